// CUDA kernels: the features element by element, then their sums by fold in fixed order.
#include "core/cuda/cuda.cuh"
#include "ops/moments/lift.h"

namespace fisherfast {
namespace {

constexpr unsigned kLiftThreads = 256;
constexpr unsigned kSumColumns = 32;  // a warp reads 32 neighbouring features
constexpr unsigned kSumRows = 8;      // rows of a fold that a block reads at the same time

// Thread: one feature of one sample, in turn. Reads and writes are coalesced; moves 2 n k numbers.
template <typename T>
__global__ void lift_kernel(LiftArgs<T> args) {
  const index_t entries = args.rows * args.dim;
  for (index_t e = global_thread(); e < entries; e += global_threads()) {
    const index_t i = e / args.dim, j = e % args.dim;
    args.features[e] = lifted_feature(args.projected[i * args.row_stride + j], args.bias[j],
                                      args.slope, args.pilot[j]);
  }
}

// Block (x, y): 32 features of one fold. Thread: every 8th row of the fold for one feature; the
// eight parts are added in order. Reads are coalesced; n k numbers are read once.
template <typename T>
__global__ void lift_sums_kernel(LiftArgs<T> args) {
  __shared__ double parts[kSumRows][kSumColumns];
  const index_t j = static_cast<index_t>(blockIdx.x) * kSumColumns + threadIdx.x;
  for (index_t g = blockIdx.y; g < args.groups; g += gridDim.y) {
    // The first row i with (first + i) mod G = g.
    const index_t start = (g - args.first % args.groups + args.groups) % args.groups;
    double sum = 0.0;
    if (j < args.dim) {
      for (index_t i = start + threadIdx.y * args.groups; i < args.rows;
           i += kSumRows * args.groups) {
        sum += static_cast<double>(args.features[i * args.dim + j]);
      }
    }
    parts[threadIdx.y][threadIdx.x] = sum;
    __syncthreads();
    if (threadIdx.y == 0 && j < args.dim) {
      double total = 0.0;
      for (unsigned r = 0; r < kSumRows; ++r) total += parts[r][threadIdx.x];
      args.sums[g * args.dim + j] = total;
    }
    __syncthreads();  // the parts have been read before the next fold overwrites them
  }
}

}  // namespace

template <typename T>
void lift_cuda(const LiftArgs<T>& args, int device, void* stream) {
  if (args.dim == 0) return;
  const DeviceGuard guard(device);
  if (args.rows > 0) {
    const index_t blocks = ceil_div(args.rows * args.dim, kLiftThreads);
    FF_LAUNCH(lift_kernel<T>, grid_x(blocks), kLiftThreads, 0, stream, args);
  }
  const dim3 grid(grid_x(ceil_div(args.dim, kSumColumns)), grid_yz(args.groups));
  const dim3 block(kSumColumns, kSumRows);
  FF_LAUNCH(lift_sums_kernel<T>, grid, block, 0, stream, args);
}

template void lift_cuda(const LiftArgs<float>&, int, void*);
template void lift_cuda(const LiftArgs<double>&, int, void*);

}  // namespace fisherfast
