// A pair of samples: S = a a'^T for a block of positions is computed from panels and kept in cache;
// tiles of S b' are made in registers and multiplied by b entry by entry, for all columns of b.
#include "ops/gradients/gradient_gram.h"

#include "core/simd/panels.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

// Columns of a matrix, copied into panels; `filled` >= rows, with zeros after the last row and the
// last column.
template <typename T>
void pack_panels(const T* from, index_t rows, index_t filled, index_t columns, index_t row_stride,
                 index_t column_stride, T* to) {
  constexpr int W = kLanes<T>;
  for (index_t first = 0; first < columns; first += kPanel<T>, to += filled * kPanel<T>) {
    const index_t used = columns - first < kPanel<T> ? columns - first : kPanel<T>;
    const T* const start = from + first * column_stride;
    index_t row = 0;
    if (used == kPanel<T> && column_stride == 1) {
      for (; row < rows; ++row) {
        store(to + row * kPanel<T>, load(start + row * row_stride));
        store(to + row * kPanel<T> + W, load(start + row * row_stride + W));
      }
    } else if (used == kPanel<T> && row_stride == 1) {
      for (; row + W <= rows; row += W) {
        for (int half = 0; half < kPanel<T>; half += W) {
          Vec<T> square[W];
          for (int c = 0; c < W; ++c) square[c] = load(start + row + (half + c) * column_stride);
          transpose<T>(square);
          for (int r = 0; r < W; ++r) store(to + (row + r) * kPanel<T> + half, square[r]);
        }
      }
    }
    for (; row < rows; ++row) {
      T* const line = to + row * kPanel<T>;
      for (index_t c = 0; c < used; ++c) line[c] = start[row * row_stride + c * column_stride];
      for (index_t c = used; c < kPanel<T>; ++c) line[c] = 0;
    }
    for (; row < filled; ++row) {
      for (index_t c = 0; c < kPanel<T>; ++c) to[row * kPanel<T> + c] = 0;
    }
  }
}

// A block of positions: t in [t, t + rows), s in [s, s + count).
struct Block {
  index_t t, rows, s, count;
};

// products[panel of t][s][t] = a_t . a'_s over the block; rows of s up to a multiple of
// kProductRows.
template <typename T, int kVectors>
FF_INLINE void multiply_inputs(const T* right, const T* left, index_t depth, T* to) {
  Vec<T> tile[kProductRows][2];
  for (index_t d = 0; d < depth; d += kGramDepth) {
    const index_t count = depth - d < kGramDepth ? depth - d : kGramDepth;
    multiply_tile<T, kVectors>(tile, right + d * kPanel<T>, kPanel<T>, left + d * kPanel<T>, count);
    for (int r = 0; r < kProductRows; ++r) {
      T* const line = to + r * kPanel<T>;
      for (int v = 0; v < 2; ++v) {
        T* const place = line + v * kLanes<T>;
        store(place, d == 0 ? tile[r][v] : load(place) + tile[r][v]);
      }
    }
  }
}

template <typename T>
FF_INLINE void multiply_block(const GramPanels& panels, const Block& block, const T* left,
                              const T* right, index_t lines, T* products) {
  const index_t depth = panels.inputs;
  for (index_t t = 0; t < block.rows; t += kPanel<T>) {
    const T* const of_t = left + (block.t + t) * depth;  // (t / kPanel) panels of depth rows
    for (index_t s = 0; s < block.count; s += kProductRows) {
      const index_t place = block.s + s, inside = place % kPanel<T>;
      const T* const of_s = right + (place - inside) * depth + inside;
      T* const to = products + t * lines + s * kPanel<T>;
      if (block.rows - t <= kLanes<T>) {
        multiply_inputs<T, 1>(of_s, of_t, depth, to);
      } else {
        multiply_inputs<T, 2>(of_s, of_t, depth, to);
      }
    }
  }
}

template <typename T>
FF_INLINE double sum_of_lanes(Vec<T> vector) {
  double sum = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) sum += static_cast<double>(vector[lane]);
  return sum;
}

