// CUDA kernels: small systems in the registers of a warp, larger ones in the shared memory of a
// block.
#include "core/check.h"
#include "core/cuda.cuh"
#include "ops/fisher_solve.h"

namespace fisherfast {
namespace {

constexpr unsigned kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffff;
constexpr unsigned kWarps = 4;      // of a block, when a warp owns its systems alone
constexpr index_t kWarpDim = 32;    // largest d that the lanes of a warp take, a column each
constexpr index_t kWarpParams = 4;  // largest P there

constexpr unsigned kRowThreads = 32;  // a warp walks down a column
constexpr unsigned kColumnWarps = 8;  // columns that are updated at the same time

// --- a warp, or a part of it, owns a system ------------------------------------------------------

// Lanes that share one system: kLanes neighbours, kWarpSize / kLanes systems a warp.
template <typename T, int kLanes>
struct Lanes {
  int lane = static_cast<int>(threadIdx.x) % kLanes;  // the column that this lane holds

  __device__ static T from(T value, int source) {
    return __shfl_sync(kAllLanes, value, source, kLanes);
  }
  // Sum, smallest and largest over the lanes, the same in each: a tree of fixed shape.
  __device__ static T sum(T value) {
    for (int step = kLanes / 2; step > 0; step /= 2) {
      value += __shfl_xor_sync(kAllLanes, value, step, kLanes);
    }
    return value;
  }
  __device__ static T smallest(T value) {
    for (int step = kLanes / 2; step > 0; step /= 2) {
      value = min(value, __shfl_xor_sync(kAllLanes, value, step, kLanes));
    }
    return value;
  }
  __device__ static T largest(T value) {
    for (int step = kLanes / 2; step > 0; step /= 2) {
      value = max(value, __shfl_xor_sync(kAllLanes, value, step, kLanes));
    }
    return value;
  }
};

// What the lane of column c holds of one system. The rows of `column` are indexed by constants
// alone, so that they stay in registers.
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
__device__ void load_columns(const FisherSolveArgs<T>& args, index_t system, int lane,
                             ColumnOfLane<T, kLanes, kParams>& own) {
  const int d = static_cast<int>(args.dim);
  const bool inside = lane < d;
  const T* cov = args.cov + system * args.cov_strides[0] + lane * args.cov_strides[2];
  const T* deriv = args.deriv + system * args.deriv_strides[0] + lane * args.deriv_strides[1];
  own.scale = inside ? unit_variance_scale(variance_of(args, system, lane)) : T(0);
  own.pivot = own.scale > 0 ? T(1) + args.ridge : kNan<T>;
  own.inverse_root = T(0);
#pragma unroll
  for (int r = 0; r < kLanes; ++r) {
    own.column[r] = r > lane && r < d ? cov[r * args.cov_strides[1]] : T(0);
  }
#pragma unroll
  for (int p = 0; p < kParams; ++p) {
    const bool wanted = inside && p < args.params;
    own.half[p] = wanted ? own.scale * deriv[p * args.deriv_strides[2]] : T(0);
  }
#pragma unroll
  for (int r = 0; r < kLanes; ++r) {
    const T row_scale = Lanes<T, kLanes>::from(own.scale, r);
    if (r > lane && r < d) own.column[r] = row_scale * own.column[r] * own.scale;
  }
}

// Factors the system, and D with it. Step j: lane j writes column j of L to shared memory, and the
// lanes c > j take L_cj times it out of theirs. Two buffers: a lane that is late still reads one
// while the next column goes to the other. Returns the first failed pivot, the same in all lanes.
template <typename T, int kLanes, int kParams>
__device__ std::int32_t factor_columns(int d, int lane, T tolerance, T (*buffers)[kLanes],
                                       ColumnOfLane<T, kLanes, kParams>& own) {
  constexpr int kRun = 8;  // columns that are updated from the same row on
  std::int32_t info = 0;
#pragma unroll
  for (int first = 0; first < kLanes; first += kRun) {
    for (int j = first; j < min(first + kRun, d); ++j) {
      const T pivot = Lanes<T, kLanes>::from(own.pivot, j);
      if (info == 0 && !(pivot > tolerance)) info = j + 1;
      const T inverse_root = rsqrt(pivot);
      T* factor = buffers[j % 2];
      if (lane == j) {
        own.inverse_root = inverse_root;
#pragma unroll
        for (int r = first; r < kLanes; ++r) factor[r] = own.column[r] * inverse_root;
      }
      __syncwarp();
      const T multiplier = lane > j ? factor[lane] : T(0);
#pragma unroll
      for (int r = first; r < kLanes; ++r) own.column[r] -= factor[r] * multiplier;
      own.pivot -= multiplier * multiplier;
#pragma unroll
      for (int p = 0; p < kParams; ++p) {
        const T y = Lanes<T, kLanes>::from(own.half[p], j) * inverse_root;
        if (lane == j) own.half[p] = y;
        if (lane > j) own.half[p] -= y * multiplier;  // 0 * NaN would reach the rows above
      }
    }
  }
  __syncwarp();  // the last columns have been read before the next system overwrites them
  return info;
}

// X = diag(s) L^-T Y, from the last row up: lane c holds L_rc for all r > c.
template <typename T, int kLanes, int kParams>
__device__ void solve_transposed(int d, ColumnOfLane<T, kLanes, kParams>& own) {
#pragma unroll
  for (int r = kLanes - 1; r >= 0; --r) {
    if (r >= d) continue;
    const T below = own.column[r] * own.inverse_root;  // L_rc, zero for c >= r
    const int lane = Lanes<T, kLanes>().lane;
#pragma unroll
    for (int p = 0; p < kParams; ++p) {
      const T x = Lanes<T, kLanes>::from(own.half[p] * own.inverse_root, r);
      if (lane < r) own.half[p] -= below * x;
    }
  }
#pragma unroll
  for (int p = 0; p < kParams; ++p) own.half[p] *= own.inverse_root * own.scale;
}

// Writes this lane's row of a [d, P] result.
template <typename T, int kLanes, int kParams>
__device__ void write_row(const ColumnOfLane<T, kLanes, kParams>& own, index_t row, int params,
                          bool failed, T* result) {
#pragma unroll
  for (int p = 0; p < kParams; ++p) {
    if (p < params) result[row * params + p] = failed ? kNan<T> : own.half[p];
  }
}

template <typename T, int kLanes, int kParams>
__device__ void write_fisher(const ColumnOfLane<T, kLanes, kParams>& own, int lane, int params,
                             bool failed, bool wanted, T* fisher) {
#pragma unroll
  for (int p = 0; p < kParams; ++p) {
#pragma unroll
    for (int q = 0; q <= p; ++q) {
      const T sum = Lanes<T, kLanes>::sum(own.half[p] * own.half[q]);
      if (!wanted || lane != 0 || p >= params) continue;
      fisher[p * params + q] = fisher[q * params + p] = failed ? kNan<T> : sum;
    }
  }
}

// kLanes lanes: one system, d <= kLanes. Lane: one column of it, in registers; block: kWarps warps
// that never wait for each other. Reads of C and writes of Y are coalesced for contiguous input.
// Moves d (d + 1) / 2 + 2 d P + P^2 numbers a system; does 5 / 8 of kLanes^2 d multiply-adds, a
// quarter of kLanes^2 / 2 wide reads of shared memory and log2(kLanes) shuffles a sum.
template <typename T, int kLanes, int kParams>
__global__ void __launch_bounds__(kWarps* kWarpSize)
    fisher_solve_warp_kernel(FisherSolveArgs<T> args, T tolerance) {
  constexpr int kSystems = kWarps * kWarpSize / kLanes;  // of a block
  __shared__ __align__(16) T buffers[kSystems][2][kLanes];
  const int d = static_cast<int>(args.dim), P = static_cast<int>(args.params);
  const int lane = Lanes<T, kLanes>().lane, place = static_cast<int>(threadIdx.x) / kLanes;
  for (index_t first = static_cast<index_t>(blockIdx.x) * kSystems; first < args.batch;
       first += static_cast<index_t>(gridDim.x) * kSystems) {
    const bool wanted = first + place < args.batch;  // the other lanes repeat the last system
    const index_t system = wanted ? first + place : args.batch - 1;
    ColumnOfLane<T, kLanes, kParams> own;
    load_columns(args, system, lane, own);
    const std::int32_t info = factor_columns(d, lane, tolerance, buffers[place], own);
    const bool failed = info != 0, writes = wanted && lane < d;
    if (writes) write_row(own, system * d + lane, P, failed, args.half);
    write_fisher(own, lane, P, failed, wanted, args.fisher + system * P * P);
    const T root = T(1) / own.inverse_root;
    const T smallest = Lanes<T, kLanes>::smallest(lane < d ? root : kLargest<T>);
    const T largest = Lanes<T, kLanes>::largest(lane < d ? root : T(0));
    if (wanted && lane == 0) {
      const T ratio = d > 0 ? largest / smallest : T(1);
      args.condition[system] = failed ? kNan<T> : ratio * ratio;
      args.info[system] = info;
    }
    if (args.solution != nullptr) {
      solve_transposed(d, own);
      if (writes) write_row(own, system * d + lane, P, failed, args.solution);
    }
  }
}

// --- a block owns a system -----------------------------------------------------------------------

// Loads the scale and every column before the factorisation. Ends with a barrier.
template <typename T>
__device__ void load_system(const FisherSolveArgs<T>& args, index_t system,
                            const AugmentedFactor& factor, T* scale, T* work) {
  for (index_t i = thread_in_block(); i < args.dim; i += threads_in_block()) {
    scale[i] = unit_variance_scale(variance_of(args, system, i));
  }
  __syncthreads();
  for (index_t c = threadIdx.y; c < args.dim; c += blockDim.y) {
    T* column = work + factor.offset(c);
    for (index_t r = threadIdx.x; r < factor.length(c); r += blockDim.x) {
      column[r] = augmented_entry(args, system, scale, c, c + r);
    }
  }
  __syncthreads();
}

// Factors the system column by column: scale column j, then take it out of all later columns.
// Every thread returns the same: 0, or the 1-based index of the first failed pivot.
template <typename T>
__device__ std::int32_t factor_system(const AugmentedFactor& factor, const T* scale, T tolerance,
                                      T* work) {
  for (index_t j = 0; j < factor.dim; ++j) {
    T* column = work + factor.offset(j);
    const index_t length = factor.length(j);
    const T pivot = column[0];
    if (!usable_pivot(pivot, scale[j], tolerance)) return static_cast<std::int32_t>(j + 1);
    const T root = std::sqrt(pivot);
    __syncthreads();  // the pivot has been read by all before it is overwritten
    for (index_t r = thread_in_block(); r < length; r += threads_in_block()) {
      column[r] = r == 0 ? root : column[r] / root;
    }
    __syncthreads();
    for (index_t c = j + 1 + threadIdx.y; c < factor.dim; c += blockDim.y) {
      const T* row_c = column + (c - j);
      T* later = work + factor.offset(c);
      for (index_t r = threadIdx.x; r < length - (c - j); r += blockDim.x) {
        later[r] -= row_c[0] * row_c[r];
      }
    }
    __syncthreads();
  }
  return 0;
}

template <typename T>
__device__ void write_results(const FisherSolveArgs<T>& args, index_t system,
                              const AugmentedFactor& factor, const T* work) {
  const index_t d = args.dim, P = args.params;
  const index_t thread = thread_in_block(), threads = threads_in_block();
  const auto y = [&](index_t i) { return work + factor.offset(i) + (d - i); };  // row i of Y
  for (index_t e = thread; e < d * P; e += threads) {
    args.half[system * d * P + e] = y(e / P)[e % P];
  }
  for (index_t e = thread; e < P * P; e += threads) {
    T sum = 0;
    for (index_t i = 0; i < d; ++i) sum += y(i)[e / P] * y(i)[e % P];
    args.fisher[system * P * P + e] = sum;
  }
  if (factor.with_inverse) {
    for (index_t i = thread; i < d; i += threads) {
      const T* row = y(i) + P;
      T squares = 0;
      for (index_t j = 0; j <= i; ++j) squares += row[j] * row[j];
      args.inverse_rows[system * d + i] = squares;
    }
  }
  if (thread == 0) {
    T smallest = d > 0 ? work[0] : T(1);
    T largest = smallest;
    for (index_t i = 1; i < d; ++i) {
      const T diagonal = work[factor.offset(i)];
      smallest = diagonal < smallest ? diagonal : smallest;
      largest = diagonal > largest ? diagonal : largest;
    }
    args.condition[system] = (largest / smallest) * (largest / smallest);
  }
}

// X = diag(s) L^-T Y, from the last row up, over Y.
template <typename T>
__device__ void write_solution(const FisherSolveArgs<T>& args, index_t system,
                               const AugmentedFactor& factor, const T* scale, T* work) {
  const index_t d = args.dim, P = args.params;
  const auto y = [&](index_t i) { return work + factor.offset(i) + (d - i); };
  for (index_t r = d - 1; r >= 0; --r) {
    __syncthreads();  // row r is complete, and the results that need Y have read it
    const T root = work[factor.offset(r)];
    for (index_t e = thread_in_block(); e < r * P; e += threads_in_block()) {
      const index_t i = e / P, p = e % P;
      y(i)[p] -= work[factor.offset(i) + (r - i)] * (y(r)[p] / root);
    }
  }
  __syncthreads();
  for (index_t e = thread_in_block(); e < d * P; e += threads_in_block()) {
    const index_t i = e / P;
    args.solution[system * d * P + e] = scale[i] * (y(i)[e % P] / work[factor.offset(i)]);
  }
}

template <typename T>
__device__ void write_failure(const FisherSolveArgs<T>& args, index_t system) {
  const index_t d = args.dim, P = args.params;
  const index_t thread = thread_in_block(), threads = threads_in_block();
  for (index_t e = thread; e < P * P; e += threads) args.fisher[system * P * P + e] = kNan<T>;
  for (index_t e = thread; e < d * P; e += threads) args.half[system * d * P + e] = kNan<T>;
  if (args.inverse_rows != nullptr) {
    for (index_t i = thread; i < d; i += threads) args.inverse_rows[system * d + i] = kNan<T>;
  }
  if (args.solution != nullptr) {
    for (index_t e = thread; e < d * P; e += threads) args.solution[system * d * P + e] = kNan<T>;
  }
  if (thread == 0) args.condition[system] = kNan<T>;
}

// Block: one system, in turn systems blockIdx.x, blockIdx.x + gridDim.x, ... Warp: one column of
// the update. Thread: every 32nd row of it. Reads of C and writes of Y are coalesced for
// contiguous input up to the triangle. Moves (d (d + 1) / 2 + 2 d P + P^2) numbers a system and
// does d^3 / 3 + d^2 P multiply-adds, twice the first with inverse_rows.
template <typename T>
__global__ void fisher_solve_block_kernel(FisherSolveArgs<T> args, T tolerance) {
  FF_DYNAMIC_SHARED(shared_memory);
  const AugmentedFactor factor{args.dim, args.params, args.inverse_rows != nullptr};
  T* work = reinterpret_cast<T*>(shared_memory);
  T* scale = work + factor.size();
  for (index_t system = blockIdx.x; system < args.batch; system += gridDim.x) {
    load_system(args, system, factor, scale, work);
    const std::int32_t info = factor_system(factor, scale, tolerance, work);
    if (info == 0) {
      write_results(args, system, factor, work);
      if (args.solution != nullptr) write_solution(args, system, factor, scale, work);
    } else {
      write_failure(args, system);
    }
    if (thread_in_block() == 0) args.info[system] = info;
    __syncthreads();  // the scratch has been read before the next system overwrites it
  }
}

}  // namespace

index_t shared_bytes_limit(int device) {
  int bytes = 0;
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
             "cudaDeviceGetAttribute");
  return bytes;
}

