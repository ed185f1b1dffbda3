// An activation on a range of the numbers of every slice.
//
// A block of primal numbers is read once: value out, slope f'(z) scale into a buffer that stays in
// the first cache. The tangents of the block then stream past it.
#include "ops/dual/dual_activation.h"

#include "core/simd/simd_math.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

// Five such buffers and the slices that pass by share 32 KiB of first cache.
template <typename T>
inline constexpr index_t kBlock = 2048 / sizeof(T);

// f(z) and f'(z).
template <typename T>
struct ValueAndSlope {
  Vec<T> value, slope;
};

// --- the activations -----------------------------------------------------------------------------
// Made of the arguments of the op; called with z and, of use to PReLU alone, the slope below zero.

template <typename T>
struct Identity {
  explicit Identity(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const { return {z, splat(T(1))}; }
};

template <typename T>
struct Relu {
  explicit Relu(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Mask<T> off = z <= T(0);  // NaN is on, as in torch
    return {off ? Vec<T>{} : z, off ? Vec<T>{} : splat(T(1))};
  }
};

template <typename T>
struct LeakyRelu {
  T negative;
  explicit LeakyRelu(const DualActivationArgs<T>& args) : negative(args.a) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Vec<T> slope = z > T(0) ? splat(T(1)) : splat(negative);
    return {z * slope, slope};
  }
};

template <typename T>
struct Prelu {
  explicit Prelu(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T> negative) const {
    const Vec<T> slope = z > T(0) ? splat(T(1)) : negative;
    return {z * slope, slope};
  }
};

template <typename T>
struct Hardtanh {
  T low, high;
  explicit Hardtanh(const DualActivationArgs<T>& args) : low(args.a), high(args.b) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Mask<T> inside = (z > low) & (z < high);
    return {clamp<T>(z, low, high), inside ? splat(T(1)) : Vec<T>{}};
  }
};

template <typename T>
struct Elu {
  T alpha, scale, input_scale;
  explicit Elu(const DualActivationArgs<T>& args)
      : alpha(args.a), scale(args.b), input_scale(args.c) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Exponential<T> below = exponential<T>(input_scale * z);
    const Mask<T> linear = z > T(0);
    return {linear ? scale * z : scale * alpha * below.expm1,
            linear ? splat(scale) : scale * alpha * input_scale * below.exp};
  }
};

template <typename T>
struct Gelu {
  explicit Gelu(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Normal<T> n = normal<T>(z);
    return {z * n.below, n.below + z * n.density};
  }
};

// 0.5 (1 + tanh(u)) = 1 / (1 + exp(-2 u)),   2 u = sqrt(8 / pi) (z + 0.044715 z^3)
template <typename T>
struct GeluTanh {
  explicit GeluTanh(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    constexpr T kLinear = static_cast<T>(1.5957691216057308);
    constexpr T kCubic = static_cast<T>(1.5957691216057308 * 0.044715);
    constexpr T kFlat = 25;  // the function is constant or linear there, and u^3 finite
    const Vec<T> bounded = clamp<T>(z, -kFlat, kFlat), square = bounded * bounded;
    const Logistic<T> gate = logistic<T>(bounded * (kLinear + kCubic * square));
    const Vec<T> inner = kLinear + T(3) * kCubic * square;
    return {z * gate.value, gate.value + z * gate.slope * inner};
  }
};

template <typename T>
struct Silu {
  explicit Silu(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Logistic<T> gate = logistic<T>(z);
    return {z * gate.value, gate.value * (T(1) + z * gate.opposite)};
  }
};

// tanh(log(1 + exp(z))) = (w - 1) / (w + 1),   w = (1 + exp(z))^2; with e = exp(-|z|)
//   z < 0:   e (e + 2) / (e (e + 2) + 2)         z >= 0:   (1 + 2 e) / (1 + 2 e + 2 e^2)
template <typename T>
struct Mish {
  explicit Mish(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Vec<T> e = exponential<T>(-absolute<T>(z)).exp;
    const Mask<T> negative = z < T(0);
    const Vec<T> above = negative ? e * (e + T(2)) : T(2) * e + T(1);
    const Vec<T> missing = negative ? splat(T(2)) : T(2) * e * e;  // 1 - tanh, times the divisor
    const Vec<T> inverse = T(1) / (above + missing), gate = above * inverse;
    const Vec<T> sigmoid = (negative ? e : splat(T(1))) / (e + T(1));
    const Vec<T> slope = missing * inverse * (T(1) + gate);  // 1 - tanh^2
    return {z * gate, gate + z * (sigmoid * slope)};
  }
};

