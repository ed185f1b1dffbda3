// Many small systems: one system a lane. A group of systems, as many as a vector has lanes, is
// transposed on the way in; every step of the factorisation is then the same for all lanes.
//
// The lower triangle lies in rows, row i at i (i + 1) / 2, and each of the P rows of D^T below it.
// Tiles of kTile rows by kTile columns stay in registers while the product of the earlier columns
// is subtracted (left-looking): 2 kTile loads serve kTile^2 multiply-adds.
#include "core/simd/lane_runs.h"
#include "ops/solve/fisher_solve.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

// 16 accumulators where there are 32 registers, 9 where there are 16.
constexpr int kTile = FF_SIMD_BYTES == 64 ? 4 : 3;

// Rows of Y whose products are summed before the sum is added to the rest: a single chain of d
// additions would lose up to sqrt(d) more digits than the factorisation.
constexpr index_t kSumRows = 16;

// One int32 a lane.
template <typename T>
struct InfoOf {
  typedef std::int32_t Type __attribute__((vector_size(4 * kLanes<T>)));
};
template <typename T>
using Info = typename InfoOf<T>::Type;

// The scratch of one group, in vectors. Dimensions that are known to the compiler (kDim, kParams,
// not 0) let it keep everything in registers and work on two groups at the same time.
template <typename T, int kDim, int kParams>
struct Group {
  using Number = T;
  static constexpr int W = kLanes<T>;

  const FisherSolveArgs<T>& args;
  index_t first;  // first system
  int count;      // systems, 1..W; the other lanes repeat the last one
  index_t ahead;  // groups to the one that is prefetched
  index_t d, P;
  Vec<T>* scale;                   // [d]
  Vec<T>* reciprocal;              // [d] 1 / L_ii
  Vec<T>* factor;                  // [d (d + 1) / 2] rows of C, then of L
  Vec<T>* half;                    // [P, d] rows of D^T, then of Y^T
  const std::int32_t* cov_index;   // [d^2] where number e of C goes in `factor`, or -1; d < W only
  const std::int32_t* half_index;  // [d P] where number e of D and Y is in `half`
  Vec<T> tolerance;
  Mask<T> failed;  // first failed pivot, or 0

  // An estimate of 2 ulp where everything waits for it, a root and a division where they overlap.
  static FF_INLINE Vec<T> reciprocal_root(Vec<T> x) {
    if constexpr (kDim > 0) return reciprocal_square_root<T>(x);
    return T(1) / square_root<T>(x);
  }
  FF_INLINE index_t dim() const { return kDim > 0 ? kDim : d; }
  FF_INLINE index_t params() const { return kDim > 0 ? kParams : P; }
  FF_INLINE index_t cov_position(index_t e) const {
    if constexpr (kDim == 0) return cov_index[e];
    const index_t i = e / dim(), j = e % dim();
    return j <= i ? i * (i + 1) / 2 + j : -1;
  }
  FF_INLINE index_t half_position(index_t e) const {
    if constexpr (kDim == 0) return half_index[e];
    return e % params() * dim() + e / params();
  }
  FF_INLINE Vec<T>* row(index_t i) { return factor + i * (i + 1) / 2; }
  FF_INLINE index_t batch() const { return args.batch; }
  FF_INLINE index_t system(int lane) const { return first + (lane < count ? lane : count - 1); }
};

// --- In: from rows of numbers, one system after another, to vectors of lanes ---------------------

// Groups between the current one and the one that is prefetched: sixteen systems far apart in
// memory are more streams than the hardware prefetcher follows, and waiting for them took most of
// the time at d = 16 to 64. At least two groups, and at least 32 KiB. Measured at d =
// 16 and 32 (16 and 64 KiB a group): 107 and 470 ns a system for one group, 93 and 412 for two, 113
// and 487 for three.
template <typename T>
FF_INLINE index_t groups_ahead(index_t d) {
  constexpr index_t kBytesAhead = 32 * 1024;
  const index_t groups = kBytesAhead / (FF_SIMD_BYTES * d * d + 1);
  return groups < 2 ? 2 : groups;
}

