// CUDA kernel of fisher_solve for many small systems: a thread owns one column of one system, in
// registers, and tells the others its factored column through shared memory.
#pragma once

#include "core/cuda/cuda.cuh"
#include "core/cuda/vector.cuh"
#include "ops/solve/fisher_solve.h"

namespace fisherfast {
namespace {

constexpr unsigned kAllLanes = 0xffffffff;
constexpr int kThreadsOfLanes = 128;  // of a block, when a system needs at most a warp
constexpr index_t kLaneDim = 64;      // largest d whose columns threads hold in registers
constexpr int kLaneParams = 4;        // largest P there

// What the thread of column j tells the others once it is factored.
template <typename T, int kLanes, int kParams>
struct __align__(16) Announcement {
  T column[kLanes];  // row r > j: L_rj
  T half[kParams];   // row j of Y, of X on the way back
  T inverse_root;    // 1 / L_jj, NaN for a pivot that failed
};

// kLanes neighbouring threads that share one system: a part of a warp, a warp, or a block.
template <typename T, int kLanes, int kParams>
struct Lanes {
  using Message = Announcement<T, kLanes, kParams>;
  static constexpr int kThreads = kLanes < kThreadsOfLanes / 2 ? kThreadsOfLanes : kLanes;
  static constexpr int kSystems = kThreads / kLanes;  // of a block
  static constexpr int kInWarp = kLanes < 32 ? kLanes : 32;

  int lane;           // the column that this thread holds
  Message* messages;  // two in shared memory, used in turn: a late thread still reads the other

  __device__ void wait() const {
    if constexpr (kLanes <= 32) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  }

