// Kernels with one planted fault each, and the same kernels without it: the harness must tell them
// apart. Every kernel adds each number of x to the one before it in the block, y_i = x_(i-1) + x_i.
#include "core/cuda/cuda.cuh"
#include "cuda_host/faults.h"

namespace cuda_host {
namespace {

using fisherfast::index_t;

constexpr unsigned kThreads = 64;

enum Planted {
  kNone,
  kNoBarrier,
  kReadsOutside,
  kSharedOutside,
  kDivergentBarrier,
  kWrongMask,
  kUnset
};

// Thread: one number, by way of dynamic shared memory. One number of shared memory a thread.
template <Planted kFault>
__global__ void neighbours_kernel(const float* x, float* y, index_t n) {
  FF_DYNAMIC_SHARED(shared);
  float* copy = reinterpret_cast<float*>(shared);
  const index_t i = fisherfast::global_thread();
  const unsigned t = threadIdx.x;
  const index_t last = kFault == kReadsOutside ? n : n - 1;
  copy[kFault == kSharedOutside ? t + 1 : t] = i <= last ? x[i] : 0.0f;
  if constexpr (kFault == kDivergentBarrier) {
    if (t < 40) {
      __syncthreads();
    } else {
      __syncthreads();
    }
  } else if constexpr (kFault != kNoBarrier) {
    __syncthreads();
  }
  if (i < n) y[i] = copy[t] + (t > 0 ? copy[t - 1] : 0.0f);
}

// The same by a shuffle inside each warp, and by static shared memory between warps.
template <Planted kFault>
__global__ void shuffled_kernel(const float* x, float* y, index_t n) {
  __shared__ float ends[kThreads / kWarp];
  const index_t i = fisherfast::global_thread();
  const unsigned t = threadIdx.x, own = t % kWarp;
  const float value = i < n ? x[i] : 0.0f;
  float before = 0.0f;
  if (kFault != kWrongMask || own < 20) before = __shfl_up_sync(0xffffffffu, value, 1);
  if (own == kWarp - 1 && kFault != kUnset) ends[t / kWarp] = value;
  __syncthreads();
  if (own == 0) before = t == 0 ? 0.0f : ends[t / kWarp - 1];
  if (i < n) y[i] = value + before;
}

template <Planted kFault>
void neighbours(const FaultArgs& args, int /*device*/, void* stream) {
  FF_LAUNCH(neighbours_kernel<kFault>,
            fisherfast::grid_x(fisherfast::ceil_div(args.rows, kThreads)), kThreads,
            kThreads * sizeof(float), stream, args.x, args.y, args.rows);
}

template <Planted kFault>
void shuffled(const FaultArgs& args, int /*device*/, void* stream) {
  FF_LAUNCH(shuffled_kernel<kFault>, fisherfast::grid_x(fisherfast::ceil_div(args.rows, kThreads)),
            kThreads, 0, stream, args.x, args.y, args.rows);
}

// Asks for more dynamic shared memory than a launch may have without cudaFuncSetAttribute.
void too_much_shared(const FaultArgs& args, int /*device*/, void* stream) {
  constexpr std::size_t kBytes = 64 << 10;
  FF_LAUNCH(neighbours_kernel<kNone>, 1, kThreads, kBytes, stream, args.x, args.y, args.rows);
}

}  // namespace

const std::map<std::string, Fault>& faults() {
  static const std::map<std::string, Fault> faults = {
      {"neighbours", neighbours<kNone>},
      {"missing_barrier", neighbours<kNoBarrier>},
      {"global_read_outside", neighbours<kReadsOutside>},
      {"shared_write_outside", neighbours<kSharedOutside>},
      {"divergent_barrier", neighbours<kDivergentBarrier>},
      {"shuffled", shuffled<kNone>},
      {"wrong_mask", shuffled<kWrongMask>},
      {"unset_shared", shuffled<kUnset>},
      {"too_much_shared", too_much_shared},
  };
  return faults;
}

}  // namespace cuda_host
