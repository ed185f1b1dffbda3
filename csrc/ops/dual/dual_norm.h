// Normalisation of the rows of a dual buffer: layer, group, instance and RMS norm.
//
//   m = mean(u) (0 unless centred),   r = 1 / sqrt(mean((u - m)^2) + eps),   h = r (u - m)
//   y[0] = w h + b,   y[p] = w r (v - mean(v) - h mean(h v))      u = x[0], v = x[p]
//
// with mean(v) left out unless centred. The weight of entry j of row i is that of number
// ((i mod groups) width + j) / inner: layer norm has groups = inner = 1; group norm of [n, C, ...]
// has one row per sample and group, `groups` of them, and inner = positions of a channel.
#pragma once

#include "core/fields.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

template <typename T>
struct DualNormArgs {
  const T* x;            // [1 + P, rows, width], each slice contiguous
  T* y;                  // out [1 + P, rows, width], contiguous; may be x itself when that is
  const T* weight;       // [groups width / inner] or null: one
  const T* bias;         // [groups width / inner] or null: zero
  index_t slice_stride;  // of x, in numbers
  index_t tangents;      // P
  index_t rows;
  index_t width;
  index_t groups;
  index_t inner;
  T eps;
  bool centre;

  FF_FIELDS(x, y, weight, bias, slice_stride, tangents, rows, width, groups, inner, eps, centre)
};

// Cost: reads and writes (1 + P) rows width numbers once from memory when a row and its tangents
// fit into the caches. Same bits for any number of threads.
template <typename T>
void dual_norm_cpu(const DualNormArgs<T>& args, int threads);

template <typename T>
void dual_norm_cuda(const DualNormArgs<T>& args, int device, void* stream);

// CPU, one instruction set: rows [begin, end).
FF_DECLARE_SIMD(template <typename T>
                void dual_norm_rows(const DualNormArgs<T>& args, index_t begin, index_t end);)

}  // namespace fisherfast
