// CUDA kernels: products of tiles of the rows x - m of a group, then a sum over splits in order.
//
// The partial result of a split is a [d + 1, d + 1] matrix in the workspace: cross in its lower
// triangle, sums in its last row, count in its last corner.
#include "core/cuda/cuda.cuh"
#include "core/cuda/tile_product.cuh"
#include "ops/moments/moments.h"

namespace fisherfast {
namespace {

constexpr unsigned kReduceThreads = 256;
constexpr unsigned kLanes = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kWarps = kTileThreads / kLanes;

// The rows of group g among kTileThreads rows from `begin` on, in order, as distances to `begin`.
// Returns their number, the same in every thread. Ends with a barrier; the caller has one after
// every use of `rows`.
template <typename T>
__device__ int rows_of_group(const MomentsArgs<T>& args, index_t g, index_t begin, index_t end,
                             int* rows, int* in_warp) {
  const int thread = static_cast<int>(thread_in_block());
  const int warp = thread / static_cast<int>(kLanes), lane = thread % static_cast<int>(kLanes);
  const index_t n = begin + thread;
  const bool mine = n < end && (args.group == nullptr || args.group[n] == g);
  const unsigned votes = __ballot_sync(kAllLanes, mine);
  if (lane == 0) in_warp[warp] = __popc(votes);
  __syncthreads();
  int before = __popc(votes & ((1u << lane) - 1)), total = 0;
  for (int w = 0; w < kWarps; ++w) {
    if (w < warp) before += in_warp[w];
    total += in_warp[w];
  }
  if (mine) rows[before] = thread;
  __syncthreads();
  return total;
}

// Copies columns [first_column, ...) of kTileDepth rows, about the pilot, into a tile. Thread:
// kEdge neighbours of one row.
template <typename T, int kEdge>
__device__ void stage(const MomentsArgs<T>& args, index_t begin, const int* rows, int count,
                      index_t first_column, Tile<T, kEdge>& tile) {
  const int r = static_cast<int>(threadIdx.y), place = static_cast<int>(threadIdx.x) * kEdge;
  const index_t column = first_column + place;
  Vector<T, kEdge> entries{};
  if (r < count && column < args.dim) {
    const T* row = args.x + (begin + rows[r]) * args.row_stride;
    entries = load_vector<kEdge>(row + column, args.dim - column);
    if (args.pilot != nullptr) {
      const auto pilot = load_vector<kEdge>(args.pilot + column, args.dim - column);
#pragma unroll
      for (int e = 0; e < kEdge; ++e) entries.entry[e] -= pilot.entry[e];
    }
  }
  as_vector<kEdge>(&tile.rows[r][place]) = entries;
}

// Block (x, y, z): one tile of the lower triangle of cross, one split of the rows, one group (in
// turn). Thread: kEdge x kEdge results; in blocks on the diagonal, one column's sum too. Reads of x
// are coalesced along rows, 16 bytes a thread where aligned. A row is read once for each tile that
// needs it, N d (d + 1) / 2 multiply-adds in all; every group looks at all N numbers of `group`.
template <typename T, int kEdge>
__global__ void __launch_bounds__(kTileThreads)
    moments_kernel(MomentsArgs<T> args, index_t rows_per_split) {
  constexpr int kWidth = Tile<T, kEdge>::kWidth;
  __shared__ Tile<T, kEdge> left, right;
  __shared__ int rows[kTileThreads], in_warp[kWarps];
  const TilePair pair = tile_pair(blockIdx.x);
  const bool diagonal = pair.row == pair.column;
  const int thread = static_cast<int>(thread_in_block());
  const index_t d = args.dim, width = d + 1;
  const index_t begin = blockIdx.y * rows_per_split;
  const index_t end = min(args.rows, begin + rows_per_split);
  for (index_t g = blockIdx.z; g < args.groups; g += gridDim.z) {
    TileProduct<T, kEdge> product;
    product.clear();
    double sum = 0.0;
    index_t count = 0;
    for (index_t n = begin; n < end; n += kTileThreads) {
      const int found = rows_of_group(args, g, n, end, rows, in_warp);
      count += found;
      for (int r = 0; r < found; r += kTileDepth) {
        stage(args, n, rows + r, found - r, pair.row * kWidth, left);
        if (!diagonal) stage(args, n, rows + r, found - r, pair.column * kWidth, right);
        __syncthreads();
        product.add(left, diagonal ? left : right);
        if (diagonal && thread < kWidth) {
          for (int q = 0; q < kTileDepth; ++q) sum += static_cast<double>(left.rows[q][thread]);
        }
        __syncthreads();
      }
    }
    double* part = args.workspace + (blockIdx.y * args.groups + g) * width * width;
    product.for_each([&](index_t a, index_t b, double total) {
      const index_t i = pair.row * kWidth + a, j = pair.column * kWidth + b;
      if (i < d && j <= i) part[i * width + j] = total;
    });
    const index_t column = pair.row * kWidth + thread;
    if (diagonal && thread < kWidth && column < d) part[d * width + column] = sum;
    if (blockIdx.x == 0 && thread == 0) part[d * width + d] = static_cast<double>(count);
  }
}

// Thread: one entry of one partial matrix, summed over the splits in order. Reads are coalesced in
// the lower triangle; moves (splits + 1) G d^2 numbers.
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

template <typename T, int kEdge>
void launch_tiles(const MomentsArgs<T>& args, index_t splits, void* stream) {
  const index_t tiles = ceil_div(args.dim > 0 ? args.dim : 1, Tile<T, kEdge>::kWidth);
  const dim3 block(kTileSide, kTileSide);
  const dim3 grid(grid_x(tile_pairs(tiles)), grid_yz(splits), grid_yz(args.groups));
  FF_LAUNCH((moments_kernel<T, kEdge>), grid, block, 0, stream, args, ceil_div(args.rows, splits));
}

}  // namespace

template <typename T>
void moments_cuda(const MomentsArgs<T>& args, int device, void* stream) {
  const DeviceGuard guard(device);
  const index_t splits = moments_splits(args.rows);
  if (args.dim <= Tile<T, 1>::kWidth) {
    launch_tiles<T, 1>(args, splits, stream);
  } else {
    launch_tiles<T, 4>(args, splits, stream);
  }
  const index_t entries = args.groups * (args.dim + 1) * (args.dim + 1);
  FF_LAUNCH(moments_reduce_kernel<T>, grid_x(ceil_div(entries, kReduceThreads)), kReduceThreads, 0,
            stream, args, splits);
}

template void moments_cuda(const MomentsArgs<float>&, int, void*);
template void moments_cuda(const MomentsArgs<double>&, int, void*);

}  // namespace fisherfast
