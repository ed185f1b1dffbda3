"""The report of rules and fallbacks is right, and every rule belongs to an existing operator."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

import pytest
import torch
from support.dual_oracle import Function
from support.networks_zoo import Written, seeded, untouched
from torch import nn

import fisherfast as ff
from fisherfast.dual import dispatch

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"


def mixed() -> nn.Module:
    """A layer by rule, one by the fallback, one that has no derivative."""
    return Written(
        lambda m, x: m.impossible(m.curious(m.linear(x))) * 2,
        linear=nn.Linear(5, 5),
        curious=Function(lambda x: torch.polygamma(1, x.abs() + 1)),
        impossible=Function(lambda x: torch.special.zeta(x.abs() + 2, x.abs() + 1)),
    )


def test_coverage_reports_and_does_not_raise():
    """Catches a report that fails where it is needed, or that names no layer."""
    model = seeded(mixed)
    x, dx = torch.rand(3, 5), torch.rand(2, 3, 5)
    with untouched(model):
        coverage = ff.dual.coverage(model, x, dx)
    assert any("polygamma" in operation for operation in coverage.fallbacks)
    assert any("zeta" in operation for operation in coverage.failures)
    assert 0 < coverage.share < 1
    lines = str(coverage).splitlines()
    for operation, way, layer in (
        ("polygamma", "fallback", "curious"),
        ("zeta", "failed", "impossible"),
        ("linear", "rule", "linear"),
    ):
        line = next(line for line in lines if operation in line)
        assert way in line
        assert layer in line


BUFFER = torch.zeros(3, 5)

STOPPED = {
    "shapes": (nn.Linear(4, 2), "RuntimeError: mat1 and mat2 shapes cannot be multiplied"),
    "its own": (Function(lambda x: x.nothing), "AttributeError: 'DualTensor' object has no"),
    "lazy": (nn.LazyLinear(3), "ValueError: model must have initialised parameters, got 'weight'"),
}
CONTINUED = {
    "into a buffer": (Function(lambda x: BUFFER.clone().copy_(x) + BUFFER.copy_(x)), "copy_"),
    "into a detached": (Function(lambda x: x.detach().mul_(2) + x), "mul_"),
}


@pytest.mark.parametrize("case", STOPPED | CONTINUED)
def test_coverage_of_a_network_that_cannot_run(case):
    """Catches an error where a report was asked for, or a report that says nothing of it."""
    model, reason = (STOPPED | CONTINUED)[case]
    x = torch.rand(3, 5)
    with contextlib.nullcontext() if case == "lazy" else untouched(model):
        report = ff.dual.coverage(nn.Sequential(nn.Identity(), model), x)
    (failure,) = report.failures
    assert reason.replace("'weight'", "'1.weight'") in failure
    assert report.layers[failure] == ["the model" if case == "lazy" else "1"]
    assert report.stopped == (case in STOPPED)
    assert ("the model stopped with an error" in str(report)) == report.stopped
    assert failure in str(report)


def test_every_rule_is_for_an_operator_that_exists():
    """Catches a misspelt operator: its rule would never run, and nobody would hear of it."""
    pinned = re.search(r"^torch==(\S+)", CONSTRAINTS.read_text(encoding="utf-8"), flags=re.M)
    assert pinned is not None
    if torch.__version__.partition("+")[0] != pinned[1]:
        pytest.skip(f"operators are those of torch {pinned[1]}, this is {torch.__version__}")
    assert not dispatch.MISSING
    assert all(isinstance(operator, torch._ops.OpOverload) for operator in dispatch.RULES)
