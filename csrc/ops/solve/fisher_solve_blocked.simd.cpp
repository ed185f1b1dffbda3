// One larger system after another. The rows of R, of (diag(s) D)^T and, for inverse_rows, of I lie
// in panels of two vectors of rows, column after column: number (row, column) of a panel is at
// column * kPanel + row. Column tiles of kColumns are factored from left to right:
//
//   diagonal panel:  subtract the products with all earlier columns, then factor the tile
//   panels below it: subtract, then solve with the tile; the same for D^T (gives Y^T), I (L^-T)
//
// Of several threads on one system each owns panels; only the diagonal panel waits for one of them.
//
// Every product is one loop over earlier columns: two vector loads and kColumns broadcasts for
// 2 kColumns multiply-adds of vectors. Entries above the diagonal are never used.
#include "core/simd/simd.h"
#include "ops/solve/fisher_solve.h"

namespace fisherfast::FF_SIMD_NAMESPACE {
namespace {

constexpr int kColumns = FF_SIMD_BYTES == 64 ? 8 : 4;  // 16 accumulators of 32 registers, 8 of 16

template <typename T>
constexpr index_t kPanel = 2 * kLanes<T>;

// The scratch of one system.
template <typename T>
struct Blocked {
  const FisherSolveArgs<T>& args;
  index_t system, d, P;
  index_t panels;   // of R: ceil(d / kPanel)
  index_t columns;  // panels * kPanel
  T* work;          // all panels: of R, of D^T, of I
  T* scale;         // [columns]
  T* reciprocal;    // [columns] 1 / L_ii
  T* solution;      // [P, columns]
  T* failure;       // [1] what the threads share: 0, or the first failed pivot
  TeamMember member;

