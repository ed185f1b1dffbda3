// A row at a time. Its mean and variance are taken in two passes about a first mean, which
// loses no digits where the mean is far from zero: the numbers of the row are used as
// (u - shift) - rest, with shift + rest the mean in more digits than T has. Then, for as many
// tangents at a time as kTangents, a pass for mean(v) and mean(h v) and one that writes. The primal
// is written last: y may be x.
#include "ops/dual/dual_norm.h"

#include "core/simd/simd.h"
#include "core/simd/simd_row.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

constexpr int kTangents = 4;  // two sums each: 8 of 16 registers

// One row: h = rate (u - shift - rest).
template <typename T>
struct Row {
  const T* x;  // of the primal
  T* y;
  T shift, rest;
  double rate;

  FF_INLINE Vec<T> centred(index_t j, WholeVector<T> lanes) const {
    return lanes.read(x + j, Vec<T>{}) - shift - rest;
  }
  FF_INLINE Vec<T> centred(index_t j, PartVector<T> lanes) const {
    return lanes.read(x + j, splat(shift)) - shift - rest;
  }
};

template <typename T>
FF_INLINE Row<T> row_of(const DualNormArgs<T>& args, index_t i) {
  Row<T> row{args.x + i * args.width, args.y + i * args.width, T(0), T(0), 0};
  const double width = static_cast<double>(args.width);
  if (args.centre) {
    double sum[1];
    sum_terms<T, 1>(args.width, sum, [&](index_t j, auto lanes, auto& terms) FF_INLINE_LAMBDA {
      terms[0] = lanes.read(row.x + j, Vec<T>{});
    });
    row.shift = static_cast<T>(sum[0] / width);
  }
  double sums[2];
  sum_terms<T, 2>(args.width, sums, [&](index_t j, auto lanes, auto& terms) FF_INLINE_LAMBDA {
    terms[0] = lanes.read(row.x + j, splat(row.shift)) - row.shift;
    terms[1] = terms[0] * terms[0];
  });
  const double rest = args.centre ? sums[0] / width : 0;
  double variance = sums[1] / width - rest * rest;  // rest is a rounding error: no loss
  variance = variance < 0 ? 0 : variance;
  row.rest = static_cast<T>(rest);
  row.rate = 1 / __builtin_sqrt(variance + static_cast<double>(args.eps));
  return row;
}

// The weight and the bias of each number of a row, and one of each for a run of numbers.
template <typename T>
struct EachWeight {
  const T *w, *b;  // null: one, zero
  template <typename Lanes>
  FF_INLINE Vec<T> weight(index_t j, Lanes lanes) const {
    return w == nullptr ? splat(T(1)) : lanes.read(w + j, Vec<T>{});
  }
  template <typename Lanes>
  FF_INLINE Vec<T> bias(index_t j, Lanes lanes) const {
    return b == nullptr ? Vec<T>{} : lanes.read(b + j, Vec<T>{});
  }
};
template <typename T>
struct OneWeight {
  T w, b;
  template <typename Lanes>
  FF_INLINE Vec<T> weight(index_t, Lanes) const {
    return splat(w);
  }
  template <typename Lanes>
  FF_INLINE Vec<T> bias(index_t, Lanes) const {
    return splat(b);
  }
};

// Calls body(begin, end, weights) for the parts of row i that share a weight, or for all of it.
template <typename T, typename Body>
FF_INLINE void for_weights(const DualNormArgs<T>& args, index_t i, const Body& body) {
  const T *w = args.weight, *b = args.bias;
  if (w == nullptr && b == nullptr) return body(0, args.width, OneWeight<T>{T(1), T(0)});
  const index_t first = i % args.groups * args.width;
  if (args.inner == 1) {
    const EachWeight<T> weights{w == nullptr ? w : w + first, b == nullptr ? b : b + first};
    return body(0, args.width, weights);
  }
  index_t k = first / args.inner;
  index_t end = (k + 1) * args.inner - first;
  for (index_t begin = 0; begin < args.width; ++k, begin = end, end += args.inner) {
    if (end > args.width) end = args.width;
    body(begin, end, OneWeight<T>{w == nullptr ? T(1) : w[k], b == nullptr ? T(0) : b[k]});
  }
}

// Tangents [p, p + P), p from 1. Taking off the first number of a tangent beforehand changes
// nothing but the digits that are lost where its mean is far from zero.
template <typename T, int P>
FF_INLINE void write_tangents(const DualNormArgs<T>& args, const Row<T>& row, index_t i,
                              index_t p) {
  const double width = static_cast<double>(args.width);
  const index_t slice = args.rows * args.width;
  const T* v[P];
  T* y[P];
  T origin[P], mean[P], slope[P];
  for (int q = 0; q < P; ++q) {
    v[q] = row.x + (p + q) * args.slice_stride;
    y[q] = row.y + (p + q) * slice;
    origin[q] = args.centre ? v[q][0] : T(0);
  }
  double sums[2 * P];
  sum_terms<T, 2 * P>(args.width, sums, [&](index_t j, auto lanes, auto& terms) FF_INLINE_LAMBDA {
    const Vec<T> centred = row.centred(j, lanes);
    FF_UNROLL
    for (int q = 0; q < P; ++q) {
      terms[q] = lanes.read(v[q] + j, splat(origin[q])) - origin[q];
      terms[P + q] = centred * terms[q];
    }
  });
  for (int q = 0; q < P; ++q) {
    mean[q] = static_cast<T>(args.centre ? sums[q] / width : 0);
    slope[q] = static_cast<T>(row.rate * (row.rate * (sums[P + q] / width)));
  }
  const T rate = static_cast<T>(row.rate);
  for_weights(args, i, [&](index_t begin, index_t end, auto weights) FF_INLINE_LAMBDA {
    for_vectors<T>(begin, end, [&](index_t j, auto lanes) FF_INLINE_LAMBDA {
      const Vec<T> centred = row.centred(j, lanes), scale = weights.weight(j, lanes) * rate;
      FF_UNROLL
      for (int q = 0; q < P; ++q) {
        const Vec<T> tangent = lanes.read(v[q] + j, Vec<T>{}) - origin[q] - mean[q];
        lanes.write(y[q] + j, scale * (tangent - centred * slope[q]));
      }
    });
  });
}

template <typename T>
FF_INLINE void write_primal(const DualNormArgs<T>& args, const Row<T>& row, index_t i) {
  const T rate = static_cast<T>(row.rate);
  for_weights(args, i, [&](index_t begin, index_t end, auto weights) FF_INLINE_LAMBDA {
    for_vectors<T>(begin, end, [&](index_t j, auto lanes) FF_INLINE_LAMBDA {
      const Vec<T> normal = row.centred(j, lanes) * rate;
      lanes.write(row.y + j, weights.weight(j, lanes) * normal + weights.bias(j, lanes));
    });
  });
}

}  // namespace

template <typename T>
void dual_norm_rows(const DualNormArgs<T>& args, index_t begin, index_t end) {
  for (index_t i = begin; i < end; ++i) {
    const Row<T> row = row_of(args, i);
    index_t p = 1;
    for (; p + kTangents <= args.tangents + 1; p += kTangents) {
      write_tangents<T, kTangents>(args, row, i, p);
    }
    for (; p <= args.tangents; ++p) write_tangents<T, 1>(args, row, i, p);
    write_primal(args, row, i);
  }
}

template void dual_norm_rows(const DualNormArgs<float>&, index_t, index_t);
template void dual_norm_rows(const DualNormArgs<double>&, index_t, index_t);

}  // namespace fisherfast::FF_SIMD_NAMESPACE
