// CUDA kernels: small systems in the registers of a warp, larger ones in the shared memory of a
// block.
#include "core/cpu/check.h"
#include "core/cuda/cuda.cuh"
#include "ops/solve/fisher_solve.h"
#include "ops/solve/fisher_solve_lanes.cuh"

namespace fisherfast {
namespace {

constexpr unsigned kRowThreads = 32;  // a warp walks down a column
constexpr unsigned kColumnWarps = 8;  // columns that are updated at the same time

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
  if (args.dim > kLaneDim || args.params > kLaneParams || args.inverse_rows != nullptr) {
    launch_blocks(args, device, stream);
  } else if (args.params <= 1) {
    launch_lanes<T, 1>(args, stream);
  } else {
    launch_lanes<T, kLaneParams>(args, stream);
  }
}

template void fisher_solve_cuda(const FisherSolveArgs<float>&, int, void*);
template void fisher_solve_cuda(const FisherSolveArgs<double>&, int, void*);

}  // namespace fisherfast
