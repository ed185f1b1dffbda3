"""The spectrum of the Fisher matrix: whole, and its largest eigenvalues alone; the effective
dimension, from dense determinants."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import scipy.sparse.linalg
import torch
from support.pairwise import pairwise
from support.parameters_oracle import brute_force
from support.parameters_small import STRUCTURES, measure, rows
from support.parameters_zoo import NETWORKS, Network
from torch import Tensor, nn

from fisherfast import parameters as fp
from fisherfast.parameters.analysis.eigenpairs import largest_eigenpairs
from fisherfast.parameters.structures import gram

ROUNDING = 1e-9
"""Relative to the truth; 1e-13 was measured."""


def problem(name: str = "conv2d strided", samples: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, its inputs, and its eigenvalues by brute force, descending."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(samples)
    return model, x, torch.linalg.eigvalsh(brute_force(model, "categorical", x)).flip(0)


def effective_rank(values: Tensor) -> float:
    share = values[values > 0] / values.sum()
    return math.exp(-float((share * share.log()).sum()))


def participation(values: Tensor) -> float:
    return float(values.sum()) ** 2 / float(values.square().sum())


@pytest.mark.parametrize(("name", "samples"), [("layer norm", 4), ("linear", 60)])
def test_statistics(name: str, samples: int) -> None:
    """Catches zero eigenvalues that count, shares of something else than the trace, a square too
    few; with 60 samples the network is the smaller side."""
    model, x, exact = problem(name, samples)
    found = fp.fisher(model, fp.Categorical(), x, structure="gram", batch_size=16).spectrum()
    # layer norm: 3e-14 of the largest is real, its epsilon breaks the invariance; rounding is 1e-16
    rank = int((exact > 1e-14 * exact[0]).sum())
    assert (found.rank, found.zeros) == (rank, len(exact) - rank)
    assert found.parameters == len(exact)
    assert found.zeros >= found.parameters - 2 * samples  # C - 1 directions of each sample
    torch.testing.assert_close(found.eigenvalues, exact[:rank], rtol=1e-7, atol=1e-12 * exact[0])
    assert math.isclose(found.trace, float(exact.sum()), rel_tol=ROUNDING)
    assert math.isclose(found.effective_rank, effective_rank(exact[:rank]), rel_tol=ROUNDING)
    assert math.isclose(found.participation_ratio, participation(exact), rel_tol=ROUNDING)
    assert 1 <= found.participation_ratio <= found.effective_rank <= found.rank


def test_bounds_where_some_are_unknown() -> None:
    """Catches bounds that are on the wrong side: the rest of the trace may be in as few or as many
    eigenvalues as there can be."""
    known, rest, spectrum = torch.tensor([4.0, 2.0, 1.0]).double(), 2.0, measure("gram").spectrum()
    partly = {"trace": 9.0, "complete": False, "most": 7, "rest_at_most": 1.0}
    found = replace(spectrum, eigenvalues=known, **partly)
    few = torch.tensor([*known, 1.0, 1.0], dtype=torch.float64)
    many = torch.tensor([*known, *[rest / 4] * 4], dtype=torch.float64)
    for bounds, of in (
        (found.effective_rank_bounds, effective_rank),
        (found.participation_bounds, participation),
    ):
        assert bounds == pytest.approx([of(few), of(many)], rel=1e-12)
    assert math.isnan(found.effective_rank + found.participation_ratio)
    assert (found.count(0.7), found.count(0.9)) == (3, None)
    assert "more than 3" in repr(found)
    assert "between" in repr(found)
    equal = replace(spectrum, eigenvalues=torch.full((4,), 2.0).double(), trace=8.0)
    assert [equal.count(share) for share in (0.25, 0.26, 0.5, 1.0)] == [1, 2, 2, 4]


@pytest.mark.parametrize("structure", [*STRUCTURES, "streamed"])
def test_of_every_structure(structure: Any) -> None:
    """Catches eigenvalues in the wrong order, or as all there are; products, a trace or a rank that
    are not those of the structure, and neither is the effective dimension."""
    model, x, _ = problem()
    F = measure(structure, x, model=model)
    dense = F.to_dense()
    exact = torch.linalg.eigvalsh(dense).flip(0).clamp_min(0)
    whole = measure("full", x, model=model) if structure == "lowrank" else F
    if structure != "streamed":
        dimension = F.effective_dimension(1000).value
        assert math.isclose(dimension, by_hand([dense], 1000, 1.0), rel_tol=ROUNDING)
    for count in [3] if structure == "streamed" else [3, None]:
        found = F.spectrum(count)
        assert found.complete == (count is None and structure != "lowrank")
        if count and structure in ("gram", "streamed"):
            assert found.most == 2 * len(x)
        torch.testing.assert_close(found.eigenvalues[:3], exact[:3], rtol=ROUNDING, atol=0)
        assert math.isclose(found.trace, whole.trace(), rel_tol=ROUNDING)
        first = torch.cat([part.flatten() for part in found.direction(0).values()])
        assert float(first @ dense @ first) == pytest.approx(float(exact[0]), rel=ROUNDING)
        for (low, high), value in (
            (found.effective_rank_bounds, effective_rank(exact)),
            (found.participation_bounds, participation(exact)),
        ):
            # low rank keeps less than all of the trace
            assert low * (1 - 1e-6) <= value <= high * (1 + 1e-6) or structure == "lowrank"


def test_directions() -> None:
    """Catches stiff and sloppy being mixed up, directions that are not orthonormal, or named by the
    wrong parameters."""
    model, x, exact = problem()
    truth = brute_force(model, "categorical", x)
    found = measure("gram", x, model=model).spectrum()
    stiff, sloppy = found.stiff(found.rank), found.sloppy(2)
    torch.testing.assert_close(truth @ stiff, stiff * exact[: found.rank], rtol=0, atol=1e-9)
    eye = torch.eye(found.rank, dtype=torch.float64)
    torch.testing.assert_close(stiff.T @ stiff, eye, rtol=0, atol=1e-8)
    torch.testing.assert_close(sloppy, stiff[:, -2:].flip(1))
    layout = fp.ParameterLayout.of(model)
    for number in (1, -1):
        torch.testing.assert_close(layout.flatten(found.direction(number)), stiff[:, number])


def test_the_largest_are_all_there_are() -> None:
    """Catches a division by the norm of nothing: the space is used up after the rank."""
    model, x, exact = problem("linear", 3)
    found = fp.fisher(model, fp.Categorical(), x, structure="streamed").spectrum(50)
    assert found.complete
    assert found.rank == 6
    torch.testing.assert_close(found.eigenvalues, exact[:6], rtol=1e-8, atol=0)


EIGENVALUES = {
    "falling": torch.logspace(0, -12, 80, dtype=torch.float64),
    "few": torch.cat([torch.linspace(1, 0.5, 6).double(), torch.zeros(74).double()]),
    "flat": 1e-9 * torch.linspace(1, 0.9, 80, dtype=torch.float64),
    "triples": (0.9 ** torch.arange(40, dtype=torch.float64)).repeat_interleave(3),
}


@pytest.mark.parametrize(
    ("values", "count"),
    [("falling", 10), ("few", 10), ("flat", 10), *(("triples", count) for count in (1, 4, 8, 11))],
)
def test_eigenpairs_of_a_known_matrix(values: str, count: int) -> None:
    """Catches lost orthogonality, zero eigenvalues that never converge, residuals that are none,
    and a search that stops after the first copies of triples among many other eigenvalues: SciPy's
    eigsh alone fails for 4 and 8."""
    exact = EIGENVALUES[values]
    noise = torch.randn(len(exact), len(exact), generator=torch.Generator().manual_seed(count))
    turn = torch.linalg.qr(noise.double()).Q
    matrix, scale = (turn * exact) @ turn.T, float(exact[0])
    settings = {"trace": float(matrix.trace()), "seed": 0, "device": torch.device("cpu")}
    found = largest_eigenpairs(lambda v: matrix @ v, len(exact), count, **settings)
    torch.testing.assert_close(found.values, exact[:count], rtol=0, atol=1e-10 * scale)
    eye = torch.eye(count, dtype=torch.float64)
    assert float((found.directions.T @ found.directions - eye).abs().max()) < 1e-12
    left = (matrix @ found.directions - found.directions * found.values).norm(dim=0)
    torch.testing.assert_close(found.residuals, left, rtol=1e-6, atol=1e-14 * scale)
    assert float(left.max()) <= 1e-6 * scale


def test_table_and_figure() -> None:
    """Catches a table without its numbers, and a figure without its lines."""
    model, x, _ = problem()
    found = fp.fisher(model, fp.Categorical(), x, structure="gram").spectrum()
    assert repr(found).startswith(f"Fisher spectrum: {found.parameters} parameters, 6 samples\n")
    assert f"{found.rank} (" in repr(found)
    ax = found.plot()
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert len(ax.get_lines()) == 3
    assert ax.get_lines()[0].get_ydata()[0] == float(found.eigenvalues[0])


def test_arguments() -> None:
    """Catches questions that have no answer."""
    model, x, _ = problem("linear")
    F = fp.fisher(model, "categorical", x, structure="gram")
    found = F.spectrum()
    questions: list[tuple[Callable[[], object], type[Exception], str]] = [
        (lambda: F.spectrum(0), ValueError, r"count must be at least 1, got 0$"),
        (lambda: F.spectrum(2.5), TypeError, r"count must be a whole number, got 2.5$"),  # type: ignore[arg-type]
        (lambda: F.spectrum(2, memory_budget=100), MemoryError, r"\d+ vectors of \d+ parameters m"),
        (lambda: found.count(0), ValueError, r"share must lie in \(0, 1\], got 0$"),
        (lambda: found.stiff(0), ValueError, r"count must lie in \[1, \d+\], got 0$"),
        (lambda: found.direction(10**6), IndexError, "number must lie in"),
    ]
    for question, error, text in questions:
        with pytest.raises(error, match=f"^{text}"):
            question()
    zero = measure("gram", 0 * x, model=model[0], likelihood=fp.Gaussian(), parameters="weight")
    for count in (None, 2):
        with pytest.raises(ValueError, match=r"^F must not be zero, got a largest eigenvalue of 0"):
            zero.spectrum(count)


@pytest.mark.parametrize("structure", ["block", "streamed"])
def test_scipy_operator(structure: Any) -> None:
    """Catches columns taken for rows, float32 products, and a vector that is written to."""
    model, x, _ = problem()
    F = measure(structure, x, model=model)
    operator, dense = F.to_scipy(), F.to_dense().numpy()
    assert isinstance(operator, scipy.sparse.linalg.LinearOperator)
    assert (operator.shape, operator.dtype) == (F.shape, np.float64)
    v = np.linspace(-1, 1, len(dense))
    kept = v.copy()
    for given in (v, np.stack([v, v**2, v[::-1]], axis=1), v.astype(np.float32)):
        for product in (operator, operator.T):
            np.testing.assert_allclose(product @ given, dense @ given, rtol=0, atol=1e-12)
    np.testing.assert_array_equal(v, kept)


def test_streamed_solves_by_conjugate_gradients() -> None:
    """Catches a damping that is left out, and a solution of a single column."""
    model, x, _ = problem()
    F = measure("streamed", x, model=model)
    dense = F.to_dense() + 0.1 * torch.eye(len(F.diag()), dtype=torch.float64)
    v = torch.linspace(-1, 1, len(dense) * 2, dtype=torch.float64).reshape(-1, 2)
    torch.testing.assert_close(F.solve(v, damping=0.1), torch.linalg.solve(dense, v))
    for question in (F.eigenvalues, F.logdet, F.state_dict, F.spectrum):
        with pytest.raises(ValueError, match=r"^structure must be one that stores F"):
            question()
    with pytest.raises(ValueError, match=r"^damping must be positive, got 0"):
        F.solve(v)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    with pytest.raises(ValueError, match="as it was when F was measured"):
        F @ v


# --- the effective dimension ---


def drawn(network: Network, draws: int) -> list[nn.Module]:
    """Networks with parameters at random."""
    models = [network.make() for _ in range(draws)]
    for draw, model in enumerate(models):
        generator = torch.Generator().manual_seed(5 + draw)
        for parameter in model.parameters():
            parameter.data.normal_(generator=generator)
    return models


def by_hand(matrices: list[Tensor], n: float, gamma: float) -> float:
    """Equation 2 of Abbas et al. (2021), by dense matrices."""
    F = torch.stack(matrices)
    size = F.shape[1]
    trace = F.diagonal(dim1=1, dim2=2).sum(1).mean()
    kappa = gamma * n / (2 * math.pi * math.log(n))
    inside = torch.eye(size, dtype=torch.float64) + kappa * size / trace * F
    return float(2 * torch.linalg.det(inside).sqrt().mean().log() / math.log(kappa))


@pairwise(
    name=["linear", "embedding", "called twice"],
    samples=[6, 25],  # P > N, and P < N
    parts=[(1000, 1.0), (200, 0.7)],
)
def test_dimension_equals_its_definition(
    name: str, samples: int, parts: tuple[int, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a lost factor 2 pi, a trace of one matrix in place of the mean, a mean of logarithms
    in place of the logarithm of the mean, a determinant of the larger side
    alone, and an error in the slower way, by eigenvalues, which small problems never take."""
    network, (n, gamma) = NETWORKS[name], parts
    models, x = drawn(network, 3), network.inputs(samples)
    exact = [brute_force(model, "categorical", x) for model in models]
    first, *others = (measure("gram", x, model=model) for model in models)
    found = first.effective_dimension(n, gamma, others=others)
    assert math.isclose(found.value, by_hand(exact, n, gamma), rel_tol=1e-10)
    assert (float(found), found.share) == (found.value, found.value / found.parameters)
    assert (found.n, found.gamma, found.parameters) == (n, gamma, len(exact[0]))
    torch.testing.assert_close(found.traces, torch.stack([f.trace() for f in exact]))
    assert found.log_determinants.shape == (3,)
    assert repr(found).startswith("EffectiveDimension(")
    alone = first.effective_dimension(n, gamma)
    assert math.isclose(alone.value, by_hand(exact[:1], n, gamma), rel_tol=1e-10)
    monkeypatch.setattr(gram, "NEGLIGIBLE", 0.0)
    assert math.isclose(alone.value, first.effective_dimension(n, gamma).value, rel_tol=1e-10)


