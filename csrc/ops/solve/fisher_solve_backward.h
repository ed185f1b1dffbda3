// Backward pass of fisher_solve, for J alone: with G the gradient with respect to J and
// X = (C + ridge diag(C))^-1 D, which the forward pass kept,
//
//   Z          = X (G + G^T)
//   grad_deriv = Z
//   grad_cov   = -(Z X^T) / 2, its diagonal times 1 + ridge
//
// grad_cov is symmetric. A failed system has X = NaN, and with it NaN gradients.
#pragma once

#include "core/fields.h"
#include "core/types.h"

namespace fisherfast {

template <typename T>
struct FisherSolveBackwardArgs {
  const T* grad_fisher;  // G [B, P, P], contiguous as all here
  const T* solution;     // X [B, d, P]
  T* grad_cov;           // out [B, d, d]
  T* grad_deriv;         // out [B, d, P]
  index_t batch;         // B systems
  index_t dim;           // d features
  index_t params;        // P parameters
  T ridge;

  FF_FIELDS(grad_fisher, solution, grad_cov, grad_deriv, batch, dim, params, ridge)
};  // outputs alias neither each other nor an input

// Cost a system: d^2 P + d P^2 multiply-adds, d^2 numbers written. Same bits for any number of
// threads.
template <typename T>
void fisher_solve_backward_cpu(const FisherSolveBackwardArgs<T>& args, int threads);

template <typename T>
void fisher_solve_backward_cuda(const FisherSolveBackwardArgs<T>& args, int device, void* stream);

}  // namespace fisherfast
