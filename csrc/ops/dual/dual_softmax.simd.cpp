// The largest number of a row, then one pass for the sum of e = exp(u - largest) and, with it, the
// sums of e v of as many tangents as kTangents, then one that writes these tangents. Between the
// two, softmax keeps e in y[0]; log-softmax takes the exponential anew where there are more
// tangents. The primal is written last: y may be x.
//
// Rows that are contiguous go along the lanes; others go a row a lane, with the neighbours in
// memory.
#include "ops/dual/dual_softmax.h"

#include "core/simd/simd.h"
#include "core/simd/simd_math.h"
#include "core/simd/simd_row.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

constexpr int kTangents = 4;

template <typename T>
FF_INLINE Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

template <typename T>
inline constexpr T kMinusInfinity = -std::numeric_limits<T>::infinity();

// One contiguous row.
template <typename T>
struct ContiguousRow {
  index_t width;

  // Calls body(offset, lanes) for all numbers.
  template <typename Body>
  FF_INLINE void for_each(const Body& body) const {
    for_vectors<T>(0, width, body);
  }
  FF_INLINE Vec<T> largest(const T* x) const {
    constexpr int W = kLanes<T>, kChains = 4;  // chains that do not wait for each other
    Vec<T> best[kChains];
    for (Vec<T>& one : best) one = splat(kMinusInfinity<T>);
    index_t j = 0;
    for (; j + kChains * W <= width; j += kChains * W) {
      FF_UNROLL
      for (int c = 0; c < kChains; ++c) best[c] = larger<T>(load(x + j + c * W), best[c]);
    }
    for_vectors<T>(j, width, [&](index_t first, auto lanes) FF_INLINE_LAMBDA {
      best[0] = larger<T>(lanes.read(x + first, best[0]), best[0]);
    });
    const Vec<T> low = larger<T>(best[0], best[1]), high = larger<T>(best[2], best[3]);
    return splat(largest_of_lanes<T>(larger<T>(low, high)));
  }
  // The K sums of body(offset, lanes, terms).
  template <int K>
  struct Sums {
    double sum[K];
    FF_INLINE double get(int k, int) const { return sum[k]; }
  };
  template <int K, typename Body>
  FF_INLINE Sums<K> sums(const Body& body) const {
    Sums<K> sums;
    sum_terms<T, K>(width, sums.sum, body);
    return sums;
  }
  // One number computed from the sums of each row, one row a lane.
  template <typename Function>
  FF_INLINE Vec<T> of_row(const Function& function) const {
    return splat(static_cast<T>(function(0)));
  }
};

// Up to `lanes` rows whose numbers lie `inner` apart, next to each other.
template <typename T, typename Lanes>
struct RowLanes {
  index_t width, inner;
  Lanes lanes;

  template <typename Body>
  FF_INLINE void for_each(const Body& body) const {
    for (index_t j = 0; j < width; ++j) body(j * inner, lanes);
  }
  FF_INLINE Vec<T> largest(const T* x) const {
    Vec<T> best = splat(kMinusInfinity<T>);
    for_each([&](index_t offset, auto some)
                 FF_INLINE_LAMBDA { best = larger<T>(some.read(x + offset, Vec<T>{}), best); });
    return best;
  }
  template <int K>
  struct Sums {
    double sum[K][kLanes<T>];
    FF_INLINE double get(int k, int lane) const { return sum[k][lane]; }
  };
  template <int K, typename Body>
  FF_INLINE Sums<K> sums(const Body& body) const {
    Sums<K> sums{};
    for (index_t begin = 0; begin < width; begin += kSumVectors) {
      const index_t end = begin + kSumVectors < width ? begin + kSumVectors : width;
      Vec<T> sum[K] = {}, terms[K];
      for (index_t j = begin; j < end; ++j) {
        body(j * inner, lanes, terms);
        FF_UNROLL
        for (int k = 0; k < K; ++k) sum[k] += terms[k];
      }
      for (int k = 0; k < K; ++k) {
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          sums.sum[k][lane] += static_cast<double>(sum[k][lane]);
        }
      }
    }
    return sums;
  }
  template <typename Function>
  FF_INLINE Vec<T> of_row(const Function& function) const {
    Vec<T> value;
    for (int lane = 0; lane < kLanes<T>; ++lane) value[lane] = static_cast<T>(function(lane));
    return value;
  }
};

// What the passes share: rows from number `first` of each slice.
template <typename T, typename Rows>
struct Pass {
  const DualSoftmaxArgs<T>& args;
  Rows rows;
  const T* x;  // of the primal
  T* y;
  index_t slice;  // of y
  Vec<T> largest;
  Vec<T> total;  // sum of e; its logarithm for log-softmax

