// Exponential functions of vectors. For the sources that are compiled once per instruction set.
//
// Errors are at most a few units in the last place, for every input that is finite (measured: see
// tests/ops/test_dual_activation.py). NaN stays NaN, exp underflows through the denormal numbers to
// 0 and overflows to infinity. The polynomials interpolate at Chebyshev nodes; their own error,
// relative to the function, is stated next to them.
#pragma once

#include "core/simd/simd.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

// Unsigned integers of the width of T: they wrap, and hold the bits of a number.
template <typename T>
struct BitsOf {
  using Integer = std::conditional_t<sizeof(T) == 4, std::uint32_t, std::uint64_t>;
  typedef Integer Type __attribute__((vector_size(FF_SIMD_BYTES)));
};
template <typename T>
using Bits = typename BitsOf<T>::Type;

template <typename T>
struct MathTable;

template <>
struct MathTable<float> {
  static constexpr int kMantissaBits = 23;
  static constexpr int kBias = 127;
  static constexpr float kRounder = 0x1.8p23f;  // adding it rounds to a whole number
  static constexpr int kOffset = 512;           // even, beyond every exponent of exp
  static constexpr float kLowest = -104.5f;     // exp is 0 there, infinite at kHighest
  static constexpr float kHighest = 89.0f;
  static constexpr float kLog2High = 0.69287109375f;  // 11 bits: times the exponent is exact
  static constexpr float kLog2Low = 0.00027608681f;
  static constexpr std::uint32_t kHighHalf =
      0xfffff000;                        // 12 bits of a number: the square is exact
  static constexpr float kTailEnd = 15;  // exp(-a^2 / 2) is 0 there
  // (exp(r) - 1 - r) / r^2 for |r| <= log(2) / 2: 3e-8
  static constexpr float kExp[] = {0.5f, 0.166665767f, 0.0416665542f, 0.00836323288f,
                                   0.00139262508f};
  // (atanh(t) / t - 1) / t^2 by t^2 <= 1/9: 2e-8
  static constexpr float kAtanh[] = {0.333333202f, 0.200037803f, 0.141183099f, 0.13425749f};
  // (a + 4) (1 - Phi(a)) exp(a^2 / 2) by (a - 4) / (a + 4), a <= 13.3: 1.2e-8
  static constexpr float kMills[] = {
      0.755285138f,    -0.607896636f,   0.387136705f,   -0.186522205f,   0.0604068506f,
      -0.00753252098f, -0.00352976018f, 0.00157770926f, 0.000211579292f, -0.000115843637f};
};

template <>
struct MathTable<double> {
  static constexpr int kMantissaBits = 52;
  static constexpr int kBias = 1023;
  static constexpr double kRounder = 0x1.8p52;
  static constexpr int kOffset = 4096;
  static constexpr double kLowest = -746;
  static constexpr double kHighest = 711;
  static constexpr double kLog2High = 0.69314718055920820916;  // 40 bits
  static constexpr double kLog2Low = 7.3710025651677989e-13;
  static constexpr std::uint64_t kHighHalf = 0xfffffffff8000000;  // 26 bits
  static constexpr double kTailEnd = 40;
  // 5e-17
  static constexpr double kExp[] = {
      0.5000000000000001,    0.16666666666666667,    0.041666666666623821,  0.0083333333333300382,
      0.0013888888917367081, 0.00019841269863171556, 2.4801521057868205e-5, 2.7557268276905696e-6,
      2.7620201591031549e-7, 2.5100472505694996e-8};
  // 5e-18
  static constexpr double kAtanh[] = {
      0.33333333333333329,  0.20000000000007291,  0.14285714283554379,  0.11111111358713931,
      0.090908947180664291, 0.076927850324793116, 0.066570721048274681, 0.060005364047953563,
      0.044003692430723369, 0.080820228059717661};
  // a <= 38.6: 4e-17
  static constexpr double kMills[] = {
      0.75528513041575148,     -0.60789664197189176,   0.38713740074221869,
      -0.18652185795969441,    0.060396574890708792,   -0.0075401889655820728,
      -0.003479692362423222,   0.0016308184416757217,  0.00013334425577948092,
      -0.00023109481611451268, -1.9078762382182561e-6, 3.5144167998227779e-5,
      7.1503734630429702e-7,   -5.9188447871870199e-6, -6.2519311058850597e-7,
      1.019696831151206e-6,    2.6374436505663119e-7,  -1.5411646334002174e-7,
      -7.6398419256398802e-8,  1.4468530167047006e-8,  1.3903504965759881e-8,
      1.0768241006921001e-10,  -9.5129910240473464e-10};
};

// coefficients[0] + coefficients[1] x + ...
template <typename T, int N>
FF_INLINE Vec<T> polynomial(Vec<T> x, const T (&coefficients)[N]) {
  Vec<T> sum = splat(coefficients[N - 1]);
  FF_UNROLL
  for (int i = N - 2; i >= 0; --i) sum = sum * x + coefficients[i];
  return sum;
}

