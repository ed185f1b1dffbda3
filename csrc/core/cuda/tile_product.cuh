// Products of two tiles of a matrix, sum over rows r of left[r][i] right[r][j]: the inner loop of
// moments and lift_moments.
//
// A block of 16 x 16 threads owns a tile of results, 16 kEdge x 16 kEdge; a thread owns kEdge x
// kEdge neighbouring results in registers. kDepth rows at a time lie in shared memory; a row of 16
// bytes more than the tile spreads the columns over the banks. For kEdge = 4 a thread reads two
// vectors of shared memory for 16 multiply-adds.
#pragma once

#include "core/cuda/vector.cuh"

namespace fisherfast {

constexpr int kTileSide = 16;  // threads along a side of the block
constexpr int kTileThreads = kTileSide * kTileSide;
constexpr int kTileDepth = 16;  // rows in shared memory at a time: the staging below needs 16

// Rows whose products are summed in T before they go to double, as on the CPU.
constexpr int kRowsInT = 64;

// kDepth rows of one tile in shared memory.
template <typename T, int kEdge>
struct __align__(16) Tile {
  static constexpr int kWidth = kTileSide * kEdge;
  T rows[kTileDepth][kWidth + 16 / sizeof(T)];
};

template <typename T, int kEdge>
class TileProduct {
 public:
  __device__ void clear() {
#pragma unroll
    for (int a = 0; a < kEdge; ++a) {
#pragma unroll
      for (int b = 0; b < kEdge; ++b) {
        part_[a][b] = T(0);
        total_[a][b] = 0.0;
      }
    }
    rows_in_part_ = 0;
  }

  // Adds the products of kTileDepth rows; rows that are not there have to be zero.
  __device__ void add(const Tile<T, kEdge>& left, const Tile<T, kEdge>& right) {
    const int row = static_cast<int>(threadIdx.y) * kEdge;
    const int column = static_cast<int>(threadIdx.x) * kEdge;
#pragma unroll
    for (int r = 0; r < kTileDepth; ++r) {
      const auto l = as_vector<kEdge>(const_cast<T*>(&left.rows[r][row]));
      const auto m = as_vector<kEdge>(const_cast<T*>(&right.rows[r][column]));
#pragma unroll
      for (int a = 0; a < kEdge; ++a) {
#pragma unroll
        for (int b = 0; b < kEdge; ++b) part_[a][b] += l.entry[a] * m.entry[b];
      }
    }
    rows_in_part_ += kTileDepth;
    if (rows_in_part_ >= kRowsInT) flush();
  }

  // Calls use(row, column, sum) for every result of this thread, counted inside the tile.
  template <typename Use>
  __device__ void for_each(const Use& use) {
    flush();
#pragma unroll
    for (int a = 0; a < kEdge; ++a) {
#pragma unroll
      for (int b = 0; b < kEdge; ++b) {
        use(static_cast<index_t>(threadIdx.y) * kEdge + a,
            static_cast<index_t>(threadIdx.x) * kEdge + b, total_[a][b]);
      }
    }
  }

 private:
  __device__ void flush() {
#pragma unroll
    for (int a = 0; a < kEdge; ++a) {
#pragma unroll
      for (int b = 0; b < kEdge; ++b) {
        total_[a][b] += static_cast<double>(part_[a][b]);
        part_[a][b] = T(0);
      }
    }
    rows_in_part_ = 0;
  }

  T part_[kEdge][kEdge];
  double total_[kEdge][kEdge];
  int rows_in_part_;
};

// A tile of the lower triangle, tiles counted along its rows: 0 -> (0, 0), 1 -> (1, 0), ...
struct TilePair {
  index_t row, column;
};
__device__ inline TilePair tile_pair(index_t index) {
  index_t row = 0;
  for (; index > row; ++row) index -= row + 1;
  return {row, index};
}
inline index_t tile_pairs(index_t tiles) { return tiles * (tiles + 1) / 2; }

}  // namespace fisherfast