template <typename G>
FF_INLINE void read_covariance(G& group) {
  using T = typename G::Number;
  const FisherSolveArgs<T>& args = group.args;
  const index_t d = group.dim();
  const index_t* strides = args.cov_strides;
  if (strides[2] == 1 && strides[1] == d && d < kLanes<T>) {  // a whole system is one run
    read_run(group, args.cov, strides[0], d * d, [&](index_t e, Vec<T> value) {
      const index_t position = group.cov_position(e);
      if (position >= 0) group.factor[position] = value;
    });
  } else if (strides[2] == 1) {
    for (index_t i = 0; i < d; ++i) {
      Vec<T>* row = group.row(i);
      // up to whole vectors, as far as the row goes
      const index_t whole = (i / kLanes<T> + 1) * kLanes<T>;
      const index_t length = whole <= d ? whole : d;
      read_run(group, args.cov + i * strides[1], strides[0], length, [&](index_t j, Vec<T> value) {
        if (j <= i) row[j] = value;
      });
    }
  } else {
    for (index_t i = 0; i < d; ++i) {
      for (index_t j = 0; j <= i; ++j) {
        for (int lane = 0; lane < kLanes<T>; ++lane) {
          group.row(i)[j][lane] =
              args.cov[group.system(lane) * strides[0] + i * strides[1] + j * strides[2]];
        }
      }
    }
  }
}

template <typename G>
FF_INLINE void read_derivative(G& group) {
  using T = typename G::Number;
  const FisherSolveArgs<T>& args = group.args;
  const index_t d = group.dim(), P = group.params();
  const index_t* strides = args.deriv_strides;
  if ((strides[2] == 1 || P == 1) && (strides[1] == P || d == 1)) {
    read_run(group, args.deriv, strides[0], d * P,
             [&](index_t e, Vec<T> value) { group.half[group.half_position(e)] = value; });
    return;
  }
  for (index_t p = 0; p < P; ++p) {
    for (index_t i = 0; i < d; ++i) {
      for (int lane = 0; lane < kLanes<T>; ++lane) {
        group.half[p * d + i][lane] =
            args.deriv[group.system(lane) * strides[0] + i * strides[1] + p * strides[2]];
      }
    }
  }
}

template <typename G>
FF_INLINE void compute_scale(G& group) {
  using T = typename G::Number;
  for (index_t i = 0; i < group.dim(); ++i) {
    const Vec<T> variance = group.row(i)[i];
    const auto usable = (variance > T(0)) & (variance <= kLargest<T>);
    group.scale[i] = usable ? G::reciprocal_root(variance) : splat(kNan<T>);
  }
}

// --- The factorisation ---------------------------------------------------------------------------

// tile -= sum_{k < depth} (left row r)_k (right row c)_k
template <typename T, int R, int C>
FF_INLINE void subtract_products(Vec<T> (&tile)[R][C], const Vec<T>* const (&left)[R],
                                 const Vec<T>* const (&right)[C], index_t depth) {
  for (index_t k = 0; k < depth; ++k) {
    Vec<T> column[C];
    FF_UNROLL
    for (int c = 0; c < C; ++c) column[c] = right[c][k];
    FF_UNROLL
    for (int r = 0; r < R; ++r) {
      const Vec<T> value = left[r][k];
      FF_UNROLL
      for (int c = 0; c < C; ++c) tile[r][c] -= value * column[c];
    }
  }
}

