// Vectors for the sources that are compiled once per instruction set (*.simd.cpp).
//
// Such a source is compiled with FF_SIMD_NAMESPACE (baseline, avx2, avx512) and FF_SIMD_BYTES (16,
// 32, 64), and puts all it defines into that namespace. It must not use inline functions of other
// headers: the linker keeps one copy of these, perhaps the one that needs the newest processor.
// What is used is the vector extension that GCC and Clang share; * and + contract to
// multiply-adds where the instruction set has them.
#pragma once

#if !defined(FF_SIMD_NAMESPACE) || !defined(FF_SIMD_BYTES)
#error "compile *.simd.cpp with FF_SIMD_NAMESPACE and FF_SIMD_BYTES, as CMakeLists.txt does"
#endif

#if defined(__AVX2__)
#include <immintrin.h>
#elif defined(__SSE2__)
#include <emmintrin.h>
#endif

#include <type_traits>
#include <utility>

#include "core/types.h"

#define FF_INLINE inline __attribute__((always_inline))
#ifdef __clang__
#define FF_UNROLL _Pragma("unroll")
#else
#define FF_UNROLL _Pragma("GCC unroll 16")  // loops over registers: their bounds are constants
#endif

namespace fisherfast::FF_SIMD_NAMESPACE {

template <typename T>
inline constexpr int kLanes = FF_SIMD_BYTES / static_cast<int>(sizeof(T));

// What GCC and Clang call "vector": lanes of T that are added, multiplied and compared at once.
template <typename T>
struct VectorOf {
  typedef T Type __attribute__((vector_size(FF_SIMD_BYTES)));
  // the same without alignment, to load and store anywhere; it may alias
  typedef T Unaligned __attribute__((vector_size(FF_SIMD_BYTES), aligned(alignof(T)), may_alias));
};
template <typename T>
using Vec = typename VectorOf<T>::Type;

// Integers of the width of T, as a comparison gives them: -1 where true.
template <typename T>
using Mask = decltype(Vec<T>{} < Vec<T>{});

template <typename T>
FF_INLINE Vec<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::Unaligned*>(from);
}
template <typename T>
FF_INLINE void store(T* to, Vec<T> vector) {
  *reinterpret_cast<typename VectorOf<T>::Unaligned*>(to) = vector;
}
// Stores past the caches, where what is written is not read soon: the processor then need not read
// the line first. `to` is on the boundary of a vector; `finish_streams` before anyone else reads.
template <typename T>
FF_INLINE void store_stream(T* to, Vec<T> vector) {
#if defined(__AVX512F__)
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), (__m512i)vector);
#elif defined(__AVX2__)
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), (__m256i)vector);
#elif defined(__SSE2__)
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), (__m128i)vector);
#else
  store(to, vector);
#endif
}
FF_INLINE void finish_streams() {
#ifdef __SSE2__
  _mm_sfence();
#endif
}
// The count of numbers before the next boundary of a vector.
template <typename T>
FF_INLINE index_t numbers_to_boundary(const T* from) {
  constexpr std::uintptr_t kSize = FF_SIMD_BYTES;
  return static_cast<index_t>((kSize - reinterpret_cast<std::uintptr_t>(from) % kSize) % kSize /
                              sizeof(T));
}
template <typename T>
FF_INLINE Vec<T> splat(T value) {
  return value - Vec<T>{};  // x - 0 is x, for -0 and NaN too
}
template <typename T>
FF_INLINE Mask<T> splat_mask(index_t value) {
  using Integer = std::remove_reference_t<decltype(Mask<T>{}[0])>;
  return static_cast<Integer>(value) - Mask<T>{};
}
template <typename T>
FF_INLINE Vec<T> square_root(Vec<T> vector) {
  Vec<T> roots;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    if constexpr (sizeof(T) == 4) {
      roots[lane] = __builtin_sqrtf(vector[lane]);
    } else {
      roots[lane] = __builtin_sqrt(vector[lane]);
    }
  }
  return roots;
}
// 1 / sqrt(x) for normal x > 0. AVX-512 has an estimate of 14 bits, which each Newton step doubles:
// right to 2 units in the last place, in half the time of a root and a division.
template <typename T>
FF_INLINE Vec<T> reciprocal_square_root(Vec<T> x) {
#ifdef __AVX512F__
  Vec<T> y;
  if constexpr (sizeof(T) == 4) {
    y = (Vec<T>)_mm512_maskz_rsqrt14_ps(0xffff, (__m512)x);
  } else {
    y = (Vec<T>)_mm512_maskz_rsqrt14_pd(0xff, (__m512d)x);
    y += T(0.5) * y * (T(1) - x * y * y);
  }
  return y + T(0.5) * y * (T(1) - x * y * y);
#else
  return T(1) / square_root<T>(x);
#endif
}
// Whether a lane of a mask is not 0.
template <typename M>
FF_INLINE bool any(M mask) {
#if defined(__AVX512F__)
  return _mm512_test_epi32_mask((__m512i)mask, (__m512i)mask) != 0;
#elif defined(__AVX2__)
  return !_mm256_testz_si256((__m256i)mask, (__m256i)mask);
#else
  bool found = false;
  for (unsigned lane = 0; lane < sizeof(M) / sizeof(mask[0]); ++lane) found |= mask[lane] != 0;
  return found;
#endif
}

