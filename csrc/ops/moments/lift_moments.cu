// CUDA kernels: the random features of a chunk of rows into a workspace that stays in the L2 cache,
// then their fold sums and the products of tiles of features, then one addition in fixed order.
//
// Computing the features inside the product kernel would do it again for each of the K / 64 tiles.
#include "core/cuda/cuda.cuh"
#include "core/cuda/tile_product.cuh"
#include "ops/moments/lift_moments.h"

namespace fisherfast {
namespace {

constexpr int kEdge = 4;
constexpr int kWidth = Tile<float, kEdge>::kWidth;
constexpr unsigned kSumColumns = 32;  // a warp reads 32 neighbouring features
constexpr unsigned kSumRows = 8;      // rows of a fold that a block reads at the same time
constexpr unsigned kThreads = 256;

constexpr index_t kChunkRows = 8192;  // their 512 random features in float32 take 16 MiB of cache
constexpr index_t kBlocks = 256;      // enough of them to fill a large device
constexpr index_t kSplitRows = 256;   // less does not pay for a partial result

index_t chunk_rows(index_t rows) { return std::min(rows, kChunkRows); }

// Into how many partial results the rows of a half are summed: by shape alone, so that every device
// gives the same bits.
index_t splits_of(index_t rows, index_t features, index_t halves) {
  const index_t blocks = halves * tile_pairs(ceil_div(features, kWidth));
  const index_t useful = ceil_div(chunk_rows(rows), kSplitRows * halves);
  return std::max<index_t>(1, std::min(useful, ceil_div(kBlocks, std::max<index_t>(blocks, 1))));
}

// The workspace: partial results [splits, H, K, K] of double, then random features [chunk, k] of T.
// An even number of doubles keeps the features at an address aligned to 16 bytes.
index_t partial_bytes(index_t rows, index_t features, index_t halves) {
  const index_t numbers = splits_of(rows, features, halves) * halves * features * features;
  return ceil_div(numbers, 2) * 2 * static_cast<index_t>(sizeof(double));
}

// The rows of one call that are worked on together.
template <typename T>
struct Chunk {
  const T* z;       // first row of the chunk
  const T* lifted;  // [rows, k] random features
  index_t rows;
  index_t begin;  // number of its first row in the batch
};

// Those of some rows of the batch that are in the chunk, counted from its first row on. Offsets are
// not known on the host: whatever they are, no row is read outside the chunk.
template <typename T>
__device__ inline RowRange rows_in_chunk(const Chunk<T>& chunk, RowRange rows) {
  const index_t begin = rows.begin < chunk.begin ? 0 : rows.begin - chunk.begin;
  const index_t end = rows.end - chunk.begin < chunk.rows ? rows.end - chunk.begin : chunk.rows;
  return {begin, end < begin ? begin : end};
}

// Columns [column, column + kEdge) of row `index` of [z | lifted], zero outside.
template <typename T>
__device__ Vector<T, kEdge> load_features(const LiftMomentsArgs<T>& args, const Chunk<T>& chunk,
                                          index_t index, index_t column) {
  const index_t d = args.dim, k = args.lifted;
  const T* z = chunk.z + index * args.row_stride;
  const T* lifted = chunk.lifted + index * k;
  if (column + kEdge <= d) return load_vector<kEdge>(z + column, d - column);
  if (column >= d) return load_vector<kEdge>(lifted + (column - d), k - (column - d));
  Vector<T, kEdge> entries{};
#pragma unroll
  for (int e = 0; e < kEdge; ++e) {
    const index_t c = column + e;
    if (c < d + k) entries.entry[e] = c < d ? z[c] : lifted[c - d];
  }
  return entries;
}

// Stages columns [begin, begin + kTileDepth) of `lines` matrix rows, turned: tile row r, column c
// is entry (line c, begin + r). Neighbouring threads read neighbouring columns.
template <typename T>
__device__ void stage_turned(const T* matrix, index_t stride, index_t lines, index_t columns,
                             index_t begin, Tile<T, kEdge>& tile) {
  const index_t column = begin + threadIdx.x;
  for (index_t line = threadIdx.y; line < kWidth; line += kTileSide) {
    const bool inside = line < lines && column < columns;
    tile.rows[threadIdx.x][line] = inside ? matrix[line * stride + column] : T(0);
  }
}

// Block (x, y): 64 random features of 64 rows, rows in turn. Thread: 4 x 4 of them. Reads of z and
// weight are coalesced in runs of 16; writes in runs of 64. Moves about 2 n k + n d k / 32 numbers,
// mostly through the cache, and does n d k multiply-adds.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    lift_features_kernel(LiftMomentsArgs<T> args, Chunk<T> chunk, T* lifted) {
  __shared__ Tile<T, kEdge> left, right;
  const index_t d = args.dim, k = args.lifted;
  const index_t column = static_cast<index_t>(blockIdx.x) * kWidth;
  for (index_t row = blockIdx.y * kWidth; row < chunk.rows;
       row += static_cast<index_t>(gridDim.y) * kWidth) {
    TileProduct<T, kEdge> product;
    product.clear();
    for (index_t c = 0; c < d; c += kTileDepth) {
      stage_turned(chunk.z + row * args.row_stride, args.row_stride, chunk.rows - row, d, c, left);
      stage_turned(args.weight + column * d, d, k - column, d, c, right);
      __syncthreads();
      product.add(left, right);
      __syncthreads();
    }
    product.for_each([&](index_t a, index_t b, double projected) {
      const index_t i = row + a, j = column + b;
      if (i >= chunk.rows || j >= k) return;
      lifted[i * k + j] =
          lifted_feature(static_cast<T>(projected), args.bias[j], args.slope, args.pilot[j]);
    });
  }
}

// Block (x, y): 32 features of one segment of rows, segments in turn. Thread: every 8th row of the
// fold for one feature; the eight parts are added in order. Reads are coalesced; n (K - start)
// numbers.
template <typename T>
__global__ void __launch_bounds__(kSumColumns* kSumRows)
    lift_fold_sums_kernel(LiftMomentsArgs<T> args, Chunk<T> chunk) {
  __shared__ double parts[kSumRows][kSumColumns];
  const index_t d = args.dim, k = args.lifted, K = d + k;
  const index_t j = args.start + static_cast<index_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  for (index_t segment = blockIdx.y; segment < args.folds; segment += gridDim.y) {
    double sum = 0.0;
    const index_t g = fold_of_segment(segment, args.folds);
    const RowRange own =
        rows_in_chunk(chunk, RowRange{args.offsets[segment], args.offsets[segment + 1]});
    for (index_t i = own.begin + threadIdx.y; j < K && i < own.end; i += kSumRows) {
      sum += static_cast<double>(j < d ? chunk.z[i * args.row_stride + j]
                                       : chunk.lifted[i * k + (j - d)]);
    }
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && j < K) {
      double total = 0.0;
      for (unsigned r = 0; r < kSumRows; ++r) total += parts[r][threadIdx.x];
      args.sums[g * args.size + j] += total;
    }
    __syncthreads();  // the parts have been read before the next fold overwrites them
  }
}

