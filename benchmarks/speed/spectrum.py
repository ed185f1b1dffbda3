"""Spectrum and effective dimension of networks of a million parameters.

python benchmarks/speed/spectrum.py [--tiny] [--out FILE]: for each network the exact Fisher matrix
of 500 samples with ten classes, through its Gram matrix [5000, 5000]: the time of the root (passes
through the network), of the Gram matrix, of its eigenvalues and of the effective dimension, each
alone. The eigenvalues are checked first, on a network small enough for a dense float64 matrix, and
on the large one against the trace and a random product.
"""

from __future__ import annotations

import resource
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fisherfast as ff
from fisherfast.parameters.structures.gram import GramFisher

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness

RESULTS = harness.ROOT / "benchmarks" / "results" / "parameters.json"
CLASSES, SAMPLES = 10, 500
TRAINED_ON = 60_000
"""Samples n of the effective dimension, those of MNIST."""

TOLERANCE = 1e-10
"""Of sums of eigenvalues and of products; 1e-14 was measured."""


def mlp(side: int, width: int) -> nn.Module:
    """A fully connected network on images of one channel."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(side * side, width),
        nn.ReLU(),
        nn.Linear(width, width // 4),
        nn.ReLU(),
        nn.Linear(width // 4, CLASSES),
    )


def cnn(side: int, width: int) -> nn.Module:
    """Two convolutions and two fully connected layers, PyTorch's own example for MNIST."""
    inner = (side - 4) // 2
    return nn.Sequential(
        nn.Conv2d(1, width, 3),
        nn.ReLU(),
        nn.Conv2d(width, 2 * width, 3),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(2 * width * inner * inner, 4 * width),
        nn.ReLU(),
        nn.Linear(4 * width, CLASSES),
    )


def measured(model: nn.Module, x: torch.Tensor) -> dict[str, Any]:
    """Seconds of each step, and what comes out."""
    likelihood = ff.parameters.Categorical()
    seconds = {}
    start = time.perf_counter()
    matrix = ff.parameters.fisher(model, likelihood, x, structure="gram")
    assert isinstance(matrix, GramFisher)
    seconds["root"] = time.perf_counter() - start
    start = time.perf_counter()
    gram = matrix.gram()
    seconds["Gram matrix"] = time.perf_counter() - start
    start = time.perf_counter()
    found = matrix.spectrum()
    seconds["eigenvalues"] = time.perf_counter() - start
    check(matrix, gram, found)
    start = time.perf_counter()
    dimension = ff.parameters.fisher(model, likelihood, x, structure="gram").effective_dimension(
        TRAINED_ON
    )
    seconds["effective dimension, all of it"] = time.perf_counter() - start
    seconds["spectrum, all of it"] = sum(
        seconds[step] for step in ("root", "Gram matrix", "eigenvalues")
    )
    return {
        "parameters": found.parameters,
        "samples": found.samples,
        "rows": matrix.rows,
        "rank": found.rank,
        "effective rank": found.effective_rank,
        "participation ratio": found.participation_ratio,
        "directions with 90 % of the trace": found.count(0.9),
        "effective dimension": dimension.value,
        "seconds": seconds,
        "peak memory in bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }


def check(matrix: GramFisher, gram: torch.Tensor, found: ff.parameters.Spectrum) -> None:
    """Raise AssertionError unless independent ways to the same numbers agree."""
    trace = float(matrix.diag().sum())
    squares = float(found.eigenvalues.square().sum())
    v = torch.randn(matrix.layout.size, 1, dtype=torch.float64)
    u = matrix.times_root(v)
    expected = float(v[:, 0] @ (matrix @ v)[:, 0])
    again = float((matrix.times_root(matrix.transposed_root(u)) - gram @ u).norm() / u.norm())
    errors = {
        "trace": abs(float(found.eigenvalues.sum()) / trace - 1),
        "squares": abs(squares / float(gram.square().sum()) - 1),
        "product": abs(float(u.square().sum()) / expected - 1),
        "Gram product": again / float(found.eigenvalues[0]),
    }
    for name, error in errors.items():
        if not error < TOLERANCE:
            raise AssertionError(f"{name} must agree to {TOLERANCE}, got {error}")


def check_small() -> float:
    """Largest relative error of the eigenvalues of a small network, against a dense matrix."""
    model, x = mlp(4, 12).double(), torch.randn(6, 1, 4, 4, dtype=torch.float64)
    rows = []
    for sample in x:
        logs = model(sample[None]).log_softmax(1)[0]
        for log in logs:
            parts = torch.autograd.grad(log, [*model.parameters()], retain_graph=True)
            rows.append(log.detach().exp().sqrt() * torch.cat([part.flatten() for part in parts]))
    root = torch.stack(rows)
    exact = torch.linalg.eigvalsh(root.T @ root / len(x)).flip(0)
    found = (
        ff.parameters.fisher(model, ff.parameters.Categorical(), x, structure="gram")
        .spectrum()
        .eigenvalues
    )
    return float((found - exact[: len(found)]).abs().max() / exact[0])


def networks(tiny: bool) -> dict[str, Any]:
    """Exact Fisher matrices of a million parameters, 500 samples, ten classes."""
    error = check_small()
    if not error < TOLERANCE:
        raise AssertionError(f"eigenvalues must agree to {TOLERANCE}, got {error}")
    side, samples = (8, 12) if tiny else (28, SAMPLES)
    figures: dict[str, Any] = {"error on a small network": error}
    widths = {"MLP": (mlp, 20 if tiny else 980), "CNN": (cnn, 4 if tiny else 32)}
    for name, (build, width) in widths.items():
        torch.manual_seed(0)
        model = build(side, width).eval()
        figures[name] = measured(model, torch.randn(samples, 1, side, side))
        print(name, figures[name], flush=True)
    return figures


if __name__ == "__main__":
    harness.main(__doc__ or "", {"spectrum": networks}, results=RESULTS)
