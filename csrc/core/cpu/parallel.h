// Work split over threads (core/cpu/threads.h chooses the pool).
//
// The number of threads comes with every call (torch.get_num_threads() on the Python side). A
// kernel that reduces over rows splits them with `row_chunks`, which looks at the shape alone, and
// adds the parts in order: the same bits come out for any number of threads.
#pragma once

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <exception>
#include <mutex>
#include <vector>

#include "core/cpu/threads.h"
#include "core/types.h"

namespace fisherfast {

// Parts of the work for each thread: one that is late, because others use its core, takes fewer.
constexpr index_t kPartsOfAThread = 4;

// Calls body(begin, end) on disjoint ranges that cover [0, total), each of at least `grain` items,
// so that waking a thread pays. The first exception thrown by a body is thrown again here, after
// every thread has finished.
template <typename Body>
void parallel_for(index_t total, index_t grain, int threads, const Body& body) {
  if (total <= 0) return;
  const index_t useful = ceil_div(total, std::max<index_t>(grain, 1));
  const index_t workers = std::clamp<index_t>(threads, 1, useful);
  const index_t parts = workers == 1 ? 1 : std::min(useful, workers * kPartsOfAThread);
  std::vector<std::exception_ptr> errors(parts);
  std::atomic<index_t> next{0};
  run_on_threads(workers, [&]() noexcept {
    for (index_t part = next.fetch_add(1); part < parts; part = next.fetch_add(1)) {
      try {
        body(part * total / parts, (part + 1) * total / parts);
      } catch (...) {
        errors[part] = std::current_exception();
      }
    }
  });
  for (const std::exception_ptr& error : errors) {
    if (error) std::rethrow_exception(error);
  }
}

// The threads of a team, which pass through several phases of one piece of work together. Made by
// `run`; a team that is constructed is one thread.
class Team {
 public:
  index_t size() const { return size_.load(std::memory_order_relaxed); }

  // Splits [0, total) among the threads of the team: the part of `rank`.
  index_t begin(index_t total, index_t rank) const { return rank * total / size(); }
  index_t end(index_t total, index_t rank) const { return (rank + 1) * total / size(); }

  // Returns when every thread has come here. Looks for a few microseconds, then sleeps.
  void wait() {
    const index_t phase = phase_.load();
    if (waiting_.fetch_add(1) + 1 == size_) {
      waiting_.store(0);
      const std::lock_guard<std::mutex> lock(mutex_);
      phase_.store(phase + 1);
      everyone_.notify_all();
      return;
    }
    for (int look = 0; look < kLooks; ++look) {
      if (phase_.load() != phase) return;
    }
    std::unique_lock<std::mutex> lock(mutex_);
    everyone_.wait(lock, [&] { return phase_.load() != phase; });
  }

  // Calls body(team, rank) on up to `threads` threads at once; it must not throw.
  template <typename Body>
  static void run(index_t threads, const Body& body) {
    Team team;
    if (threads > 1 && borrowed_pool()) {
      run_on_threads(threads, [&]() noexcept {
        team.size_.store(borrowed_pool().size());  // each stores the same: it may be fewer
        body(team, borrowed_pool().rank());
      });
      return;
    }
    run_own(team, threads, body);
  }

 private:
  static constexpr int kLooks = 20'000;  // about 10 us

  // On threads started here: none begins before their number is known.
  template <typename Body>
  static void run_own(Team& team, index_t threads, const Body& body) {
    std::vector<std::thread> workers;
    workers.reserve(std::max<index_t>(threads - 1, 0));
    {
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
      team.size_.store(static_cast<index_t>(workers.size()) + 1);
    }
    body(team, 0);
    for (std::thread& worker : workers) worker.join();
  }

  std::mutex mutex_;
  std::condition_variable everyone_;
  std::atomic<index_t> size_{1};
  std::atomic<index_t> waiting_{0};
  std::atomic<index_t> phase_{0};
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
