// CUDA kernels: products of tiles of the rows [x - m, 1], then a sum over splits in fixed order.
//
// The column of ones makes one product of all three results: for the rows Z_g = [x - m, 1] of
// group g, Z_g^T Z_g holds cross_g, sums_g in its last row and count_g in its last corner.
#include "core/cuda.cuh"
#include "ops/moments.h"

namespace fisherfast {
namespace {

constexpr int kTile = 16;  // a block multiplies 16 x 16 columns, 16 rows at a time
constexpr unsigned kReduceThreads = 256;

// Entry (n, c) of Z_g: zero for rows of other groups, and outside the matrix.
template <typename T>
__device__ double extended_entry(const MomentsArgs<T>& args, index_t g, index_t n, index_t end,
                                 index_t c) {
  if (n >= end || c > args.dim) return 0.0;
  if (args.group != nullptr && args.group[n] != g) return 0.0;
  if (c == args.dim) return 1.0;
  const T pilot = args.pilot == nullptr ? T(0) : args.pilot[c];
  return static_cast<double>(args.x[n * args.row_stride + c] - pilot);
}

// Block (x, y, z): one tile of Z_g^T Z_g in the lower triangle, one split of the rows, one group.
// Thread: one entry of the tile. Reads of x are coalesced in runs of 16 columns. A split is read
// once for every group and pair of tiles; N (d + 1) (d + 2) / 2 multiply-adds in all a group.
template <typename T>
__global__ void moments_kernel(MomentsArgs<T> args, index_t tiles, index_t rows_per_split) {
  __shared__ double left[kTile][kTile], right[kTile][kTile];
  const index_t tile_row = blockIdx.x / tiles, tile_column = blockIdx.x % tiles;
  if (tile_column > tile_row) return;
  const index_t tx = threadIdx.x, ty = threadIdx.y;
  const index_t width = args.dim + 1;
  const index_t i = tile_row * kTile + ty, j = tile_column * kTile + tx;
  const index_t begin = blockIdx.y * rows_per_split;
  const index_t end = min(args.rows, begin + rows_per_split);
  for (index_t g = blockIdx.z; g < args.groups; g += gridDim.z) {
    double sum = 0.0;
    for (index_t n = begin; n < end; n += kTile) {
      left[ty][tx] = extended_entry(args, g, n + ty, end, tile_row * kTile + tx);
      right[ty][tx] = extended_entry(args, g, n + ty, end, tile_column * kTile + tx);
      __syncthreads();
      for (int r = 0; r < kTile; ++r) sum += left[r][ty] * right[r][tx];
      __syncthreads();
    }
    if (i < width && j < width) {
      args.workspace[((blockIdx.y * args.groups + g) * width + i) * width + j] = sum;
    }
  }
}

// Thread: one entry of one Z_g^T Z_g, summed over the splits in order. Reads are coalesced in the
// lower triangle.
template <typename T>
__global__ void moments_reduce_kernel(MomentsArgs<T> args, index_t splits) {
  const index_t d = args.dim, width = d + 1;
  const index_t entries = args.groups * width * width;
  for (index_t e = global_thread(); e < entries; e += global_threads()) {
    const index_t g = e / (width * width), i = e / width % width, j = e % width;
    const index_t row = max(i, j), column = min(i, j);
    double sum = 0.0;
    for (index_t split = 0; split < splits; ++split) {
      sum += args.workspace[((split * args.groups + g) * width + row) * width + column];
    }
    if (row < d) {
      args.cross[(g * d + i) * d + j] = sum;
    } else if (column == d) {
      args.count[g] = static_cast<index_t>(sum);
    } else if (i == d) {
      args.sums[g * d + column] = sum;
    }
  }
}

}  // namespace

template <typename T>
void moments_cuda(const MomentsArgs<T>& args, int device, void* stream) {
  const DeviceGuard guard(device);
  const index_t tiles = ceil_div(args.dim + 1, kTile);
  const index_t splits = moments_splits(args.rows);
  const dim3 block(kTile, kTile);
  const dim3 grid(grid_x(tiles * tiles), grid_yz(splits), grid_yz(args.groups));
  FF_LAUNCH(moments_kernel<T>, grid, block, 0, stream, args, tiles, ceil_div(args.rows, splits));
  const index_t entries = args.groups * (args.dim + 1) * (args.dim + 1);
  FF_LAUNCH(moments_reduce_kernel<T>, grid_x(ceil_div(entries, kReduceThreads)), kReduceThreads, 0,
            stream, args, splits);
}

template void moments_cuda(const MomentsArgs<float>&, int, void*);
template void moments_cuda(const MomentsArgs<double>&, int, void*);

}  // namespace fisherfast
