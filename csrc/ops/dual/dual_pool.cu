// CUDA kernel: the place of the largest primal of each window, and the tangents from there.
#include <limits>

#include "core/cuda/cuda.cuh"
#include "ops/dual/dual_pool.h"

namespace fisherfast {
namespace {

constexpr unsigned kThreads = 256;
constexpr index_t kAhead = 4;  // tangents that are loaded before the first of them is written

template <typename T>
constexpr T kBelowAll = -std::numeric_limits<T>::infinity();

// The taps of a window that lie inside the input along one dimension: first, first + dilation, ...
struct Taps {
  index_t first, end;
};

template <typename T>
__device__ Taps taps_of(const DualPoolArgs<T>& args, int dim, index_t output) {
  const index_t dilation = args.dilation[dim];
  index_t first = output * args.stride[dim] - args.padding[dim];
  const index_t end = first + (args.kernel[dim] - 1) * dilation + 1;
  if (first < 0) first += ceil_div(-first, dilation) * dilation;
  return {first, end < args.in[dim] ? end : args.in[dim]};
}

// The largest number of a window, and its place among the outer inputs; a window of padding alone
// has the place -1.
template <typename T>
struct Best {
  T value;
  index_t place;
};

// Later numbers must be larger, or NaN: of several NaNs the last one is taken, as PyTorch does.
template <typename T>
__device__ Best<T> best_of(const DualPoolArgs<T>& args, const T* x, const Taps (&taps)[kPoolDims]) {
  Best<T> best{kBelowAll<T>, -1};
  for (index_t a = taps[0].first; a < taps[0].end; a += args.dilation[0]) {
    for (index_t b = taps[1].first; b < taps[1].end; b += args.dilation[1]) {
      const index_t line = (a * args.in[1] + b) * args.in[2];
      for (index_t c = taps[2].first; c < taps[2].end; c += args.dilation[2]) {
        const index_t place = (line + c) * args.inner;
        const T value = x[place];
        if (value > best.value || value != value || best.place < 0) best = {value, place};
      }
    }
  }
  return best;
}

// Thread: one number of the pooled primal, in turn, and of every tangent, kAhead of them on their
// way at a time. Neighbouring threads take neighbouring windows, or neighbouring channels where
// those are innermost: writes are coalesced, and reads as far as the stride allows. Moves each
// primal number once per window (again mostly from the cache), P tangents and 1 + P results for
// each window, with a comparison a tap.
template <typename T>
__global__ void __launch_bounds__(kThreads) dual_pool_kernel(DualPoolArgs<T> args) {
  const index_t area = args.in[0] * args.in[1] * args.in[2] * args.inner;
  const index_t size = args.outer * args.out[0] * args.out[1] * args.out[2] * args.inner;
  for (index_t number = global_thread(); number < size; number += global_threads()) {
    index_t rest = number / args.inner;
    const index_t within = number - rest * args.inner;
    Taps taps[kPoolDims];
#pragma unroll
    for (int dim = kPoolDims - 1; dim >= 0; --dim) {
      const index_t next = rest / args.out[dim];
      taps[dim] = taps_of(args, dim, rest - next * args.out[dim]);
      rest = next;
    }
    const index_t start = rest * area + within;
    const Best<T> best = best_of(args, args.x + start, taps);
    args.y[number] = best.value;
    const T* tangents = args.x + args.slice_stride + start + best.place;
    for (index_t begin = 0; begin < args.tangents; begin += kAhead) {
      T loaded[kAhead];
#pragma unroll
      for (index_t p = 0; p < kAhead; ++p) {
        const bool there = begin + p < args.tangents && best.place >= 0;
        loaded[p] = there ? tangents[(begin + p) * args.slice_stride] : T(0);
      }
#pragma unroll
      for (index_t p = 0; p < kAhead; ++p) {
        if (begin + p < args.tangents) args.y[(1 + begin + p) * size + number] = loaded[p];
      }
    }
  }
}

}  // namespace

template <typename T>
void dual_pool_cuda(const DualPoolArgs<T>& args, int device, void* stream) {
  const index_t size = args.outer * args.out[0] * args.out[1] * args.out[2] * args.inner;
  if (size == 0) return;
  const DeviceGuard guard(device);
  FF_LAUNCH(dual_pool_kernel<T>, grid_x(ceil_div(size, kThreads)), kThreads, 0, stream, args);
}

template void dual_pool_cuda(const DualPoolArgs<float>&, int, void*);
template void dual_pool_cuda(const DualPoolArgs<double>&, int, void*);

}  // namespace fisherfast
