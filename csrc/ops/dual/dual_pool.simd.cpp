// An output a lane: neighbours along the last dimension, or channels where these are last. The
// numbers of a window are passed over in its order; where one is larger than the largest so far, it
// and its tangents replace what the lanes hold, so that no index is kept and nothing is
// gathered. Tangents beyond kTangents take further passes over the primal. Windows at the ends of a
// row, and those more than two numbers apart, are searched one by one for an index.
#include "ops/dual/dual_pool.h"

#include "core/simd/simd.h"
#include "core/simd/simd_row.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

constexpr int kTangents = FF_SIMD_BYTES == 64 ? 8 : 4;  // held in registers, with the primal
// So many outputs are searched for one by one faster than in part of a vector. Measured for windows
// of 2 x 2 to 7 x 7 with 16 lanes: 1.4 to 2.9 times as fast for one to three outputs.
template <typename T>
constexpr index_t kFewLanes = kLanes<T> / 4;

// --- which lanes are replaced --------------------------------------------------------------------

// Lanes where a is larger than b, or NaN; and `yes` there, `no` elsewhere.
#ifdef __AVX512F__
template <typename T>
FF_INLINE unsigned exceeds(Vec<T> a, Vec<T> b) {
  if constexpr (sizeof(T) == 4) {
    return _mm512_cmp_ps_mask((__m512)a, (__m512)b, _CMP_GT_OQ) |
           _mm512_cmp_ps_mask((__m512)a, (__m512)a, _CMP_UNORD_Q);
  } else {
    return _mm512_cmp_pd_mask((__m512d)a, (__m512d)b, _CMP_GT_OQ) |
           _mm512_cmp_pd_mask((__m512d)a, (__m512d)a, _CMP_UNORD_Q);
  }
}
template <typename T>
FF_INLINE Vec<T> choose(unsigned mask, Vec<T> yes, Vec<T> no) {
  if constexpr (sizeof(T) == 4) {
    return (Vec<T>)_mm512_mask_mov_ps((__m512)no, static_cast<__mmask16>(mask), (__m512)yes);
  } else {
    return (Vec<T>)_mm512_mask_mov_pd((__m512d)no, static_cast<__mmask8>(mask), (__m512d)yes);
  }
}
#else
template <typename T>
FF_INLINE Mask<T> exceeds(Vec<T> a, Vec<T> b) {
  return (a > b) | (a != a);
}
template <typename T>
FF_INLINE Vec<T> choose(Mask<T> mask, Vec<T> yes, Vec<T> no) {
  return mask ? yes : no;
}
#endif
// --- how the lanes are read ----------------------------------------------------------------------

// kStride numbers, 1 or 2, from lane to lane; `count` lanes are there.
template <typename T, int kStride, bool kWhole>
struct StridedLanes {
  index_t count;

  FF_INLINE Vec<T> read(const T* from) const {
    constexpr int W = kLanes<T>;
    if constexpr (kStride == 1) {
      return kWhole ? load(from) : load_part(from, count, Vec<T>{});
    } else {  // neither reads beyond the number of the last lane
      Vec<T> first, second;
      if constexpr (kWhole) {
        first = load(from);
        second = load(from + W - 1);
      } else {
        const index_t reach = 2 * count - 1;
        first = load_part(from, reach < W ? reach : W, Vec<T>{});
        second = load_part(from + W - 1, reach - (W - 1), Vec<T>{});
      }
      return every_second(first, second, std::make_integer_sequence<int, W>{});
    }
  }
  FF_INLINE void write(T* to, Vec<T> vector) const {
    if constexpr (kWhole) {
      store(to, vector);
    } else {
      store_part(to, count, vector);
    }
  }

 private:
  // Lanes 0, 2, ... of the first, then 1, 3, ... of the second, which starts W - 1 numbers later.
  template <int... lane>
  static FF_INLINE Vec<T> every_second(Vec<T> first, Vec<T> second,
                                       std::integer_sequence<int, lane...>) {
    constexpr int W = kLanes<T>;
#ifdef __clang__
    return __builtin_shufflevector(first, second, (2 * lane < W ? 2 * lane : 2 * lane + 1)...);
#else
    return __builtin_shuffle(first, second, Mask<T>{(2 * lane < W ? 2 * lane : 2 * lane + 1)...});
#endif
  }
};

