// CPU kernel: a thread takes systems one after another; what it writes limits it, not arithmetic.
#include "ops/solve/fisher_solve_backward.h"

#include <vector>

#include "core/cpu/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many numbers written (about 50 us).
constexpr index_t kGrainNumbers = 100'000;

// Z of one system, row by row.
template <typename T>
void derivative_gradient(const FisherSolveBackwardArgs<T>& args, index_t system, T* z) {
  const index_t d = args.dim, P = args.params;
  const T* G = args.grad_fisher + system * P * P;
  const T* X = args.solution + system * d * P;
  for (index_t i = 0; i < d; ++i) {
    for (index_t q = 0; q < P; ++q) {
      T sum = 0;
      for (index_t p = 0; p < P; ++p) sum += X[i * P + p] * (G[p * P + q] + G[q * P + p]);
      z[i * P + q] = sum;
    }
  }
}

// Row i of -(Z X^T) / 2 up to the diagonal; `columns` is X^T [P, d]: the inner loop runs over
// columns.
template <typename T>
void covariance_gradient_row(const FisherSolveBackwardArgs<T>& args, index_t i, const T* z,
                             const T* columns, T* __restrict row) {
  for (index_t j = 0; j <= i; ++j) row[j] = 0;
  for (index_t p = 0; p < args.params; ++p) {
    const T factor = z[p] / -2;
    const T* __restrict column = columns + p * args.dim;
    for (index_t j = 0; j <= i; ++j) row[j] += factor * column[j];
  }
  row[i] *= 1 + args.ridge;
}

}  // namespace

template <typename T>
void fisher_solve_backward_cpu(const FisherSolveBackwardArgs<T>& args, int threads) {
  const index_t d = args.dim, P = args.params;
  const index_t grain = ceil_div(kGrainNumbers, 1 + d * (d + P));
  parallel_for(args.batch, grain, threads, [&](index_t begin, index_t end) {
    std::vector<T> columns(P * d);
    for (index_t system = begin; system < end; ++system) {
      const T* X = args.solution + system * d * P;
      T* z = args.grad_deriv + system * d * P;
      T* grad_cov = args.grad_cov + system * d * d;
      derivative_gradient(args, system, z);
      for (index_t e = 0; e < d * P; ++e) columns[e % P * d + e / P] = X[e];
      for (index_t i = 0; i < d; ++i) {
        covariance_gradient_row(args, i, z + i * P, columns.data(), grad_cov + i * d);
        for (index_t j = 0; j < i; ++j) grad_cov[j * d + i] = grad_cov[i * d + j];
      }
    }
  });
}

template void fisher_solve_backward_cpu(const FisherSolveBackwardArgs<float>&, int);
template void fisher_solve_backward_cpu(const FisherSolveBackwardArgs<double>&, int);

}  // namespace fisherfast
