// Fisher solve: one Cholesky factorisation gives the linear Fisher information of a system.
//
//   s_i = 1 / sqrt(C_ii)                       scale every feature to unit variance
//   R   = diag(s) C diag(s) + ridge I = L L^T
//   Y   = L^-1 diag(s) D                       `half`
//   J   = Y^T Y                                `fisher`
//   X   = diag(s) L^-T Y = (C + ridge diag(C))^-1 D       `solution`, what the backward pass needs
//
// Only the lower triangle of C is read. Pivot i (1-based) fails when C_ii is not positive and
// finite, or when the Cholesky pivot L_ii^2 is not above `pivot_tolerance`; the first failure is
// written to `info` and every floating-point result of that system is NaN.
//
// Host and device run the same plan on the *augmented factor*. Append the rows of (diag(s) D)^T,
// and the rows of I when inverse_rows is wanted, below R; the column operations that turn R
// into L turn these rows into Y^T and L^-T. Column j then holds, contiguously,
//
//   L_jj ... L_(d-1)j | Y_j1 ... Y_jP | (L^-1)_j0 ... (L^-1)_jj
//
// and one loop, `column c -= L_cj * column j`, does the factorisation and both solves.
#pragma once

#include <cmath>
#include <limits>

#include "core/fields.h"
#include "core/simd/dispatch.h"
#include "core/types.h"

namespace fisherfast {

template <typename T>
struct FisherSolveArgs {
  const T* cov;              // [B, d, d], any strides
  index_t cov_strides[3];    // in elements
  const T* deriv;            // [B, d, P], any strides
  index_t deriv_strides[3];  // in elements
  T* fisher;                 // out [B, P, P], contiguous as all below
  T* half;                   // out [B, d, P]
  std::int32_t* info;        // out [B]: 0, or the 1-based index of the first failed pivot
  T* condition;              // out [B]: (max L_ii / min L_ii)^2
  T* inverse_rows;           // out [B, d]: squared norms of the rows of L^-1, or null: not wanted
  T* solution;               // out [B, d, P]: X, or null: not wanted
  index_t batch;             // B systems
  index_t dim;               // d features
  index_t params;            // P parameters
  T ridge;                   // added to the unit diagonal

  FF_FIELDS(cov, cov_strides, deriv, deriv_strides, fisher, half, info, condition, inverse_rows,
            solution, batch, dim, params, ridge)
};  // outputs alias neither each other nor an input

// The smallest pivot that can be distinguished from zero. The rounding error of a pivot is at most
// about d eps (L L^T)_ii, and (L L^T)_ii = 1 here (Higham 2002, Accuracy and Stability of Numerical
// Algorithms, theorem 10.3).
template <typename T>
inline T pivot_tolerance(index_t dim) {
  return static_cast<T>(dim) * std::numeric_limits<T>::epsilon();
}

// 1 / sqrt(C_ii), NaN where C_ii is not positive and finite: the NaN reaches pivot i, none before.
template <typename T>
FF_HOST_DEVICE inline T unit_variance_scale(T variance) {
  return variance > 0 && variance <= kLargest<T> ? 1 / std::sqrt(variance) : kNan<T>;
}

// Whether pivot i, of value L_ii^2, can be divided by. NaN compares false.
template <typename T>
FF_HOST_DEVICE inline bool usable_pivot(T pivot, T scale, T tolerance) {
  return scale > 0 && pivot > tolerance;
}

// The layout of the columns of the augmented factor in one scratch array.
struct AugmentedFactor {
  index_t dim;
  index_t params;
  bool with_inverse;

  FF_HOST_DEVICE index_t inverse_length(index_t column) const {
    return with_inverse ? column + 1 : 0;
  }
  FF_HOST_DEVICE index_t length(index_t column) const {
    return dim - column + params + inverse_length(column);
  }
  FF_HOST_DEVICE index_t offset(index_t column) const {
    const index_t shrinkage = with_inverse ? 0 : column * (column - 1) / 2;
    return column * (dim + params + (with_inverse ? 1 : 0)) - shrinkage;
  }
  FF_HOST_DEVICE index_t size() const { return offset(dim); }
};

template <typename T>
FF_HOST_DEVICE inline T variance_of(const FisherSolveArgs<T>& args, index_t system, index_t i) {
  return args.cov[system * args.cov_strides[0] + i * (args.cov_strides[1] + args.cov_strides[2])];
}

// Entry `row` of column `column` before the factorisation; rows below d belong to D, then to I.
template <typename T>
FF_HOST_DEVICE inline T augmented_entry(const FisherSolveArgs<T>& args, index_t system,
                                        const T* scale, index_t column, index_t row) {
  if (row == column) return T(1) + args.ridge;
  if (row < args.dim) {
    const T covariance = args.cov[system * args.cov_strides[0] + row * args.cov_strides[1] +
                                  column * args.cov_strides[2]];
    return scale[row] * covariance * scale[column];
  }
  if (row < args.dim + args.params) {
    const T derivative =
        args.deriv[system * args.deriv_strides[0] + column * args.deriv_strides[1] +
                   (row - args.dim) * args.deriv_strides[2]];
    return scale[column] * derivative;
  }
  return row - args.dim - args.params == column ? T(1) : T(0);
}

// Cost a system: d^3 / 6 + d^2 P / 2 multiply-adds, d^3 / 6 more for inverse_rows and d^2 P / 2
// more for solution. Same bits for any number of threads.
template <typename T>
void fisher_solve_cpu(const FisherSolveArgs<T>& args, int threads);

// The two ways of the CPU, one instruction set at a time, on systems [begin, end): a system a lane
// for many small ones (no inverse_rows), and one system after another in blocks. `scratch` is
// aligned to 64 bytes and holds that many numbers of T.
inline index_t fisher_solve_lanes_scratch(index_t lanes, index_t d, index_t P) {
  return lanes * (2 * d + d * (d + 1) / 2 + P * d + P * P + lanes + 1) + d * P;
}
inline index_t fisher_solve_blocked_scratch(index_t lanes, index_t d, index_t P,
                                            bool with_inverse) {
  const index_t panel = 2 * lanes;  // rows of a panel
  const index_t columns = ceil_div(d, panel) * panel;
  const index_t rows = columns * (with_inverse ? 2 : 1) + ceil_div(P, panel) * panel;
  return (rows + 2 + P) * columns + 1;
}
// One thread of several that solve the same large systems together, with one scratch.
struct TeamMember {
  index_t rank;
  index_t size;
  void* team;
  void (*wait)(void* team);  // returns when every member has called it
};
FF_DECLARE_SIMD(template <typename T>
                void fisher_solve_lanes(const FisherSolveArgs<T>& args, index_t begin, index_t end,
                                        T tolerance, T* scratch);
                template <typename T>
                void fisher_solve_blocked(const FisherSolveArgs<T>& args, index_t begin,
                                          index_t end, T tolerance, T* scratch,
                                          const TeamMember& member);)

// Bytes of shared memory that a block of the device kernel needs.
template <typename T>
inline index_t fisher_solve_shared_bytes(index_t dim, index_t params, bool with_inverse) {
  const AugmentedFactor factor{dim, params, with_inverse};
  return (factor.size() + dim) * static_cast<index_t>(sizeof(T));
}

// Bytes of shared memory that a block may have: 48 to 227 KiB, by device.
index_t shared_bytes_limit(int device);

// Throws std::invalid_argument when a system does not fit into the shared memory of the device.
template <typename T>
void fisher_solve_cuda(const FisherSolveArgs<T>& args, int device, void* stream);

}  // namespace fisherfast
