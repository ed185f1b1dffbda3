// Random lift: the activation of the random features and their sums by fold, in one pass.
//
//   features_ij = leaky_relu(projected_ij + bias_j) - pilot_j     slope below zero: `slope`
//   sums_gj     = sum of features_ij over rows i with (first + i) mod G = g
//
// The matrix product that gives `projected` stays with torch.
#pragma once

#include "core/fields.h"
#include "core/lifted_feature.h"
#include "core/types.h"

namespace fisherfast {

template <typename T>
struct LiftArgs {
  const T* projected;  // [n, k], unit column stride
  index_t row_stride;  // of projected, in elements
  const T* bias;       // [k]
  const T* pilot;      // [k]
  T* features;         // out [n, k], contiguous; may be `projected` itself when that is contiguous
  double* sums;        // out [G, k]
  index_t rows;        // n
  index_t dim;         // k features
  index_t groups;      // G
  index_t first;       // number of rows dealt before this call
  T slope;

  FF_FIELDS(projected, row_stride, bias, pilot, features, sums, rows, dim, groups, first, slope)
};

// Cost: reads and writes n k numbers. Same bits for any number of threads.
template <typename T>
void lift_cpu(const LiftArgs<T>& args, int threads);

template <typename T>
void lift_cuda(const LiftArgs<T>& args, int device, void* stream);

}  // namespace fisherfast
