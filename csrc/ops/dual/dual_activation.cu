// CUDA kernel: value and derivative once for each primal number, the tangents streamed past them.
#include "core/cuda/activation_math.h"
#include "core/cuda/cuda.cuh"
#include "core/cuda/vector.cuh"
#include "ops/dual/dual_activation.h"

namespace fisherfast {
namespace {

constexpr unsigned kThreads = 256;
constexpr index_t kAhead = 4;  // tangents that are loaded before the first of them is written

// The channels of neighbours in a slice [outer, C, inner], one after another.
class Channels {
 public:
  __device__ Channels(index_t number, index_t channels, index_t inner)
      : channels_(channels), inner_(inner) {
    const index_t line = number / inner;
    channel_ = line % channels;
    left_ = inner - (number - line * inner);
  }
  __device__ index_t channel() const { return channel_; }
  __device__ void next() {
    if (--left_ > 0) return;
    left_ = inner_;
    if (++channel_ == channels_) channel_ = 0;
  }

 private:
  index_t channels_, inner_, channel_, left_;  // left_: neighbours in this channel
};

// f at each entry of z: z becomes the value, `factor` is multiplied by the derivative.
template <typename T, typename Function>
__device__ void apply(Numbers<T>& z, Numbers<T>& factor, Function f) {
#pragma unroll
  for (int e = 0; e < kVectorCount<T>; ++e) {
    const ValueAndSlope<T> result = f(z.entry[e]);
    z.entry[e] = result.value;
    factor.entry[e] *= result.slope;
  }
}

// All threads of a launch take the same branch.
template <typename T>
__device__ void activate(const DualActivationArgs<T>& args, Numbers<T>& z, Numbers<T>& factor) {
  const T a = args.a, b = args.b, c = args.c;
  switch (args.kind) {
    case Activation::kIdentity:
    case Activation::kPrelu:  // needs the channel: done by the caller
      return;
    case Activation::kRelu:
      return apply(z, factor, [](T u) { return relu(u); });
    case Activation::kLeakyRelu:
      return apply(z, factor, [=](T u) { return leaky_relu(u, a); });
    case Activation::kHardtanh:
      return apply(z, factor, [=](T u) { return hardtanh(u, a, b); });
    case Activation::kElu:
      return apply(z, factor, [=](T u) { return elu(u, a, b, c); });
    case Activation::kGelu:
      return apply(z, factor, [](T u) { return gelu(u); });
    case Activation::kGeluTanh:
      return apply(z, factor, [](T u) { return gelu_tanh(u); });
    case Activation::kSilu:
      return apply(z, factor, [](T u) { return silu(u); });
    case Activation::kMish:
      return apply(z, factor, [](T u) { return mish(u); });
    case Activation::kSoftplus:
      return apply(z, factor, [=](T u) { return softplus(u, a, b); });
    case Activation::kSigmoid:
      return apply(z, factor, [](T u) { return sigmoid(u); });
    case Activation::kTanh:
      return apply(z, factor, [](T u) { return hyperbolic_tangent(u); });
    case Activation::kHardswish:
      return apply(z, factor, [](T u) { return hardswish(u); });
    case Activation::kHardsigmoid:
      return apply(z, factor, [](T u) { return hardsigmoid(u); });
  }
}

// Scale, shift and slope of the channels: z becomes scale_c z + shift_c, then the value of a PReLU
// where there are slopes; factor becomes scale_c times its derivative.
template <typename T>
__device__ void apply_channels(const DualActivationArgs<T>& args, index_t first, index_t valid,
                               Numbers<T>& z, Numbers<T>& factor) {
  Channels channels(first, args.channels, args.inner);
#pragma unroll
  for (int e = 0; e < kVectorCount<T>; ++e) {
    if (e >= valid) return;
    const index_t c = channels.channel();
    channels.next();
    const T scale = args.scale != nullptr ? args.scale[c] : T(1);
    const T shift = args.shift != nullptr ? args.shift[c] : T(0);
    z.entry[e] = scale * z.entry[e] + shift;
    factor.entry[e] = scale;
    if (args.slope == nullptr) continue;
    const ValueAndSlope<T> result = leaky_relu(z.entry[e], args.slope[c]);
    z.entry[e] = result.value;
    factor.entry[e] *= result.slope;
  }
}

// Thread: 16 bytes of neighbours of the primal and of every tangent, in turn; f and f' once for
// each neighbour, kAhead tangents on their way at a time. Reads and writes are coalesced, 16 bytes
// a thread where aligned; moves 2 (1 + P) numbers for each primal number. A thread reads what it
// writes and nothing else, so that y may be x.
template <typename T>
__global__ void __launch_bounds__(kThreads) dual_activation_kernel(DualActivationArgs<T> args) {
  constexpr int kCount = kVectorCount<T>;
  const index_t size = args.outer * args.channels * args.inner;
  const bool by_channel = args.scale != nullptr || args.shift != nullptr || args.slope != nullptr;
  for (index_t first = global_thread() * kCount; first < size; first += global_threads() * kCount) {
    const index_t valid = size - first;
    Numbers<T> z = load_vector<kCount>(args.x + first, valid), factor;
#pragma unroll
    for (int e = 0; e < kCount; ++e) factor.entry[e] = T(1);
    if (by_channel) apply_channels(args, first, valid, z, factor);
    activate(args, z, factor);
    store_vector(args.y + first, valid, z);
    const T* tangents = args.x + args.slice_stride + first;
    T* results = args.y + args.output_stride + first;
    for (index_t begin = 0; begin < args.tangents; begin += kAhead) {
      Numbers<T> loaded[kAhead];
#pragma unroll
      for (index_t p = 0; p < kAhead; ++p) {
        if (begin + p >= args.tangents) break;
        loaded[p] = load_vector<kCount>(tangents + (begin + p) * args.slice_stride, valid);
      }
#pragma unroll
      for (index_t p = 0; p < kAhead; ++p) {
        if (begin + p >= args.tangents) break;
#pragma unroll
        for (int e = 0; e < kCount; ++e) loaded[p].entry[e] *= factor.entry[e];
        store_vector(results + (begin + p) * args.output_stride, valid, loaded[p]);
      }
    }
  }
}

}  // namespace

template <typename T>
void dual_activation_cuda(const DualActivationArgs<T>& args, int device, void* stream) {
  const index_t size = args.outer * args.channels * args.inner;
  if (size == 0) return;
  const DeviceGuard guard(device);
  const index_t blocks = ceil_div(ceil_div(size, kVectorCount<T>), kThreads);
  FF_LAUNCH(dual_activation_kernel<T>, grid_x(blocks), kThreads, 0, stream, args);
}

template void dual_activation_cuda(const DualActivationArgs<float>&, int, void*);
template void dual_activation_cuda(const DualActivationArgs<double>&, int, void*);

}  // namespace fisherfast
