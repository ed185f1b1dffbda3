// Max pooling of a dual buffer: the largest primal of each window, and the tangents at its place.
//
//   i(o) = argmax of x[0] over window o (the first of equals; of NaN the last)
//   y[:, o] = x[:, i(o)]
//
// One to three dimensions: missing ones have size, kernel, stride and dilation 1 and padding 0.
#pragma once

#include "core/fields.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

constexpr int kPoolDims = 3;

template <typename T>
struct DualPoolArgs {
  const T* x;            // [1 + P, outer, in_0, in_1, in_2, inner], each slice contiguous
  T* y;                  // out [1 + P, outer, out_0, out_1, out_2, inner], contiguous
  index_t slice_stride;  // of x, in numbers
  index_t tangents;      // P
  index_t outer;         // n C, or n for channels-last
  index_t inner;         // 1, or C for channels-last
  index_t in[kPoolDims];
  index_t out[kPoolDims];
  index_t kernel[kPoolDims];
  index_t stride[kPoolDims];
  index_t padding[kPoolDims];  // every window reaches beyond it
  index_t dilation[kPoolDims];

  FF_FIELDS(x, y, slice_stride, tangents, outer, inner, in, out, kernel, stride, padding, dilation)
};

// Cost: writes the results, and reads each number once from memory; on the CPU, from the caches, as
// often as it is in a window. Same bits for any number of threads.
template <typename T>
void dual_pool_cpu(const DualPoolArgs<T>& args, int threads);

template <typename T>
void dual_pool_cuda(const DualPoolArgs<T>& args, int device, void* stream);

// CPU, one instruction set: rows [begin, end) of the outer x out_0 x out_1.
FF_DECLARE_SIMD(template <typename T>
                void dual_pool_rows(const DualPoolArgs<T>& args, index_t begin, index_t end);)

}  // namespace fisherfast
