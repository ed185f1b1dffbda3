// Rows of numbers, each held or walked along by a team of threads: one, a warp, or a whole block.
//
// The threads of a team are neighbours along x; a block holds blockDim.y teams.
#pragma once

#include "core/cuda/cuda.cuh"
#include "core/cuda/vector.cuh"

namespace fisherfast {

constexpr int kLanes = 32;        // of a warp
constexpr int kRowThreads = 256;  // of a block
constexpr unsigned kAllLanes = 0xffffffffu;

struct Add {
  template <typename S>
  __device__ S operator()(S a, S b) const {
    return a + b;
  }
};

// The larger of two numbers; a NaN is overlooked.
struct Largest {
  template <typename S>
  __device__ S operator()(S a, S b) const {
    return a < b || a != a ? b : a;
  }
};

// Joins `values` over the threads of a team, in an order that depends on kTeam alone: every thread
// gets the same bits. All threads of a warp, or of a block when it is one team, have to come.
template <int kTeam, typename S, int kValues, typename Join>
__device__ void join_team(S (&values)[kValues], Join join) {
  static_assert(kTeam == 1 || kTeam == kLanes || kTeam == kRowThreads);
  if constexpr (kTeam > 1) {
#pragma unroll
    for (int step = kLanes / 2; step > 0; step /= 2) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) {
        values[k] = join(values[k], __shfl_xor_sync(kAllLanes, values[k], step));
      }
    }
  }
  if constexpr (kTeam > kLanes) {
    constexpr int kWarps = kTeam / kLanes;
    __shared__ S parts[kWarps][kValues];
    if (threadIdx.x % kLanes == 0) {
#pragma unroll
      for (int k = 0; k < kValues; ++k) parts[threadIdx.x / kLanes][k] = values[k];
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kValues; ++k) {
      values[k] = parts[0][k];
      for (int warp = 1; warp < kWarps; ++warp) values[k] = join(values[k], parts[warp][k]);
    }
    __syncthreads();  // the parts have been read before the next call overwrites them
  }
}

// The numbers of a row that one thread of a team holds in registers: kVectors times 16 bytes. Slot
// s stands for the same number of the row in every Row of a kind.
template <typename T, int kTeam_, int kVectors>
class Row {
 public:
  static constexpr int kTeam = kTeam_;
  static constexpr int kCount = kVectorCount<T>;
  static constexpr index_t kWidth = index_t{kTeam} * kVectors * kCount;  // most that fits

  __device__ T& operator[](int slot) { return vectors_[slot / kCount].entry[slot % kCount]; }

  // Numbers after the end of the row become zero.
  __device__ void load(const T* row, index_t width) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      vectors_[v] = load_vector<kCount>(row + place(v), width - place(v));
    }
  }

  __device__ void store(T* row, index_t width) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      store_vector(row + place(v), width - place(v), vectors_[v]);
    }
  }

  // f(slot) for each number of this thread that lies in the row.
  template <typename Function>
  __device__ static void for_each(index_t width, Function f) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const index_t valid = width - place(v);
#pragma unroll
      for (int e = 0; e < kCount; ++e) {
        if (e < valid) f(v * kCount + e);
      }
    }
  }

  // f(v, j) for each vector v of this thread that begins in the row, at number j.
  template <typename Function>
  __device__ static void for_each_vector(index_t width, Function f) {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      if (place(v) < width) f(v, place(v));
    }
  }
  __device__ const Vector<T, kCount>& vector(int v) const { return vectors_[v]; }

 private:
  __device__ static index_t place(int v) { return (index_t{v} * kTeam + threadIdx.x) * kCount; }
  Vector<T, kCount> vectors_[kVectors];
};

// The rows of a team: begin, and one more after each `step`.
__device__ inline index_t first_team_row() {
  return static_cast<index_t>(blockIdx.x) * blockDim.y + threadIdx.y;
}
__device__ inline index_t team_row_step() { return static_cast<index_t>(gridDim.x) * blockDim.y; }

// The grid and block for `rows` rows with a team of kTeam threads each.
template <int kTeam>
dim3 team_block() {
  return dim3(kTeam, kRowThreads / kTeam);
}
template <int kTeam>
dim3 team_grid(index_t rows) {
  return dim3(grid_x(ceil_div(rows, kRowThreads / kTeam)));
}

// Calls launch(Row<T, team, vectors>{}) with the smallest team that holds `width` numbers in
// registers, or returns false: none does. More than four vectors a thread would cost occupancy.
template <typename T, typename Launch>
bool with_row_in_registers(index_t width, Launch launch) {
  if (width <= Row<T, kLanes, 1>::kWidth) return launch(Row<T, kLanes, 1>{}), true;
  if (width <= Row<T, kLanes, 2>::kWidth) return launch(Row<T, kLanes, 2>{}), true;
  if (width <= Row<T, kLanes, 4>::kWidth) return launch(Row<T, kLanes, 4>{}), true;
  if (width <= Row<T, kRowThreads, 1>::kWidth) return launch(Row<T, kRowThreads, 1>{}), true;
  if (width <= Row<T, kRowThreads, 2>::kWidth) return launch(Row<T, kRowThreads, 2>{}), true;
  if (width <= Row<T, kRowThreads, 4>::kWidth) return launch(Row<T, kRowThreads, 4>{}), true;
  return false;
}

}  // namespace fisherfast
