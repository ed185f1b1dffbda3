// Activations and their derivatives, one number at a time.
//
// Each function returns f(z) and f'(z). At a kink the derivative is PyTorch's; so is what a NaN or
// an infinity gives. Exponentials are taken of negative numbers, so that nothing overflows, and
// 1 - s of a sigmoid s is computed without a difference.
#pragma once

#include <cmath>

#include "core/types.h"

namespace fisherfast {

template <typename T>
struct ValueAndSlope {
  T value, slope;
};

// 1 / (1 + exp(-z)), its difference to one, and the exponential of both.
template <typename T>
struct Logistic {
  T value, complement;
  T decay;  // exp(-|z|)
};

template <typename T>
FF_HOST_DEVICE inline Logistic<T> logistic(T z) {
  const T decay = std::exp(-std::fabs(z));
  const T large = T(1) / (T(1) + decay), small = decay * large;
  return z < T(0) ? Logistic<T>{small, large, decay} : Logistic<T>{large, small, decay};
}

// z between low and high; a NaN stays.
template <typename T>
FF_HOST_DEVICE inline T clamped(T z, T low, T high) {
  return z < low ? low : (z > high ? high : z);
}

template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> relu(T z) {
  return {z <= T(0) ? T(0) : z, z <= T(0) ? T(0) : T(1)};  // NaN, 1 at NaN: as PyTorch
}

// PReLU too.
template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> leaky_relu(T z, T slope) {
  return {z > T(0) ? z : slope * z, z > T(0) ? T(1) : slope};
}

template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> hardtanh(T z, T low, T high) {
  return {clamped(z, low, high), z > low && z < high ? T(1) : T(0)};
}

// scale z above zero, scale alpha (exp(input_scale z) - 1) below: ELU, SELU and CELU.
template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> elu(T z, T alpha, T scale, T input_scale) {
  if (z > T(0)) return {scale * z, scale};
  const T w = input_scale * z;
  return {scale * (alpha * std::expm1(w)), scale * (alpha * input_scale * std::exp(w))};
}

// z times the distribution function of a normal number, 1 / 2 erfc(-z / sqrt(2)).
template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> gelu(T z) {
  constexpr T kRootHalf = T(0.70710678118654752440), kDensityAtZero = T(0.39894228040143267794);
  const T below = T(0.5) * std::erfc(-z * kRootHalf);
  const T density = kDensityAtZero * std::exp(T(-0.5) * z * z);
  return {z * below, below + z * density};
}

// GELU by a tanh: 1 / 2 z (1 + tanh(u)) = z s(2 u), s the sigmoid and u = factor (z + cubic z^3).
// (Hendrycks and Gimpel 2016)
template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> gelu_tanh(T z) {
  constexpr T kTwiceFactor = T(1.59576912160573071176), kCubic = T(0.044715);
  const Logistic<T> s = logistic(kTwiceFactor * (z + kCubic * z * z * z));
  // d s / d u is zero for large z: multiplied first, it keeps the powers of z from overflowing.
  const T bend = s.value * s.complement * z * kTwiceFactor;
  return {z * s.value, s.value + bend + bend * z * z * (T(3) * kCubic)};
}

template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> silu(T z) {
  const Logistic<T> s = logistic(z);
  return {z * s.value, s.value * (T(1) + z * s.complement)};
}

// z t, t = tanh(log(1 + exp(z))) = n / (n + 2) with n = exp(z) (exp(z) + 2).
template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> mish(T z) {
  const Logistic<T> s = logistic(z);
  const T e = s.decay;
  // Above zero both n and n + 2 are multiplied with exp(-2 z).
  const T n = z < T(0) ? e * (e + T(2)) : T(1) + T(2) * e;
  const T two = z < T(0) ? T(2) : T(2) * e * e;
  const T inverse = T(1) / (n + two);
  const T t = n * inverse, complement = two * inverse;
  return {z * t, t + z * s.value * complement * (T(1) + t)};
}

// log(1 + exp(beta z)) / beta, and z itself where beta z lies above the threshold.
template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> softplus(T z, T beta, T threshold) {
  const T w = beta * z;
  if (w > threshold) return {z, T(1)};
  const Logistic<T> s = logistic(w);
  return {((w > T(0) ? w : T(0)) + std::log1p(s.decay)) / beta, s.value};
}

template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> sigmoid(T z) {
  const Logistic<T> s = logistic(z);
  return {s.value, s.value * s.complement};
}

template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> hyperbolic_tangent(T z) {
  const T t = std::tanh(z);
  return {t, (T(1) - t) * (T(1) + t)};
}

// z times hardsigmoid(z).
template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> hardswish(T z) {
  const T gate = clamped(z + T(3), T(0), T(6)) / T(6);
  return {z * gate, z <= T(-3) ? T(0) : (z >= T(3) ? T(1) : z / T(3) + T(0.5))};
}

template <typename T>
FF_HOST_DEVICE inline ValueAndSlope<T> hardsigmoid(T z) {
  return {clamped(z + T(3), T(0), T(6)) / T(6), z > T(-3) && z < T(3) ? T(1) / T(6) : T(0)};
}

}  // namespace fisherfast
