// Threads for the CPU kernels.
//
// The number of threads comes with every call (torch.get_num_threads() on the Python side); no pool
// is kept, so a fork is safe and the thread settings of torch are never touched. Work is split
// statically. A kernel that reduces over rows splits them with `row_chunks`, which looks at the
// shape alone, and adds the parts in order: the same bits come out for any number of threads.
#pragma once

#include <algorithm>
#include <condition_variable>
#include <exception>
#include <mutex>
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

// The threads of a team, which pass through several phases of one piece of work together. Made by
// `run`; a team that is constructed is one thread.
class Team {
 public:
  index_t size() const { return size_; }

  // Splits [0, total) among the threads of the team: the part of `rank`.
  index_t begin(index_t total, index_t rank) const { return rank * total / size_; }
  index_t end(index_t total, index_t rank) const { return (rank + 1) * total / size_; }

  // Returns when every thread has come here.
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    const index_t phase = phase_;
    if (++waiting_ == size_) {
      waiting_ = 0;
      ++phase_;
      everyone_.notify_all();
    } else {
      everyone_.wait(lock, [&] { return phase_ != phase; });
    }
  }

  // Calls body(team, rank) on up to `threads` threads at once; it must not throw.
  template <typename Body>
  static void run(index_t threads, const Body& body) {
    Team team;
    std::vector<std::thread> workers;
    workers.reserve(std::max<index_t>(threads - 1, 0));
    {
      // nobody starts before the number of threads is known: the system may have too few
      const std::lock_guard<std::mutex> hold(team.mutex_);
      try {
        for (index_t rank = 1; rank < threads; ++rank) {
          workers.emplace_back([&team, &body, rank]() noexcept {
            {
              const std::lock_guard<std::mutex> started(team.mutex_);
            }
            body(team, rank);
          });
        }
      } catch (const std::system_error&) {
      }
      team.size_ = static_cast<index_t>(workers.size()) + 1;
    }
    body(team, 0);
    for (std::thread& worker : workers) worker.join();
  }

 private:
  std::mutex mutex_;
  std::condition_variable everyone_;
  index_t size_ = 1;
  index_t waiting_ = 0;
  index_t phase_ = 0;
};

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
