// CUDA kernels: Z entry by entry, then the symmetric products Z X^T, a warp for some rows of one.
#include "core/cuda/cuda.cuh"
#include "ops/solve/fisher_solve_backward.h"

namespace fisherfast {
namespace {

constexpr unsigned kThreads = 256;
constexpr unsigned kLanes = 32;
constexpr index_t kEntriesOfWarp = 1024;  // about: one division for the place, 32 entries a lane

// Thread: one entry of Z, in turn. Writes are coalesced; the P entries of a row of X and the P^2 of
// G are read by neighbours too and come from the cache. Moves 2 B d P numbers, does B d P^2
// multiply-adds.
template <typename T>
__global__ void __launch_bounds__(kThreads) grad_deriv_kernel(FisherSolveBackwardArgs<T> args) {
  const index_t d = args.dim, P = args.params;
  for (index_t e = global_thread(); e < args.batch * d * P; e += global_threads()) {
    const index_t row = e / P, p = e - row * P;
    const T* x = args.solution + row * P;
    const T* g = args.grad_fisher + row / d * P * P;
    T sum = 0;
    for (index_t q = 0; q < P; ++q) sum += x[q] * (g[q * P + p] + g[p * P + q]);
    args.grad_deriv[e] = sum;
  }
}

// Warp: `rows` rows of grad_cov of one system, in turn. Lane: every 32nd entry of them; the entries
// (i, j) and (j, i) are the same products in the same order. Writes are coalesced: d^2 numbers a
// system; rows of X and Z come from the cache. d^2 P multiply-adds a system.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    grad_cov_kernel(FisherSolveBackwardArgs<T> args, index_t rows) {
  const index_t d = args.dim, P = args.params;
  const index_t parts = ceil_div(d, rows);
  const index_t lane = threadIdx.x % kLanes;
  const index_t step_rows = kLanes / d, step_columns = kLanes - step_rows * d;
  const T half = T(-0.5), half_on_diagonal = T(-0.5) * (T(1) + args.ridge);
  for (index_t work = global_thread() / kLanes; work < args.batch * parts;
       work += global_threads() / kLanes) {
    const index_t system = work / parts, begin = (work - system * parts) * rows;
    const index_t end = min(d, begin + rows);
    const T* x = args.solution + system * d * P;
    const T* z = args.grad_deriv + system * d * P;
    T* grad = args.grad_cov + system * d * d;
    index_t i = begin + lane / d, j = lane % d;
    while (i < end) {
      const index_t lower = max(i, j), upper = min(i, j);
      T sum = 0;
      for (index_t p = 0; p < P; ++p) sum += z[lower * P + p] * x[upper * P + p];
      grad[i * d + j] = (i == j ? half_on_diagonal : half) * sum;
      i += step_rows;
      j += step_columns;
      if (j >= d) {
        j -= d;
        ++i;
      }
    }
  }
}

}  // namespace

template <typename T>
void fisher_solve_backward_cuda(const FisherSolveBackwardArgs<T>& args, int device, void* stream) {
  if (args.batch == 0 || args.dim == 0) return;
  const DeviceGuard guard(device);
  if (args.params > 0) {
    const index_t entries = args.batch * args.dim * args.params;
    FF_LAUNCH(grad_deriv_kernel<T>, grid_x(ceil_div(entries, kThreads)), kThreads, 0, stream, args);
  }
  const index_t rows = ceil_div(kEntriesOfWarp, args.dim);
  const index_t warps = args.batch * ceil_div(args.dim, rows);
  FF_LAUNCH(grad_cov_kernel<T>, grid_x(ceil_div(warps * kLanes, kThreads)), kThreads, 0, stream,
            args, rows);
}

template void fisher_solve_backward_cuda(const FisherSolveBackwardArgs<float>&, int, void*);
template void fisher_solve_backward_cuda(const FisherSolveBackwardArgs<double>&, int, void*);

}  // namespace fisherfast
