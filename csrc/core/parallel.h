// Threads for the CPU kernels.
//
// The number of threads comes with every call (torch.get_num_threads() on the Python side); no pool
// is kept, so a fork is safe and the thread settings of torch are never touched. Work is split
// statically. A kernel that reduces over rows splits them with `row_chunks`, which looks at the
// shape alone, and adds the parts in order: the same bits come out for any number of threads.
#pragma once

#include <algorithm>
#include <exception>
#include <system_error>
#include <thread>
#include <vector>

#include "core/types.h"

namespace fisherfast {

// Calls body(begin, end) on disjoint ranges that cover [0, total), one range a thread. A thread
// gets at least `grain` items, so that starting it (about 20 us) pays. The first exception thrown
// by a body is thrown again here, after every thread has finished.
template <typename Body>
void parallel_for(index_t total, index_t grain, int threads, const Body& body) {
  if (total <= 0) return;
  const index_t useful = ceil_div(total, std::max<index_t>(grain, 1));
  const index_t parts = std::clamp<index_t>(threads, 1, useful);
  std::vector<std::exception_ptr> errors(parts);
  const auto run = [&](index_t part) noexcept {
    try {
      body(part * total / parts, (part + 1) * total / parts);
    } catch (...) {
      errors[part] = std::current_exception();
    }
  };

  std::vector<std::thread> workers;
  workers.reserve(parts - 1);
  for (index_t part = 1; part < parts; ++part) {
    try {
      workers.emplace_back(run, part);
    } catch (const std::system_error&) {
      run(part);  // the system has no thread left: do the work here
    }
  }
  run(0);
  for (std::thread& worker : workers) worker.join();
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// A split of rows into chunks of `size` rows (the last may be shorter).
struct RowChunks {
  index_t rows;
  index_t size;
  index_t count;

  index_t begin(index_t chunk) const { return chunk * size; }
  index_t end(index_t chunk) const { return std::min(rows, (chunk + 1) * size); }
};

// Splits rows for a reduction whose chunks need `scratch` doubles each.
inline RowChunks row_chunks(index_t rows, index_t scratch) {
  constexpr index_t kMinRows = 1024;                 // less does not pay for a partial result
  constexpr index_t kMaxChunks = 64;                 // enough for the threads of one machine
  constexpr index_t kMaxScratch = index_t{8} << 20;  // doubles: 64 MiB of partial results
  const index_t affordable = kMaxScratch / std::max<index_t>(scratch, 1);
  const index_t most = std::clamp<index_t>(affordable, 1, kMaxChunks);
  const index_t size = std::max(kMinRows, ceil_div(rows, most));
  return {rows, size, ceil_div(rows, size)};
}

}  // namespace fisherfast
