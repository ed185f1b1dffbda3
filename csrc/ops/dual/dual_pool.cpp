// CPU: splits the rows of windows over the threads; no two threads write the same number.
#include "ops/dual/dual_pool.h"

#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many numbers that are read (about 50 us).
constexpr index_t kGrainNumbers = 131'072;

}  // namespace

template <typename T>
void dual_pool_cpu(const DualPoolArgs<T>& args, int threads) {
  const index_t numbers = (1 + args.tangents) * args.out[2] * args.inner * args.kernel[0] *
                          args.kernel[1] * args.kernel[2];
  if (numbers == 0) return;
  const SimdLevel level = simd_level();
  const index_t rows = args.outer * args.out[0] * args.out[1];
  parallel_for(rows, ceil_div(kGrainNumbers, numbers), threads, [&](index_t begin, index_t end) {
    FF_CALL_SIMD(level, dual_pool_rows<T>, args, begin, end);
  });
}

template void dual_pool_cpu(const DualPoolArgs<float>&, int);
template void dual_pool_cpu(const DualPoolArgs<double>&, int);

}  // namespace fisherfast
