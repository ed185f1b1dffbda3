// Panels: rows of numbers in blocks of two vectors of columns, and the product of two panels.
//
// Number (row, column) of a panel is at row * kPanel + column. One panel is a copy of a few columns
// that is read from the first to the last byte: no strides, no conflicts in the caches. For the
// sources that are compiled once per instruction set.
#pragma once

#include "core/simd/simd.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

template <typename T>
constexpr index_t kPanel = 2 * kLanes<T>;

// Rows of the product in registers: 16 accumulators where there are 32 registers, 8 where there
// are 16.
constexpr int kProductRows = FF_SIMD_BYTES == 64 ? 8 : 4;

// tile[r] = sum_n left[n * stride + r] * right row n, r < kProductRows; the first kVectors vectors
// of the right rows.
template <typename T, int kVectors>
FF_INLINE void multiply_tile(Vec<T> (&tile)[kProductRows][2], const T* left, index_t stride,
                             const T* right, index_t count) {
  FF_UNROLL
  for (int r = 0; r < kProductRows; ++r) tile[r][0] = tile[r][1] = Vec<T>{};
  for (index_t n = 0; n < count; ++n) {
    const Vec<T> low = load(right + n * kPanel<T>);
    const Vec<T> high = kVectors == 2 ? load(right + n * kPanel<T> + kLanes<T>) : Vec<T>{};
    FF_UNROLL
    for (int r = 0; r < kProductRows; ++r) {
      const T factor = left[n * stride + r];
      tile[r][0] += low * factor;
      if constexpr (kVectors == 2) tile[r][1] += high * factor;
    }
  }
}

// The part of a symmetric matrix [size, size] that a product of panels is added to: rows from
// `start` on, the lower triangle. A row is `stride` numbers after the one before.
struct Triangle {
  double* matrix;
  index_t size;
  index_t start;
  index_t stride;
};

// matrix (rows of panel `row_panel`, columns of `column_panel`) += left^T right.
template <typename T>
FF_INLINE void add_panel_product(const Triangle& triangle, index_t row_panel, index_t column_panel,
                                 const T* left, const T* right, index_t count) {
  Vec<T> tile[kProductRows][2];
  T numbers[kPanel<T>];
  const index_t first_column = column_panel * kPanel<T>;
  for (index_t r0 = 0; r0 < kPanel<T>; r0 += kProductRows) {
    const index_t first_row = row_panel * kPanel<T> + r0;
    if (first_row >= triangle.size) return;
    if (first_row + kProductRows <= triangle.start) continue;
    if (triangle.size - first_column <= kLanes<T>) {
      multiply_tile<T, 1>(tile, left + r0, kPanel<T>, right, count);
    } else {
      multiply_tile<T, 2>(tile, left + r0, kPanel<T>, right, count);
    }
    for (int r = 0; r < kProductRows; ++r) {
      const index_t row = first_row + r;
      if (row < triangle.start || row >= triangle.size) continue;
      store(numbers, tile[r][0]);
      store(numbers + kLanes<T>, tile[r][1]);
      double* const to = triangle.matrix + row * triangle.stride + first_column;
      const index_t last = row + 1 - first_column < kPanel<T> ? row + 1 - first_column : kPanel<T>;
      for (index_t c = 0; c < last; ++c) to[c] += static_cast<double>(numbers[c]);
    }
  }
}

}  // namespace
}  // namespace fisherfast::FF_SIMD_NAMESPACE