// --- a window ------------------------------------------------------------------------------------

// The part of a window inside the input along one dimension: `count` places, `step` apart.
struct Places {
  index_t first, step, count;
};

FF_INLINE Places places(index_t output, index_t in, index_t kernel, index_t stride, index_t padding,
                        index_t dilation) {
  const index_t start = output * stride - padding;
  const index_t before = start < 0 ? (-start + dilation - 1) / dilation : 0;
  const index_t end = (in - start + dilation - 1) / dilation;
  const index_t last = end < kernel ? end : kernel;
  return {start + before * dilation, dilation, last - before};
}
template <typename T>
FF_INLINE Places places(const DualPoolArgs<T>& args, int dim, index_t output) {
  return places(output, args.in[dim], args.kernel[dim], args.stride[dim], args.padding[dim],
                args.dilation[dim]);
}

// A window in numbers from the start of a slice.
struct Window {
  index_t first;
  Places along[kPoolDims];
};

// Tangents [p, p + P) of the outputs of `lanes`, and the primal when p is 1. No alias.
template <typename T, int P, typename Lanes>
FF_INLINE void pool_lanes(const DualPoolArgs<T>& args, const Lanes& lanes, const Window& window,
                          index_t p, index_t slice, index_t to) {
  const T* const primal = args.x + window.first;
  const T* const tangents = primal + p * args.slice_stride;
  Vec<T> best = lanes.read(primal);  // number 0 is there again below: it replaces nothing
  Vec<T> held[P + 1];
  FF_UNROLL
  for (int q = 0; q < P; ++q) held[q] = lanes.read(tangents + q * args.slice_stride);
  index_t plane = 0;
  for (index_t a = 0; a < window.along[0].count; ++a, plane += window.along[0].step) {
    index_t row = plane;
    for (index_t b = 0; b < window.along[1].count; ++b, row += window.along[1].step) {
      index_t place = row;
      for (index_t c = 0; c < window.along[2].count; ++c, place += window.along[2].step) {
        const Vec<T> value = lanes.read(primal + place);
        const auto mask = exceeds<T>(value, best);
        best = choose<T>(mask, value, best);
        FF_UNROLL
        for (int q = 0; q < P; ++q) {
          held[q] = choose<T>(mask, lanes.read(tangents + q * args.slice_stride + place), held[q]);
        }
      }
    }
  }
  if (p == 1) lanes.write(args.y + to, best);
  FF_UNROLL
  for (int q = 0; q < P; ++q) lanes.write(args.y + (p + q) * slice + to, held[q]);
}

// All tangents of one window a lane.
template <typename T, typename Lanes>
FF_INLINE void pool(const DualPoolArgs<T>& args, const Lanes& lanes, const Window& window,
                    index_t slice, index_t to) {
  index_t p = 1;
  for (; p + kTangents <= args.tangents + 1; p += kTangents) {
    pool_lanes<T, kTangents>(args, lanes, window, p, slice, to);
  }
  if constexpr (kTangents > 4) {
    for (; p + 4 <= args.tangents + 1; p += 4) pool_lanes<T, 4>(args, lanes, window, p, slice, to);
  }
  for (; p <= args.tangents; ++p) pool_lanes<T, 1>(args, lanes, window, p, slice, to);
  if (args.tangents == 0) pool_lanes<T, 0>(args, lanes, window, p, slice, to);
}

// One window by itself.
template <typename T>
FF_INLINE void pool_one(const DualPoolArgs<T>& args, const Window& window, index_t slice,
                        index_t to) {
  const T* x = args.x + window.first;
  T best = *x;
  index_t found = 0, plane = 0;
  for (index_t a = 0; a < window.along[0].count; ++a, plane += window.along[0].step) {
    index_t row = plane;
    for (index_t b = 0; b < window.along[1].count; ++b, row += window.along[1].step) {
      index_t place = row;
      for (index_t c = 0; c < window.along[2].count; ++c, place += window.along[2].step) {
        const bool better = (x[place] > best) | (x[place] != x[place]);
        best = better ? x[place] : best;
        found = better ? place : found;
      }
    }
  }
  x += found;
  T* y = args.y + to;
  for (index_t p = 0; p <= args.tangents; ++p, x += args.slice_stride, y += slice) *y = *x;
}