  FF_INLINE bool owns(index_t index) const { return index % member.size == member.rank; }
  FF_INLINE void wait() const {
    if (member.size > 1) member.wait(member.team);
  }
  FF_INLINE T* panel(index_t index) { return work + index * kPanel<T> * columns; }
  FF_INLINE index_t derivative_panels() const { return (P + kPanel<T> - 1) / kPanel<T>; }
  FF_INLINE T* derivative_panel(index_t index) { return panel(panels + index); }
  FF_INLINE T* inverse_panel(index_t index) { return panel(panels + derivative_panels() + index); }
  FF_INLINE T y(index_t i, index_t p) {
    return derivative_panel(p / kPanel<T>)[i * kPanel<T> + p % kPanel<T>];
  }
};

// --- In ------------------------------------------------------------------------------------------

template <typename T>
void compute_scale(Blocked<T>& b) {
  const FisherSolveArgs<T>& args = b.args;
  const T* cov = args.cov + b.system * args.cov_strides[0];
  for (index_t i = 0; i < b.columns; ++i) {
    b.scale[i] = 1;  // of the padding
    if (i >= b.d) continue;
    const T variance = cov[i * (args.cov_strides[1] + args.cov_strides[2])];
    const bool usable = variance > 0 && variance <= kLargest<T>;
    const T root = sizeof(T) == 4 ? static_cast<T>(__builtin_sqrtf(static_cast<float>(variance)))
                                  : static_cast<T>(__builtin_sqrt(variance));
    b.scale[i] = usable ? 1 / root : kNan<T>;
  }
}

// Entry (row, column) of R, column <= row; the padding is the identity.
template <typename T>
FF_INLINE T scaled_entry(const Blocked<T>& b, index_t row, index_t column) {
  if (row == column) return row < b.d ? 1 + b.args.ridge : 1;
  if (row >= b.d || column > row) return 0;
  const FisherSolveArgs<T>& args = b.args;
  const T covariance = args.cov[b.system * args.cov_strides[0] + row * args.cov_strides[1] +
                                column * args.cov_strides[2]];
  return b.scale[row] * covariance * b.scale[column];
}

// A square of R below the diagonal, transposed in registers.
template <typename T>
FF_INLINE void read_square(Blocked<T>& b, index_t row, index_t column, T* to) {
  constexpr int W = kLanes<T>;
  const FisherSolveArgs<T>& args = b.args;
  const T* from = args.cov + b.system * args.cov_strides[0] + row * args.cov_strides[1] + column;
  Vec<T> square[W];
  FF_UNROLL
  for (int r = 0; r < W; ++r) square[r] = load(from + r * args.cov_strides[1]);
  transpose<T>(square);
  const Vec<T> row_scale = load(b.scale + row);
  FF_UNROLL
  for (int c = 0; c < W; ++c) {
    store(to + c * kPanel<T>, row_scale * square[c] * b.scale[column + c]);
  }
}

template <typename T>
void read_covariance(Blocked<T>& b) {
  constexpr int W = kLanes<T>;
  const bool unit_stride = b.args.cov_strides[2] == 1;
  for (index_t row = 0; row < b.columns; row += W) {
    if (!b.owns(row / kPanel<T>)) continue;
    T* const rows = b.panel(row / kPanel<T>) + row % kPanel<T>;
    const index_t end = (row / kPanel<T> + 1) * kPanel<T>;  // of the panel's diagonal block
    for (index_t column = 0; column < end; column += W) {
      T* const to = rows + column * kPanel<T>;
      if (unit_stride && column + W <= row && row + W <= b.d) {
        read_square(b, row, column, to);
        continue;
      }
      FF_UNROLL
      for (int c = 0; c < W; ++c) {
        FF_UNROLL
        for (int r = 0; r < W; ++r) {
          to[c * kPanel<T> + r] = scaled_entry(b, row + r, column + c);
        }
      }
    }
  }
}

template <typename T>
void read_derivative(Blocked<T>& b) {
  const FisherSolveArgs<T>& args = b.args;
  const T* deriv = args.deriv + b.system * args.deriv_strides[0];
  for (index_t index = 0; index < b.derivative_panels(); ++index) {
    if (!b.owns(b.panels + index)) continue;
    T* const panel = b.derivative_panel(index);
    for (index_t i = 0; i < b.columns; ++i) {
      for (index_t r = 0; r < kPanel<T>; ++r) {
        const index_t p = index * kPanel<T> + r;
        const bool inside = i < b.d && p < b.P;
        panel[i * kPanel<T> + r] =
            inside ? b.scale[i] * deriv[i * args.deriv_strides[1] + p * args.deriv_strides[2]] : 0;
      }
    }
  }
}

template <typename T>
void fill_identity(Blocked<T>& b) {
  for (index_t index = 0; index < b.panels; ++index) {
    if (!b.owns(index)) continue;
    T* const panel = b.inverse_panel(index);
    for (index_t column = index * kPanel<T>; column < b.columns; ++column) {
      for (index_t r = 0; r < kPanel<T>; ++r) {
        panel[column * kPanel<T> + r] = index * kPanel<T> + r == column ? 1 : 0;
      }
    }
  }
}

// --- The factorisation ---------------------------------------------------------------------------

template <typename T>
using Tile = Vec<T>[kColumns][2];

// tile = columns j .. j + kColumns of `panel`, less their products with columns [begin, j).
template <typename T>
FF_INLINE void subtract_products(Tile<T>& tile, const T* panel, const T* diagonal, index_t begin,
                                 index_t j) {
  constexpr int W = kLanes<T>;
  FF_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    tile[c][0] = load(panel + (j + c) * kPanel<T>);
    tile[c][1] = load(panel + (j + c) * kPanel<T> + W);
  }
  const T* factors = diagonal + j % kPanel<T>;  // rows j .. j + kColumns of L
  for (index_t k = begin; k < j; ++k) {
    const Vec<T> low = load(panel + k * kPanel<T>), high = load(panel + k * kPanel<T> + W);
    FF_UNROLL
    for (int c = 0; c < kColumns; ++c) {
      const T factor = factors[k * kPanel<T> + c];
      tile[c][0] -= low * factor;
      tile[c][1] -= high * factor;
    }
  }
}

template <typename T>
FF_INLINE void store_column(T* panel, index_t column, const Vec<T> (&values)[2]) {
  store(panel + column * kPanel<T>, values[0]);
  store(panel + column * kPanel<T> + kLanes<T>, values[1]);
}

// The tile on the diagonal. Returns 0 or the 1-based index of the first failed pivot.
template <typename T>
index_t factor_diagonal_tile(Blocked<T>& b, index_t j, T tolerance) {
  T* const panel = b.panel(j / kPanel<T>);
  Tile<T> tile;
  subtract_products<T>(tile, panel, panel, 0, j);
  FF_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    T* const column = panel + (j + c) * kPanel<T>;
    const index_t row = j % kPanel<T> + c;
    store_column<T>(panel, j + c, tile[c]);
    const T pivot = column[row];
    if (!(b.scale[j + c] > 0 && pivot > tolerance)) return j + c + 1;
    const T root = square_root<T>(splat(pivot))[0];
    const T reciprocal = 1 / root;
    b.reciprocal[j + c] = reciprocal;
    tile[c][0] *= reciprocal;
    tile[c][1] *= reciprocal;
    store_column<T>(panel, j + c, tile[c]);
    column[row] = root;
    FF_UNROLL
    for (int q = c + 1; q < kColumns; ++q) {
      const T factor = column[row + q - c];
      tile[q][0] -= tile[c][0] * factor;
      tile[q][1] -= tile[c][1] * factor;
    }
  }
  return 0;
}

