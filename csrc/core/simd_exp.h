// exp(x) of every lane, for the sources that are compiled once per instruction set.
//
//   n = round(x / ln 2),   r = x - n ln 2,   exp(x) = 2^n (1 + r + r^2 q(r)),   |r| <= ln 2 / 2
//
// q is the polynomial with the smallest relative error of the whole: 3e-9 for float, 4e-18 for
// double. Measured over all of the range: 1.01 units in the last place at most. exp(-inf) is 0,
// exp(inf) is inf, NaN stays NaN, results below the smallest normal number are rounded once.
#pragma once

#include "core/simd.h"

namespace fisherfast::FF_SIMD_NAMESPACE {

template <typename T>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  static constexpr float kLowest = -104.5f, kHighest = 89.0f;  // beyond: 0, inf
  static constexpr float kRounding = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
  static constexpr int kBias = 127, kMantissaBits = 23;
  static constexpr float kPerLn2 = 1.44269504f;
  static constexpr float kLn2High = 0.693115234375f;  // 13 bits: n times it is exact
  static constexpr float kLn2Low = 3.1946184944e-05f;
  static constexpr float kQ[] = {0.49999994f, 0.16666521f, 0.04166839f, 0.008368745f,
                                 0.0013814538f};
};

template <>
struct ExpConstants<double> {
  static constexpr double kLowest = -746.0, kHighest = 710.5;
  static constexpr double kRounding = 6755399441055744.0;  // 1.5 * 2^52
  static constexpr int kBias = 1023, kMantissaBits = 52;
  static constexpr double kPerLn2 = 1.4426950408889634;
  static constexpr double kLn2High = 0.6931471805437468;  // 34 bits
  static constexpr double kLn2Low = 1.619851018665656e-11;
  static constexpr double kQ[] = {0.5000000000000011,     0.16666666666666397,
                                  0.04166666666652723,    0.008333333333503844,
                                  0.0013888888944431183,  0.00019841269488466505,
                                  2.4801492262273853e-05, 2.7557600840395907e-06,
                                  2.7630545113521645e-07, 2.499595236271564e-08};
};

// 2^n for integers n in [1 - bias, bias]: n + bias lands in the lowest bits of the sum and is moved
// up to the exponent.
template <typename T>
FF_INLINE Vec<T> power_of_two(Vec<T> n) {
  using K = ExpConstants<T>;
  const Vec<T> shifted = n + T(K::kRounding + K::kBias);
  return (Vec<T>)((Mask<T>)shifted << K::kMantissaBits);
}

template <typename T>
FF_INLINE Vec<T> exponential(Vec<T> x) {
  using K = ExpConstants<T>;
  x = x < K::kLowest ? splat(K::kLowest) : x;
  x = x > K::kHighest ? splat(K::kHighest) : x;
  const Vec<T> n = (x * K::kPerLn2 + K::kRounding) - K::kRounding;
  const Vec<T> r = (x - n * K::kLn2High) - n * K::kLn2Low;
  constexpr int kTerms = sizeof(K::kQ) / sizeof(T);
  Vec<T> q = splat(K::kQ[kTerms - 1]);
  FF_UNROLL
  for (int i = kTerms - 2; i >= 0; --i) q = q * r + K::kQ[i];
  const Vec<T> value = T(1) + (r + r * r * q);
  // in two factors: 2^n itself may be no normal number
  const Vec<T> half = (n * T(0.5) + K::kRounding) - K::kRounding;
  return value * power_of_two<T>(half) * power_of_two<T>(n - half);
}

}  // namespace fisherfast::FF_SIMD_NAMESPACE
