// CPU: splits the numbers of a slice over the threads; each thread takes its part of every slice.
#include "ops/dual/dual_activation.h"

#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many bytes read and written (about 25 us).
constexpr index_t kGrainBytes = index_t{1} << 18;

// Parts begin at a whole number of pages: no two threads write the same line.
constexpr index_t kUnitBytes = 4096;

}  // namespace

template <typename T>
void dual_activation_cpu(const DualActivationArgs<T>& args, int threads) {
  const SimdLevel level = simd_level();
  const index_t total = args.outer * args.channels * args.inner;
  const index_t unit = kUnitBytes / static_cast<index_t>(sizeof(T));
  const index_t grain = ceil_div(kGrainBytes, 2 * (1 + args.tangents) * kUnitBytes);
  parallel_for(ceil_div(total, unit), grain, threads, [&](index_t begin, index_t end) {
    const index_t last = std::min(total, end * unit);
    FF_CALL_SIMD(level, dual_activation_range<T>, args, begin * unit, last);
  });
}

template void dual_activation_cpu(const DualActivationArgs<float>&, int);
template void dual_activation_cpu(const DualActivationArgs<double>&, int);

}  // namespace fisherfast
