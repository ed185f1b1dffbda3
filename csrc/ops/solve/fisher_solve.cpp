// CPU: chooses the way and the instruction set, and splits the systems over the threads.
#include "ops/solve/fisher_solve.h"

#include "core/cpu/aligned.h"
#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many multiply-adds (about 50 us).
constexpr index_t kGrainOperations = 1'000'000;

// Largest d for a system a lane: above it the factors of a whole group (1 MiB at d = 180 and 64
// bytes a vector) leave the second-level cache. Measured: 2 times faster than blocks at d = 192, as
// fast at 256.
constexpr index_t kLargestLaneDim = 192;

// Fewer systems than threads: from this d on the threads share each system, two waits for every 16
// to 32 columns, and every thread has at least kColumnsOfAThread columns.
constexpr index_t kSmallestSharedDim = 512;
constexpr index_t kColumnsOfAThread = 128;

// Whether the systems go a lane each. Looks at the shape alone, never at the threads: same bits.
template <typename T>
bool one_system_a_lane(const FisherSolveArgs<T>& args, index_t lanes) {
  return args.inverse_rows == nullptr && args.dim <= kLargestLaneDim && 2 * args.batch > lanes;
}

}  // namespace

template <typename T>
void fisher_solve_cpu(const FisherSolveArgs<T>& args, int threads) {
  const SimdLevel level = simd_level();
  const index_t d = args.dim, P = args.params;
  const index_t lanes = simd_lanes<T>(level);
  const T tolerance = pivot_tolerance<T>(d);
  const index_t operations = 1 + d * (d * (d / 6 + P) + 16);
  const index_t grain = ceil_div(kGrainOperations, operations);
  if (one_system_a_lane(args, lanes)) {
    // whole groups per thread: a system has the same neighbours for any number of threads
    const index_t groups = ceil_div(args.batch, lanes);
    const index_t size = fisher_solve_lanes_scratch(lanes, d, P);
    parallel_for(groups, ceil_div(grain, lanes), threads, [&](index_t begin, index_t end) {
      const AlignedArray<T> scratch = aligned_array<T>(size);
      const index_t last = std::min(args.batch, end * lanes);
      FF_CALL_SIMD(level, fisher_solve_lanes<T>, args, begin * lanes, last, tolerance,
                   scratch.get());
    });
    return;
  }
  const index_t size = fisher_solve_blocked_scratch(lanes, d, P, args.inverse_rows != nullptr);
  if (args.batch < threads && d >= kSmallestSharedDim) {
    const AlignedArray<T> scratch = aligned_array<T>(size);
    const index_t most = std::max<index_t>(d / kColumnsOfAThread, 1);
    Team::run(std::min<index_t>(threads, most), [&](Team& team, index_t rank) {
      const TeamMember member{rank, team.size(), &team,
                              [](void* shared) { static_cast<Team*>(shared)->wait(); }};
      FF_CALL_SIMD(level, fisher_solve_blocked<T>, args, 0, args.batch, tolerance, scratch.get(),
                   member);
    });
    return;
  }
  parallel_for(args.batch, grain, threads, [&](index_t begin, index_t end) {
    const AlignedArray<T> scratch = aligned_array<T>(size);
    const TeamMember alone{0, 1, nullptr, nullptr};
    FF_CALL_SIMD(level, fisher_solve_blocked<T>, args, begin, end, tolerance, scratch.get(), alone);
  });
}

template void fisher_solve_cpu(const FisherSolveArgs<float>&, int);
template void fisher_solve_cpu(const FisherSolveArgs<double>&, int);

}  // namespace fisherfast
