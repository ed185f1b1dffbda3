"""Matrices and vectors at the edge of what is allowed, and just beyond."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.parameters_oracle import brute_force
from support.parameters_zoo import Network, convolution2d, linear
from torch import Tensor, nn

from fisherfast.parameters import Categorical, ElasticWeightConsolidation, Gaussian, fisher

STRUCTURES = ("diag", "block", "kfac", "full", "gram", "lowrank")

HALF_ROUNDING = {torch.float16: 0.003, torch.bfloat16: 0.02}
"""Of the trace of a small network in half precision; measured: 2e-4 and 1.3e-3."""

pytestmark = pytest.mark.parametrize("structure", STRUCTURES)


def make(build: Any = linear, shape: tuple[int, ...] = (4,)) -> tuple[nn.Module, Tensor]:
    network = Network(build, shape)
    return network.make(), network.inputs(5)


def test_vectors_without_columns(structure: Any) -> None:
    """Catches products that count on a first column."""
    model, x = make()
    F = fisher(model, Categorical(), x, structure=structure)
    none = torch.ones(F.shape[0], 0)
    for found in (F @ none, F.solve(none, damping=1.0)):
        assert found.shape == none.shape
        assert found.dtype == torch.float64


def test_complex_vectors(structure: Any) -> None:
    """Catches imaginary parts that are dropped."""
    model, x = make()
    F = fisher(model, Categorical(), x, structure=structure)
    vector = torch.ones(F.shape[0], dtype=torch.complex64)
    for wrong in (vector, F.layout.unflatten(vector)):
        with pytest.raises(TypeError, match=r"vector must be real, got torch\.complex64"):
            F @ wrong


@pytest.mark.parametrize("damping", ["1", None, True, [1.0], torch.ones(2), 1j], ids=repr)
def test_damping_that_is_no_number(structure: Any, damping: Any) -> None:
    """Catches errors that do not say which argument is wrong."""
    model, x = make()
    F = fisher(model, Categorical(), x, structure=structure)
    for method in (
        lambda: F.solve(torch.ones(F.shape[0]), damping=damping),
        lambda: F.logdet(damping=damping),
    ):
        with pytest.raises(TypeError, match="damping must be a number, got"):
            method()


def test_no_information_at_all(structure: Any) -> None:
    """Catches divisions by a largest eigenvalue of zero: inputs of zero, and a zero last layer."""
    model = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()
    for parameter in model.parameters():
        parameter.data.zero_()
    F = fisher(model, Gaussian(), torch.zeros(3, 4), structure=structure, parameters="0")
    ones = torch.ones(F.shape[0], dtype=torch.float64)
    assert F.trace() == 0
    assert not F.eigenvalues().any()
    assert not F.diag().any()
    assert not (F @ ones).any()
    assert not F.to_dense().any()
    assert F.logdet() == -torch.inf
    assert F.logdet(damping=1.0) == 0
    torch.testing.assert_close(F.solve(ones, damping=2.0), ones / 2)
    with pytest.raises(ValueError, match="damping must be positive, got 0"):
        F.solve(ones)


@pytest.mark.parametrize("dtype", HALF_ROUNDING)
@pytest.mark.parametrize("image", [False, True])
def test_half_precision(structure: Any, dtype: torch.dtype, image: bool) -> None:
    """Catches kernels that do not read half precision, and sums in it."""
    model, x = make(convolution2d, (2, 6, 5)) if image else make()
    half = copy.deepcopy(model).to(dtype)
    same = copy.deepcopy(half).double()
    found = fisher(half, Categorical(), x, structure=structure).trace()
    expected = fisher(same, Categorical(), x.to(dtype).double(), structure=structure).trace()
    assert found == pytest.approx(expected, rel=HALF_ROUNDING[dtype])


def test_one_sample_and_one_output(structure: Any) -> None:
    """Catches dimensions of size 1 that are squeezed away. One sample's "kfac" is exact for one
    output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 1)).double()
    x = torch.randn(1, 3, dtype=torch.float64)
    truth = brute_force(model, "gaussian", x)
    found = fisher(model, Gaussian(), x, structure=structure)
    torch.testing.assert_close(found.diag(), truth.diag())
    flat = fisher(nn.Sequential(model, nn.Flatten(0)), Gaussian(), x, structure=structure)
    torch.testing.assert_close(flat.diag(), truth.diag())


def test_no_outputs(structure: Any) -> None:
    """Catches errors from deep inside."""
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten()).double()
    model.register_forward_hook(lambda module, args, output: output[:, :0])
    text = r"model must return at least one number per sample, got shape \[3, 0\]"
    with pytest.raises(ValueError, match=text):
        fisher(model, Gaussian(), torch.ones(3, 4), structure=structure)


def test_settings_of_consolidation_that_are_no_numbers(structure: Any) -> None:
    """Catches errors that do not say which argument is wrong."""
    for name in ("strength", "decay"):
        settings: dict[str, Any] = {"strength": 1.0, "online": True, name: "1"}
        with pytest.raises(TypeError, match=f"{name} must be a number, got '1'"):
            ElasticWeightConsolidation(**settings)
    model, x = make()
    with pytest.raises(TypeError, match="weight must be a number, got None"):
        ElasticWeightConsolidation(1.0).consolidate(
            model, Categorical(), x, structure=structure, weight=None
        )