// Rows and columns j0 .. j0 + C of the factor: a small Cholesky in registers.
template <typename G, int C>
FF_INLINE void factor_diagonal_tile(G& group, index_t j0, typename G::Number unit) {
  using T = typename G::Number;
  Vec<T>* rows[C];
  const Vec<T>* right[C];
  Vec<T> tile[C][C];
  FF_UNROLL
  for (int r = 0; r < C; ++r) {
    rows[r] = group.row(j0 + r);
    right[r] = rows[r];
    FF_UNROLL
    for (int c = 0; c < C; ++c) {
      tile[r][c] = splat(unit);
      if (c < r) tile[r][c] = group.scale[j0 + r] * rows[r][j0 + c] * group.scale[j0 + c];
    }
  }
  subtract_products<T, C, C>(tile, right, right, j0);
  FF_UNROLL
  for (int c = 0; c < C; ++c) {
    const Vec<T> scale = group.scale[j0 + c];
    Vec<T> pivot = tile[c][c];
    const auto bad = ~((scale > T(0)) & (pivot > group.tolerance));
    const Mask<T> pivot_number = splat_mask<T>(j0 + c + 1);
    group.failed = (bad & (group.failed == 0)) ? pivot_number : group.failed;
    const Vec<T> reciprocal = G::reciprocal_root(pivot);
    rows[c][j0 + c] = pivot * reciprocal;
    group.reciprocal[j0 + c] = reciprocal;
    FF_UNROLL
    for (int r = c + 1; r < C; ++r) {
      tile[r][c] *= reciprocal;
      rows[r][j0 + c] = tile[r][c];
    }
    FF_UNROLL
    for (int r = c + 1; r < C; ++r) {
      FF_UNROLL
      for (int q = c + 1; q <= r; ++q) tile[r][q] -= tile[r][c] * tile[q][c];
    }
  }
}

// R rows below the diagonal tile at column j0: subtract, then solve with the diagonal tile.
// A row starts as row_scale * row * scale; rows of D^T have no scale of their own.
template <typename G, int R, int C, bool derivative>
FF_INLINE void factor_tile(G& group, index_t i0, index_t j0) {
  using T = typename G::Number;
  Vec<T>* rows[R];
  const Vec<T>* left[R];
  const Vec<T>* right[C];
  Vec<T> tile[R][C];
  FF_UNROLL
  for (int c = 0; c < C; ++c) right[c] = group.row(j0 + c);
  FF_UNROLL
  for (int r = 0; r < R; ++r) {
    rows[r] = derivative ? group.half + (i0 + r) * group.dim() : group.row(i0 + r);
    left[r] = rows[r];
    FF_UNROLL
    for (int c = 0; c < C; ++c) {
      tile[r][c] = derivative ? rows[r][j0 + c] : group.scale[i0 + r] * rows[r][j0 + c];
      tile[r][c] *= group.scale[j0 + c];
    }
  }
  subtract_products<T, R, C>(tile, left, right, j0);
  FF_UNROLL
  for (int c = 0; c < C; ++c) {
    const Vec<T> reciprocal = group.reciprocal[j0 + c];
    FF_UNROLL
    for (int r = 0; r < R; ++r) {
      FF_UNROLL
      for (int q = 0; q < c; ++q) tile[r][c] -= tile[r][q] * right[c][j0 + q];
      tile[r][c] *= reciprocal;
      rows[r][j0 + c] = tile[r][c];
    }
  }
}

template <typename G, int C, bool derivative>
FF_INLINE void factor_rows(G& group, index_t begin, index_t end, index_t j0) {
  index_t i = begin;
  for (; i + kTile <= end; i += kTile) factor_tile<G, kTile, C, derivative>(group, i, j0);
  switch (end - i) {
    case 3:
      if constexpr (kTile > 3) factor_tile<G, 3, C, derivative>(group, i, j0);
      break;
    case 2:
      factor_tile<G, 2, C, derivative>(group, i, j0);
      break;
    case 1:
      factor_tile<G, 1, C, derivative>(group, i, j0);
      break;
    default:
      break;
  }
}

template <typename G, int C>
FF_INLINE void factor_columns(G& group, index_t j0, typename G::Number unit) {
  factor_diagonal_tile<G, C>(group, j0, unit);
  factor_rows<G, C, false>(group, j0 + C, group.dim(), j0);
  factor_rows<G, C, true>(group, 0, group.params(), j0);
}

