// All ops: FF_FOR_EACH_OP(DO) expands DO(name) once for each.
#pragma once

#include "ops/dual/dual_activation.h"
#include "ops/dual/dual_norm.h"
#include "ops/dual/dual_pool.h"
#include "ops/dual/dual_softmax.h"
#include "ops/gradients/gradient_gram.h"
#include "ops/gradients/gradient_squares.h"
#include "ops/moments/lift_moments.h"
#include "ops/moments/moments.h"
#include "ops/moments/patch_moments.h"
#include "ops/moments/spatial_moments.h"
#include "ops/solve/fisher_solve.h"
#include "ops/solve/fisher_solve_backward.h"

#define FF_FOR_EACH_OP(DO)  \
  DO(dual_activation)       \
  DO(dual_norm)             \
  DO(dual_pool)             \
  DO(dual_softmax)          \
  DO(fisher_solve)          \
  DO(fisher_solve_backward) \
  DO(gradient_gram)         \
  DO(gradient_squares)      \
  DO(lift_moments)          \
  DO(moments)               \
  DO(patch_moments)         \
  DO(spatial_moments)
