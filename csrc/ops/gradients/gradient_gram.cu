// CUDA kernel: tiles of a a'^T stay in registers and are multiplied by tiles of b b'^T, entry by
// entry.
#include "core/cuda/cuda.cuh"
#include "core/cuda/tile_product.cuh"
#include "ops/gradients/gradient_gram.h"

namespace fisherfast {
namespace {

// Rows of one matrix as the tiles see it: `depth` numbers for each of `positions`.
template <typename T>
struct Operand {
  const T* address;
  index_t positions, position_stride;
  index_t depth, depth_stride;
};

template <typename T>
__device__ Operand<T> inputs_of(const GramSide<T>& side, index_t sample, index_t inputs) {
  return {side.a + sample * side.a_strides[0], side.positions, side.a_strides[1], inputs,
          side.a_strides[2]};
}

template <typename T>
__device__ Operand<T> column_of(const GramSide<T>& side, index_t sample, index_t column,
                                index_t outputs) {
  return {side.b + sample * side.b_strides[0] + column * side.b_strides[1], side.positions,
          side.b_strides[2], outputs, side.b_strides[3]};
}

// Copies kTileDepth numbers of the positions from `position` on into a tile; zero outside.
// Neighbouring threads take neighbouring numbers or neighbouring positions, whichever lie closer.
template <typename T, int kEdge>
__device__ void stage(const Operand<T>& operand, index_t position, index_t depth,
                      Tile<T, kEdge>& tile) {
  constexpr int kWidth = Tile<T, kEdge>::kWidth;
  const bool deep = operand.depth_stride <= operand.position_stride;
  const int thread = static_cast<int>(thread_in_block());
#pragma unroll
  for (int u = 0; u < kTileDepth * kWidth / kTileThreads; ++u) {
    const int e = u * kTileThreads + thread;
    const int row = deep ? e % kTileDepth : e / kWidth;
    const int column = deep ? e / kTileDepth : e % kWidth;
    const index_t p = position + column, d = depth + row;
    const bool there = p < operand.positions && d < operand.depth;
    tile.rows[row][column] =
        there ? operand.address[p * operand.position_stride + d * operand.depth_stride] : T(0);
  }
}

// The products of a tile of positions of two operands, those of this thread in `results`.
template <typename T, int kEdge>
__device__ void multiply(const Operand<T>& left, const Operand<T>& right, index_t t, index_t s,
                         Tile<T, kEdge>& left_tile, Tile<T, kEdge>& right_tile,
                         double (&results)[kEdge * kEdge]) {
  TileProduct<T, kEdge> product;
  product.clear();
  for (index_t d = 0; d < left.depth; d += kTileDepth) {
    stage(left, t, d, left_tile);
    stage(right, s, d, right_tile);
    __syncthreads();
    product.add(left_tile, right_tile);
    __syncthreads();
  }
  int result = 0;
  product.for_each([&](index_t, index_t, double sum) { results[result++] = sum; });
}

// The sum over the threads of the block, in the same order always; right in thread 0. Ends with a
// barrier.
__device__ inline double block_sum(double value, double* shared) {
  const int thread = static_cast<int>(thread_in_block());
  shared[thread] = value;
  for (int half = kTileThreads / 2; half > 0; half /= 2) {
    __syncthreads();
    if (thread < half) shared[thread] += shared[thread + half];
  }
  const double sum = shared[0];
  __syncthreads();
  return sum;
}

// Adds to a result, or begins it; of a symmetric product to its mirror image too.
template <typename T>
__device__ void add_result(const GradientGramArgs<T>& args, index_t i, index_t c, index_t j,
                           index_t e, double sum, bool begins) {
  const index_t stride = args.right.rows * args.right.columns;
  const index_t row = i * args.left.columns + c, column = j * args.right.columns + e;
  double* const to = args.gram + row * stride + column;
  const double total = begins ? sum : *to + sum;
  *to = total;
  if (args.symmetric) args.gram[column * stride + row] = total;
}

// Block (in turn): one pair of samples; of a symmetric product those of the lower triangle.
// Thread: kEdge x kEdge pairs of positions, whose products of a it keeps for all pairs of columns.
// Reads are coalesced along whichever of positions and numbers lie together. Moves (T T' / width)
// (D + C C' M) numbers of each side, from the cache but the first; T T' (D + C C' M) multiply-adds,
// in T over kRowsInT of them and then in double.
template <typename T, int kEdge>
__global__ void __launch_bounds__(kTileThreads) gradient_gram_kernel(GradientGramArgs<T> args) {
  constexpr int kWidth = Tile<T, kEdge>::kWidth;
  __shared__ Tile<T, kEdge> left_tile, right_tile;
  __shared__ double sums[kTileThreads];
  const index_t pairs = args.left.rows * args.right.rows;
  for (index_t pair = blockIdx.x; pair < pairs; pair += gridDim.x) {
    const index_t i = pair / args.right.rows, j = pair % args.right.rows;
    if (args.symmetric && j > i) continue;
    for (index_t t = 0; t < args.left.positions; t += kWidth) {
      for (index_t s = 0; s < args.right.positions; s += kWidth) {
        double inputs[kEdge * kEdge], outputs[kEdge * kEdge];
        multiply<T, kEdge>(inputs_of(args.left, i, args.inputs),
                           inputs_of(args.right, j, args.inputs), t, s, left_tile, right_tile,
                           inputs);
        for (index_t c = 0; c < args.left.columns; ++c) {
          const index_t last = args.symmetric && i == j ? c + 1 : args.right.columns;
          for (index_t e = 0; e < last; ++e) {
            multiply<T, kEdge>(column_of(args.left, i, c, args.outputs),
                               column_of(args.right, j, e, args.outputs), t, s, left_tile,
                               right_tile, outputs);
            double sum = 0.0;
#pragma unroll
            for (int k = 0; k < kEdge * kEdge; ++k) sum += inputs[k] * outputs[k];
            sum = block_sum(sum, sums);
            if (thread_in_block() == 0) add_result(args, i, c, j, e, sum, t == 0 && s == 0);
          }
        }
      }
    }
  }
}

}  // namespace

template <typename T>
void gradient_gram_cuda(const GradientGramArgs<T>& args, int device, void* stream) {
  const index_t pairs = args.left.rows * args.right.rows;
  if (pairs == 0) return;
  const DeviceGuard guard(device);
  const dim3 block(kTileSide, kTileSide);
  if (std::max(args.left.positions, args.right.positions) <= Tile<T, 1>::kWidth) {
    FF_LAUNCH((gradient_gram_kernel<T, 1>), grid_x(pairs), block, 0, stream, args);
  } else {
    FF_LAUNCH((gradient_gram_kernel<T, 4>), grid_x(pairs), block, 0, stream, args);
  }
}

template void gradient_gram_cuda(const GradientGramArgs<float>&, int, void*);
template void gradient_gram_cuda(const GradientGramArgs<double>&, int, void*);

}  // namespace fisherfast
