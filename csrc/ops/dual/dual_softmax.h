// Softmax or log-softmax of a dual buffer along one dimension.
//
//   s = softmax(x[0]);   y[0] = s,       y[p] = s (x[p] - sum(s x[p]))
//   log:                 y[0] = log s,   y[p] = x[p] - sum(s x[p])
//
// A row of -inf alone gives NaN, as in PyTorch.
#pragma once

#include "core/fields.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

template <typename T>
struct DualSoftmaxArgs {
  const T* x;            // [1 + P, outer, width, inner], each slice contiguous
  T* y;                  // out [1 + P, outer, width, inner], contiguous; may be x itself
  index_t slice_stride;  // of x, in numbers
  index_t tangents;      // P
  index_t outer;
  index_t width;  // numbers that are summed over
  index_t inner;
  bool log;

  FF_FIELDS(x, y, slice_stride, tangents, outer, width, inner, log)
};

// Cost: reads and writes (1 + P) outer width inner numbers once from memory when a row and its
// tangents fit into the caches. Same bits for any number of threads.
template <typename T>
void dual_softmax_cpu(const DualSoftmaxArgs<T>& args, int threads);

template <typename T>
void dual_softmax_cuda(const DualSoftmaxArgs<T>& args, int device, void* stream);

// CPU, one instruction set: groups [begin, end) of the outer x ceil(inner / lanes), each of as many
// neighbouring rows as a vector has lanes, or one contiguous row where inner is 1. A row is always
// in the same group, and so has the same bits.
FF_DECLARE_SIMD(template <typename T> void dual_softmax_groups(const DualSoftmaxArgs<T>& args,
                                                               index_t begin, index_t end);)

}  // namespace fisherfast
