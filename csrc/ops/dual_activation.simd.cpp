// An activation on a range of the numbers of every slice.
//
// A block of primal numbers is read once: value out, slope f'(z) scale into a buffer that stays in
// the first cache. The tangents of the block then stream past it.
#include "ops/dual_activation.h"

#include "core/simd_math.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

template <typename T>
inline constexpr index_t kBlock = 8192 / sizeof(T);

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

// Scale, shift and slope below zero for each number of a block.
template <typename T>
struct Coefficients {
  alignas(64) T scale[kBlock<T>] = {};
  alignas(64) T shift[kBlock<T>] = {};
  alignas(64) T negative[kBlock<T>] = {};

  void fill(const DualActivationArgs<T>& args, index_t first, index_t count) {
    if (args.scale != nullptr || args.shift != nullptr) {
      spread(args, args.scale, T(1), first, count, scale);
      spread(args, args.shift, T(0), first, count, shift);
    }
    if (args.slope != nullptr) spread(args, args.slope, T(0), first, count, negative);
  }
};

// Value and slope of `count` numbers; `slopes` has room for whole vectors.
template <typename T, bool affine, bool by_channel, typename F>
FF_INLINE void primal_block(const F& f, const Coefficients<T>* coefficients, const T* x, T* y,
                            T* slopes, index_t count) {
  constexpr index_t W = kLanes<T>;
  const auto evaluate = [&](Vec<T> z, index_t i) {
    Vec<T> scale = splat(T(1)), negative = Vec<T>{};
    if constexpr (affine) {
      scale = load(coefficients->scale + i);
      z = z * scale + load(coefficients->shift + i);
    }
    if constexpr (by_channel) negative = load(coefficients->negative + i);
    ValueAndSlope<T> result = f(z, negative);
    if constexpr (affine) result.slope *= scale;
    return result;
  };
  index_t i = 0;
  for (; i + W <= count; i += W) {
    const ValueAndSlope<T> result = evaluate(load(x + i), i);
    store(y + i, result.value);
    store(slopes + i, result.slope);
  }
  if (i == count) return;
  alignas(64) T rest[W] = {};
  for (index_t k = i; k < count; ++k) rest[k - i] = x[k];
  const ValueAndSlope<T> result = evaluate(load(rest), i);
  store(slopes + i, result.slope);
  store(rest, result.value);
  for (index_t k = i; k < count; ++k) y[k] = rest[k - i];
}

template <typename T>
FF_INLINE void tangent_block(const T* x, T* y, const T* slopes, index_t count) {
  constexpr index_t W = kLanes<T>;
  index_t i = 0;
  for (; i + W <= count; i += W) store(y + i, load(slopes + i) * load(x + i));
  for (; i < count; ++i) y[i] = slopes[i] * x[i];
}

template <typename T, bool affine, bool by_channel, typename F>
void run(const DualActivationArgs<T>& args, const F& f, index_t begin, index_t end,
         Coefficients<T>* coefficients) {
  alignas(64) T slopes[kBlock<T>];
  for (index_t first = begin; first < end; first += kBlock<T>) {
    const index_t count = end - first < kBlock<T> ? end - first : kBlock<T>;
    if constexpr (affine || by_channel) coefficients->fill(args, first, count);
    primal_block<T, affine, by_channel>(f, coefficients, args.x + first, args.y + first, slopes,
                                        count);
    for (index_t p = 1; p <= args.tangents; ++p) {
      tangent_block(args.x + p * args.slice_stride + first, args.y + p * args.output_stride + first,
                    slopes, count);
    }
  }
}

template <typename T, template <typename> typename F>
void apply(const DualActivationArgs<T>& args, index_t begin, index_t end) {
  constexpr bool by_channel = std::is_same_v<F<T>, Prelu<T>>;
  const F<T> f(args);
  const bool affine = args.scale != nullptr || args.shift != nullptr;
  if (!affine && !by_channel) return run<T, false, false>(args, f, begin, end, nullptr);
  Coefficients<T> coefficients;
  if (affine) return run<T, true, by_channel>(args, f, begin, end, &coefficients);
  run<T, false, by_channel>(args, f, begin, end, &coefficients);
}

}  // namespace

template <typename T>
void dual_activation_range(const DualActivationArgs<T>& args, index_t begin, index_t end) {
  switch (args.kind) {
    case Activation::kIdentity:
      return apply<T, Identity>(args, begin, end);
    case Activation::kRelu:
      return apply<T, Relu>(args, begin, end);
    case Activation::kLeakyRelu:
      return apply<T, LeakyRelu>(args, begin, end);
    case Activation::kPrelu:
      return apply<T, Prelu>(args, begin, end);
    case Activation::kHardtanh:
      return apply<T, Hardtanh>(args, begin, end);
    case Activation::kElu:
      return apply<T, Elu>(args, begin, end);
    case Activation::kGelu:
      return apply<T, Gelu>(args, begin, end);
    case Activation::kGeluTanh:
      return apply<T, GeluTanh>(args, begin, end);
    case Activation::kSilu:
      return apply<T, Silu>(args, begin, end);
    case Activation::kMish:
      return apply<T, Mish>(args, begin, end);
    case Activation::kSoftplus:
      return apply<T, Softplus>(args, begin, end);
    case Activation::kSigmoid:
      return apply<T, Sigmoid>(args, begin, end);
    case Activation::kTanh:
      return apply<T, Tanh>(args, begin, end);
    case Activation::kHardswish:
      return apply<T, Hardswish>(args, begin, end);
    case Activation::kHardsigmoid:
      return apply<T, Hardsigmoid>(args, begin, end);
  }
}

template void dual_activation_range(const DualActivationArgs<float>&, index_t, index_t);
template void dual_activation_range(const DualActivationArgs<double>&, index_t, index_t);

}  // namespace fisherfast::FF_SIMD_NAMESPACE
