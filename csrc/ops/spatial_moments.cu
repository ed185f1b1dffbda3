// CUDA kernel: products of tiles of channels, one small matrix a position, summed over samples.
#include "core/cuda.cuh"
#include "core/tile_product.cuh"
#include "ops/spatial_moments.h"

namespace fisherfast {
namespace {

constexpr int kPositions = 32;  // of a block: one a lane
constexpr int kWarps = 16;      // of a block
constexpr int kThreads = kPositions * kWarps;
constexpr int kChannels = 16;  // a block owns 16 x 16 pairs of channels of each position,
constexpr int kRows = 4;       // a thread 4 x 4 of them
constexpr int kColumns = 4;
constexpr int kColumnTiles = kChannels / kColumns;
static_assert(kChannels / kRows * kColumnTiles == kWarps);
template <typename T>
constexpr int kSamples = 32 / static_cast<int>(sizeof(T));  // in shared memory at a time

// x - m of some samples, 16 channels, 32 positions; the last column spreads channels over
// banks.
template <typename T>
using Samples = T[kSamples<T>][kChannels][kPositions + 1];

// A channel and a position that one thread copies, sample after sample.
template <typename T>
struct Source {
  const T* address;  // of the first sample; null outside x
  T pilot;
  int channel, position;  // inside the block
};
constexpr int kSources = kChannels * kPositions / kThreads;  // of a thread

// The sources of this thread. Neighbouring threads take neighbouring channels or neighbouring
// positions, whichever lie closer in memory.
template <typename T>
__device__ void find_sources(const SpatialMomentsArgs<T>& args, index_t first_channel,
                             index_t first_position, bool channels_first,
                             Source<T> (&sources)[kSources]) {
  const index_t area = args.height * args.width;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int u = 0; u < kSources; ++u) {
    Source<T>& source = sources[u];
    const int e = u * kThreads + thread;
    source.channel = channels_first ? e % kChannels : e / kPositions;
    source.position = channels_first ? e / kChannels : e % kPositions;
    source.address = nullptr;
    source.pilot = T(0);
    const index_t c = first_channel + source.channel, p = first_position + source.position;
    if (c >= args.channels || p >= area) continue;
    const index_t h = p / args.width, w = p - h * args.width;
    source.address = args.x + c * args.strides[1] + h * args.strides[2] + w * args.strides[3];
    if (args.pilot != nullptr) source.pilot = args.pilot[c * area + p];
  }
}

// Copies kSamples<T> samples, about the pilot; what is outside becomes zero.
template <typename T>
__device__ void stage(const SpatialMomentsArgs<T>& args, const Source<T> (&sources)[kSources],
                      index_t first_sample, Samples<T>& samples) {
#pragma unroll
  for (int u = 0; u < kSources; ++u) {
    const Source<T>& source = sources[u];
#pragma unroll
    for (int s = 0; s < kSamples<T>; ++s) {
      const index_t n = first_sample + s;
      const bool inside = source.address != nullptr && n < args.rows;
      samples[s][source.channel][source.position] =
          inside ? source.address[n * args.strides[0]] - source.pilot : T(0);
    }
  }
}

// The results of one thread: 4 x 4 products and 4 sums, of at most kSpatialTileRows samples in T.
template <typename T>
struct Products {
  T part[kRows][kColumns], part_sum[kRows];
  double total[kRows][kColumns], sum[kRows];

  __device__ Products() : part{}, part_sum{}, total{}, sum{} {}

  __device__ void add(const Samples<T>& left, const Samples<T>& right, int row, int column,
                      int position) {
#pragma unroll
    for (int s = 0; s < kSamples<T>; ++s) {
      T l[kRows], r[kColumns];
#pragma unroll
      for (int a = 0; a < kRows; ++a) l[a] = left[s][row + a][position];
#pragma unroll
      for (int b = 0; b < kColumns; ++b) r[b] = right[s][column + b][position];
#pragma unroll
      for (int a = 0; a < kRows; ++a) {
        part_sum[a] += l[a];
#pragma unroll
        for (int b = 0; b < kColumns; ++b) part[a][b] += l[a] * r[b];
      }
    }
  }

