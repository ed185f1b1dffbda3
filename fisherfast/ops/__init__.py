"""The ops with native kernels, usable on their own.

Each op is a public function over an op of ``torch.library`` (``torch.ops.fisherfast.*``) with an
implementation for CPU and CUDA and a fake one, so that ``torch.compile`` and fake tensors work.
The checks of an input are shared by all of them and run once a call. `fisher_solve` has a backward;
for the others an input that requires grad is an error, never a wrong gradient.

On the CPU the kernels serve every size: torch is faster for a single small system alone
(docs/benchmarks.md).
On CUDA `fisher_solve` goes to ``torch.linalg`` where a system does not fit into the memory of a
block. Everything goes to plain torch when ``FISHERFAST_DISABLE_NATIVE=1`` is set, or for CUDA
tensors when the build has no CUDA kernels.
"""

from fisherfast.ops._dual_activation import dual_activation
from fisherfast.ops._dual_pool import dual_pool
from fisherfast.ops._dual_rows import dual_norm, dual_softmax
from fisherfast.ops._gradients import gradient_gram, gradient_squares
from fisherfast.ops._lift import lift_moments_
from fisherfast.ops._moments import moments, patch_moments, spatial_moments
from fisherfast.ops._solve import (
    FisherSolve,
    fisher_solve,
    fisher_solve_backward,
    fisher_solve_details,
)

__all__ = [
    "FisherSolve",
    "dual_activation",
    "dual_norm",
    "dual_pool",
    "dual_softmax",
    "fisher_solve",
    "fisher_solve_backward",
    "fisher_solve_details",
    "gradient_gram",
    "gradient_squares",
    "lift_moments_",
    "moments",
    "patch_moments",
    "spatial_moments",
]
