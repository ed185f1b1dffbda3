"""Where other libraries' Fisher matrix of the parameters is another one, or none.

Each row is a small network in float64 (the last in float32) on which fisherfast and a library are
compared with a loop over samples and classes: relative errors of the diagonal, or what was raised.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import fisherfast as ff
from benchmarks import harness
from benchmarks.peers import libraries, networks
from benchmarks.peers.libraries import Case

CLASSES = 4
SAMPLES = 16
CONFIDENT = 100.0  # factor on the last layer: the largest probability rounds to 1 in float32


class Twice(nn.Module):
    """A layer that is called twice."""

    def __init__(self) -> None:
        super().__init__()
        self.again = nn.Linear(6, 6)
        self.last = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """x [n, 6] -> [n, 4]."""
        return self.last(torch.tanh(self.again(torch.tanh(self.again(x)))))


def image_network(**settings: Any) -> nn.Module:
    """A convolution with a setting, for images of 2 x 5 x 5, and a linear layer."""
    convolution = nn.Conv2d(2, 4, 3, **settings)
    numbers = convolution(torch.zeros(1, 2, 5, 5)).numel()
    return nn.Sequential(convolution, nn.Tanh(), nn.Flatten(), nn.Linear(numbers, CLASSES))


def confident() -> nn.Module:
    """Its largest probability is 1 in float32."""
    model = networks.perceptron(6, CLASSES)
    with torch.no_grad():
        model[-1].weight.mul_(CONFIDENT)
    return model


VECTOR, IMAGE = (6,), (2, 5, 5)
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], torch.dtype]] = {
    "a layer called twice": (Twice, VECTOR, torch.float64),
    "batch norm, eps = 0.1": (
        lambda: nn.Sequential(
            nn.Linear(6, 5), nn.BatchNorm1d(5, eps=0.1), nn.Tanh(), nn.Linear(5, CLASSES)
        ),
        VECTOR,
        torch.float64,
    ),
    "circular padding": (
        lambda: image_network(padding=1, padding_mode="circular"),
        IMAGE,
        torch.float64,
    ),
    'padding="same"': (lambda: image_network(padding="same"), IMAGE, torch.float64),
    "grouped convolution": (lambda: image_network(groups=2), IMAGE, torch.float64),
    "positions that share a linear layer": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Flatten(), nn.Linear(15, CLASSES)),
        (3, 6),
        torch.float64,
    ),
    "layer norm": (
        lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, CLASSES)),
        VECTOR,
        torch.float64,
    ),
    "confident outputs, float32": (confident, VECTOR, torch.float32),
}


def ways(case: Case) -> dict[str, Callable[[], Tensor]]:
    """The exact diagonal by each library, on a copy of the model: some leave hooks behind."""
    return {
        "fisherfast": lambda: ff.parameters.fisher(
            case.model, case.likelihood(), (case.x, case.y)
        ).diag(),
        "nngeometry": lambda: libraries.nngeometry_diag(case, "exact"),
        "curvlinops": lambda: libraries.curvlinops_dense(case, "exact").diag(),
        "BackPACK": lambda: libraries.BackPack(case, "exact")(),
    }


def rows() -> list[dict[str, Any]]:
    """Every network with the relative error of each library, or what it raised."""
    found = []
    for name, (build, shape, dtype) in NETWORKS.items():
        model = networks.drawn(build, dtype)
        case = Case(model, "categorical", *networks.data(shape, CLASSES, SAMPLES, dtype))
        truth = libraries.brute_force(case, "exact").diag()
        found.append({"network": name, "errors": _errors(case, truth)})
    return found


def _errors(case: Case, truth: Tensor) -> dict[str, float | str]:
    errors: dict[str, float | str] = {}
    for library in ways(case):
        own = Case(copy.deepcopy(case.model), case.kind, case.x, case.y)
        try:
            error = harness.relative_error(ways(own)[library](), truth)
            errors[library] = error if math.isfinite(error) else "not a number"
        except Exception as raised:  # whatever a library raises is what is reported
            reason = str(raised).splitlines()
            errors[library] = f"{type(raised).__name__}: {reason[0][:120] if reason else ''}"
    return errors


def batch_loop() -> list[dict[str, Any]]:
    """What the widespread loop over batches computes, which squares the mean gradient of a batch:
    its trace over that of the empirical diagonal, by batch size. Ours beside it."""
    model = networks.drawn(networks.perceptron, torch.float64)
    x, y = networks.data(VECTOR, CLASSES, 64, torch.float64)
    case = Case(model, "categorical", x, y)
    truth = float(libraries.brute_force(case, "empirical").trace())
    found = []
    for batch in (1, 4, 16, 64):
        squared = 0.0
        for start in range(0, len(x), batch):
            part = slice(start, start + batch)
            loss = nn.functional.cross_entropy(model(x[part]), y[part])
            gradients = torch.autograd.grad(loss, list(model.parameters()))
            squared += sum(float(g.square().sum()) for g in gradients)
        ours = ff.parameters.fisher(
            model,
            case.likelihood(),
            (x, y),
            structure="diag",
            fisher_type="empirical",
            batch_size=batch,
        )
        found.append(
            {
                "batch": batch,
                "squared mean gradient / truth": squared / (len(x) / batch) / truth,
                "fisherfast / truth": ours.trace() / truth,
            }
        )
    return found