  __device__ void flush() {
#pragma unroll
    for (int a = 0; a < kRows; ++a) {
      sum[a] += static_cast<double>(part_sum[a]);
      part_sum[a] = T(0);
#pragma unroll
      for (int b = 0; b < kColumns; ++b) {
        total[a][b] += static_cast<double>(part[a][b]);
        part[a][b] = T(0);
      }
    }
  }
};

// Writes the products of one thread at one position, both triangles, and with them the sums of its
// rows if they are the first to know them.
template <typename T>
__device__ void write_products(const SpatialMomentsArgs<T>& args, const Products<T>& products,
                               index_t position, index_t row, index_t column) {
  const index_t C = args.channels;
  double* cross = args.cross + position * C * C;
#pragma unroll
  for (int a = 0; a < kRows; ++a) {
    const index_t i = row + a;
    if (i >= C) continue;
    if (column == 0) args.sums[position * C + i] = products.sum[a];
#pragma unroll
    for (int b = 0; b < kColumns; ++b) {
      const index_t j = column + b;
      if (j <= i) cross[i * C + j] = cross[j * C + i] = products.total[a][b];
    }
  }
}

// Block (x, y): 16 x 16 channels in the lower triangle, 32 neighbouring positions (in turn). Warp:
// 4 x 4 channels; lane: one position. Reads of x are coalesced along positions or along channels,
// as x lies; writes are runs of 4 numbers. Every number of x is read C / 16 times, from the cache
// but the first; n H W C (C + 1) / 2 multiply-adds in T, summed in double every 64 samples.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    spatial_moments_kernel(SpatialMomentsArgs<T> args, bool channels_first) {
  __shared__ Samples<T> left, right;
  const TilePair pair = tile_pair(blockIdx.x);
  const bool diagonal = pair.row == pair.column;
  const int lane = static_cast<int>(threadIdx.x) % kPositions;
  const int warp = static_cast<int>(threadIdx.x) / kPositions;
  const int row = warp / kColumnTiles * kRows, column = warp % kColumnTiles * kColumns;
  const index_t first_row = pair.row * kChannels, first_column = pair.column * kChannels;
  // Tiles above the diagonal, or outside, only help to stage.
  const bool works =
      first_row + row < args.channels && first_column + column <= first_row + row + kRows - 1;
  const index_t area = args.height * args.width;
  for (index_t first = static_cast<index_t>(blockIdx.y) * kPositions; first < area;
       first += static_cast<index_t>(gridDim.y) * kPositions) {
    Source<T> rows[kSources], columns[kSources];
    find_sources(args, first_row, first, channels_first, rows);
    if (!diagonal) find_sources(args, first_column, first, channels_first, columns);
    Products<T> products;
    for (index_t n = 0; n < args.rows; n += kSamples<T>) {
      stage(args, rows, n, left);
      if (!diagonal) stage(args, columns, n, right);
      __syncthreads();
      if (works) products.add(left, diagonal ? left : right, row, column, lane);
      if ((n + kSamples<T>) % kSpatialTileRows == 0) products.flush();
      __syncthreads();
    }
    products.flush();
    if (works && first + lane < area) {
      write_products(args, products, first + lane, first_row + row, first_column + column);
    }
  }
}

}  // namespace

template <typename T>
void spatial_moments_cuda(const SpatialMomentsArgs<T>& args, int device, void* stream) {
  const index_t area = args.height * args.width;
  if (area == 0 || args.channels == 0) return;
  const DeviceGuard guard(device);
  const index_t pairs = tile_pairs(ceil_div(args.channels, kChannels));
  const bool channels_first = args.strides[1] < args.strides[3];
  const dim3 grid(grid_x(pairs), grid_yz(ceil_div(area, kPositions)));
  FF_LAUNCH(spatial_moments_kernel<T>, grid, kThreads, 0, stream, args, channels_first);
}

template void spatial_moments_cuda(const SpatialMomentsArgs<float>&, int, void*);
template void spatial_moments_cuda(const SpatialMomentsArgs<double>&, int, void*);

}  // namespace fisherfast
