// CPU kernel: every thread takes a range of systems and one scratch array that fits the caches.
#include "ops/fisher_solve.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "core/parallel.h"

namespace fisherfast {
namespace {

// A thread is started for at least this many multiply-adds (about 50 us).
constexpr index_t kGrainOperations = 100'000;

// Lays out column c of the augmented factor, before the factorisation.
template <typename T>
void load_column(const FisherSolveArgs<T>& args, index_t system, const T* scale, index_t c,
                 index_t length, T* column) {
  for (index_t r = 0; r < length; ++r) {
    column[r] = augmented_entry(args, system, scale, c, c + r);
  }
}

// column c -= sum_{j < c} L_cj * column j. Four earlier columns at a time, so that column c is
// read and written a quarter as often. An earlier column has a shorter inverse part.
template <typename T>
void subtract_earlier_columns(const AugmentedFactor& factor, const T* work, index_t c, T* column) {
  const auto row_c = [&](index_t j) { return work + factor.offset(j) + (c - j); };
  const auto length = [&](index_t j) { return factor.length(j) - (c - j); };
  index_t j = 0;
  for (; j + 4 <= c; j += 4) {
    const T *a0 = row_c(j), *a1 = row_c(j + 1), *a2 = row_c(j + 2), *a3 = row_c(j + 3);
    const T l0 = a0[0], l1 = a1[0], l2 = a2[0], l3 = a3[0];
    const index_t common = length(j);
    for (index_t r = 0; r < common; ++r) {
      column[r] -= (l0 * a0[r] + l1 * a1[r]) + (l2 * a2[r] + l3 * a3[r]);
    }
    for (index_t r = common; r < length(j + 1); ++r) column[r] -= l1 * a1[r];
    for (index_t r = common; r < length(j + 2); ++r) column[r] -= l2 * a2[r];
    for (index_t r = common; r < length(j + 3); ++r) column[r] -= l3 * a3[r];
  }
  for (; j < c; ++j) {
    const T* earlier = row_c(j);
    const T l = earlier[0];
    const index_t common = length(j);
    for (index_t r = 0; r < common; ++r) column[r] -= l * earlier[r];
  }
}

// Factors one system in `work`. Returns 0 or the 1-based index of the first failed pivot.
template <typename T>
std::int32_t factor_system(const FisherSolveArgs<T>& args, index_t system,
                           const AugmentedFactor& factor, T* scale, T* work) {
  const T tolerance = pivot_tolerance<T>(args.dim);
  for (index_t i = 0; i < args.dim; ++i) {
    scale[i] = unit_variance_scale(variance_of(args, system, i));
  }
  for (index_t c = 0; c < args.dim; ++c) {
    T* column = work + factor.offset(c);
    const index_t length = factor.length(c);
    load_column(args, system, scale, c, length, column);
    subtract_earlier_columns(factor, work, c, column);
    const T pivot = column[0];
    if (!usable_pivot(pivot, scale[c], tolerance)) return static_cast<std::int32_t>(c + 1);
    const T root = std::sqrt(pivot);
    const T inverse_root = 1 / root;
    column[0] = root;
    for (index_t r = 1; r < length; ++r) column[r] *= inverse_root;
  }
  return 0;
}

// Reads half, fisher, condition and inverse_rows off the finished factor.
template <typename T>
void write_results(const FisherSolveArgs<T>& args, index_t system, const AugmentedFactor& factor,
                   const T* work) {
  const index_t d = args.dim, P = args.params;
  T* fisher = args.fisher + system * P * P;
  T* half = args.half + system * d * P;
  std::fill(fisher, fisher + P * P, T(0));
  T smallest = d > 0 ? work[0] : T(1);
  T largest = smallest;
  for (index_t i = 0; i < d; ++i) {
    const T* column = work + factor.offset(i);
    const T* y = column + (d - i);
    smallest = std::min(smallest, column[0]);
    largest = std::max(largest, column[0]);
    std::copy(y, y + P, half + i * P);
    for (index_t p = 0; p < P; ++p) {
      for (index_t q = 0; q < P; ++q) fisher[p * P + q] += y[p] * y[q];
    }
    if (factor.with_inverse) {
      const T* row = y + P;
      T squares = 0;
      for (index_t j = 0; j <= i; ++j) squares += row[j] * row[j];
      args.inverse_rows[system * d + i] = squares;
    }
  }
  const T ratio = largest / smallest;
  args.condition[system] = ratio * ratio;
}

template <typename T>
void write_failure(const FisherSolveArgs<T>& args, index_t system) {
  const index_t d = args.dim, P = args.params;
  std::fill_n(args.fisher + system * P * P, P * P, kNan<T>);
  std::fill_n(args.half + system * d * P, d * P, kNan<T>);
  args.condition[system] = kNan<T>;
  if (args.inverse_rows != nullptr) std::fill_n(args.inverse_rows + system * d, d, kNan<T>);
}

}  // namespace

template <typename T>
void fisher_solve_cpu(const FisherSolveArgs<T>& args, int threads) {
  const AugmentedFactor factor{args.dim, args.params, args.inverse_rows != nullptr};
  const index_t operations = 1 + args.dim * (args.dim * args.dim / 3 + args.dim * args.params);
  parallel_for(
      args.batch, ceil_div(kGrainOperations, operations), threads, [&](index_t begin, index_t end) {
        std::vector<T> scale(args.dim), work(factor.size());
        for (index_t system = begin; system < end; ++system) {
          const std::int32_t info = factor_system(args, system, factor, scale.data(), work.data());
          args.info[system] = info;
          if (info == 0) {
            write_results(args, system, factor, work.data());
          } else {
            write_failure(args, system);
          }
        }
      });
}

template void fisher_solve_cpu(const FisherSolveArgs<float>&, int);
template void fisher_solve_cpu(const FisherSolveArgs<double>&, int);

}  // namespace fisherfast
