// CPU: squares of samples, each by one thread: those on the left are packed once, those on the
// right one after another.
#include "ops/gradients/gradient_gram.h"

#include "core/cpu/aligned.h"
#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many multiply-adds (about 100 us).
constexpr index_t kGrainOperations = 4'000'000;

// Samples along a side of a square: as many as fit into this part of a cache, packed, so that a
// sample on the right is packed once for all of them.
constexpr index_t kSquareBytes = index_t{1} << 20;
constexpr index_t kMostSamples = 16;

template <typename T>
GramPanels panels_of(const GradientGramArgs<T>& args, const GramSide<T>& side, SimdLevel level) {
  return gram_panels(args.inputs, args.outputs, side.positions, side.columns,
                     2 * simd_lanes<T>(level));
}

// The products of sample j with itself are symmetric but for rounding: the lower triangle counts.
void mirror(double* gram, index_t columns, index_t stride) {
  for (index_t c = 0; c < columns; ++c) {
    for (index_t e = 0; e < c; ++e) gram[e * stride + c] = gram[c * stride + e];
  }
}

void copy_transposed(const double* from, index_t rows, index_t columns, index_t stride, double* to,
                     index_t to_stride) {
  for (index_t c = 0; c < rows; ++c) {
    for (index_t e = 0; e < columns; ++e) to[e * to_stride + c] = from[c * stride + e];
  }
}

}  // namespace

template <typename T>
void gradient_gram_cpu(const GradientGramArgs<T>& args, int threads) {
  const SimdLevel level = simd_level();
  const GramPanels left = panels_of(args, args.left, level);
  const GramPanels right = panels_of(args, args.right, level);
  const index_t bytes = std::max<index_t>(left.size, 1) * static_cast<index_t>(sizeof(T));
  const index_t side = std::clamp<index_t>(kSquareBytes / bytes, 1, kMostSamples);
  const index_t rows = args.left.rows, columns = args.right.rows;
  const index_t stride = columns * right.columns;  // of the result
  const index_t down = ceil_div(rows, side), across = ceil_div(columns, side);
  const index_t operations =
      left.positions * right.positions * (left.inputs + right.columns * left.outputs) +
      left.columns * right.columns * left.positions * left.outputs;
  const index_t grain = ceil_div(kGrainOperations, 1 + operations * side * side);
  parallel_for(down * across, grain, threads, [&](index_t begin, index_t end) {
    const AlignedArray<T> packed = aligned_array<T>(side * left.size + right.size + 1);
    const AlignedArray<T> scratch =
        aligned_array<T>(gradient_gram_scratch(left.panel, left.columns));
    T* const other = packed.get() + side * left.size;
    for (index_t square = begin; square < end; ++square) {
      const index_t first = square / across * side, start = square % across * side;
      if (args.symmetric && start > first) continue;
      const index_t last = std::min(rows, first + side);
      for (index_t i = first; i < last; ++i) {
        FF_CALL_SIMD(level, gradient_gram_pack<T>, args.left, left, i,
                     packed.get() + (i - first) * left.size);
      }
      for (index_t j = start; j < std::min(columns, start + side); ++j) {
        FF_CALL_SIMD(level, gradient_gram_pack<T>, args.right, right, j, other);
        for (index_t i = args.symmetric ? std::max(first, j) : first; i < last; ++i) {
          double* const gram = args.gram + i * left.columns * stride + j * right.columns;
          FF_CALL_SIMD(level, gradient_gram_pair<T>, left, right,
                       packed.get() + (i - first) * left.size, other, scratch.get(), gram, stride);
          if (!args.symmetric) continue;
          if (i == j) mirror(gram, left.columns, stride);
          double* const mirrored = args.gram + j * left.columns * stride + i * right.columns;
          if (i != j) {
            copy_transposed(gram, left.columns, right.columns, stride, mirrored, stride);
          }
        }
      }
    }
  });
}

template void gradient_gram_cpu(const GradientGramArgs<float>&, int);
template void gradient_gram_cpu(const GradientGramArgs<double>&, int);

}  // namespace fisherfast