template <typename T>
struct Softplus {
  T beta, threshold;
  explicit Softplus(const DualActivationArgs<T>& args) : beta(args.a), threshold(args.b) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Vec<T> u = beta * z;
    const Mask<T> linear = u > threshold, positive = u > T(0);
    const Vec<T> e = exponential<T>(-absolute<T>(u)).exp;
    const Vec<T> log = (positive ? u : Vec<T>{}) + log1p_unit<T>(e);
    const Vec<T> sigmoid = (positive ? splat(T(1)) : e) / (e + T(1));
    return {linear ? z : log / beta, linear ? splat(T(1)) : sigmoid};
  }
};

template <typename T>
struct Sigmoid {
  explicit Sigmoid(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Logistic<T> gate = logistic<T>(z);
    return {gate.value, gate.slope};
  }
};

// (1 - e) / (1 + e) and 4 e / (1 + e)^2,   e = exp(-2 |z|)
template <typename T>
struct Tanh {
  explicit Tanh(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Exponential<T> e = exponential<T>(T(-2) * absolute<T>(z));
    const Vec<T> inverse = T(1) / (e.exp + T(1));
    return {with_sign_of<T>(e.expm1 * inverse, z), T(4) * e.exp * inverse * inverse};
  }
};

constexpr int kHardThree = 3, kHardSix = 6;

template <typename T>
struct Hardswish {
  explicit Hardswish(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Vec<T> gate = clamp<T>(z + T(kHardThree), 0, kHardSix) / T(kHardSix);
    const Vec<T> middle = z / T(kHardThree) + T(0.5);
    const Vec<T> upper = z >= T(kHardThree) ? splat(T(1)) : middle;
    return {z * gate, z <= T(-kHardThree) ? Vec<T>{} : upper};
  }
};

template <typename T>
struct Hardsigmoid {
  explicit Hardsigmoid(const DualActivationArgs<T>&) {}
  FF_INLINE ValueAndSlope<T> operator()(Vec<T> z, Vec<T>) const {
    const Mask<T> inside = (z > T(-kHardThree)) & (z < T(kHardThree));
    return {clamp<T>(z + T(kHardThree), 0, kHardSix) / T(kHardSix),
            inside ? splat(T(1) / T(kHardSix)) : Vec<T>{}};
  }
};

// --- blocks --------------------------------------------------------------------------------------

// The entries of a vector [C] for numbers first, first + 1, ... of a slice.
template <typename T>
void spread(const DualActivationArgs<T>& args, const T* vector, T otherwise, index_t first,
            index_t count, T* out) {
  if (vector == nullptr) {
    for (index_t i = 0; i < count; ++i) out[i] = otherwise;
    return;
  }
  index_t channel = first / args.inner % args.channels;
  if (args.inner == 1) {
    for (index_t i = 0; i < count; channel = 0) {
      const index_t left = args.channels - channel;
      const index_t run = left < count - i ? left : count - i;
      for (index_t k = 0; k < run; ++k) out[i + k] = vector[channel + k];
      i += run;
    }
    return;
  }
  index_t left = args.inner - first % args.inner;
  for (index_t i = 0; i < count; left = args.inner) {
    const index_t run = left < count - i ? left : count - i;
    const T value = vector[channel];
    for (index_t k = 0; k < run; ++k) out[i + k] = value;
    i += run;
    channel = channel + 1 < args.channels ? channel + 1 : 0;
  }
}

// Results for a block of primal numbers, computed by whole vectors: lanes after the last number
// hold leftovers.
template <typename T>
struct Block {
  alignas(64) T value[kBlock<T>] = {};  // first z, then f(z)
  alignas(64) T slope[kBlock<T>] = {};  // f'(z) scale
  alignas(64) T scale[kBlock<T>] = {};
  alignas(64) T shift[kBlock<T>] = {};
  alignas(64) T negative[kBlock<T>] = {};  // the slope below zero of PReLU
};

template <typename T, typename Step>
FF_INLINE void for_vectors(index_t count, const Step& step) {
  for (index_t i = 0; i < count; i += kLanes<T>) step(i);
}

// z of numbers first, first + 1, ... of the primal.
template <typename T>
void read_primal(const DualActivationArgs<T>& args, index_t first, index_t count, bool affine,
                 Block<T>& block) {
  const T* const x = args.x + first;
  index_t i = 0;
  for (; i + kLanes<T> <= count; i += kLanes<T>) store(block.value + i, load(x + i));
  for (; i < count; ++i) block.value[i] = x[i];
  if (args.slope != nullptr) spread(args, args.slope, T(0), first, count, block.negative);
  if (!affine) return;
  spread(args, args.scale, T(1), first, count, block.scale);
  spread(args, args.shift, T(0), first, count, block.shift);
  for_vectors<T>(count, [&](index_t k) {
    store(block.value + k, load(block.value + k) * load(block.scale + k) + load(block.shift + k));
  });
}