// Block (x, y, z): one tile of the lower triangle at or below row `start`, one split, one half.
// Thread: 4 x 4 results. Reads are coalesced along rows, 16 bytes a thread where aligned, and come
// from the cache: a row is read once for each tile that needs it. n (K - start) (K + start) / 2
// multiply-adds.
template <typename T>
__global__ void __launch_bounds__(kTileThreads)
    lift_cross_kernel(LiftMomentsArgs<T> args, Chunk<T> chunk, index_t first_pair) {
  __shared__ Tile<T, kEdge> left, right;
  const TilePair pair = tile_pair(first_pair + blockIdx.x);
  const bool diagonal = pair.row == pair.column;
  const index_t K = args.dim + args.lifted, half = blockIdx.z;
  const RowRange own =
      rows_in_chunk(chunk, rows_of_half(args.offsets, args.folds, half, args.halves, args.rows));
  const index_t per_split = ceil_div(own.end - own.begin, static_cast<index_t>(gridDim.y));
  const index_t place = threadIdx.x * kEdge;
  TileProduct<T, kEdge> product;
  product.clear();
  const index_t begin = own.begin + blockIdx.y * per_split;
  const index_t end = begin + per_split < own.end ? begin + per_split : own.end;
  for (index_t row = begin; row < end; row += kTileDepth) {
    const index_t index = row + threadIdx.y;
    Vector<T, kEdge> l{}, r{};
    if (index < end) {
      l = load_features(args, chunk, index, pair.row * kWidth + place);
      if (!diagonal) r = load_features(args, chunk, index, pair.column * kWidth + place);
    }
    as_vector<kEdge>(&left.rows[threadIdx.y][place]) = l;
    if (!diagonal) as_vector<kEdge>(&right.rows[threadIdx.y][place]) = r;
    __syncthreads();
    product.add(left, diagonal ? left : right);
    __syncthreads();
  }
  double* partial =
      static_cast<double*>(args.workspace) + (blockIdx.y * args.halves + half) * K * K;
  product.for_each([&](index_t a, index_t b, double sum) {
    const index_t i = pair.row * kWidth + a, j = pair.column * kWidth + b;
    if (i < args.start || i >= K || j > i) return;
    partial[i * K + j] = chunk.begin == 0 ? sum : partial[i * K + j] + sum;
  });
}

