"""The dual tensor by itself: its parts, what it shows to a model, and the structures around it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.dual_oracle import Function, map_tensors
from torch import Tensor

import fisherfast as ff


def test_dual_tensor_is_the_stack_of_its_parts():
    """Catches parts in another order, and a shape that shows the stack to the model."""
    x, dx = torch.randn(2, 5), torch.randn(3, 2, 5)
    dual = ff.dual.DualTensor.pack(x, dx)
    assert torch.equal(dual.primal, x)
    assert torch.equal(dual.tangents, dx)
    assert torch.equal(dual.stack, torch.cat([x[None], dx]))
    assert (dual.shape, dual.dtype, dual.ndim, len(dual)) == (x.shape, x.dtype, 2, 2)
    assert (dual.numel(), dual.size(-1), dual.requires_grad) == (10, 5, False)


class Pair(NamedTuple):
    """A named tuple of outputs."""

    mean: Tensor
    scale: Tensor


def test_structures_of_outputs_stay():
    """Catches lists, tuples, dicts and named tuples that come back as something else."""
    x, dx = torch.randn(2, 5), torch.randn(3, 2, 5)
    for structure in (
        lambda x: (x + 1, [x * 2, (x.exp(),)]),
        lambda x: {"a": {"b": x + 1}, "c": [x, None, 3]},
        lambda x: Pair(x + 1, x.exp()),
        lambda x: [Pair(x, x[:, 0])],
    ):
        y, dy = ff.jvp(Function(structure), x, dx)
        expected = structure(x)
        map_tensors(lambda seen, truth: torch.testing.assert_close(seen, truth), y, expected)
        map_tensors(lambda seen, truth: _shaped(seen, (3, *truth.shape)), dy, expected)
        assert type(y) is type(dy) is type(expected)


def _shaped(seen: Tensor, shape: tuple[int, ...]) -> None:
    assert seen.shape == shape


def test_comparisons_and_indices_are_plain():
    """Catches duals of booleans and integers, which have no derivative."""
    dual = ff.dual.DualTensor.pack(torch.randn(2, 5), torch.randn(3, 2, 5))
    for plain in (dual > 0, dual.argmax(-1), dual.sort(1).indices, dual.isnan(), dual.long()):
        assert type(plain) is torch.Tensor
        assert not plain.is_floating_point()
    assert dual.max(1).indices.shape == (2,)


def test_constants_of_a_forward_pass_are_plain_operands():
    """Catches a sampling grid, a mask or a weight made inside the model that counts as varying: an
    operation that is linear in its other operand then has no derivative, or a dear one."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        grid = torch.zeros(len(x), 3, 4, 2) + torch.linspace(-1, 1, 4)[:, None]
        kernel = torch.ones(2, 1, 2, 2)
        moved = F.grid_sample(x, grid, align_corners=True)
        return F.conv2d(moved, kernel) * torch.full((2, 3), 0.5)

    model = Function(forward)
    x, dx = torch.randn(3, 1, 5, 6), torch.randn(2, 3, 1, 5, 6)
    _, dy = ff.jvp(model, x, dx)
    torch.testing.assert_close(dy, torch.stack([forward(one) for one in dx]))
    assert ff.dual.coverage(model, x).share == 1.0


@dataclass
class Answer:
    """An output that hides its tensors in a list."""

    means: list[Tensor]


@pytest.mark.parametrize("wrap", [lambda a: a, lambda a: [a], lambda a: {"a": (1, a)}])
def test_outputs_of_other_classes_are_refused(wrap):
    """Catches an object that comes back twice, with dual tensors inside, as y and as dy."""
    model = Function(lambda x: wrap(Answer([x * 2])))
    with pytest.raises(TypeError, match=r"^model must return tensors, or .*, got Answer$"):
        ff.jvp(model, torch.randn(2, 5), torch.randn(3, 2, 5))


def test_outputs_that_are_parameters():
    """Catches a parameter that is handed out itself, with its gradient."""
    model = Function(lambda x: weight)
    weight = model.weight = torch.nn.Parameter(torch.ones(5))
    y, dy = ff.jvp(model, torch.randn(2, 5), torch.randn(3, 2, 5))
    y.zero_()
    assert not y.requires_grad
    assert torch.equal(weight, torch.ones(5))
    assert torch.equal(dy, torch.zeros(3, 5))


def test_libraries_take_it_for_a_tensor_of_torch():
    """Catches NumPy's functions on tangents: opt_einsum and autoray choose the library for an array
    by the first name of the module of its class."""
    dual = ff.dual.DualTensor.pack(torch.ones(2), torch.ones(1, 2))
    assert type(dual).__module__.split(".")[0] == torch.Tensor.__module__ == "torch"


def test_writes_into_a_conjugate_are_refused():
    """Catches a write that is lost: PyTorch would change x, too."""
    x = torch.complex(torch.ones(2), torch.ones(2))
    dual = ff.dual.DualTensor.pack(x.real.clone(), torch.ones(1, 2)) * 1j
    with pytest.raises(ff.dual.DerivativeError, match=r"^operation conj in .*write into a clone"):
        dual.conj().mul_(2)
    assert torch.equal(dual.conj().clone().mul_(2).primal, torch.tensor([-2j, -2j]))