template <typename G>
FF_INLINE void factor_group(G& group) {
  using T = typename G::Number;
  const T unit = T(1) + group.args.ridge;
  index_t j = 0;
  for (; j + kTile <= group.dim(); j += kTile) factor_columns<G, kTile>(group, j, unit);
  switch (group.dim() - j) {
    case 3:
      if constexpr (kTile > 3) factor_columns<G, 3>(group, j, unit);
      break;
    case 2:
      factor_columns<G, 2>(group, j, unit);
      break;
    case 1:
      factor_columns<G, 1>(group, j, unit);
      break;
    default:
      break;
  }
}

// --- Out: from vectors of lanes to rows of numbers -----------------------------------------------

// X = diag(s) L^-T Y, in place of Y; `half` has been written before.
template <typename G>
FF_INLINE void back_substitute(G& group) {
  using T = typename G::Number;
  for (index_t p = 0; p < group.params(); ++p) {
    Vec<T>* x = group.half + p * group.dim();
    for (index_t k = group.dim() - 1; k >= 0; --k) {
      const Vec<T>* row = group.row(k);
      const Vec<T> value = x[k] * group.reciprocal[k];
      for (index_t i = 0; i < k; ++i) x[i] -= row[i] * value;
      x[k] = value * group.scale[k];
    }
  }
}

template <typename G>
FF_INLINE void write_group(G& group, Vec<typename G::Number>* products, typename G::Number* run) {
  using T = typename G::Number;
  const FisherSolveArgs<T>& args = group.args;
  const index_t d = group.dim(), P = group.params();
  const auto failed = group.failed != 0;
  Vec<T> smallest = d > 0 ? group.row(0)[0] : splat(T(1));
  Vec<T> largest = smallest;
  for (index_t i = 1; i < d; ++i) {
    const Vec<T> diagonal = group.row(i)[i];
    smallest = diagonal < smallest ? diagonal : smallest;
    largest = diagonal > largest ? diagonal : largest;
  }
  Vec<T> condition = largest / smallest;
  condition *= condition;
  if (any(failed)) {
    const Vec<T> nan = splat(kNan<T>);
    condition = failed ? nan : condition;
    for (index_t e = 0; e < P * d; ++e) group.half[e] = failed ? nan : group.half[e];
  }
  for (index_t p = 0; p < P; ++p) {
    for (index_t q = 0; q <= p; ++q) {
      const Vec<T>*y = group.half + p * d, *z = group.half + q * d;
      Vec<T> sum{};
      for (index_t begin = 0; begin < d; begin += kSumRows) {
        const index_t end = begin + kSumRows < d ? begin + kSumRows : d;
        Vec<T> part{};
        for (index_t i = begin; i < end; ++i) part += y[i] * z[i];
        sum += part;
      }
      if (d == 0) sum = failed ? splat(kNan<T>) : sum;
      products[p * P + q] = sum;
      products[q * P + p] = sum;
    }
  }
  const auto numbers = __builtin_convertvector(group.failed, Info<T>);
  if (group.count == kLanes<T>) {
    __builtin_memcpy(args.info + group.first, &numbers, sizeof(numbers));
  } else {
    for (int lane = 0; lane < group.count; ++lane) args.info[group.first + lane] = numbers[lane];
  }
  write_lanes(group, args.condition, condition);
  if (P == 0) return;
  write_run(group, args.fisher, P * P, run, [&](index_t e) { return products[e]; });
  if (d == 0) return;
  const auto by_parameter = [&](index_t e) { return group.half[group.half_position(e)]; };
  write_run(group, args.half, d * P, run, by_parameter);
  if (args.solution == nullptr) return;
  back_substitute(group);
  write_run(group, args.solution, d * P, run, by_parameter);
}

// The order of numbers in memory and in the scratch, once a call.
void fill_indices(index_t d, index_t P, bool with_cov, std::int32_t* cov, std::int32_t* half) {
  for (index_t i = 0; i < d; ++i) {
    for (index_t p = 0; p < P; ++p) half[i * P + p] = static_cast<std::int32_t>(p * d + i);
    for (index_t j = 0; with_cov && j < d; ++j) {
      cov[i * d + j] = static_cast<std::int32_t>(j <= i ? i * (i + 1) / 2 + j : -1);
    }
  }
}

