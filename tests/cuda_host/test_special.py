"""Tests of single CUDA kernels, run on the host: the formulas of the activations, the accuracy of
rows, reads out of bounds, and the shared memory that a system needs."""

import math

import pytest
import torch
from support.closeness import assert_close
from support.op_cases import added, solved
from support.op_oracle import truth_of

from fisherfast import ops
from fisherfast.ops import _dual_pool, _lift
from fisherfast.ops._dual_activation import KINDS

# Of one, or of the truth where that is larger. Measured: 8.7e-7 and 4e-15, where the reference
# takes a difference of numbers near one.
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-14}

# Parameters that float32 holds exactly: the kernel and the reference see the same numbers.
PARAMETERS = {
    "leaky_relu": [0.25],
    "hardtanh": [-1.5, 2.0],
    "elu": [1.5, 1.0625, 0.5],
    "softplus": [2.0, 16.0],
}
KINKS = [0.0, -0.0, -1.5, 2.0, -3.0, 3.0, 8.0]  # 8: where softplus becomes linear
PIECEWISE_LINEAR = ["identity", "relu", "leaky_relu", "prelu", "hardtanh", "hardsigmoid"]
SMALL = {torch.float32: 1e-30, torch.float64: 1e-100}


@pytest.mark.parametrize("kind", KINDS)
def test_every_activation(kernels, normal, dtype, kind):
    """From deep saturation to deep saturation, at kinks, not finite or large. Catches a wrong
    formula, a lost factor, cancellation, >= for > at a kink, an overflow on the way (exp, the cube
    of gelu_tanh) and a NaN that is swallowed."""
    small = SMALL[dtype]
    special = torch.tensor([*KINKS, math.nan, math.inf, -math.inf, 1 / small, -1 / small, small])
    z = torch.cat([special, torch.linspace(-40, 40, 801), 1e-3 * normal(100)]).to(dtype)
    x = torch.stack([z, torch.ones_like(z), normal(len(z), dtype=dtype)])[:, None, None]
    slope = normal(1, dtype=dtype) if kind == "prelu" else None
    call = (x, kind, PARAMETERS.get(kind, []), None, None, slope, 2)
    (truth,) = truth_of("dual_activation", call)
    with kernels.serving():
        y = ops.dual_activation(x, kind, *call[2], slope=slope)
    assert_close(y, truth, TOLERANCE[dtype], truth.abs().clamp_min(1))
    if kind in PIECEWISE_LINEAR:
        at_kinks = torch.finfo(dtype).eps
        y, truth = (t[..., : len(KINKS)] for t in (y, truth))
        assert_close(y, truth, at_kinks, truth.abs().clamp_min(1))


def test_activation_writes_nothing_between_slices(kernels, normal, dtype):
    """Catches a vector store past a slice of y, at any alignment."""
    for size in (5, 64, 1023):
        x, memory = (
            normal(4, 1, 1, size, dtype=dtype),
            torch.full((4, size + 3), math.nan).to(dtype),
        )
        out = memory[:, :size].unflatten(1, (1, 1, size))
        with kernels.serving():
            expected = ops.dual_activation(x, "gelu")
            ops.dual_activation(x, "gelu", out=out)
        assert torch.equal(out, expected)
        assert memory[:, size:].isnan().all()


@pytest.mark.parametrize("width", [100, 1000, 5000])
def test_norm_of_a_mean_far_above_the_deviations(kernels, normal, dtype, width):
    """Catches a variance from the mean of the squares, and a mean rounded to the dtype: one part in
    10^8 of it is 6 % of a deviation here. Equal numbers: a variance below zero by rounding."""
    x = normal(3, 3, width, dtype=dtype)
    far = {torch.float32: 1e4, torch.float64: 1e12}[dtype]
    x[0] = (x[0].double() + far).to(dtype)
    near = x.double()
    near[0] -= far  # exact; normalised rows do not depend on it
    eps = 2.0**-10  # the same number in float32 and float64
    (truth,) = truth_of("dual_norm", (near, None, None, eps))
    with kernels.serving():
        got = ops.dual_norm(x, eps=eps)
        same = ops.dual_norm(torch.full((2, 4, width), 100.1, dtype=dtype), eps=eps)
    assert_close(got, truth, 4 * TOLERANCE[dtype], truth.abs().clamp_min(1))
    assert same.abs().max() <= 1e3 * torch.finfo(dtype).eps / math.sqrt(eps)


@pytest.mark.parametrize("shape", [(2, 1, 100_001), (2, 1, 50_001, 1), (2, 1, 20_001, 2)])
def test_rows_of_many_numbers(kernels, normal, dtype, shape):
    """Catches sums that lose digits with the width: those of a column are added one by one."""
    x = normal(*shape, dtype=dtype) + 1
    op = "dual_norm" if len(shape) == 3 else "dual_softmax"
    others = () if op == "dual_norm" else (2,)
    with kernels.serving():
        got = getattr(ops, op)(x, *others)
    (truth,) = truth_of(op, (x, *others))
    assert_close(got, truth, 4 * TOLERANCE[dtype], truth.abs().clamp_min(1))


def test_a_window_of_padding_alone(kernels, normal, dtype, monkeypatch):
    """Taps at -1 and 4 of four numbers: catches a read outside."""
    monkeypatch.setattr(_dual_pool, "_check_no_empty_window", lambda *numbers: None)
    with kernels.serving():
        y = ops.dual_pool(normal(3, 1, 2, 4, dtype=dtype), [2], [1], [1], [5])
    assert y.flatten().tolist() == [-math.inf] * 2 + [0.0] * 4


@pytest.mark.parametrize("offsets", [[0, 0, 30], [0, 30, 30], [-5, 40, 90], [0, 90, -7]])
def test_wrong_offsets_read_no_row_outside(kernels, normal, dtype, monkeypatch, offsets):
    """They are not checked on the device: the sanitizer sees a row that is not there."""
    monkeypatch.setattr(_lift, "_check_segments", lambda offsets, rows: None)
    sums, cross, *given, _, slope, start = added(normal, 30, 4, 9, 2, dtype=dtype)
    with kernels.serving():
        ops.lift_moments_(
            sums, cross, *given, offsets=torch.tensor(offsets), slope=slope, start=start
        )
    assert sums.isfinite().all()
    assert cross.isfinite().all()


def test_a_system_that_does_not_fit_is_an_error(kernels, normal, dtype):
    message = "the factor of one system must take at most 8192 bytes of shared memory"
    cov, deriv, *_ = solved(normal, (1,), 64, 1, dtype=dtype)
    with pytest.raises(RuntimeError, match=message), kernels.serving(limit=8192):
        ops.fisher_solve_details(cov, deriv, inverse_rows=True)


def test_cross_products_are_symmetric_to_the_bit(kernels, normal, dtype):
    """Over several tiles of each. Catches the two halves computed apart."""
    x = normal(70, 100, dtype=dtype)
    with kernels.serving():
        matrices = [ops.moments(x)[2], ops.spatial_moments(x.view(7, 40, 5, 5))[1]]
        matrices += [ops.patch_moments(x.view(2, 20, 25, 7), (2, 2))[1]]
        matrices += [ops.gradient_gram(x.view(5, 70, 20), x.view(5, 2, 70, 10)).reshape(10, 10)]
        matrices += [
            ops.fisher_solve_backward(x.view(7, 10, 100)[:, :, :10], x.view(7, 100, 10))[0]
        ]
    for matrix in matrices:
        assert torch.equal(matrix, matrix.mT)
