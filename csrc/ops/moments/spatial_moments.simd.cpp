// A position a lane. Tiles of samples are copied into the order [sample, channel, position], with
// the pilot taken off; where positions are neighbours in memory this is a copy of vectors, where
// channels are (channels-last) squares are transposed in registers. Then, for every block of kBlock
// by kBlock channels, the products of the tile are summed in registers and added in double.
#include "ops/moments/spatial_moments.h"

#include "core/simd/simd.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

constexpr int kBlock = FF_SIMD_BYTES == 64 ? 4 : 3;  // 16 accumulators of 32 registers, 9 of 16

// The positions of one vector; lanes beyond the last repeat it.
template <typename T>
struct Positions {
  static constexpr int W = kLanes<T>;
  index_t first;
  int count;
  index_t offset[W];  // of each position in x
  bool neighbours;    // the whole vector lies in one row of x, next to each other
};

template <typename T>
FF_INLINE Positions<T> positions_from(const SpatialMomentsArgs<T>& args, index_t first,
                                      index_t end) {
  constexpr int W = kLanes<T>;
  Positions<T> positions;
  positions.first = first;
  positions.count = static_cast<int>(end - first < W ? end - first : W);
  positions.neighbours = positions.count == W;
  for (int lane = 0; lane < W; ++lane) {
    const index_t p = first + (lane < positions.count ? lane : positions.count - 1);
    positions.offset[lane] = p / args.width * args.strides[2] + p % args.width * args.strides[3];
    positions.neighbours &= positions.offset[lane] == positions.offset[0] + lane;
  }
  return positions;
}

// Channels [c, c + W) of all positions, transposed.
template <typename T>
FF_INLINE void read_square(const T* sample, const Positions<T>& positions, index_t c, Vec<T>* to) {
  constexpr int W = kLanes<T>;
  Vec<T> square[W];
  for (int lane = 0; lane < W; ++lane) square[lane] = load(sample + positions.offset[lane] + c);
  transpose<T>(square);
  for (int e = 0; e < W; ++e) to[c + e] = square[e];
}

// One sample in the order [channel, position].
template <typename T>
FF_INLINE void read_sample(const SpatialMomentsArgs<T>& args, const Positions<T>& positions,
                           index_t n, const Vec<T>* pilot, Vec<T>* to) {
  constexpr int W = kLanes<T>;
  const index_t C = args.channels;
  const T* sample = args.x + n * args.strides[0];
  const index_t stride = args.strides[1];
  index_t c = 0;
  if (positions.neighbours) {
    const T* const from = sample + positions.offset[0];
    for (; c < C; ++c) {
      to[c] = load(from + c * stride);
      __builtin_prefetch(from + args.strides[0] + c * stride, 0, 2);  // of the next sample
    }
  } else if (stride == 1) {
    for (; c + W <= C; c += W) read_square(sample, positions, c, to);
  }
  for (; c < C; ++c) {
    for (int lane = 0; lane < W; ++lane) to[c][lane] = sample[positions.offset[lane] + c * stride];
  }
  if (pilot == nullptr) return;
  for (c = 0; c < C; ++c) to[c] -= pilot[c];
}

// As many doubles as a vector has lanes of T; the compiler splits them into registers.
template <typename T>
struct DoublesOf {
  typedef double Type
      __attribute__((vector_size(8 * kLanes<T>), aligned(alignof(double)), may_alias));
};

template <typename T>
FF_INLINE void add_double(double* sum, Vec<T> value) {
  using Doubles = typename DoublesOf<T>::Type;
  *reinterpret_cast<Doubles*>(sum) += __builtin_convertvector(value, Doubles);
}

// Adds the products of channels [i, i + R) and [j, j + Q) over the tile; sums are by lane.
template <typename T, int R, int Q>
FF_INLINE void add_products(const Vec<T>* tile, index_t rows, index_t C, index_t i, index_t j,
                            double* cross) {
  Vec<T> sums[R][Q] = {};
  for (index_t n = 0; n < rows; ++n) {
    const Vec<T>*left = tile + n * C + i, *right = tile + n * C + j;
    FF_UNROLL
    for (int r = 0; r < R; ++r) {
      FF_UNROLL
      for (int q = 0; q < Q; ++q) sums[r][q] += left[r] * right[q];
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int q = 0; q < Q && j + q <= i + r; ++q) {
      const index_t entry = (i + r) * (i + r + 1) / 2 + j + q;
      add_double<T>(cross + entry * kLanes<T>, sums[r][q]);
    }
  }
}

