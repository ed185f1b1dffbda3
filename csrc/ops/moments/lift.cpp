// CPU kernel: chunks of rows, each with its own sums.
#include "ops/moments/lift.h"

#include <algorithm>
#include <vector>

#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// Lifts one row [k] and adds it to `sum` [k]. Without aliases the compiler uses vectors; `features`
// may be `projected` itself, which is safe because each number is read before it is written.
template <typename T>
void lift_row(const LiftArgs<T>& args, const T* projected, T* features, double* __restrict sum) {
  const T* __restrict bias = args.bias;
  const T* __restrict pilot = args.pilot;
  const T slope = args.slope;
  const index_t dim = args.dim;
#pragma GCC ivdep
  for (index_t j = 0; j < dim; ++j) {
    const T feature = lifted_feature(projected[j], bias[j], slope, pilot[j]);
    features[j] = feature;
    sum[j] += static_cast<double>(feature);
  }
}

// Lifts rows [begin, end) and adds them to `sums` [G, k].
template <typename T>
void lift_rows(const LiftArgs<T>& args, index_t begin, index_t end, double* sums) {
  for (index_t i = begin; i < end; ++i) {
    double* sum = sums + (args.first + i) % args.groups * args.dim;
    lift_row(args, args.projected + i * args.row_stride, args.features + i * args.dim, sum);
  }
}

}  // namespace

template <typename T>
void lift_cpu(const LiftArgs<T>& args, int threads) {
  const index_t size = args.groups * args.dim;
  const RowChunks chunks = row_chunks(args.rows, size);
  std::vector<std::vector<double>> parts(chunks.count, std::vector<double>(size, 0.0));
  parallel_for(chunks.count, 1, threads, [&](index_t begin, index_t end) {
    for (index_t c = begin; c < end; ++c) {
      lift_rows(args, chunks.begin(c), chunks.end(c), parts[c].data());
    }
  });

  std::fill_n(args.sums, size, 0.0);
  for (const std::vector<double>& part : parts) {
    for (index_t i = 0; i < size; ++i) args.sums[i] += part[i];
  }
}

template void lift_cpu(const LiftArgs<float>&, int);
template void lift_cpu(const LiftArgs<double>&, int);

}  // namespace fisherfast
