// Features of a few hundred samples, panel by panel, and the products of two panels.
#include "ops/moments/lift_moments.h"

#include "core/simd/panels.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

// Columns of a panel that are raw activations: [0, raw) of it, and where features end.
template <typename T>
FF_INLINE index_t raw_columns(const LiftMomentsArgs<T>& args, index_t panel) {
  const index_t left = args.dim - panel * kPanel<T>;
  return left < 0 ? 0 : left < kPanel<T> ? left : kPanel<T>;
}
template <typename T>
FF_INLINE index_t used_columns(const LiftMomentsArgs<T>& args, index_t panel) {
  const index_t left = args.dim + args.lifted - panel * kPanel<T>;
  return left < kPanel<T> ? left : kPanel<T>;
}

// A number of the lift by column of a panel: of bias or pilot, zero for columns without lift.
template <typename T>
FF_INLINE void panel_values(const LiftMomentsArgs<T>& args, index_t panel, const T* values,
                            T (&out)[kPanel<T>]) {
  const index_t raw = raw_columns(args, panel), used = used_columns(args, panel);
  for (index_t c = 0; c < kPanel<T>; ++c) {
    out[c] = c >= raw && c < used ? values[panel * kPanel<T> + c - args.dim] : 0;
  }
}

// The activation of one vector, about its pilot.
template <typename T>
FF_INLINE Vec<T> activate(Vec<T> projected, Vec<T> bias, Vec<T> pilot, T slope) {
  const Vec<T> z = projected + bias;
  return (z > T(0) ? z : slope * z) - pilot;
}

// Adds a row of features to the sums of its fold, columns [from, to) of the panel.
template <typename T>
FF_INLINE void add_sums(const T* row, double* sums, index_t from, index_t to) {
  for (index_t c = from; c < to; ++c) sums[c] += static_cast<double>(row[c]);
}

}  // namespace

template <typename T>
void lift_pack_weights(const LiftMomentsArgs<T>& args, index_t panel, T* packed) {
  const index_t raw = raw_columns(args, panel), used = used_columns(args, panel);
  for (index_t m = 0; m < args.dim; ++m) {
    for (index_t c = 0; c < kPanel<T>; ++c) {
      const index_t row = panel * kPanel<T> + c - args.dim;
      packed[m * kPanel<T> + c] = c >= raw && c < used ? args.weight[row * args.dim + m] : 0;
    }
  }
}

template <typename T>
void lift_features(const LiftMomentsArgs<T>& args, index_t panel, const T* packed, index_t begin,
                   index_t count, T* features) {
  constexpr int W = kLanes<T>;
  const index_t raw = raw_columns(args, panel), used = used_columns(args, panel);
  const index_t first_column = panel * kPanel<T>;
  const index_t known = args.start - first_column;
  const index_t from = known < 0 ? 0 : known < used ? known : used;
  alignas(64) T bias[kPanel<T>], pilot[kPanel<T>];
  panel_values(args, panel, args.bias, bias);
  panel_values(args, panel, args.pilot, pilot);
  const Vec<T> bias_low = load(bias), bias_high = load(bias + W);
  const Vec<T> pilot_low = load(pilot), pilot_high = load(pilot + W);
  const auto row_of = [&](index_t n) { return args.z + (begin + n) * args.row_stride; };
  index_t segment = 0;  // of the row that is finished next
  const auto finish = [&](index_t n, Vec<T> low, Vec<T> high) {
    T* const row = features + n * kPanel<T>;
    store(row, activate<T>(low, bias_low, pilot_low, args.slope));
    store(row + W, activate<T>(high, bias_high, pilot_high, args.slope));
    const T* z = row_of(n) + first_column;
    for (index_t c = 0; c < raw; ++c) row[c] = z[c];
    for (index_t c = used; c < kPanel<T>; ++c) row[c] = 0;
    while (segment + 1 < args.folds && begin + n >= args.offsets[segment + 1]) ++segment;
    const index_t fold = fold_of_segment(segment, args.folds);
    add_sums(row, args.sums + fold * args.size + first_column, from, used);
  };
  if (raw == kPanel<T>) {  // nothing is lifted here
    for (index_t n = 0; n < count; ++n) finish(n, Vec<T>{}, Vec<T>{});
    return;
  }
  index_t n = 0;
  for (; n + kProductRows <= count; n += kProductRows) {
    Vec<T> low[kProductRows] = {}, high[kProductRows] = {};
    const T* rows[kProductRows];
    for (int r = 0; r < kProductRows; ++r) rows[r] = row_of(n + r);
    for (index_t m = 0; m < args.dim; ++m) {
      const Vec<T> weight_low = load(packed + m * kPanel<T>);
      const Vec<T> weight_high = load(packed + m * kPanel<T> + W);
      FF_UNROLL
      for (int r = 0; r < kProductRows; ++r) {
        low[r] += weight_low * rows[r][m];
        high[r] += weight_high * rows[r][m];
      }
    }
    FF_UNROLL
    for (int r = 0; r < kProductRows; ++r) finish(n + r, low[r], high[r]);
  }
  for (; n < count; ++n) {
    Vec<T> low{}, high{};
    const T* z = row_of(n);
    for (index_t m = 0; m < args.dim; ++m) {
      low += load(packed + m * kPanel<T>) * z[m];
      high += load(packed + m * kPanel<T> + W) * z[m];
    }
    finish(n, low, high);
  }
}

template <typename T>
void lift_products(const LiftMomentsArgs<T>& args, index_t half, index_t row_panel,
                   index_t column_panel, const T* left, const T* right, index_t count) {
  const index_t size = args.dim + args.lifted;
  const Triangle triangle{args.cross + half * args.size * args.size, size, args.start, args.size};
  add_panel_product<T>(triangle, row_panel, column_panel, left, right, count);
}

#define FF_INSTANTIATE(T)                                                                          \
  template void lift_pack_weights(const LiftMomentsArgs<T>&, index_t, T*);                         \
  template void lift_features(const LiftMomentsArgs<T>&, index_t, const T*, index_t, index_t, T*); \
  template void lift_products(const LiftMomentsArgs<T>&, index_t, index_t, index_t, const T*,      \
                              const T*, index_t);
FF_INSTANTIATE(float)
FF_INSTANTIATE(double)
#undef FF_INSTANTIATE

}  // namespace fisherfast::FF_SIMD_NAMESPACE