template <typename T, int R>
FF_INLINE void add_row_block(const Vec<T>* tile, index_t rows, index_t C, index_t i,
                             double* cross) {
  index_t j = 0;
  for (; j + kBlock <= i + R; j += kBlock) {
    add_products<T, R, kBlock>(tile, rows, C, i, j, cross);
  }
  for (; j < i + R; ++j) add_products<T, R, 1>(tile, rows, C, i, j, cross);
}

template <typename T>
void add_tile(const Vec<T>* tile, index_t rows, index_t C, double* sums, double* cross) {
  for (index_t n = 0; n < rows; ++n) {
    for (index_t c = 0; c < C; ++c) add_double<T>(sums + c * kLanes<T>, tile[n * C + c]);
  }
  index_t i = 0;
  for (; i + kBlock <= C; i += kBlock) add_row_block<T, kBlock>(tile, rows, C, i, cross);
  for (; i < C; ++i) add_row_block<T, 1>(tile, rows, C, i, cross);
}

template <typename T>
void write_positions(const SpatialMomentsArgs<T>& args, const Positions<T>& positions,
                     const double* sums, const double* cross) {
  constexpr int W = kLanes<T>;
  const index_t C = args.channels;
  for (int lane = 0; lane < positions.count; ++lane) {
    double* const to_sums = args.sums + (positions.first + lane) * C;
    double* const to_cross = args.cross + (positions.first + lane) * C * C;
    for (index_t i = 0; i < C; ++i) {
      to_sums[i] = sums[i * W + lane];
      const double* row = cross + i * (i + 1) / 2 * W + lane;
      for (index_t j = 0; j <= i; ++j) to_cross[i * C + j] = row[j * W];
    }
    for (index_t i = 0; i < C; ++i) {
      for (index_t j = i + 1; j < C; ++j) to_cross[i * C + j] = to_cross[j * C + i];
    }
  }
}

}  // namespace

template <typename T>
void spatial_moments_lanes(const SpatialMomentsArgs<T>& args, index_t begin, index_t end,
                           void* scratch) {
  constexpr int W = kLanes<T>;
  const index_t C = args.channels, entries = C * (C + 1) / 2;
  Vec<T>* const tile = static_cast<Vec<T>*>(scratch);
  Vec<T>* const pilot = tile + kSpatialTileRows * C;
  double* const sums = reinterpret_cast<double*>(pilot + C);
  double* const cross = sums + C * W;
  for (index_t first = begin; first < end; first += W) {
    const Positions<T> positions = positions_from(args, first, end);
    for (index_t e = 0; e < (C + entries) * W; ++e) sums[e] = 0;
    for (index_t c = 0; args.pilot != nullptr && c < C; ++c) {
      for (int lane = 0; lane < W; ++lane) {
        const index_t p = first + (lane < positions.count ? lane : positions.count - 1);
        pilot[c][lane] = args.pilot[c * args.height * args.width + p];
      }
    }
    for (index_t n = 0; n < args.rows; n += kSpatialTileRows) {
      const index_t rows = args.rows - n < kSpatialTileRows ? args.rows - n : kSpatialTileRows;
      for (index_t r = 0; r < rows; ++r) {
        read_sample(args, positions, n + r, args.pilot == nullptr ? nullptr : pilot, tile + r * C);
      }
      add_tile<T>(tile, rows, C, sums, cross);
    }
    write_positions(args, positions, sums, cross);
  }
}

template void spatial_moments_lanes(const SpatialMomentsArgs<float>&, index_t, index_t, void*);
template void spatial_moments_lanes(const SpatialMomentsArgs<double>&, index_t, index_t, void*);

}  // namespace fisherfast::FF_SIMD_NAMESPACE
