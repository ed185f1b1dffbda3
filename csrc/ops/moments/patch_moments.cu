// CUDA kernels: products of tiles of patches, which are read from the feature map in place, then a
// sum over splits in order.
//
// The partial result of a split is a [K + 1, K] matrix in the workspace: cross in its lower
// triangle, sums in its last row.
#include "core/cuda/cuda.cuh"
#include "core/cuda/tile_product.cuh"
#include "ops/moments/patch_moments.h"

namespace fisherfast {
namespace {

constexpr unsigned kReduceThreads = 256;

// Entry `column` of patch `row` of a group; zero outside.
template <typename T>
__device__ T patch_entry(const PatchMomentsArgs<T>& args, index_t group, index_t row, index_t end,
                         index_t column) {
  if (row >= end || column >= args.width) return T(0);
  const index_t ox = row % args.out[1], line = row / args.out[1];
  const index_t oy = line % args.out[0], sample = line / args.out[0];
  const index_t kx = column % args.kernel[1], above = column / args.kernel[1];
  const index_t ky = above % args.kernel[0], channel = above / args.kernel[0];
  const index_t iy = oy * args.stride[0] - args.padding[0] + ky * args.dilation[0];
  const index_t ix = ox * args.stride[1] - args.padding[1] + kx * args.dilation[1];
  if (iy < 0 || iy >= args.size[0] || ix < 0 || ix >= args.size[1]) return T(0);
  return args.x[sample * args.strides[0] + (group * args.channels + channel) * args.strides[1] +
                iy * args.strides[2] + ix * args.strides[3]];
}

// Columns [first_column, ...) of kTileDepth patches. Neighbouring threads take neighbouring
// patches, which are neighbours in x but for the stride.
template <typename T, int kEdge>
__device__ void stage(const PatchMomentsArgs<T>& args, index_t group, index_t row, index_t end,
                      index_t first_column, Tile<T, kEdge>& tile) {
  constexpr int kWidth = Tile<T, kEdge>::kWidth;
  const int thread = static_cast<int>(thread_in_block());
#pragma unroll
  for (int u = 0; u < kTileDepth * kWidth / kTileThreads; ++u) {
    const int e = u * kTileThreads + thread, r = e % kTileDepth, c = e / kTileDepth;
    tile.rows[r][c] = patch_entry(args, group, row + r, end, first_column + c);
  }
}

// Block (x, y, z): one tile of the lower triangle of cross, one split of the patches, one group (in
// turn). Thread: kEdge x kEdge results; in blocks on the diagonal, one column's sum too. A patch is
// read once for each tile that needs it, from the cache but the first; positions K (K + 1) / 2
// multiply-adds for each sample and group.
template <typename T, int kEdge>
__global__ void __launch_bounds__(kTileThreads)
    patch_moments_kernel(PatchMomentsArgs<T> args, index_t rows_per_split) {
  constexpr int kWidth = Tile<T, kEdge>::kWidth;
  __shared__ Tile<T, kEdge> left, right;
  const TilePair pair = tile_pair(blockIdx.x);
  const bool diagonal = pair.row == pair.column;
  const int thread = static_cast<int>(thread_in_block());
  const index_t K = args.width;
  const index_t rows = args.samples * args.out[0] * args.out[1];
  const index_t begin = blockIdx.y * rows_per_split;
  const index_t end = min(rows, begin + rows_per_split);
  for (index_t g = blockIdx.z; g < args.groups; g += gridDim.z) {
    TileProduct<T, kEdge> product;
    product.clear();
    double sum = 0.0;
    for (index_t row = begin; row < end; row += kTileDepth) {
      stage(args, g, row, end, pair.row * kWidth, left);
      if (!diagonal) stage(args, g, row, end, pair.column * kWidth, right);
      __syncthreads();
      product.add(left, diagonal ? left : right);
      if (diagonal && thread < kWidth) {
        for (int q = 0; q < kTileDepth; ++q) sum += static_cast<double>(left.rows[q][thread]);
      }
      __syncthreads();
    }
    double* part = args.workspace + (blockIdx.y * args.groups + g) * (K + 1) * K;
    product.for_each([&](index_t a, index_t b, double total) {
      const index_t i = pair.row * kWidth + a, j = pair.column * kWidth + b;
      if (i < K && j <= i) part[i * K + j] = total;
    });
    const index_t column = pair.row * kWidth + thread;
    if (diagonal && thread < kWidth && column < K) part[K * K + column] = sum;
  }
}

// Thread: one entry of one partial matrix, summed over the splits in order. Reads are coalesced in
// the lower triangle; moves (splits + 1) G K^2 numbers.
template <typename T>
__global__ void patch_moments_reduce_kernel(PatchMomentsArgs<T> args, index_t splits) {
  const index_t K = args.width, size = (K + 1) * K;
  for (index_t e = global_thread(); e < args.groups * size; e += global_threads()) {
    const index_t g = e / size, i = e % size / K, j = e % K;
    const bool of_cross = i < K;
    const index_t row = of_cross ? max(i, j) : i, column = of_cross ? min(i, j) : j;
    double sum = 0.0;
    for (index_t split = 0; split < splits; ++split) {
      sum += args.workspace[(split * args.groups + g) * size + row * K + column];
    }
    if (of_cross) {
      args.cross[(g * K + i) * K + j] = sum;
    } else {
      args.sums[g * K + j] = sum;
    }
  }
}

template <typename T, int kEdge>
void launch_tiles(const PatchMomentsArgs<T>& args, index_t rows, index_t splits, void* stream) {
  const index_t tiles = ceil_div(args.width, Tile<T, kEdge>::kWidth);
  const dim3 block(kTileSide, kTileSide);
  const dim3 grid(grid_x(tile_pairs(tiles)), grid_yz(splits), grid_yz(args.groups));
  FF_LAUNCH((patch_moments_kernel<T, kEdge>), grid, block, 0, stream, args, ceil_div(rows, splits));
}

}  // namespace

template <typename T>
void patch_moments_cuda(const PatchMomentsArgs<T>& args, int device, void* stream) {
  const index_t entries = args.groups * (args.width + 1) * args.width;
  if (entries == 0) return;
  const DeviceGuard guard(device);
  const index_t rows = args.samples * args.out[0] * args.out[1];
  const index_t splits = patch_splits(rows);
  if (args.width <= Tile<T, 1>::kWidth) {
    launch_tiles<T, 1>(args, rows, splits, stream);
  } else {
    launch_tiles<T, 4>(args, rows, splits, stream);
  }
  FF_LAUNCH(patch_moments_reduce_kernel<T>, grid_x(ceil_div(entries, kReduceThreads)),
            kReduceThreads, 0, stream, args, splits);
}

template void patch_moments_cuda(const PatchMomentsArgs<float>&, int, void*);
template void patch_moments_cuda(const PatchMomentsArgs<double>&, int, void*);

}  // namespace fisherfast
