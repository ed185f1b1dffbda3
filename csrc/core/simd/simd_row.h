// Runs of numbers in vectors, for the sources that are compiled once per instruction set: the last
// vector may be part of one, the lanes of a vector are summed, long sums lose no digits.
#pragma once

#include "core/simd/simd.h"

#define FF_INLINE_LAMBDA __attribute__((always_inline))

namespace fisherfast::FF_SIMD_NAMESPACE {

// --- whole vectors and parts of one --------------------------------------------------------------

template <typename T>
FF_INLINE Mask<T> first_lanes(index_t count) {
  Mask<T> number;
  for (int lane = 0; lane < kLanes<T>; ++lane) number[lane] = lane;
  return number < splat_mask<T>(count);
}

// The first `count` <= lanes numbers, the rest `fill`; none is read when count <= 0.
template <typename T>
FF_INLINE Vec<T> load_part(const T* from, index_t count, Vec<T> fill) {
#if defined(__AVX512F__)
  const unsigned mask = count <= 0 ? 0u : (1u << count) - 1;
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_mask_loadu_ps((__m512)fill, static_cast<__mmask16>(mask), from);
  } else {
    return (Vec<T>)_mm512_mask_loadu_pd((__m512d)fill, static_cast<__mmask8>(mask), from);
  }
#elif defined(__AVX2__)
  const Mask<T> mask = first_lanes<T>(count);
  if constexpr (sizeof(T) == 4) {
    return mask ? (Vec<T>)_mm256_maskload_ps(from, (__m256i)mask) : fill;
  } else {
    return mask ? (Vec<T>)_mm256_maskload_pd(from, (__m256i)mask) : fill;
  }
#else
  for (index_t lane = 0; lane < count; ++lane) fill[lane] = from[lane];
  return fill;
#endif
}

template <typename T>
FF_INLINE void store_part(T* to, index_t count, Vec<T> vector) {
#if defined(__AVX512F__)
  const unsigned mask = count <= 0 ? 0u : (1u << count) - 1;
  if constexpr (sizeof(T) == 4) {
    _mm512_mask_storeu_ps(to, static_cast<__mmask16>(mask), (__m512)vector);
  } else {
    _mm512_mask_storeu_pd(to, static_cast<__mmask8>(mask), (__m512d)vector);
  }
#elif defined(__AVX2__)
  const Mask<T> mask = first_lanes<T>(count);
  if constexpr (sizeof(T) == 4) {
    _mm256_maskstore_ps(to, (__m256i)mask, (__m256)vector);
  } else {
    _mm256_maskstore_pd(to, (__m256i)mask, (__m256d)vector);
  }
#else
  for (index_t lane = 0; lane < count; ++lane) to[lane] = vector[lane];
#endif
}

// The numbers of a vector: as many as it has lanes, or the first `count` of them.
template <typename T>
struct WholeVector {
  FF_INLINE Vec<T> read(const T* from, Vec<T>) const { return load(from); }
  FF_INLINE void write(T* to, Vec<T> vector) const { store(to, vector); }
};
template <typename T>
struct PartVector {
  index_t count;
  FF_INLINE Vec<T> read(const T* from, Vec<T> fill) const { return load_part(from, count, fill); }
  FF_INLINE void write(T* to, Vec<T> vector) const { store_part(to, count, vector); }
};

// Calls body(first, lanes) for vectors that cover [begin, end).
template <typename T, typename Body>
FF_INLINE void for_vectors(index_t begin, index_t end, const Body& body) {
  constexpr int W = kLanes<T>;
  index_t j = begin;
  for (; j + W <= end; j += W) body(j, WholeVector<T>{});
  if (j < end) body(j, PartVector<T>{end - j});
}

// --- over the lanes ------------------------------------------------------------------------------

// Lane i of the result is lane i + h, around the end.
template <typename T, int h, int... lane>
FF_INLINE Vec<T> rotate(Vec<T> v, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  return __builtin_shufflevector(v, v, ((lane + h) % kLanes<T>)...);
#else
  return __builtin_shuffle(v, Mask<T>{((lane + h) % kLanes<T>)...});
#endif
}

template <typename T, int h = kLanes<T> / 2>
FF_INLINE T sum_of_lanes(Vec<T> v) {
  if constexpr (h == 0) {
    return v[0];
  } else {
    return sum_of_lanes<T, h / 2>(v +
                                  rotate<T, h>(v, std::make_integer_sequence<int, kLanes<T>>{}));
  }
}

// NaN lanes are passed over where another number is compared with them.
template <typename T, int h = kLanes<T> / 2>
FF_INLINE T largest_of_lanes(Vec<T> v) {
  if constexpr (h == 0) {
    return v[0];
  } else {
    const Vec<T> other = rotate<T, h>(v, std::make_integer_sequence<int, kLanes<T>>{});
    return largest_of_lanes<T, h / 2>(other > v ? other : v);
  }
}

// --- sums ----------------------------------------------------------------------------------------

// Vectors that are added in T before their sum is added in double: the error of a float32 sum of
// 64 numbers is at most 64 * 2^-24 = 4e-6 of the sum of their magnitudes, 2e-7 typically.
inline constexpr index_t kSumVectors = 64;

// sums[k] = the sum of terms[k] over [0, width); body(first, lanes, terms) gives the terms of a
// vector, which must be 0 in lanes beyond the last number.
template <typename T, int K, typename Body>
FF_INLINE void sum_terms(index_t width, double (&sums)[K], const Body& body) {
  constexpr int W = kLanes<T>;
  constexpr int kChains = K < 4 ? 4 : 1;  // sums that do not wait for each other
  constexpr index_t kBlock = kSumVectors * W;
  for (int k = 0; k < K; ++k) sums[k] = 0;
  for (index_t begin = 0; begin < width; begin += kBlock) {
    const index_t end = begin + kBlock < width ? begin + kBlock : width;
    Vec<T> sum[kChains][K] = {};
    Vec<T> terms[K];
    const auto add = [&](int chain, index_t j, auto lanes) FF_INLINE_LAMBDA {
      body(j, lanes, terms);
      FF_UNROLL
      for (int k = 0; k < K; ++k) sum[chain][k] += terms[k];
    };
    index_t j = begin;
    for (; j + kChains * W <= end; j += kChains * W) {
      FF_UNROLL
      for (int chain = 0; chain < kChains; ++chain) add(chain, j + chain * W, WholeVector<T>{});
    }
    for_vectors<T>(j, end,
                   [&](index_t first, auto lanes) FF_INLINE_LAMBDA { add(0, first, lanes); });
    for (int k = 0; k < K; ++k) {
      Vec<T> whole = sum[0][k];
      for (int chain = 1; chain < kChains; ++chain) whole += sum[chain][k];
      sums[k] += static_cast<double>(sum_of_lanes<T>(whole));
    }
  }
}

}  // namespace fisherfast::FF_SIMD_NAMESPACE
