// CUDA kernels: for each sample the product of a tile of g with a tile of patches, read out of x,
// squared and summed in registers; then a sum over splits of the samples in order.
#include "core/cuda/cuda.cuh"
#include "core/cuda/tile_product.cuh"
#include "ops/gradients/gradient_squares.h"

namespace fisherfast {
namespace {

constexpr unsigned kReduceThreads = 256;

// The numbers of a tile that one thread copies, kEdge of them: number u is at `row[u]` (of
// kTileDepth positions) and `column[u]` of the tile. Neighbouring threads take neighbouring columns
// or neighbouring positions, whichever lie closer in memory.
template <int kEdge>
struct Places {
  int row[kEdge], column[kEdge];

  __device__ explicit Places(bool columns_first) {
    constexpr int kWidth = kTileSide * kEdge;
#pragma unroll
    for (int u = 0; u < kEdge; ++u) {
      const int e = u * kTileThreads + static_cast<int>(thread_in_block());
      row[u] = columns_first ? e / kWidth : e % kTileDepth;
      column[u] = columns_first ? e % kWidth : e / kTileDepth;
    }
  }
};

// Copies tiles of g: rows of M from `first_row` of a group on.
template <typename T, int kEdge>
class Gradients {
 public:
  __device__ Gradients(const GradientSquaresArgs<T>& args, index_t group, index_t first_row)
      : places_(args.g_strides[1] < args.g_strides[3]) {
#pragma unroll
    for (int u = 0; u < kEdge; ++u) {
      const index_t row = first_row + places_.column[u];
      offset_[u] = row < args.outputs ? (group * args.outputs + row) * args.g_strides[1] : -1;
    }
  }

  __device__ void stage(const GradientSquaresArgs<T>& args, index_t sample, index_t first,
                        Tile<T, kEdge>& tile) const {
#pragma unroll
    for (int u = 0; u < kEdge; ++u) {
      const index_t t = first + places_.row[u];
      T number = T(0);
      if (offset_[u] >= 0 && t < args.out[0] * args.out[1]) {
        const index_t h = t / args.out[1], w = t - h * args.out[1];
        number = args.g[sample * args.g_strides[0] + offset_[u] + h * args.g_strides[2] +
                        w * args.g_strides[3]];
      }
      tile.rows[places_.row[u]][places_.column[u]] = number;
    }
  }

 private:
  Places<kEdge> places_;
  index_t offset_[kEdge];  // of the channel, -1 outside
};

// Copies tiles of patches: columns of D from `first_column` of a group on.
template <typename T, int kEdge>
class Patches {
 public:
  __device__ Patches(const GradientSquaresArgs<T>& args, index_t group, index_t first_column)
      : places_(args.x_strides[1] < args.x_strides[3]) {
    const index_t taps = args.kernel[0] * args.kernel[1];
#pragma unroll
    for (int u = 0; u < kEdge; ++u) {
      const index_t d = first_column + places_.column[u], c = d / taps, tap = d % taps;
      offset_[u] = c < args.inputs ? (group * args.inputs + c) * args.x_strides[1] : -1;
      down_[u] = tap / args.kernel[1] * args.dilation[0] - args.padding[0];
      right_[u] = tap % args.kernel[1] * args.dilation[1] - args.padding[1];
    }
  }

  __device__ void stage(const GradientSquaresArgs<T>& args, index_t sample, index_t first,
                        Tile<T, kEdge>& tile) const {
#pragma unroll
    for (int u = 0; u < kEdge; ++u) {
      const index_t t = first + places_.row[u];
      T number = T(0);
      if (offset_[u] >= 0 && t < args.out[0] * args.out[1]) {
        const index_t out_h = t / args.out[1], out_w = t - out_h * args.out[1];
        const index_t h = out_h * args.stride[0] + down_[u];
        const index_t w = out_w * args.stride[1] + right_[u];
        if (h >= 0 && h < args.in[0] && w >= 0 && w < args.in[1]) {
          number = args.x[sample * args.x_strides[0] + offset_[u] + h * args.x_strides[2] +
                          w * args.x_strides[3]];
        }
      }
      tile.rows[places_.row[u]][places_.column[u]] = number;
    }
  }