def test_dimension_tends_to_the_rank() -> None:
    """Catches zero eigenvalues that rounding turns into dimensions: with kappa from 1e150 to 1e250
    log det grows by the rank for each unit of log kappa."""
    network = NETWORKS["conv2d strided"]
    x = network.inputs(4)[[0, 1, 2, 3, 3]]  # a copy, which adds rows and no rank
    F = measure("gram", x, model=network.make())
    few, many = (F.effective_dimension(n) for n in (1e150, 1e250))
    logs = [math.log(f.n / (2 * math.pi * math.log(f.n))) for f in (few, many)]
    slope = float(many.log_determinants - few.log_determinants) / (logs[1] - logs[0])
    assert math.isclose(slope, 4 * 2, rel_tol=1e-9)


@pytest.mark.parametrize(
    ("settings", "error", "text"),
    [
        ({"n": 1.0}, ValueError, r"n must be so large that gamma n / \(2 pi log n\)"),
        ({"n": 10}, ValueError, "n must be so large"),  # kappa below 1
        ({"n": "1000"}, TypeError, "n must be a number, got '1000'"),
        ({"gamma": 1.5}, ValueError, r"gamma must lie in \(0, 1\], got 1.5"),
        ({"gamma": None}, TypeError, "gamma must be a number, got None"),
        ({"others": [measure("gram")]}, ValueError, "others must be of the same network, got '0"),
        ({"others": [3]}, TypeError, "fisher must be a matrix of ff.parameters.fisher, got int"),
    ],
)
def test_wrong_settings_of_the_dimension(
    settings: dict[str, Any], error: type[Exception], text: str
) -> None:
    """Catches a logarithm that is zero or negative, and errors that do not name the argument."""
    F = measure("gram", rows(3), model=nn.Sequential(nn.Linear(4, 3)))
    with pytest.raises(error, match=f"^{text}"):
        F.effective_dimension(**{"n": 5000.0, **settings})
