// Moments of the patches that a convolution multiplies by its weights, in each of G groups of
// channels:
//
//   sums_g  = sum_{n, position} patch_g
//   cross_g = sum_{n, position} patch_g patch_g^T
//
// where patch_g is [C / G, kh, kw], flattened: entry (c, ky, kx) of the patch at (oy, ox) is
// x[c, oy stride - padding + ky dilation, ...], zero outside x. The patches are the rows of im2col
// and are never all in memory. Products and sums of T are summed in T over at most
// kPatchTileRows patches (64 on the device) and then in double.
#pragma once

#include "core/fields.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

template <typename T>
struct PatchMomentsArgs {
  const T* x;          // [n, C, H, W], any strides
  index_t strides[4];  // of x, in elements, not negative
  index_t size[2];     // H, W of x
  index_t kernel[2];
  index_t stride[2];
  index_t padding[2];
  index_t dilation[2];
  index_t out[2];     // positions
  double* sums;       // out [G, K], K = C / G kh kw
  double* cross;      // out [G, K, K], both triangles
  double* workspace;  // device only: workspace_bytes()
  index_t samples;    // n
  index_t channels;   // C / G
  index_t groups;     // G
  index_t width;      // K

  FF_FIELDS(x, strides, size, kernel, stride, padding, dilation, out, sums, cross, workspace,
            samples, channels, groups, width)
};  // outputs and workspace alias nothing

// Patches whose products are summed in T: the error of a float32 sum of 256 products is at most
// 256 * 2^-24 = 2e-5 of the sum of their magnitudes, 1e-6 typically.
constexpr index_t kPatchTileRows = 256;

// Cost: n positions K (K + 1) / 2 multiply-adds a group. Same bits for any number of threads.
template <typename T>
void patch_moments_cpu(const PatchMomentsArgs<T>& args, int threads);

// The device sums splits of the patches into partial results, then adds these in order.
constexpr index_t kPatchesPerSplit = 4096;
constexpr index_t kMaxPatchSplits = 64;

inline index_t patch_splits(index_t rows) {
  const index_t splits = ceil_div(rows, kPatchesPerSplit);
  return splits < 1 ? 1 : (splits < kMaxPatchSplits ? splits : kMaxPatchSplits);
}

// One [K + 1, K] matrix of double for every split and group, the sums in its last row.
template <typename T>
index_t workspace_bytes(const PatchMomentsArgs<T>& args) {
  const index_t doubles = args.groups * (args.width + 1) * args.width;
  const index_t splits = patch_splits(args.samples * args.out[0] * args.out[1]);
  return splits * doubles * static_cast<index_t>(sizeof(double));
}

template <typename T>
void patch_moments_cuda(const PatchMomentsArgs<T>& args, int device, void* stream);

// CPU, one instruction set: patches [first, first + count) of a group, in panels of two vectors of
// columns, with their sums; and the product of two panels.
FF_DECLARE_SIMD(template <typename T>
                void patch_moments_pack(const PatchMomentsArgs<T>& args, index_t group,
                                        index_t first, index_t count, index_t panel, T* to,
                                        double* sums);
                template <typename T>
                void patch_moments_products(index_t width, index_t row_panel, index_t column_panel,
                                            const T* left, const T* right, index_t count,
                                            double* cross);)

}  // namespace fisherfast