// One step of the transposition: rows i and i + h exchange the halves of every block of 2 h lanes.
template <typename T, int h, int... lane>
FF_INLINE void exchange(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, lane...>) {
  constexpr int W = kLanes<T>;
#ifdef __clang__
  const Vec<T> low = __builtin_shufflevector(a, b, ((lane & h) ? W + lane - h : lane)...);
  const Vec<T> high = __builtin_shufflevector(a, b, ((lane & h) ? W + lane : lane + h)...);
#else
  const Vec<T> low = __builtin_shuffle(a, b, Mask<T>{((lane & h) ? W + lane - h : lane)...});
  const Vec<T> high = __builtin_shuffle(a, b, Mask<T>{((lane & h) ? W + lane : lane + h)...});
#endif
  a = low;
  b = high;
}

// Transposes a square of lanes x lanes numbers in registers.
template <typename T, int h = kLanes<T> / 2>
FF_INLINE void transpose(Vec<T> (&rows)[kLanes<T>]) {
  if constexpr (h > 0) {
    for (int i = 0; i < kLanes<T>; ++i) {
      if ((i & h) == 0) {
        exchange<T, h>(rows[i], rows[i + h], std::make_integer_sequence<int, kLanes<T>>{});
      }
    }
    transpose<T, h / 2>(rows);
  }
}

// Even and odd lanes of the row a, b, and the way back.
template <typename T, int... lane>
FF_INLINE void unzip_pair(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, lane...>) {
#ifdef __clang__
  const Vec<T> even = __builtin_shufflevector(a, b, (2 * lane)...);
  const Vec<T> odd = __builtin_shufflevector(a, b, (2 * lane + 1)...);
#else
  const Vec<T> even = __builtin_shuffle(a, b, Mask<T>{(2 * lane)...});
  const Vec<T> odd = __builtin_shuffle(a, b, Mask<T>{(2 * lane + 1)...});
#endif
  a = even;
  b = odd;
}
template <typename T, int... lane>
FF_INLINE void zip_pair(Vec<T>& a, Vec<T>& b, std::integer_sequence<int, lane...>) {
  constexpr int W = kLanes<T>;
#ifdef __clang__
  const Vec<T> low = __builtin_shufflevector(a, b, (lane / 2 + lane % 2 * W)...);
  const Vec<T> high = __builtin_shufflevector(a, b, (W / 2 + lane / 2 + lane % 2 * W)...);
#else
  const Vec<T> low = __builtin_shuffle(a, b, Mask<T>{(lane / 2 + lane % 2 * W)...});
  const Vec<T> high = __builtin_shuffle(a, b, Mask<T>{(W / 2 + lane / 2 + lane % 2 * W)...});
#endif
  a = low;
  b = high;
}

// Runs of L numbers (a power of two), one after another in L vectors: afterwards vector e holds
// number e of every run. `zip` is the way back.
template <typename T, int L>
FF_INLINE void unzip(Vec<T> (&vectors)[L]) {
  if constexpr (L > 1) {
    Vec<T> even[L / 2], odd[L / 2];
    for (int i = 0; i < L / 2; ++i) {
      even[i] = vectors[2 * i];
      odd[i] = vectors[2 * i + 1];
      unzip_pair<T>(even[i], odd[i], std::make_integer_sequence<int, kLanes<T>>{});
    }
    unzip<T, L / 2>(even);
    unzip<T, L / 2>(odd);
    for (int i = 0; i < L / 2; ++i) {
      vectors[2 * i] = even[i];
      vectors[2 * i + 1] = odd[i];
    }
  }
}
template <typename T, int L>
FF_INLINE void zip(Vec<T> (&vectors)[L]) {
  if constexpr (L > 1) {
    Vec<T> even[L / 2], odd[L / 2];
    for (int i = 0; i < L / 2; ++i) {
      even[i] = vectors[2 * i];
      odd[i] = vectors[2 * i + 1];
    }
    zip<T, L / 2>(even);
    zip<T, L / 2>(odd);
    for (int i = 0; i < L / 2; ++i) {
      zip_pair<T>(even[i], odd[i], std::make_integer_sequence<int, kLanes<T>>{});
      vectors[2 * i] = even[i];
      vectors[2 * i + 1] = odd[i];
    }
  }
}

}  // namespace fisherfast::FF_SIMD_NAMESPACE
