// Inner products of the gradients of samples, from what their layer multiplied:
//
//   K[i, c, j, e] = sum_ts (a_it . a'_js) (b_ict . b'_jes) = <G_ic, G'_je>
//
// where G_ic = sum_t b_ict a_it^T, without these [M, D], and without the products of all positions
// in memory. Products of T are summed in T over at most kGramDepth entries of D and kGramPositions
// positions s, times 2 entries of M and kGramRows positions t, and then in double.
#pragma once

#include "core/fields.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

// The samples on one side of the product; n samples, each with C columns at T positions.
template <typename T>
struct GramSide {
  const T* a;            // [n, T, D], any strides
  index_t a_strides[3];  // in elements, not negative
  const T* b;            // [n, C, T, M], any strides
  index_t b_strides[4];
  index_t rows;       // n
  index_t columns;    // C
  index_t positions;  // T
};

template <typename T>
struct GradientGramArgs {
  GramSide<T> left;
  GramSide<T> right;  // of a symmetric product the same as `left`
  double* gram;       // out [n, C, n', C']; aliases nothing
  index_t inputs;     // D
  index_t outputs;    // M
  bool symmetric;     // left and right are the same: half of the pairs are computed

  FF_FIELDS(left.a, left.a_strides, left.b, left.b_strides, left.rows, left.columns, left.positions,
            right.a, right.a_strides, right.b, right.b_strides, right.rows, right.columns,
            right.positions, gram, inputs, outputs, symmetric)
};

constexpr index_t kGramDepth = 256;      // entries of D whose products are summed in T
constexpr index_t kGramPositions = 256;  // positions s of a' and
constexpr index_t kGramRows = 128;       // positions t of a, whose products a . a' are in cache

// Cost of one pair of samples: T T' (D + C' M) + C C' T M multiply-adds. The same bits for any
// number of threads, and for a pair whatever the others are.
template <typename T>
void gradient_gram_cpu(const GradientGramArgs<T>& args, int threads);

template <typename T>
void gradient_gram_cuda(const GradientGramArgs<T>& args, int device, void* stream);

// The layout of a sample in panels of two vectors of columns (core/simd/panels.h): a as [D, T],
// then each column of b as [T, M]. No member functions: several instruction sets compile this
// header.
struct GramPanels {
  index_t inputs, outputs, positions, columns;  // D, M, T, C
  index_t panel;                                // numbers in a row of a panel
  index_t filled;       // rows of b, with zeros up to a multiple of kGramFilled
  index_t inputs_size;  // numbers of a, of one column of b, of all
  index_t column_size;
  index_t size;
};
constexpr index_t kGramFilled = 8;

inline GramPanels gram_panels(index_t inputs, index_t outputs, index_t positions, index_t columns,
                              index_t panel) {
  GramPanels panels{inputs, outputs, positions, columns, panel, 0, 0, 0, 0};
  panels.filled = ceil_div(positions, kGramFilled) * kGramFilled;
  panels.inputs_size = ceil_div(positions, panel) * inputs * panel;
  panels.column_size = ceil_div(outputs, panel) * panels.filled * panel;
  panels.size = panels.inputs_size + columns * panels.column_size;
  return panels;
}

// Numbers of T in the scratch memory of `gradient_gram_pair`: products of positions, and one vector
// a column; aligned to 64 bytes.
inline index_t gradient_gram_scratch(index_t panel, index_t columns) {
  return kGramRows * (kGramPositions + kGramFilled) + 2 * panel * (columns + 1);
}

// CPU, one instruction set: a sample copied into panels; and the products of a pair of samples,
// [C, C'] with rows `stride` apart.
FF_DECLARE_SIMD(template <typename T>
                void gradient_gram_pack(const GramSide<T>& side, const GramPanels& panels,
                                        index_t sample, T* to);
                template <typename T>
                void gradient_gram_pair(const GramPanels& left_panels,
                                        const GramPanels& right_panels, const T* left,
                                        const T* right, T* scratch, double* gram, index_t stride);)

}  // namespace fisherfast
