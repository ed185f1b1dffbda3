// Moments of random features without storing the features: projection, bias, activation, centring,
// sums by fold and products by half in one pass over the samples. For a sample z
//
//   f       = [z | leaky_relu(weight z + bias) - pilot]      slope below zero: `slope`
//   sums_g += sum of f over the rows of fold g
//   cross_h += sum of f f^T over the rows of half h: those of the folds g = h mod H, lower triangle
//
// Rows are sorted by fold, even folds first: segments s = 0, ..., F - 1 are folds 0, 2, 4, ..., 1,
// 3, ..., so that a half is one run of rows.
//
// Features before `start` are known already: only the sums of the others, and the rows of the cross
// products from `start` on, are added to. Growing a dictionary costs its new columns alone.
// Accumulators may have room for more features: what is after the first d + k is not touched.
#pragma once

#include "core/fields.h"
#include "core/lifted_feature.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

template <typename T>
struct LiftMomentsArgs {
  const T* z;              // [n, d], unit column stride
  index_t row_stride;      // of z, in elements
  const T* weight;         // [k, d], contiguous
  const T* bias;           // [k]
  const T* pilot;          // [k]
  const index_t* offsets;  // [F + 1], row at which each segment begins, and n
  double* sums;            // in and out [F, size], contiguous
  double* cross;           // in and out [H, size, size], contiguous
  void* workspace;         // device only: workspace_bytes(), aligned to 16
  index_t rows;            // n
  index_t dim;             // d raw features
  index_t lifted;          // k lifted features
  index_t folds;           // F
  index_t halves;          // H
  index_t start;           // features known already
  index_t size;            // features that sums and cross have room for, at least d + k
  T slope;

  FF_FIELDS(z, row_stride, weight, bias, pilot, offsets, sums, cross, workspace, rows, dim, lifted,
            folds, halves, start, size, slope)
};  // outputs and workspace alias nothing

// The fold of a segment of rows.
FF_HOST_DEVICE constexpr index_t fold_of_segment(index_t segment, index_t folds) {
  const index_t even = (folds + 1) / 2;
  return segment < even ? 2 * segment : 2 * (segment - even) + 1;
}

// Rows [begin, end).
struct RowRange {
  index_t begin, end;
};

// The rows of half h of H = 1 or 2, within [0, rows) whatever the offsets.
FF_HOST_DEVICE inline RowRange rows_of_half(const index_t* offsets, index_t folds, index_t half,
                                            index_t halves, index_t rows) {
  if (halves == 1) return {0, rows};
  index_t middle = offsets[(folds + 1) / 2];
  middle = middle < 0 ? 0 : middle < rows ? middle : rows;
  return half == 0 ? RowRange{0, middle} : RowRange{middle, rows};
}

// Rows whose products are summed in T on the CPU (64 on the device) before they are added in
// double: the error of a float32 sum of 512 products is at most 512 * 2^-24 = 3e-5 of the sum of
// their magnitudes, 1e-6 typically.
constexpr index_t kLiftTileRows = 512;

// Cost, with K = d + k: n ((K - start) (K + start) / 2 + k d) multiply-adds. Nothing of the size
// [n, K] is held, only tiles of it. Same bits for any number of threads, and on the CPU the same
// whether features are added at once or in several passes over the same rows.
template <typename T>
void lift_moments_cpu(const LiftMomentsArgs<T>& args, int threads);

template <typename T>
index_t workspace_bytes(const LiftMomentsArgs<T>& args);  // compiled with the CUDA kernels

template <typename T>
void lift_moments_cuda(const LiftMomentsArgs<T>& args, int device, void* stream);

// CPU, one instruction set. Features lie in panels of two vectors of columns, row after row:
// number (row, column) of panel p is feature p * panel + column, at row * panel + column.
// Weights are packed alike: number (m, column) of panel p is weight[column - d][m].
FF_DECLARE_SIMD(template <typename T>
                void lift_pack_weights(const LiftMomentsArgs<T>& args, index_t panel, T* packed);
                // Rows begin, begin + 1, ... (count of them) of one panel, and their sums by fold.
                template <typename T>
                void lift_features(const LiftMomentsArgs<T>& args, index_t panel, const T* packed,
                                   index_t begin, index_t count, T* features);
                // cross (row panel, column panel) += left^T right over `count` rows.
                template <typename T>
                void lift_products(const LiftMomentsArgs<T>& args, index_t half, index_t row_panel,
                                   index_t column_panel, const T* left, const T* right,
                                   index_t count);)

}  // namespace fisherfast