// sums[c] += sum over the block and the panel of (S b')_t . b_ct, for one panel of b'.
template <typename T, int kVectors>
void add_columns(const Block& block, const T* products, index_t lines, const T* right,
                 const T* left, index_t column_size, index_t columns, Vec<T>* sums) {
  Vec<T> tile[kProductRows][2];
  for (index_t t = 0; t < block.rows; t += kProductRows) {
    const index_t inside = t % kPanel<T>;
    multiply_tile<T, kVectors>(tile, products + (t - inside) * lines + inside, kPanel<T>, right,
                               block.count);
    for (index_t c = 0; c < columns; ++c) {
      const T* const line = left + c * column_size + t * kPanel<T>;
      Vec<T> low = sums[c], high = {};
      FF_UNROLL
      for (int r = 0; r < kProductRows; ++r) {
        low += tile[r][0] * load(line + r * kPanel<T>);
        if constexpr (kVectors == 2) high += tile[r][1] * load(line + r * kPanel<T> + kLanes<T>);
      }
      sums[c] = low + high;
    }
  }
}

}  // namespace

template <typename T>
void gradient_gram_pack(const GramSide<T>& side, const GramPanels& panels, index_t sample, T* to) {
  const index_t* const a = side.a_strides;
  const index_t* const b = side.b_strides;
  pack_panels(side.a + sample * a[0], panels.inputs, panels.inputs, panels.positions, a[2], a[1],
              to);
  to += panels.inputs_size;
  for (index_t c = 0; c < panels.columns; ++c, to += panels.column_size) {
    pack_panels(side.b + sample * b[0] + c * b[1], panels.positions, panels.filled, panels.outputs,
                b[2], b[3], to);
  }
}

template <typename T>
void gradient_gram_pair(const GramPanels& left_panels, const GramPanels& right_panels,
                        const T* left, const T* right, T* scratch, double* gram, index_t stride) {
  const T* const left_b = left + left_panels.inputs_size;
  const T* const right_b = right + right_panels.inputs_size;
  Vec<T>* const sums = reinterpret_cast<Vec<T>*>(scratch);
  T* const products = scratch + kPanel<T> * (left_panels.columns + 1);
  for (index_t c = 0; c < left_panels.columns; ++c) {
    for (index_t e = 0; e < right_panels.columns; ++e) gram[c * stride + e] = 0;
  }
  Block block;
  for (block.t = 0; block.t < left_panels.positions; block.t += kGramRows) {
    const index_t left_rows = left_panels.positions - block.t;
    block.rows = left_rows < kGramRows ? left_rows : kGramRows;
    for (block.s = 0; block.s < right_panels.positions; block.s += kGramPositions) {
      const index_t left_count = right_panels.positions - block.s;
      block.count = left_count < kGramPositions ? left_count : kGramPositions;
      const index_t lines = (block.count + kProductRows - 1) / kProductRows * kProductRows;
      multiply_block(left_panels, block, left, right, lines, products);
      for (index_t e = 0; e < right_panels.columns; ++e) {
        for (index_t c = 0; c < left_panels.columns; ++c) sums[c] = Vec<T>{};
        for (index_t m = 0; m < left_panels.outputs; m += kPanel<T>) {
          const T* const of_right = right_b + e * right_panels.column_size +
                                    m * right_panels.filled + block.s * kPanel<T>;
          const T* const of_left = left_b + m * left_panels.filled + block.t * kPanel<T>;
          const index_t size = left_panels.column_size, columns = left_panels.columns;
          if (left_panels.outputs - m <= kLanes<T>) {
            add_columns<T, 1>(block, products, lines, of_right, of_left, size, columns, sums);
          } else {
            add_columns<T, 2>(block, products, lines, of_right, of_left, size, columns, sums);
          }
          for (index_t c = 0; c < columns; ++c) {
            gram[c * stride + e] += sum_of_lanes<T>(sums[c]);
            sums[c] = Vec<T>{};
          }
        }
      }
    }
  }
}

#define FF_INSTANTIATE(T)                                                                        \
  template void gradient_gram_pack(const GramSide<T>&, const GramPanels&, index_t, T*);          \
  template void gradient_gram_pair(const GramPanels&, const GramPanels&, const T*, const T*, T*, \
                                   double*, index_t);
FF_INSTANTIATE(float)
FF_INSTANTIATE(double)
#undef FF_INSTANTIATE

}  // namespace fisherfast::FF_SIMD_NAMESPACE