template <typename T, int kDim, int kParams>
FF_INLINE void solve_group(Group<T, kDim, kParams>& group, Vec<T>* products, T* run) {
  read_covariance(group);
  read_derivative(group);
  compute_scale(group);
  factor_group(group);
  write_group(group, products, run);
}

// Groups of any size, with everything in `scratch`.
template <typename T>
void solve_groups(const FisherSolveArgs<T>& args, index_t begin, index_t end, T tolerance,
                  T* scratch) {
  constexpr int W = kLanes<T>;
  const index_t d = args.dim, P = args.params;
  Vec<T>* const scale = reinterpret_cast<Vec<T>*>(scratch);
  Vec<T>* const reciprocal = scale + d;
  Vec<T>* const factor = reciprocal + d;
  Vec<T>* const half = factor + d * (d + 1) / 2;
  Vec<T>* const products = half + P * d;
  T* const run = reinterpret_cast<T*>(products + P * P);
  std::int32_t* const half_index = reinterpret_cast<std::int32_t*>(run + W * (W + 1));
  std::int32_t cov_index[W * W];
  fill_indices(d, P, d < W, cov_index, half_index);
  const index_t ahead = groups_ahead<T>(d);
  for (index_t first = begin; first < end; first += W) {
    const index_t left = end - first;
    const int count = static_cast<int>(left < W ? left : W);
    Group<T, 0, 0> group{args,
                         first,
                         count,
                         ahead,
                         d,
                         P,
                         scale,
                         reciprocal,
                         factor,
                         half,
                         cov_index,
                         half_index,
                         splat(tolerance),
                         Mask<T>{}};
    solve_group(group, products, run);
  }
}

// Groups of a size that is known when this is compiled, with everything in registers.
template <typename T, int kDim, int kParams>
void solve_tiny_groups(const FisherSolveArgs<T>& args, index_t begin, index_t end, T tolerance) {
  constexpr int W = kLanes<T>;
  for (index_t first = begin; first < end; first += W) {
    Vec<T> scale[kDim], reciprocal[kDim], factor[kDim * (kDim + 1) / 2], half[kParams * kDim];
    Vec<T> products[kParams * kParams];
    T run[W * (W + 1)];
    const int count = static_cast<int>(end - first < W ? end - first : W);
    Group<T, kDim, kParams> group{
        args,       first,  count, 0,       kDim,    kParams,          scale,
        reciprocal, factor, half,  nullptr, nullptr, splat(tolerance), Mask<T>{}};
    solve_group(group, products, run);
  }
}

}  // namespace

template <typename T>
void fisher_solve_lanes(const FisherSolveArgs<T>& args, index_t begin, index_t end, T tolerance,
                        T* scratch) {
  switch (args.params > 2 ? 0 : 10 * args.dim + args.params) {
    case 21:
      return solve_tiny_groups<T, 2, 1>(args, begin, end, tolerance);
    case 22:
      return solve_tiny_groups<T, 2, 2>(args, begin, end, tolerance);
    case 31:
      return solve_tiny_groups<T, 3, 1>(args, begin, end, tolerance);
    case 32:
      return solve_tiny_groups<T, 3, 2>(args, begin, end, tolerance);
    case 41:
      return solve_tiny_groups<T, 4, 1>(args, begin, end, tolerance);
    case 42:
      return solve_tiny_groups<T, 4, 2>(args, begin, end, tolerance);
    default:
      break;
  }
  solve_groups(args, begin, end, tolerance, scratch);
}

template void fisher_solve_lanes(const FisherSolveArgs<float>&, index_t, index_t, float, float*);
template void fisher_solve_lanes(const FisherSolveArgs<double>&, index_t, index_t, double, double*);

}  // namespace fisherfast::FF_SIMD_NAMESPACE