template <typename T>
FF_INLINE Vec<T> clamp(Vec<T> x, T low, T high) {  // NaN stays
  const Vec<T> above = x < low ? splat(low) : x;
  return above > high ? splat(high) : above;
}
template <typename T>
FF_INLINE Vec<T> absolute(Vec<T> x) {
  constexpr auto kSign = typename BitsOf<T>::Integer{1} << (8 * sizeof(T) - 1);
  return (Vec<T>)((Bits<T>)x & ~kSign);
}
template <typename T>
FF_INLINE Vec<T> with_sign_of(Vec<T> magnitude, Vec<T> sign) {
  constexpr auto kSign = typename BitsOf<T>::Integer{1} << (8 * sizeof(T) - 1);
  return (Vec<T>)(((Bits<T>)magnitude & ~kSign) | ((Bits<T>)sign & kSign));
}

template <typename T>
struct Exponential {
  Vec<T> exp, expm1;
};

// exp(x + low) and exp(x + low) - 1; low is small, for a sum that T alone does not hold.
//
//   x = n log(2) + r,   exp(x) = 2^n exp(r);   2^n in two factors, each of which is a normal number
template <typename T>
FF_INLINE Exponential<T> exponential(Vec<T> x, Vec<T> low = Vec<T>{}) {
  using Table = MathTable<T>;
  constexpr T kLog2E = static_cast<T>(1.4426950408889634);
  constexpr T kFromExp = 4;  // beyond, exp - 1 loses nothing
  x = clamp<T>(x, Table::kLowest, Table::kHighest);
  const Vec<T> shifted = x * kLog2E + Table::kRounder;
  const Vec<T> n = shifted - Table::kRounder;
  const Vec<T> r = x - n * Table::kLog2High - n * Table::kLog2Low + low;
  const Vec<T> rest = r + r * r * polynomial<T>(r, Table::kExp);

  const Bits<T> exponent = (Bits<T>)shifted - (Bits<T>)splat(Table::kRounder) + Table::kOffset;
  const Bits<T> half = exponent >> 1;
  constexpr int kToBias = Table::kOffset / 2 - Table::kBias;
  const Vec<T> first = (Vec<T>)((half - kToBias) << Table::kMantissaBits);
  const Vec<T> second = (Vec<T>)((exponent - half - kToBias) << Table::kMantissaBits);
  const Vec<T> exp = (rest + T(1)) * first * second;
  const Vec<T> power = first * second;
  return {exp, x > kFromExp ? exp - T(1) : rest * power + (power - T(1))};
}

// log(1 + e) for 0 <= e <= 1:   2 atanh(t),   t = e / (2 + e)
template <typename T>
FF_INLINE Vec<T> log1p_unit(Vec<T> e) {
  const Vec<T> t = e / (e + T(2)), square = t * t;
  return T(2) * (t + t * square * polynomial<T>(square, MathTable<T>::kAtanh));
}

template <typename T>
struct Logistic {
  Vec<T> value;     // 1 / (1 + exp(-z))
  Vec<T> opposite;  // 1 - value
  Vec<T> slope;     // value (1 - value)
};

// From e = exp(-|z|) <= 1: nothing cancels on either side.
template <typename T>
FF_INLINE Logistic<T> logistic(Vec<T> z) {
  const Vec<T> e = exponential<T>(-absolute<T>(z)).exp;
  const Vec<T> large = T(1) / (e + T(1)), small = e * large;
  return {z < T(0) ? small : large, z < T(0) ? large : small, small * large};
}

template <typename T>
struct Normal {
  Vec<T> below;    // Phi(z), the standard normal distribution function
  Vec<T> density;  // exp(-z^2 / 2) / sqrt(2 pi)
};

// 1 - Phi(a) is exp(-a^2 / 2) times a smooth function (Mills 1926) for a = |z|; the rounding of a^2
// is handed to exp, which would multiply it by a^2.
template <typename T>
FF_INLINE Normal<T> normal(Vec<T> z) {
  using Table = MathTable<T>;
  constexpr T kOneOverRoot2Pi = static_cast<T>(0.39894228040143268);
  constexpr T kCentre = 4;
  const Vec<T> size = absolute<T>(z);
  const Vec<T> a = size < Table::kTailEnd ? size : splat(Table::kTailEnd);  // NaN too: end of tail
  const Vec<T> high = (Vec<T>)((Bits<T>)a & Table::kHighHalf);
  const Vec<T> gauss = exponential<T>(T(-0.5) * high * high, T(-0.5) * (a - high) * (a + high)).exp;
  const Vec<T> inverse = T(1) / (a + kCentre);
  const Vec<T> tail = gauss * inverse * polynomial<T>((a - kCentre) * inverse, Table::kMills);
  return {z < T(0) ? tail : T(1) - tail, kOneOverRoot2Pi * gauss};
}

}  // namespace
}  // namespace fisherfast::FF_SIMD_NAMESPACE
