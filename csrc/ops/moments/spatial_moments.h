// Moments over samples at every position of a feature map, about a pilot m, read in place:
//
//   sums_hw  = sum_n (x[n, :, h, w] - m[:, h, w])
//   cross_hw = sum_n (x[n, :, h, w] - m[:, h, w]) (x[n, :, h, w] - m[:, h, w])^T
//
// The difference x - m is taken in T. Products of T are summed in T over at most kSpatialTileRows
// samples and then in double.
#pragma once

#include "core/fields.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

template <typename T>
struct SpatialMomentsArgs {
  const T* x;          // [n, C, H, W], any strides
  index_t strides[4];  // of x, in elements, not negative
  const T* pilot;      // [C, H, W], contiguous, or null: zero
  double* sums;        // out [H, W, C]
  double* cross;       // out [H, W, C, C], both triangles
  index_t rows;        // n samples
  index_t channels;    // C
  index_t height;      // H
  index_t width;       // W

  FF_FIELDS(x, strides, pilot, sums, cross, rows, channels, height, width)
};  // outputs alias nothing

// Samples whose products are summed in T: the error of a float32 sum of 64 products is at most
// 64 * 2^-24 = 4e-6 of the sum of their magnitudes, 2e-7 typically.
constexpr index_t kSpatialTileRows = 64;

// Cost: n H W C (C + 1) / 2 multiply-adds; every number of x is read once. Same bits for any number
// of threads.
template <typename T>
void spatial_moments_cpu(const SpatialMomentsArgs<T>& args, int threads);

template <typename T>
void spatial_moments_cuda(const SpatialMomentsArgs<T>& args, int device, void* stream);

// CPU, one instruction set: positions [begin, end) of the H W, as many at a time as a vector has
// lanes. `scratch` is aligned to 64 bytes and holds spatial_moments_scratch() bytes.
inline index_t spatial_moments_scratch(index_t lanes, index_t channels, index_t number_bytes) {
  const index_t tile = (kSpatialTileRows + 1) * channels * lanes * number_bytes;  // and the pilot
  const index_t sums = lanes * (channels + channels * (channels + 1) / 2) * 8;
  return tile + sums;
}
FF_DECLARE_SIMD(template <typename T> void spatial_moments_lanes(const SpatialMomentsArgs<T>& args,
                                                                 index_t begin, index_t end,
                                                                 void* scratch);)

}  // namespace fisherfast
