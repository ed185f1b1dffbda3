// CPU: splits the positions over the threads; no two threads write the same number.
#include "ops/moments/spatial_moments.h"

#include "core/cpu/aligned.h"
#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many multiply-adds (about 50 us).
constexpr index_t kGrainOperations = 1'000'000;

}  // namespace

template <typename T>
void spatial_moments_cpu(const SpatialMomentsArgs<T>& args, int threads) {
  const SimdLevel level = simd_level();
  const index_t lanes = simd_lanes<T>(level), C = args.channels;
  const index_t positions = args.height * args.width;
  const index_t size = spatial_moments_scratch(lanes, C, sizeof(T));
  const index_t operations = 1 + (args.rows + 8) * C * (C + 8) / 2 * lanes;
  const index_t groups = ceil_div(positions, lanes);
  const index_t grain = ceil_div(kGrainOperations, operations);
  parallel_for(groups, grain, threads, [&](index_t begin, index_t end) {
    const AlignedArray<unsigned char> scratch = aligned_array<unsigned char>(size);
    const index_t last = std::min(positions, end * lanes);
    FF_CALL_SIMD(level, spatial_moments_lanes<T>, args, begin * lanes, last, scratch.get());
  });
}

template void spatial_moments_cpu(const SpatialMomentsArgs<float>&, int);
template void spatial_moments_cpu(const SpatialMomentsArgs<double>&, int);

}  // namespace fisherfast