// A tile below the diagonal; `begin` is the panel's first column that is not zero.
template <typename T>
FF_INLINE void factor_tile(const Blocked<T>& b, T* panel, const T* diagonal, index_t begin,
                           index_t j) {
  Tile<T> tile;
  subtract_products<T>(tile, panel, diagonal, begin, j);
  FF_UNROLL
  for (int c = 0; c < kColumns; ++c) {
    FF_UNROLL
    for (int q = 0; q < c; ++q) {
      const T factor = diagonal[(j + q) * kPanel<T> + j % kPanel<T> + c];
      tile[c][0] -= tile[q][0] * factor;
      tile[c][1] -= tile[q][1] * factor;
    }
    tile[c][0] *= b.reciprocal[j + c];
    tile[c][1] *= b.reciprocal[j + c];
    store_column<T>(panel, j + c, tile[c]);
  }
}

// Columns [first, last) of the panels below the diagonal that this thread owns.
template <typename T>
void factor_panels(Blocked<T>& b, index_t block, index_t first, index_t last) {
  const T* diagonal = b.panel(block);
  const auto factor_panel = [&](T* panel, index_t begin) {
    for (index_t j = first; j < last; j += kColumns) factor_tile<T>(b, panel, diagonal, begin, j);
  };
  for (index_t index = block + 1; index < b.panels + b.derivative_panels(); ++index) {
    if (b.owns(index)) factor_panel(b.panel(index), 0);
  }
  if (b.args.inverse_rows == nullptr) return;
  for (index_t index = 0; index <= block; ++index) {
    if (b.owns(index)) factor_panel(b.inverse_panel(index), index * kPanel<T>);
  }
}

// Returns 0 or the 1-based index of the first failed pivot, the same to every thread.
template <typename T>
index_t factor_system(Blocked<T>& b, T tolerance) {
  for (index_t block = 0; block < b.panels; ++block) {
    const index_t first = block * kPanel<T>;
    const index_t last = first + kPanel<T> < b.d ? first + kPanel<T> : b.d;
    b.wait();  // the panels of the block before
    if (b.owns(block)) {
      index_t failed = 0;
      for (index_t j = first; j < last && failed == 0; j += kColumns) {
        failed = factor_diagonal_tile(b, j, tolerance);
      }
      *b.failure = static_cast<T>(failed);
    }
    b.wait();  // the diagonal panel
    if (*b.failure != 0) return static_cast<index_t>(*b.failure);
    factor_panels(b, block, first, last);
  }
  b.wait();
  return 0;
}

// --- Out -----------------------------------------------------------------------------------------

template <typename T>
void write_condition(Blocked<T>& b) {
  T smallest = 1, largest = 1;
  for (index_t i = 0; i < b.d; ++i) {
    const T diagonal = b.panel(i / kPanel<T>)[i * kPanel<T> + i % kPanel<T>];
    smallest = i == 0 || diagonal < smallest ? diagonal : smallest;
    largest = i == 0 || diagonal > largest ? diagonal : largest;
  }
  b.args.condition[b.system] = (largest / smallest) * (largest / smallest);
}

template <typename T>
void write_fisher(Blocked<T>& b) {
  const index_t d = b.d, P = b.P;
  T* const fisher = b.args.fisher + b.system * P * P;
  T* const half = b.args.half + b.system * d * P;
  for (index_t i = 0; i < d; ++i) {
    for (index_t p = 0; p < P; ++p) half[i * P + p] = b.y(i, p);
  }
  for (index_t p = 0; p < P; ++p) {
    for (index_t q = 0; q <= p; ++q) {  // in double: the sum of d products costs no digit
      double sum = 0;
      for (index_t i = 0; i < d; ++i) {
        sum += static_cast<double>(half[i * P + p]) * static_cast<double>(half[i * P + q]);
      }
      fisher[p * P + q] = static_cast<T>(sum);
      fisher[q * P + p] = static_cast<T>(sum);
    }
  }
}