  FF_INLINE const T* tangent(index_t p) const { return x + p * args.slice_stride; }
  template <typename Lanes>
  FF_INLINE Vec<T> exponent(index_t offset, Lanes lanes) const {
    return exponential<T>(lanes.read(x + offset, splat(kMinusInfinity<T>)) - largest).exp;
  }
};

// Tangents [p, p + P), p from 1; those from p = 1 bring the sum of e with them. P may be 0.
template <typename T, int P, typename Rows>
FF_INLINE void write_tangents(Pass<T, Rows>& pass, index_t p) {
  const DualSoftmaxArgs<T>& args = pass.args;
  const T* v[P + 1];
  T* y[P + 1];
  for (int q = 0; q < P; ++q) {
    v[q] = pass.tangent(p + q);
    y[q] = pass.y + (p + q) * pass.slice;
  }
  const bool keep = !args.log, kept = keep && p > 1;
  const auto sums =
      pass.rows.template sums<P + 1>([&](index_t j, auto lanes, auto& terms) FF_INLINE_LAMBDA {
        terms[P] = kept ? lanes.read(pass.y + j, Vec<T>{}) : pass.exponent(j, lanes);
        if (keep && !kept) lanes.write(pass.y + j, terms[P]);
        FF_UNROLL
        for (int q = 0; q < P; ++q) terms[q] = terms[P] * lanes.read(v[q] + j, Vec<T>{});
      });
  const Vec<T> rate = pass.rows.of_row([&](int lane) { return 1 / sums.get(P, lane); });
  if (p == 1) {
    pass.total = args.log
                     ? pass.rows.of_row([&](int lane) { return __builtin_log(sums.get(P, lane)); })
                     : rate;
  }
  Vec<T> mean[P + 1];
  for (int q = 0; q < P; ++q) {
    mean[q] = pass.rows.of_row([&](int lane) { return sums.get(q, lane) / sums.get(P, lane); });
  }
  if (P == 0) return;
  if (args.log) {
    pass.rows.for_each([&](index_t j, auto lanes) FF_INLINE_LAMBDA {
      FF_UNROLL
      for (int q = 0; q < P; ++q) lanes.write(y[q] + j, lanes.read(v[q] + j, Vec<T>{}) - mean[q]);
    });
  } else {
    pass.rows.for_each([&](index_t j, auto lanes) FF_INLINE_LAMBDA {
      const Vec<T> softmax = lanes.read(pass.y + j, Vec<T>{}) * rate;
      FF_UNROLL
      for (int q = 0; q < P; ++q) {
        lanes.write(y[q] + j, softmax * (lanes.read(v[q] + j, Vec<T>{}) - mean[q]));
      }
    });
  }
}

template <typename T, typename Rows>
FF_INLINE void write_rows(const DualSoftmaxArgs<T>& args, const Rows& rows, index_t first) {
  const index_t slice = args.outer * args.width * args.inner;
  Pass<T, Rows> pass{args, rows, args.x + first, args.y + first, slice, {}, {}};
  pass.largest = rows.largest(pass.x);
  index_t p = 1;
  for (; p + kTangents <= args.tangents + 1; p += kTangents) write_tangents<T, kTangents>(pass, p);
  for (; p <= args.tangents; ++p) write_tangents<T, 1>(pass, p);
  if (args.tangents == 0) write_tangents<T, 0>(pass, p);
  if (args.log) {
    rows.for_each([&](index_t j, auto lanes) FF_INLINE_LAMBDA {
      lanes.write(pass.y + j, lanes.read(pass.x + j, Vec<T>{}) - pass.largest - pass.total);
    });
  } else {
    rows.for_each([&](index_t j, auto lanes) FF_INLINE_LAMBDA {
      lanes.write(pass.y + j, lanes.read(pass.y + j, Vec<T>{}) * pass.total);
    });
  }
}

}  // namespace

template <typename T>
void dual_softmax_groups(const DualSoftmaxArgs<T>& args, index_t begin, index_t end) {
  constexpr int W = kLanes<T>;
  if (args.inner == 1) {
    const ContiguousRow<T> row{args.width};
    for (index_t i = begin; i < end; ++i) write_rows(args, row, i * args.width);
    return;
  }
  const index_t groups = (args.inner + W - 1) / W;
  for (index_t group = begin; group < end; ++group) {
    const index_t column = group % groups * W, left = args.inner - column;
    const index_t first = group / groups * args.width * args.inner + column;
    if (left >= W) {
      write_rows(args, RowLanes<T, WholeVector<T>>{args.width, args.inner, {}}, first);
    } else {
      write_rows(args, RowLanes<T, PartVector<T>>{args.width, args.inner, {left}}, first);
    }
  }
}

template void dual_softmax_groups(const DualSoftmaxArgs<float>&, index_t, index_t);
template void dual_softmax_groups(const DualSoftmaxArgs<double>&, index_t, index_t);

}  // namespace fisherfast::FF_SIMD_NAMESPACE
