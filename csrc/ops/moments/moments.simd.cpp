// Panels of rows about the pilot, and the products of two panels.
#include "ops/moments/moments.h"

#include "core/simd/panels.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

// -1 in the lanes of columns that are used, 0 in the others.
template <typename T>
FF_INLINE Mask<T> used_lanes(index_t used) {
  Mask<T> mask;
  for (int lane = 0; lane < kLanes<T>; ++lane) mask[lane] = lane < used ? -1 : 0;
  return mask;
}

}  // namespace

template <typename T>
void moments_centre(const MomentsArgs<T>& args, const RowList& rows, index_t panel, T* centred,
                    double* sums) {
  constexpr int W = kLanes<T>;
  const index_t first = panel * kPanel<T>;
  const index_t used = args.dim - first < kPanel<T> ? args.dim - first : kPanel<T>;
  alignas(64) T pilot[kPanel<T>] = {};
  alignas(64) double total[kPanel<T>] = {};
  for (index_t c = 0; args.pilot != nullptr && c < used; ++c) pilot[c] = args.pilot[first + c];
  const Vec<T> pilot_low = load(pilot), pilot_high = load(pilot + W);
  const Mask<T> low_used = used_lanes<T>(used), high_used = used_lanes<T>(used - W);
  // reading past the end of a row is safe unless it is the last row
  const T* const last = args.x + (args.rows - 1) * args.row_stride + args.dim - kPanel<T>;
  for (index_t n = 0; n < rows.count; ++n) {
    const index_t row = rows.list == nullptr ? rows.first + n : rows.list[rows.first + n];
    const T* x = args.x + row * args.row_stride + first;
    T* const to = centred + n * kPanel<T>;
    if (x <= last) {
      store(to, low_used ? load(x) - pilot_low : Vec<T>{});
      store(to + W, high_used ? load(x + W) - pilot_high : Vec<T>{});
    } else {
      for (index_t c = 0; c < used; ++c) to[c] = x[c] - pilot[c];
      for (index_t c = used; c < kPanel<T>; ++c) to[c] = 0;
    }
    const index_t vectors = used <= W ? W : kPanel<T>;
    for (index_t c = 0; c < vectors; ++c) total[c] += static_cast<double>(to[c]);
  }
  for (index_t c = 0; c < used; ++c) sums[first + c] += total[c];
}

template <typename T>
void moments_products(index_t dim, index_t row_panel, index_t column_panel, const T* left,
                      const T* right, index_t count, double* cross) {
  add_panel_product<T>(Triangle{cross, dim, 0, dim}, row_panel, column_panel, left, right, count);
}

#define FF_INSTANTIATE(T)                                                                    \
  template void moments_centre(const MomentsArgs<T>&, const RowList&, index_t, T*, double*); \
  template void moments_products(index_t, index_t, index_t, const T*, const T*, index_t, double*);
FF_INSTANTIATE(float)
FF_INSTANTIATE(double)
#undef FF_INSTANTIATE

}  // namespace fisherfast::FF_SIMD_NAMESPACE