 private:
  Places<kEdge> places_;
  index_t offset_[kEdge];               // of the channel, -1 outside
  index_t down_[kEdge], right_[kEdge];  // of the number in the window, from the window's place
};

// Block (x, y): a tile of 16 kEdge rows of M by 16 kEdge columns of D of one group, one split of
// the samples (both in turn). Thread: kEdge x kEdge results. Reads are coalesced along positions or
// along channels, as x and g lie; each number of g is read D / (16 kEdge) times, each of a patch
// M / (16 kEdge) times, from the caches but the first. n G M D Ho Wo multiply-adds in T, in double
// after 64 positions; squares in double.
template <typename T, int kEdge>
__global__ void __launch_bounds__(kTileThreads)
    gradient_squares_kernel(GradientSquaresArgs<T> args, index_t splits) {
  constexpr index_t kWidth = Tile<T, kEdge>::kWidth;
  __shared__ Tile<T, kEdge> left, right;
  const index_t columns = args.inputs * args.kernel[0] * args.kernel[1];
  const index_t row_tiles = ceil_div(args.outputs, kWidth),
                column_tiles = ceil_div(columns, kWidth);
  const index_t tiles = args.groups * row_tiles * column_tiles, area = args.out[0] * args.out[1];
  for (index_t split = blockIdx.y; split < splits; split += gridDim.y) {
    const index_t begin = split * args.samples / splits, end = (split + 1) * args.samples / splits;
    for (index_t index = blockIdx.x; index < tiles; index += gridDim.x) {
      const index_t group = index / column_tiles / row_tiles;
      const index_t first_row = index / column_tiles % row_tiles * kWidth;
      const index_t first_column = index % column_tiles * kWidth;
      const Gradients<T, kEdge> gradients(args, group, first_row);
      const Patches<T, kEdge> patches(args, group, first_column);
      double squares[kEdge * kEdge] = {};
      for (index_t n = begin; n < end; ++n) {
        TileProduct<T, kEdge> product;
        product.clear();
        for (index_t t = 0; t < area; t += kTileDepth) {
          gradients.stage(args, n, t, left);
          patches.stage(args, n, t, right);
          __syncthreads();
          product.add(left, right);
          __syncthreads();
        }
        int e = 0;
        product.for_each([&](index_t, index_t, double sum) { squares[e++] += sum * sum; });
      }
      double* const part = args.workspace + split * args.groups * args.outputs * columns;
      const index_t row = first_row + threadIdx.y * kEdge;
      const index_t column = first_column + threadIdx.x * kEdge;
#pragma unroll
      for (int e = 0; e < kEdge * kEdge; ++e) {
        const index_t m = row + e / kEdge, d = column + e % kEdge;
        if (m < args.outputs && d < columns) {
          part[(group * args.outputs + m) * columns + d] = squares[e];
        }
      }
    }
  }
}

// Thread: one result, summed over the splits in order. Coalesced; moves (splits + 1) results.
template <typename T>
__global__ void gradient_squares_reduce_kernel(GradientSquaresArgs<T> args, index_t splits) {
  const index_t columns = args.inputs * args.kernel[0] * args.kernel[1];
  const index_t results = args.groups * args.outputs * columns;
  for (index_t e = global_thread(); e < results; e += global_threads()) {
    double sum = 0.0;
    for (index_t split = 0; split < splits; ++split) sum += args.workspace[split * results + e];
    args.squares[e] = sum;
  }
}

template <typename T, int kEdge>
void launch_tiles(const GradientSquaresArgs<T>& args, index_t columns, index_t splits,
                  void* stream) {
  constexpr index_t kWidth = Tile<T, kEdge>::kWidth;
  const index_t tiles = args.groups * ceil_div(args.outputs, kWidth) * ceil_div(columns, kWidth);
  const dim3 block(kTileSide, kTileSide), grid(grid_x(tiles), grid_yz(splits));
  FF_LAUNCH((gradient_squares_kernel<T, kEdge>), grid, block, 0, stream, args, splits);
}

}  // namespace

template <typename T>
void gradient_squares_cuda(const GradientSquaresArgs<T>& args, int device, void* stream) {
  const index_t columns = args.inputs * args.kernel[0] * args.kernel[1];
  const index_t results = args.groups * args.outputs * columns;
  if (results == 0) return;
  const DeviceGuard guard(device);
  const index_t splits = gradient_squares_splits(args.samples, args.groups, args.outputs, columns);
  if (gradient_tile_edge(args.outputs, columns) == Tile<T, 1>::kWidth) {
    launch_tiles<T, 1>(args, columns, splits, stream);
  } else {
    launch_tiles<T, 4>(args, columns, splits, stream);
  }
  FF_LAUNCH(gradient_squares_reduce_kernel<T>, grid_x(ceil_div(results, kReduceThreads)),
            kReduceThreads, 0, stream, args, splits);
}

template void gradient_squares_cuda(const GradientSquaresArgs<float>&, int, void*);
template void gradient_squares_cuda(const GradientSquaresArgs<double>&, int, void*);

}  // namespace fisherfast