// --- a row of windows ----------------------------------------------------------------------------

// Row r of the outer x out_0 x out_1: where it starts in x, and its windows but for the last
// dimension.
template <typename T>
FF_INLINE Window window_of_row(const DualPoolArgs<T>& args, index_t r) {
  Window window;
  window.along[1] = places(args, 1, r % args.out[1]);
  window.along[0] = places(args, 0, r / args.out[1] % args.out[0]);
  const index_t outer = r / (args.out[1] * args.out[0]);
  const index_t row = args.in[2] * args.inner;
  window.first =
      ((outer * args.in[0] + window.along[0].first) * args.in[1] + window.along[1].first) * row;
  window.along[0].step *= args.in[1] * row;
  window.along[1].step *= row;
  return window;
}

// Channels last: a vector of channels at a time.
template <typename T>
void pool_channels(const DualPoolArgs<T>& args, const Window& row, index_t slice, index_t to) {
  constexpr int W = kLanes<T>;
  const index_t C = args.inner;
  for (index_t o = 0; o < args.out[2]; ++o, to += C) {
    Window window = row;
    window.along[2] = places(args, 2, o);
    window.first += window.along[2].first * C;
    window.along[2].step *= C;
    index_t c = 0;
    for (; c + W <= C; c += W, window.first += W) {
      pool(args, StridedLanes<T, 1, true>{W}, window, slice, to + c);
    }
    if (c < C) pool(args, StridedLanes<T, 1, false>{C - c}, window, slice, to + c);
  }
}

// Contiguous: outputs [begin, end) of a row.
template <typename T>
void pool_one_by_one(const DualPoolArgs<T>& args, const Window& row, index_t slice, index_t to,
                     index_t begin, index_t end) {
  for (index_t o = begin; o < end; ++o) {
    Window window = row;
    window.along[2] = places(args, 2, o);
    window.first += window.along[2].first;
    pool_one(args, window, slice, to + o);
  }
}

// Contiguous: the outputs whose windows lie inside along the row, by the vector.
template <typename T, int kStride>
void pool_positions(const DualPoolArgs<T>& args, const Window& row, index_t slice, index_t to) {
  constexpr int W = kLanes<T>;
  const index_t out = args.out[2], padding = args.padding[2], dilation = args.dilation[2];
  const index_t space = args.in[2] + padding - (args.kernel[2] - 1) * dilation - 1;
  index_t first = (padding + kStride - 1) / kStride;
  first = first < out ? first : out;
  index_t last = space < 0 ? 0 : space / kStride + 1;  // space: of the last start that fits
  last = last < first ? first : last < out ? last : out;
  pool_one_by_one(args, row, slice, to, 0, first);
  Window window = row;
  window.along[2] = {0, dilation, args.kernel[2]};
  index_t o = first;
  while (last - o > kFewLanes<T>) {
    const bool whole = last - first >= W;
    if (whole && last - o < W) o = last - W;  // some once more
    window.first = row.first + o * kStride - padding;
    if (whole) {
      pool(args, StridedLanes<T, kStride, true>{W}, window, slice, to + o);
      o += W;
    } else {
      pool(args, StridedLanes<T, kStride, false>{last - o}, window, slice, to + o);
      o = last;
    }
  }
  pool_one_by_one(args, row, slice, to, o, out);
}

}  // namespace

template <typename T>
void dual_pool_rows(const DualPoolArgs<T>& args, index_t begin, index_t end) {
  const index_t size = args.out[2] * args.inner;
  const index_t slice = args.outer * args.out[0] * args.out[1] * size;
  for (index_t r = begin; r < end; ++r) {
    const Window row = window_of_row(args, r);
    const index_t to = r * size;
    if (args.inner > 1) {
      pool_channels(args, row, slice, to);
    } else if (args.stride[2] == 1) {
      pool_positions<T, 1>(args, row, slice, to);
    } else if (args.stride[2] == 2) {
      pool_positions<T, 2>(args, row, slice, to);
    } else {
      pool_one_by_one(args, row, slice, to, 0, args.out[2]);
    }
  }
}

template void dual_pool_rows(const DualPoolArgs<float>&, index_t, index_t);
template void dual_pool_rows(const DualPoolArgs<double>&, index_t, index_t);

}  // namespace fisherfast::FF_SIMD_NAMESPACE
