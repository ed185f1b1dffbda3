// An activation on a dual buffer: the value of the primal, the tangents times its derivative.
//
//   z = scale_c x[0] + shift_c,   y[0] = f(z),   y[p] = f'(z) scale_c x[p]
//
// A batch norm in eval mode is a scale and a shift: it is fused with the activation that follows,
// or stands alone with f the identity. The derivative at a kink is PyTorch's.
#pragma once

#include "core/fields.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

// The order is that of fisherfast/ops/_dual_activation.py. Parameters a, b, c in brackets.
enum class Activation : int {
  kIdentity,
  kRelu,
  kLeakyRelu,  // (slope below zero)
  kPrelu,      // slope below zero by channel: DualActivationArgs::slope
  kHardtanh,   // (low, high), ReLU6 too
  kElu,        // (alpha, scale, input scale), SELU and CELU too
  kGelu,
  kGeluTanh,
  kSilu,
  kMish,
  kSoftplus,  // (beta, threshold)
  kSigmoid,
  kTanh,
  kHardswish,
  kHardsigmoid,
};

template <typename T>
struct DualActivationArgs {
  const T* x;             // [1 + P] slices of outer x C x inner numbers
  T* y;                   // out, slices of the same layout; may be x itself with equal strides
  const T* scale;         // [C] or null: one
  const T* shift;         // [C] or null: zero
  const T* slope;         // [C] for kPrelu, else null
  index_t slice_stride;   // of x, in numbers
  index_t output_stride;  // of y, in numbers
  index_t tangents;       // P
  index_t outer;
  index_t channels;  // C; 1 when scale, shift and slope are null
  index_t inner;     // 1 for channels-last
  Activation kind;
  T a, b, c;

  FF_FIELDS(x, y, scale, shift, slope, slice_stride, output_stride, tangents, outer, channels,
            inner, kind, a, b, c)
};

// Cost: reads and writes (1 + P) outer C inner numbers once; f and f' once for each primal.
template <typename T>
void dual_activation_cpu(const DualActivationArgs<T>& args, int threads);

template <typename T>
void dual_activation_cuda(const DualActivationArgs<T>& args, int device, void* stream);

// CPU, one instruction set: numbers [begin, end) of every slice.
FF_DECLARE_SIMD(template <typename T> void dual_activation_range(const DualActivationArgs<T>& args,
                                                                 index_t begin, index_t end);)

}  // namespace fisherfast
