// CUDA kernel: products of tiles of channels, one small matrix a position, summed over samples.
#include "core/cuda/cuda.cuh"
#include "core/cuda/tile_product.cuh"
#include "ops/moments/spatial_moments.h"

namespace fisherfast {
namespace {

constexpr int kPositions = 32;    // of a block: one a lane
constexpr int kSide = 4;          // a thread owns 4 x 4 pairs of channels of its position,
                                  // a block kChannels x kChannels
constexpr index_t kBlocks = 264;  // enough to fill a large device: with fewer, smaller ones are run
template <int kChannels>
constexpr int kWarps = (kChannels / kSide) * (kChannels / kSide);
template <int kChannels>
constexpr int kThreads = kPositions * kWarps<kChannels>;
template <int kChannels>
constexpr int kSources = kChannels * kPositions / kThreads<kChannels>;  // that one thread copies
template <typename T>
constexpr int kSamples = 32 / static_cast<int>(sizeof(T));  // in shared memory at a time
static_assert(kSpatialTileRows % kSamples<float> == 0);

// x - m of some samples; the last column spreads channels over the banks of shared memory.
template <typename T, int kChannels>
using Samples = T[kSamples<T>][kChannels][kPositions + 1];

// A channel and a position that one thread copies, sample after sample.
template <typename T>
struct Source {
  const T* address;  // of the first sample; null outside x
  T pilot;
  int channel, position;  // inside the block
};

// The sources of this thread. Neighbouring threads take neighbouring channels or neighbouring
// positions, whichever lie closer in memory.
template <typename T, int kChannels>
__device__ void find_sources(const SpatialMomentsArgs<T>& args, index_t first_channel,
                             index_t first_position, bool channels_first,
                             Source<T> (&sources)[kSources<kChannels>]) {
  const index_t area = args.height * args.width;
  const int thread = static_cast<int>(threadIdx.x);
#pragma unroll
  for (int u = 0; u < kSources<kChannels>; ++u) {
    Source<T>& source = sources[u];
    const int e = u * kThreads<kChannels> + thread;
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
template <typename T, int kChannels>
__device__ void stage(const SpatialMomentsArgs<T>& args,
                      const Source<T> (&sources)[kSources<kChannels>], index_t first_sample,
                      Samples<T, kChannels>& samples) {
#pragma unroll
  for (int u = 0; u < kSources<kChannels>; ++u) {
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
  T part[kSide][kSide], part_sum[kSide];
  double total[kSide][kSide], sum[kSide];

  __device__ Products() : part{}, part_sum{}, total{}, sum{} {}

  template <int kChannels>
  __device__ void add(const Samples<T, kChannels>& left, const Samples<T, kChannels>& right,
                      int row, int column, int position) {
#pragma unroll
    for (int s = 0; s < kSamples<T>; ++s) {
      T l[kSide], r[kSide];
#pragma unroll
      for (int a = 0; a < kSide; ++a) l[a] = left[s][row + a][position];
#pragma unroll
      for (int b = 0; b < kSide; ++b) r[b] = right[s][column + b][position];
#pragma unroll
      for (int a = 0; a < kSide; ++a) {
        part_sum[a] += l[a];
#pragma unroll
        for (int b = 0; b < kSide; ++b) part[a][b] += l[a] * r[b];
      }
    }
  }

  __device__ void flush() {
#pragma unroll
    for (int a = 0; a < kSide; ++a) {
      sum[a] += static_cast<double>(part_sum[a]);
      part_sum[a] = T(0);
#pragma unroll
      for (int b = 0; b < kSide; ++b) {
        total[a][b] += static_cast<double>(part[a][b]);
        part[a][b] = T(0);
      }
    }
  }
};

// Writes the products of one thread at one position, both triangles, and the sums of its
// rows if it has the first columns.
template <typename T>
__device__ void write_products(const SpatialMomentsArgs<T>& args, const Products<T>& products,
                               index_t position, index_t row, index_t column) {
  const index_t C = args.channels;
  double* cross = args.cross + position * C * C;
#pragma unroll
  for (int a = 0; a < kSide; ++a) {
    const index_t i = row + a;
    if (i >= C) continue;
    if (column == 0) args.sums[position * C + i] = products.sum[a];
#pragma unroll
    for (int b = 0; b < kSide; ++b) {
      const index_t j = column + b;
      if (j <= i) cross[i * C + j] = cross[j * C + i] = products.total[a][b];
    }
  }
}

// Block (x, y): kChannels x kChannels channels in the lower triangle, 32 neighbouring positions (in
// turn). Warp: 4 x 4 channels; lane: one position. Reads of x are coalesced along positions or
// along channels, as x lies; writes are runs of 4 numbers. Every number of x is read C / kChannels
// times, from the cache but the first; n H W C (C + 1) / 2 multiply-adds in T, summed in double
// every 64 samples: the same bits for every kChannels.
template <typename T, int kChannels>
__global__ void __launch_bounds__(kThreads<kChannels>)
    spatial_moments_kernel(SpatialMomentsArgs<T> args, bool channels_first) {
  constexpr int kTiles = kChannels / kSide;  // of a thread, along a side
  __shared__ Samples<T, kChannels> left, right;
  const TilePair pair = tile_pair(blockIdx.x);
  // Tiles of 4 channels are for C <= 4: there is one, and the compiler leaves out the other half.
  const bool diagonal = kChannels == kSide || pair.row == pair.column;
  const int lane = static_cast<int>(threadIdx.x) % kPositions;
  const int warp = static_cast<int>(threadIdx.x) / kPositions;
  const int row = warp / kTiles * kSide, column = warp % kTiles * kSide;
  const index_t first_row = pair.row * kChannels, first_column = pair.column * kChannels;
  // Warps above the diagonal, or outside, only help to stage.
  const bool works = first_row + row < args.channels && first_column + column <= first_row + row;
  const index_t area = args.height * args.width;
  for (index_t first = static_cast<index_t>(blockIdx.y) * kPositions; first < area;
       first += static_cast<index_t>(gridDim.y) * kPositions) {
    Source<T> rows[kSources<kChannels>], columns[kSources<kChannels>];
    find_sources<T, kChannels>(args, first_row, first, channels_first, rows);
    if (!diagonal) find_sources<T, kChannels>(args, first_column, first, channels_first, columns);
    Products<T> products;
    for (index_t n = 0; n < args.rows; n += kSamples<T>) {
      stage<T, kChannels>(args, rows, n, left);
      if (!diagonal) stage<T, kChannels>(args, columns, n, right);
      __syncthreads();
      if (works) {
        products.template add<kChannels>(left, diagonal ? left : right, row, column, lane);
      }
      if ((n + kSamples<T>) % kSpatialTileRows == 0) products.flush();
      __syncthreads();
    }
    products.flush();
    if (works && first + lane < area) {
      write_products(args, products, first + lane, first_row + row, first_column + column);
    }
  }
}

template <typename T, int kChannels>
dim3 grid_of(const SpatialMomentsArgs<T>& args) {
  const index_t pairs = tile_pairs(ceil_div(args.channels, kChannels));
  return dim3(grid_x(pairs), grid_yz(ceil_div(args.height * args.width, kPositions)));
}

template <typename T, int kChannels>
void launch_tiles(const SpatialMomentsArgs<T>& args, void* stream) {
  const bool channels_first = args.strides[1] < args.strides[3];
  FF_LAUNCH((spatial_moments_kernel<T, kChannels>), (grid_of<T, kChannels>(args)),
            kThreads<kChannels>, 0, stream, args, channels_first);
}

}  // namespace

template <typename T>
void spatial_moments_cuda(const SpatialMomentsArgs<T>& args, int device, void* stream) {
  const index_t area = args.height * args.width;
  if (area == 0 || args.channels == 0) return;
  const DeviceGuard guard(device);
  const dim3 grid = grid_of<T, 16>(args);
  if (args.channels <= 4) {
    launch_tiles<T, 4>(args, stream);
  } else if (args.channels <= 8 || index_t{grid.x} * grid.y < kBlocks) {
    launch_tiles<T, 8>(args, stream);
  } else {
    launch_tiles<T, 16>(args, stream);
  }
}

template void spatial_moments_cuda(const SpatialMomentsArgs<float>&, int, void*);
template void spatial_moments_cuda(const SpatialMomentsArgs<double>&, int, void*);

}  // namespace fisherfast