namespace {

template <typename T, int kLanes, int kParams>
void launch_warps(const FisherSolveArgs<T>& args, void* stream) {
  const index_t systems = kWarps * kWarpSize / kLanes;
  FF_LAUNCH((fisher_solve_warp_kernel<T, kLanes, kParams>), grid_x(ceil_div(args.batch, systems)),
            kWarps * kWarpSize, 0, stream, args, pivot_tolerance<T>(args.dim));
}

template <typename T, int kParams>
void launch_warps(const FisherSolveArgs<T>& args, void* stream) {
  if (args.dim <= 8) return launch_warps<T, 8, kParams>(args, stream);
  if (args.dim <= 16) return launch_warps<T, 16, kParams>(args, stream);
  launch_warps<T, kWarpDim, kParams>(args, stream);
}

template <typename T>
void launch_blocks(const FisherSolveArgs<T>& args, int device, void* stream) {
  const bool with_inverse = args.inverse_rows != nullptr;
  const index_t bytes = fisher_solve_shared_bytes<T>(args.dim, args.params, with_inverse);
  const index_t limit = shared_bytes_limit(device);
  FF_CHECK(bytes <= limit, "the factor of one system must take at most "
                               << limit << " bytes of shared memory, got " << bytes
                               << " (d = " << args.dim << ", P = " << args.params << ")");
  check_cuda(
      cudaFuncSetAttribute(fisher_solve_block_kernel<T>,
                           cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)),
      "cudaFuncSetAttribute");
  const dim3 block(kRowThreads, kColumnWarps);
  FF_LAUNCH(fisher_solve_block_kernel<T>, grid_x(args.batch), block,
            static_cast<std::size_t>(bytes), stream, args, pivot_tolerance<T>(args.dim));
}

}  // namespace

template <typename T>
void fisher_solve_cuda(const FisherSolveArgs<T>& args, int device, void* stream) {
  if (args.batch == 0) return;
  const DeviceGuard guard(device);
  if (args.dim > kWarpDim || args.params > kWarpParams || args.inverse_rows != nullptr) {
    launch_blocks(args, device, stream);
  } else if (args.params <= 1) {
    launch_warps<T, 1>(args, stream);
  } else {
    launch_warps<T, kWarpParams>(args, stream);
  }
}

template void fisher_solve_cuda(const FisherSolveArgs<float>&, int, void*);
template void fisher_solve_cuda(const FisherSolveArgs<double>&, int, void*);

}  // namespace fisherfast