// Thread: entries of the rows start: of cross, in turn; adds the splits in order. Reads are
// coalesced; moves (splits + 2) H K (K - start) numbers.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    lift_add_kernel(LiftMomentsArgs<T> args, index_t splits) {
  const index_t K = args.dim + args.lifted, rows = K - args.start;
  const double* partial = static_cast<const double*>(args.workspace);
  for (index_t e = global_thread(); e < args.halves * rows * K; e += global_threads()) {
    const index_t line = e / K, j = e - line * K;
    const index_t half = line / rows, i = args.start + (line - half * rows);
    if (j > i) continue;
    double sum = 0.0;
    for (index_t split = 0; split < splits; ++split) {
      sum += partial[((split * args.halves + half) * K + i) * K + j];
    }
    args.cross[(half * args.size + i) * args.size + j] += sum;
  }
}

template <typename T>
void launch_chunk(const LiftMomentsArgs<T>& args, const Chunk<T>& chunk, T* lifted, index_t splits,
                  void* stream) {
  const index_t K = args.dim + args.lifted;
  const dim3 tile(kTileSide, kTileSide);
  if (args.lifted > 0) {
    const dim3 grid(grid_x(ceil_div(args.lifted, kWidth)), grid_yz(ceil_div(chunk.rows, kWidth)));
    FF_LAUNCH(lift_features_kernel<T>, grid, tile, 0, stream, args, chunk, lifted);
  }
  const dim3 sum_grid(grid_x(ceil_div(K - args.start, kSumColumns)), grid_yz(args.folds));
  const dim3 sum_block(kSumColumns, kSumRows);
  FF_LAUNCH(lift_fold_sums_kernel<T>, sum_grid, sum_block, 0, stream, args, chunk);
  const index_t first_pair = tile_pairs(args.start / kWidth);
  const index_t pairs = tile_pairs(ceil_div(K, kWidth)) - first_pair;
  const dim3 grid(grid_x(pairs), grid_yz(splits), grid_yz(args.halves));
  FF_LAUNCH(lift_cross_kernel<T>, grid, tile, 0, stream, args, chunk, first_pair);
}

}  // namespace

template <typename T>
index_t workspace_bytes(const LiftMomentsArgs<T>& args) {
  const index_t features = chunk_rows(args.rows) * args.lifted * static_cast<index_t>(sizeof(T));
  return partial_bytes(args.rows, args.dim + args.lifted, args.halves) + features;
}

template <typename T>
void lift_moments_cuda(const LiftMomentsArgs<T>& args, int device, void* stream) {
  const index_t K = args.dim + args.lifted;
  if (args.rows == 0 || args.start >= K) return;
  const DeviceGuard guard(device);
  const index_t splits = splits_of(args.rows, K, args.halves);
  T* lifted = reinterpret_cast<T*>(static_cast<char*>(args.workspace) +
                                   partial_bytes(args.rows, K, args.halves));
  for (index_t begin = 0; begin < args.rows; begin += kChunkRows) {
    const index_t rows = std::min(kChunkRows, args.rows - begin);
    const Chunk<T> chunk{args.z + begin * args.row_stride, lifted, rows, begin};
    launch_chunk(args, chunk, lifted, splits, stream);
  }
  const index_t entries = args.halves * (K - args.start) * K;
  FF_LAUNCH(lift_add_kernel<T>, grid_x(ceil_div(entries, kThreads)), kThreads, 0, stream, args,
            splits);
}

template index_t workspace_bytes(const LiftMomentsArgs<float>&);
template index_t workspace_bytes(const LiftMomentsArgs<double>&);
template void lift_moments_cuda(const LiftMomentsArgs<float>&, int, void*);
template void lift_moments_cuda(const LiftMomentsArgs<double>&, int, void*);

}  // namespace fisherfast