template <typename T>
void write_inverse_rows(Blocked<T>& b) {
  constexpr int W = kLanes<T>;
  for (index_t i = 0; i < b.d; ++i) {
    Vec<T> squares{};
    for (index_t index = 0; index <= i / kPanel<T>; ++index) {
      const T* column = b.inverse_panel(index) + i * kPanel<T>;
      const Vec<T> low = load(column), high = load(column + W);
      squares += low * low + high * high;
    }
    T sum = 0;
    for (int lane = 0; lane < W; ++lane) sum += squares[lane];
    b.args.inverse_rows[b.system * b.d + i] = sum;
  }
}

// X = diag(s) L^-T Y from the last row to the first; rows that are not known yet count as zero.
template <typename T>
void write_solution(Blocked<T>& b) {
  constexpr int W = kLanes<T>;
  for (index_t e = 0; e < b.P * b.columns; ++e) b.solution[e] = 0;
  for (index_t i = b.d - 1; i >= 0; --i) {
    for (index_t p = 0; p < b.P; ++p) {
      T* const x = b.solution + p * b.columns;
      Vec<T> products{};
      for (index_t index = i / kPanel<T>; index < b.panels; ++index) {
        const T* column = b.panel(index) + i * kPanel<T>;
        products += load(column) * load(x + index * kPanel<T>);
        products += load(column + W) * load(x + index * kPanel<T> + W);
      }
      T sum = b.y(i, p);
      for (int lane = 0; lane < W; ++lane) sum -= products[lane];
      x[i] = sum * b.reciprocal[i];
      b.args.solution[(b.system * b.d + i) * b.P + p] = x[i] * b.scale[i];
    }
  }
}

template <typename T>
void write_failure(const FisherSolveArgs<T>& args, index_t system) {
  const index_t d = args.dim, P = args.params;
  const auto fill = [&](T* out, index_t size) {
    for (index_t e = 0; out != nullptr && e < size; ++e) out[system * size + e] = kNan<T>;
  };
  fill(args.fisher, P * P);
  fill(args.half, d * P);
  fill(args.condition, 1);
  fill(args.inverse_rows, d);
  fill(args.solution, d * P);
}

template <typename T>
void write_system(Blocked<T>& b, index_t failed) {
  b.args.info[b.system] = static_cast<std::int32_t>(failed);
  if (failed != 0) {
    write_failure(b.args, b.system);
    return;
  }
  write_condition(b);
  write_fisher(b);
  if (b.args.inverse_rows != nullptr) write_inverse_rows(b);
  if (b.args.solution != nullptr) write_solution(b);
}

}  // namespace

template <typename T>
void fisher_solve_blocked(const FisherSolveArgs<T>& args, index_t begin, index_t end, T tolerance,
                          T* scratch, const TeamMember& member) {
  const index_t d = args.dim, P = args.params;
  const index_t panels = (d + kPanel<T> - 1) / kPanel<T>;
  const index_t columns = panels * kPanel<T>;
  T* const scale = scratch;
  T* const reciprocal = scale + columns;
  T* const solution = reciprocal + columns;
  T* const work = solution + P * columns;
  const index_t rows = columns * (args.inverse_rows != nullptr ? 2 : 1) +
                       (P + kPanel<T> - 1) / kPanel<T> * kPanel<T>;
  T* const failure = work + rows * columns;
  for (index_t system = begin; system < end; ++system) {
    Blocked<T> b{args, system, d,          P,        panels,  columns,
                 work, scale,  reciprocal, solution, failure, member};
    if (member.rank == 0) compute_scale(b);
    b.wait();
    read_covariance(b);
    read_derivative(b);
    if (args.inverse_rows != nullptr) fill_identity(b);
    const index_t failed = factor_system(b, tolerance);
    if (member.rank == 0) write_system(b, failed);
    b.wait();
  }
}

template void fisher_solve_blocked(const FisherSolveArgs<float>&, index_t, index_t, float, float*,
                                   const TeamMember&);
template void fisher_solve_blocked(const FisherSolveArgs<double>&, index_t, index_t, double,
                                   double*, const TeamMember&);

}  // namespace fisherfast::FF_SIMD_NAMESPACE
