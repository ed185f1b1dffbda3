// CPU: splits the rows over the threads; no two threads write the same number.
#include "ops/dual/dual_softmax.h"

#include <algorithm>

#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many numbers (about 50 us).
constexpr index_t kGrainNumbers = 65'536;

}  // namespace

template <typename T>
void dual_softmax_cpu(const DualSoftmaxArgs<T>& args, int threads) {
  if (args.width == 0 || args.inner == 0) return;
  const SimdLevel level = simd_level();
  const index_t rows = std::min(args.inner, simd_lanes<T>(level));  // of a group
  const index_t grain = ceil_div(kGrainNumbers, (1 + args.tangents) * args.width * rows);
  const index_t groups = args.outer * ceil_div(args.inner, rows);
  parallel_for(groups, grain, threads, [&](index_t begin, index_t end) {
    FF_CALL_SIMD(level, dual_softmax_groups<T>, args, begin, end);
  });
}

template void dual_softmax_cpu(const DualSoftmaxArgs<float>&, int);
template void dual_softmax_cpu(const DualSoftmaxArgs<double>&, int);

}  // namespace fisherfast