template <template <typename> typename F, typename T>
void evaluate(const DualActivationArgs<T>& args, index_t count, Block<T>& block) {
  const F<T> f(args);
  for_vectors<T>(count, [&](index_t i) {
    Vec<T> negative{};
    if constexpr (std::is_same_v<F<T>, Prelu<T>>) negative = load(block.negative + i);
    const ValueAndSlope<T> result = f(load(block.value + i), negative);
    store(block.value + i, result.value);
    store(block.slope + i, result.slope);
  });
}

template <typename T>
void evaluate_kind(const DualActivationArgs<T>& args, index_t count, Block<T>& block) {
  switch (args.kind) {
    case Activation::kIdentity:
      return evaluate<Identity>(args, count, block);
    case Activation::kRelu:
      return evaluate<Relu>(args, count, block);
    case Activation::kLeakyRelu:
      return evaluate<LeakyRelu>(args, count, block);
    case Activation::kPrelu:
      return evaluate<Prelu>(args, count, block);
    case Activation::kHardtanh:
      return evaluate<Hardtanh>(args, count, block);
    case Activation::kElu:
      return evaluate<Elu>(args, count, block);
    case Activation::kGelu:
      return evaluate<Gelu>(args, count, block);
    case Activation::kGeluTanh:
      return evaluate<GeluTanh>(args, count, block);
    case Activation::kSilu:
      return evaluate<Silu>(args, count, block);
    case Activation::kMish:
      return evaluate<Mish>(args, count, block);
    case Activation::kSoftplus:
      return evaluate<Softplus>(args, count, block);
    case Activation::kSigmoid:
      return evaluate<Sigmoid>(args, count, block);
    case Activation::kTanh:
      return evaluate<Tanh>(args, count, block);
    case Activation::kHardswish:
      return evaluate<Hardswish>(args, count, block);
    case Activation::kHardsigmoid:
      return evaluate<Hardsigmoid>(args, count, block);
  }
}

// Writes number(i) for i < count, whole vectors from whole(i); past the caches with `stream`.
template <typename T, typename Whole, typename Number>
FF_INLINE void write(T* y, index_t count, bool stream, const Whole& whole, const Number& number) {
  constexpr index_t W = kLanes<T>;
  index_t i = 0;
  if (stream) {
    for (const index_t before = numbers_to_boundary(y); i < before && i < count; ++i) {
      y[i] = number(i);
    }
    for (; i + W <= count; i += W) store_stream(y + i, whole(i));
  } else {
    for (; i + W <= count; i += W) store(y + i, whole(i));
  }
  for (; i < count; ++i) y[i] = number(i);
}

// Streaming stores pay for results beyond the caches: relu and gelu on 42 MB took 0.54 and 0.58 of
// the time (two cores, 32 MiB of shared cache). Half of that cache is the bound: what is smaller
// may still be there for the next reader. In place the lines are in the cache anyway.
constexpr index_t kStreamBytes = index_t{16} << 20;

template <typename T>
FF_INLINE bool streams(const DualActivationArgs<T>& args) {
  const index_t numbers = args.outer * args.channels * args.inner * (1 + args.tangents);
  return args.x != args.y && numbers * static_cast<index_t>(sizeof(T)) >= kStreamBytes;
}

}  // namespace

template <typename T>
void dual_activation_range(const DualActivationArgs<T>& args, index_t begin, index_t end) {
  const bool affine = args.scale != nullptr || args.shift != nullptr, stream = streams(args);
  Block<T> block;
  for (index_t first = begin; first < end; first += kBlock<T>) {
    const index_t count = end - first < kBlock<T> ? end - first : kBlock<T>;
    read_primal(args, first, count, affine, block);
    evaluate_kind(args, count, block);
    if (affine) {
      for_vectors<T>(count, [&](index_t i) {
        store(block.slope + i, load(block.slope + i) * load(block.scale + i));
      });
    }
    write(
        args.y + first, count, stream, [&](index_t i) { return load(block.value + i); },
        [&](index_t i) { return block.value[i]; });
    for (index_t p = 1; p <= args.tangents; ++p) {
      const T* const x = args.x + p * args.slice_stride + first;
      write(
          args.y + p * args.output_stride + first, count, stream,
          [&](index_t i) { return load(block.slope + i) * load(x + i); },
          [&](index_t i) { return block.slope[i] * x[i]; });
    }
  }
  if (stream) finish_streams();
}

template void dual_activation_range(const DualActivationArgs<float>&, index_t, index_t);
template void dual_activation_range(const DualActivationArgs<double>&, index_t, index_t);

}  // namespace fisherfast::FF_SIMD_NAMESPACE
