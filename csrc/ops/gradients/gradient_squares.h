// Sums over samples of the squared gradients of a convolution's weights:
//
//   out[m, c, a, b] = sum_i ( sum_t g[i, m, t] x[i, c, t stride - padding + (a, b) dilation] )^2
//
// t runs over the positions [Ho, Wo] of the output; x is zero outside. Channels m and c are of the
// same group. Neither patches nor gradients of a sample are stored.
//
// CPU: products are summed in T, in blocks of kGradientPositions (in groups of few rows: by lanes,
// each its share of all positions), squares in T over at most kGradientSamples samples and then in
// double. Device: products in T over 64 positions, then all in double.
#pragma once

#include "core/fields.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

template <typename T>
struct GradientSquaresArgs {
  const T* x;            // [n, G C, H, W], any strides
  const T* g;            // [n, G M, Ho, Wo], any strides
  index_t x_strides[4];  // in elements, not negative
  index_t g_strides[4];
  double* squares;    // out [G M, C, kh, kw], contiguous
  double* workspace;  // device only: workspace_bytes()
  index_t samples;    // n
  index_t groups;     // G
  index_t inputs;     // C, of a group
  index_t outputs;    // M, of a group
  index_t in[2];      // H, W
  index_t out[2];     // Ho, Wo
  index_t kernel[2];
  index_t stride[2];
  index_t padding[2];
  index_t dilation[2];

  FF_FIELDS(x, g, x_strides, g_strides, squares, workspace, samples, groups, inputs, outputs, in,
            out, kernel, stride, padding, dilation)
};  // outputs and workspace alias nothing

// A float32 sum of 64 squares is off by at most 64 * 2^-24 = 4e-6 of it, 2e-7 typically; a sum of p
// products by (256 + p / 256) 2^-24 of the sum of their magnitudes, by lanes (p / lanes) 2^-24: of
// 512 x 512 equal products 1.6e-5 and 4e-6 were measured.
constexpr index_t kGradientSamples = 64;
constexpr index_t kGradientPositions = 256;

// Cost: n G M D Ho Wo multiply-adds, D = C kh kw. Same bits for any number of threads.
template <typename T>
void gradient_squares_cpu(const GradientSquaresArgs<T>& args, int threads);

// CPU, one instruction set: one group, rows [row, row + rows) of the M and columns
// [column, column + columns) of the D numbers of a patch; they use channels [channel, channel +
// channels).
struct GradientTile {
  index_t group;
  index_t row, rows;
  index_t column, columns;
  index_t channel, channels;
};

// Memory of one thread, each array on a cache line.
template <typename T>
struct GradientScratch {
  T* g;               // [rows of a panel rounded up, Ho Wo] of one sample
  T* sums;            // squares of some samples, rows and columns rounded up
  index_t* position;  // [Ho Wo], offsets of the positions in x
  index_t* column;    // offsets of the columns in x, rounded up
  T* padded;          // x of one sample with its margins; null without margins
  // Groups of few rows (depthwise): lanes are positions, and `padded` is always there, each channel
  // followed by kGradientRound zeros.
  bool positions_are_lanes;
};

// Largest number of rows of groups whose positions are lanes.
constexpr index_t kGradientFewRows = 4;

// Numbers to which rows and columns of a tile are rounded up, whatever the instruction set.
constexpr index_t kGradientRound = 32;

FF_DECLARE_SIMD(template <typename T>
                void gradient_squares_tile(const GradientSquaresArgs<T>& args,
                                           const GradientTile& tile,
                                           const GradientScratch<T>& scratch);)

// The device splits the samples where there are few tiles of results, and adds the parts in order.
constexpr index_t kGradientBlocks = 528;         // enough to fill a large device
constexpr index_t kGradientWorkspace = 1 << 23;  // doubles at most: 64 MiB

// Results along an edge of a tile: small tiles for a group of few channels.
inline index_t gradient_tile_edge(index_t outputs, index_t columns) {
  return outputs <= 16 || columns <= 16 ? 16 : 64;
}

inline index_t gradient_squares_splits(index_t samples, index_t groups, index_t outputs,
                                       index_t columns) {
  const index_t edge = gradient_tile_edge(outputs, columns), results = groups * outputs * columns;
  if (results == 0 || samples == 0) return 1;
  const index_t tiles = groups * ceil_div(outputs, edge) * ceil_div(columns, edge);
  const index_t wanted = ceil_div(kGradientBlocks, tiles), most = kGradientWorkspace / results;
  const index_t splits = wanted < most ? wanted : most;
  return splits < 1 ? 1 : (splits < samples ? splits : samples);
}

// The results of every split, in double.
template <typename T>
index_t workspace_bytes(const GradientSquaresArgs<T>& args) {
  const index_t columns = args.inputs * args.kernel[0] * args.kernel[1];
  const index_t doubles = args.groups * args.outputs * columns;
  return gradient_squares_splits(args.samples, args.groups, args.outputs, columns) * doubles *
         static_cast<index_t>(sizeof(double));
}

template <typename T>
void gradient_squares_cuda(const GradientSquaresArgs<T>& args, int device, void* stream);

}  // namespace fisherfast