  // The value reduced over the lanes by a tree of fixed shape, the same in each of them.
  template <typename Reduce>
  __device__ T reduce(T value, const Reduce& both) const {
#pragma unroll
    for (int step = kInWarp / 2; step > 0; step /= 2) {
      value = both(value, __shfl_xor_sync(kAllLanes, value, step, kInWarp));
    }
    if constexpr (kLanes > 32) {
      messages[0].column[lane] = value;
      wait();
      value = both(messages[0].column[0], messages[0].column[32]);
      wait();
    }
    return value;
  }
};

// What a thread holds of one system. The rows of `column` are indexed by constants alone, so that
// they stay in registers.
template <typename T, int kLanes, int kParams>
struct ColumnOfLane {
  T column[kLanes];  // row r > c: the entry (r, c), L_rc L_cc in the end; the others go unused
  T pivot;           // the entry (c, c), L_cc^2 in the end; NaN for an unusable variance
  T inverse_root;    // 1 / L_cc
  T half[kParams];   // row c of D, then of Y, then of X
  T scale;
};

// Reads are coalesced along the rows of C, up to the triangle.
template <typename T, int kLanes, int kParams>
__device__ void load_columns(const FisherSolveArgs<T>& args, index_t system,
                             const Lanes<T, kLanes, kParams>& lanes,
                             ColumnOfLane<T, kLanes, kParams>& own) {
  const int d = static_cast<int>(args.dim), c = lanes.lane;
  const bool inside = c < d;
  const T* cov = args.cov + system * args.cov_strides[0] + c * args.cov_strides[2];
  const T* deriv = args.deriv + system * args.deriv_strides[0] + c * args.deriv_strides[1];
  own.scale = inside ? unit_variance_scale(variance_of(args, system, c)) : T(0);
  own.pivot = own.scale > 0 ? T(1) + args.ridge : kNan<T>;
  own.inverse_root = T(0);
#pragma unroll
  for (int r = 0; r < kLanes; ++r) {
    own.column[r] = r > c && r < d ? cov[r * args.cov_strides[1]] : T(0);
  }
#pragma unroll
  for (int p = 0; p < kParams; ++p) {
    const bool wanted = inside && p < args.params;
    own.half[p] = wanted ? own.scale * deriv[p * args.deriv_strides[2]] : T(0);
  }
  T* scales = lanes.messages[1].column;
  scales[c] = own.scale;
  lanes.wait();
#pragma unroll
  for (int r = 0; r < kLanes; ++r) {
    if (r > c && r < d) own.column[r] = scales[r] * own.column[r] * own.scale;
  }
}

// Factors the system, and D with it. Step j: thread j announces column j of L and row j of Y, and
// the threads c > j take L_cj times them out of theirs. Returns the first failed pivot, to all.
template <typename T, int kLanes, int kParams>
__device__ std::int32_t factor_columns(int d, T tolerance, const Lanes<T, kLanes, kParams>& lanes,
                                       ColumnOfLane<T, kLanes, kParams>& own) {
  constexpr int kRun = kLanes > 32 ? 16 : 8;  // columns that are updated from the same row on
  constexpr int kVector = 4;
  const int c = lanes.lane;
  std::int32_t info = 0;
#pragma unroll
  for (int first = 0; first < kLanes; first += kRun) {
    for (int j = first; j < min(first + kRun, d); ++j) {
      auto& message = lanes.messages[j % 2];
      if (c == j) {
        own.inverse_root = own.pivot > tolerance ? rsqrt(own.pivot) : kNan<T>;
        message.inverse_root = own.inverse_root;
#pragma unroll
        for (int p = 0; p < kParams; ++p) message.half[p] = own.half[p] *= own.inverse_root;
#pragma unroll
        for (int r = first; r < kLanes; r += kVector) {
          Vector<T, kVector> rows;
#pragma unroll
          for (int e = 0; e < kVector; ++e) rows.entry[e] = own.column[r + e] * own.inverse_root;
          as_vector<kVector>(&message.column[r]) = rows;
        }
      }
      lanes.wait();
      if (info == 0 && !(message.inverse_root > 0)) info = j + 1;
      const T multiplier = c > j ? message.column[c] : T(0);
#pragma unroll
      for (int r = first; r < kLanes; r += kVector) {
        const auto rows = as_vector<kVector>(&message.column[r]);
#pragma unroll
        for (int e = 0; e < kVector; ++e) own.column[r + e] -= rows.entry[e] * multiplier;
      }
      own.pivot -= multiplier * multiplier;
#pragma unroll
      for (int p = 0; p < kParams; ++p) {
        if (c > j) own.half[p] -= message.half[p] * multiplier;  // 0 * NaN would reach rows above
      }
    }
  }
  lanes.wait();  // the last message has been read before the next use
  return info;
}

// X = diag(s) L^-T Y, from the last row up: thread c holds L_rc for all r > c.
template <typename T, int kLanes, int kParams>
__device__ void solve_transposed(int d, const Lanes<T, kLanes, kParams>& lanes,
                                 ColumnOfLane<T, kLanes, kParams>& own) {
  const int c = lanes.lane;
#pragma unroll
  for (int r = kLanes - 1; r >= 0; --r) {
    if (r >= d) continue;
    auto& message = lanes.messages[r % 2];
    if (c == r) {
#pragma unroll
      for (int p = 0; p < kParams; ++p) message.half[p] = own.half[p] * own.inverse_root;
    }
    lanes.wait();
#pragma unroll
    for (int p = 0; p < kParams; ++p) {
      if (c < r) own.half[p] -= own.column[r] * own.inverse_root * message.half[p];
    }
  }
#pragma unroll
  for (int p = 0; p < kParams; ++p) own.half[p] *= own.inverse_root * own.scale;
  lanes.wait();
}

// Writes this thread's row of a [d, P] result.
template <typename T, int kLanes, int kParams>
__device__ void write_row(const ColumnOfLane<T, kLanes, kParams>& own, index_t row, int params,
                          bool failed, T* result) {
#pragma unroll
  for (int p = 0; p < kParams; ++p) {
    if (p < params) result[row * params + p] = failed ? kNan<T> : own.half[p];
  }
}

// Reduces J = Y^T Y and the condition over the threads; the first one writes them.
template <typename T, int kLanes, int kParams>
__device__ void write_reduced(const FisherSolveArgs<T>& args, index_t system,
                              const Lanes<T, kLanes, kParams>& lanes,
                              const ColumnOfLane<T, kLanes, kParams>& own, std::int32_t info,
                              bool wanted) {
  const int params = static_cast<int>(args.params);
  const bool inside = lanes.lane < args.dim, writes = wanted && lanes.lane == 0;
  T* fisher = args.fisher + system * params * params;
#pragma unroll
  for (int p = 0; p < kParams; ++p) {
#pragma unroll
    for (int q = 0; q <= p; ++q) {
      const T product = inside ? own.half[p] * own.half[q] : T(0);
      const T sum = lanes.reduce(product, [](T a, T b) { return a + b; });
      if (!writes || p >= params) continue;
      fisher[p * params + q] = fisher[q * params + p] = info != 0 ? kNan<T> : sum;
    }
  }
  const T root = T(1) / own.inverse_root;
  const T least = lanes.reduce(inside ? root : kLargest<T>, [](T a, T b) { return min(a, b); });
  const T most = lanes.reduce(inside ? root : T(0), [](T a, T b) { return max(a, b); });
  if (!writes) return;
  const T ratio = args.dim > 0 ? most / least : T(1);
  args.condition[system] = info != 0 ? kNan<T> : ratio * ratio;
  args.info[system] = info;
}

// kLanes threads: one system, d <= kLanes. Thread: one column of it, in registers. Up to a warp,
// the systems of a block never wait for each other. Reads of C and writes of Y are coalesced for
// contiguous input. Moves d (d + 1) / 2 + 2 d P + P^2 numbers a system; does 5 / 8 of kLanes^2 d
// multiply-adds, a quarter as many reads of shared memory, the same for all lanes of a warp.
template <typename T, int kLanes, int kParams>
__global__ void __launch_bounds__(Lanes<T, kLanes, kParams>::kThreads)
    fisher_solve_lanes_kernel(FisherSolveArgs<T> args, T tolerance) {
  using Group = Lanes<T, kLanes, kParams>;
  __shared__ Announcement<T, kLanes, kParams> messages[Group::kSystems][2];
  const int d = static_cast<int>(args.dim), P = static_cast<int>(args.params);
  const int place = static_cast<int>(threadIdx.x) / kLanes;
  const Group lanes{static_cast<int>(threadIdx.x) % kLanes, messages[place]};
  for (index_t first = static_cast<index_t>(blockIdx.x) * Group::kSystems; first < args.batch;
       first += static_cast<index_t>(gridDim.x) * Group::kSystems) {
    const bool wanted = first + place < args.batch;  // the other threads repeat the last system
    const index_t system = wanted ? first + place : args.batch - 1;
    ColumnOfLane<T, kLanes, kParams> own;
    load_columns(args, system, lanes, own);
    const std::int32_t info = factor_columns(d, tolerance, lanes, own);
    const bool writes = wanted && lanes.lane < d;
    if (writes) write_row(own, system * d + lanes.lane, P, info != 0, args.half);
    write_reduced(args, system, lanes, own, info, wanted);
    if (args.solution != nullptr) {
      solve_transposed(d, lanes, own);
      if (writes) write_row(own, system * d + lanes.lane, P, info != 0, args.solution);
    }
  }
}

template <typename T, int kLanes, int kParams>
void launch_lanes(const FisherSolveArgs<T>& args, void* stream) {
  using Group = Lanes<T, kLanes, kParams>;
  FF_LAUNCH((fisher_solve_lanes_kernel<T, kLanes, kParams>),
            grid_x(ceil_div(args.batch, Group::kSystems)), Group::kThreads, 0, stream, args,
            pivot_tolerance<T>(args.dim));
}

template <typename T, int kParams>
void launch_lanes(const FisherSolveArgs<T>& args, void* stream) {
  if (args.dim <= 8) return launch_lanes<T, 8, kParams>(args, stream);
  if (args.dim <= 16) return launch_lanes<T, 16, kParams>(args, stream);
  if (args.dim <= 32) return launch_lanes<T, 32, kParams>(args, stream);
  launch_lanes<T, kLaneDim, kParams>(args, stream);
}

}  // namespace
}  // namespace fisherfast
