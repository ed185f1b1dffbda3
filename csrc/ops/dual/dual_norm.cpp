// CPU: splits the rows over the threads; no two threads write the same number.
#include "ops/dual/dual_norm.h"

#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many numbers (about 50 us).
constexpr index_t kGrainNumbers = 65'536;

}  // namespace

template <typename T>
void dual_norm_cpu(const DualNormArgs<T>& args, int threads) {
  if (args.width == 0) return;
  const SimdLevel level = simd_level();
  const index_t grain = ceil_div(kGrainNumbers, (1 + args.tangents) * args.width);
  parallel_for(args.rows, grain, threads, [&](index_t begin, index_t end) {
    FF_CALL_SIMD(level, dual_norm_rows<T>, args, begin, end);
  });
}

template void dual_norm_cpu(const DualNormArgs<float>&, int);
template void dual_norm_cpu(const DualNormArgs<double>&, int);

}  // namespace fisherfast
