"""The spectrum of the Fisher matrix: whole, and its largest eigenvalues alone."""

from __future__ import annotations

import math

import pytest
import torch
from support.parameters_oracle import brute_force
from support.parameters_zoo import NETWORKS
from torch import Tensor, nn

from fisherfast import parameters as fp
from fisherfast.parameters.analysis.lanczos import lanczos
from fisherfast.parameters.analysis.spectrum import Spectrum
from fisherfast.parameters.layout import ParameterLayout

ROUNDING = 1e-9
"""Relative to the truth; 1e-13 was measured."""


def problem(name: str = "conv2d", samples: int = 6) -> tuple[nn.Module, Tensor, Tensor]:
    """A network, its inputs, and its eigenvalues by brute force, descending."""
    network = NETWORKS[name]
    model, x = network.make(), network.inputs(samples)
    return model, x, torch.linalg.eigvalsh(brute_force(model, "categorical", x)).flip(0)


def effective_rank(values: Tensor) -> float:
    share = values[values > 0] / values.sum()
    return math.exp(-float((share * share.log()).sum()))


def participation(values: Tensor) -> float:
    return float(values.sum()) ** 2 / float(values.square().sum())


@pytest.mark.parametrize("name", ["linear", "conv2d", "layer norm", "called twice"])
@pytest.mark.parametrize("samples", [4, 60])
def test_statistics(name: str, samples: int) -> None:
    """Catches zero eigenvalues that count, shares of something else than the trace, a square too
    few; with 60 samples the network is the smaller side."""
    model, x, exact = problem(name, samples)
    found = fp.spectrum(model, fp.Categorical(), x, batch_size=16)
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


def made(values: list[float], *, trace: float | None = None, most: int = 0) -> Spectrum:
    """A spectrum with eigenvalues that were chosen."""
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    layout = ParameterLayout(("w",), (torch.Size([10]),))
    total = float(eigenvalues.sum()) if trace is None else trace
    eye = torch.eye(10, dtype=torch.float64)
    return Spectrum(
        eigenvalues=eigenvalues,
        residuals=torch.zeros_like(eigenvalues),
        layout=layout,
        samples=5,
        trace=total,
        complete=trace is None,
        most=most or len(values),
        rest_at_most=values[-1],
        directions=lambda chosen: eye[:, list(chosen)],
    )


def test_closed_forms() -> None:
    """Catches a definition other than those of the literature: equal eigenvalues count one each."""
    equal = made([2.0] * 4)
    assert math.isclose(equal.effective_rank, 4, rel_tol=1e-12)
    assert math.isclose(equal.participation_ratio, 4, rel_tol=1e-12)
    assert [equal.count(share) for share in (0.25, 0.26, 0.5, 1.0)] == [1, 2, 2, 4]
    halves = made([4.0, 2.0, 1.0, 1.0])  # entropy 1.75 bits
    assert math.isclose(halves.effective_rank, 2**1.75, rel_tol=1e-12)
    assert math.isclose(halves.participation_ratio, 64 / 22, rel_tol=1e-12)


def test_bounds_where_some_are_unknown() -> None:
    """Catches bounds that are on the wrong side: the rest of the trace may be in as few or as many
    eigenvalues as there can be."""
    known, rest = [4.0, 2.0, 1.0], 2.0
    found = made(known, trace=9.0, most=7)
    few = torch.tensor([*known, 1.0, 1.0], dtype=torch.float64)
    many = torch.tensor([*known, *[rest / 4] * 4], dtype=torch.float64)
    expected = [effective_rank(few), effective_rank(many)]
    assert found.effective_rank_bounds == pytest.approx(expected, rel=1e-12)
    assert found.participation_bounds == pytest.approx(
        [participation(few), participation(many)], rel=1e-12
    )
    assert math.isnan(found.effective_rank)
    assert math.isnan(found.participation_ratio)
    assert found.count(0.7) == 3
    assert found.count(0.9) is None
    assert "more than 3" in repr(found)
    assert "between" in repr(found)


@pytest.mark.parametrize("structure", ["gram", "lowrank", "diag", "full"])
def test_of_a_matrix(structure: str) -> None:
    """Catches a structure whose eigenvalues are taken in the wrong order, or as all there are."""
    model, x, exact = problem()
    settings = {"rank": 4} if structure == "lowrank" else {}
    matrix = fp.fisher(model, fp.Categorical(), x, structure, **settings)  # type: ignore[arg-type]
    found = fp.spectrum(matrix)
    if structure == "diag":
        exact = matrix.diag().sort(descending=True).values
    assert found.complete == (structure != "lowrank")
    torch.testing.assert_close(
        found.eigenvalues[:4], exact[:4], rtol=ROUNDING, atol=ROUNDING * float(exact[0])
    )
    assert math.isclose(found.trace, float(exact.sum()), rel_tol=ROUNDING)
    low, high = found.effective_rank_bounds
    assert low * (1 - 1e-9) <= effective_rank(exact.clamp_min(0)) <= high * (1 + 1e-9)
    stiffest = torch.cat([part.flatten() for part in found.direction(0).values()])
    truth = matrix.to_dense()
    assert float(stiffest @ truth @ stiffest) == pytest.approx(float(exact[0]), rel=ROUNDING)


def test_directions() -> None:
    """Catches stiff and sloppy being mixed up, or named by the wrong parameters."""
    model, x, exact = problem()
    truth = brute_force(model, "categorical", x)
    found = fp.spectrum(model, fp.Categorical(), x)
    stiff, sloppy = found.stiff(3), found.sloppy(2)
    for number in range(3):
        along = float(stiff[:, number] @ truth @ stiff[:, number])
        assert along == pytest.approx(float(exact[number]), rel=ROUNDING)
    for number in range(2):
        along = float(sloppy[:, number] @ truth @ sloppy[:, number])
        assert along == pytest.approx(float(found.eigenvalues[-1 - number]), rel=1e-6)
    named = found.direction(1)
    assert {name: part.shape for name, part in named.items()} == {
        name: parameter.shape for name, parameter in model.named_parameters()
    }
    torch.testing.assert_close(
        torch.cat([part.flatten() for part in named.values()]), stiff[:, 1], rtol=1e-9, atol=1e-12
    )
    last = torch.cat([part.flatten() for part in found.direction(-1).values()])
    torch.testing.assert_close(last, sloppy[:, 0], rtol=1e-9, atol=1e-12)


def test_lanczos_on_data_that_are_read_again() -> None:
    """Catches a product that lacks a batch, residuals that are no bounds, a wrong trace."""
    model, x, exact = problem("conv2d", 40)
    found = fp.spectrum(model, fp.Categorical(), x, count=5, batch_size=16)
    truth = brute_force(model, "categorical", x)
    assert not found.complete
    assert math.isclose(found.trace, float(exact.sum()), rel_tol=ROUNDING)
    assert len(found.eigenvalues) == 5
    error = (found.eigenvalues - exact[:5]).abs()
    assert bool((error <= found.residuals + 1e-13 * exact[0]).all())
    assert float(found.residuals.max()) <= 1e-6 * float(exact[0])
    stiff = found.stiff(5)
    left = (truth @ stiff - stiff * found.eigenvalues).norm(dim=0)
    assert bool((left <= found.residuals * (1 + 1e-6) + 1e-12 * exact[0]).all())
    for bounds, value in (
        (found.effective_rank_bounds, effective_rank(exact[exact > 0])),
        (found.participation_bounds, participation(exact)),
    ):
        assert bounds[0] * (1 - 1e-6) <= value <= bounds[1] * (1 + 1e-6)


def test_lanczos_finds_all_there_are() -> None:
    """Catches a division by the norm of nothing: the space is used up after the rank."""
    model, x, exact = problem("linear", 3)
    found = fp.spectrum(model, fp.Categorical(), x, count=50)
    assert found.complete
    assert found.rank == 6
    torch.testing.assert_close(found.eigenvalues, exact[:6], rtol=1e-8, atol=0)


def test_lanczos_of_a_known_matrix() -> None:
    """Catches lost orthogonality: copies of the largest eigenvalue would come, in 60 steps."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(80, 80, dtype=torch.float64, generator=generator)).Q
    values = torch.logspace(0, -12, 80, dtype=torch.float64)
    matrix = (turn * values) @ turn.T

    def draw() -> Tensor:
        return torch.randn(80, dtype=torch.float64, generator=generator)

    found = lanczos(lambda v: matrix @ v, draw, 10, tolerance=1e-14, most_products=60)
    torch.testing.assert_close(found.values, values[:10], rtol=1e-9, atol=0)
    eye = torch.eye(10, dtype=torch.float64)
    assert float((found.directions.T @ found.directions - eye).abs().max()) < 1e-12


@pytest.mark.parametrize("count", [1, 2, 4, 7, 30])
def test_eigenvalues_that_come_several_times(count: int) -> None:
    """Catches one of each: outputs that share no layer give every eigenvalue once for each."""
    torch.manual_seed(0)
    model, x = nn.Linear(4, 3).double(), torch.randn(50, 4, dtype=torch.float64)
    exact = fp.spectrum(model, fp.Gaussian(), x).eigenvalues
    assert math.isclose(exact[0], exact[2], rel_tol=1e-12)
    found = fp.spectrum(model, fp.Gaussian(), x, count=count)
    torch.testing.assert_close(found.eigenvalues, exact[:count], rtol=1e-6, atol=0)
    directions = found.stiff(found.rank)
    eye = torch.eye(found.rank, dtype=torch.float64)
    torch.testing.assert_close(directions.T @ directions, eye, rtol=0, atol=1e-9)
    low, high = found.participation_bounds
    assert low * (1 - 1e-6) <= participation(exact) <= high * (1 + 1e-6)
    assert found.complete == (count > len(exact))


@pytest.mark.parametrize("seed", range(10))
def test_lanczos_misses_no_copy(seed: int) -> None:
    """Copies far from the end of the space, among many other eigenvalues: catches a search that is
    content with the first of each."""
    generator = torch.Generator().manual_seed(seed)
    values = torch.cat([0.9 ** torch.arange(40, dtype=torch.float64)] * 3).sort(descending=True)[0]
    turn = torch.linalg.qr(torch.randn(120, 120, dtype=torch.float64, generator=generator)).Q
    matrix = (turn * values) @ turn.T

    def draw() -> Tensor:
        return torch.randn(120, dtype=torch.float64, generator=generator)

    found = lanczos(lambda v: matrix @ v, draw, 8, tolerance=1e-9, most_products=60)
    torch.testing.assert_close(found.values, values[:8], rtol=1e-7, atol=0)
    left = matrix @ found.directions - found.directions * found.values
    assert bool((left.norm(dim=0) <= found.residuals + 1e-8).all())


def test_monte_carlo_draws_the_same_labels_again() -> None:
    """Catches products with matrices that differ from pass to pass."""
    model, x, _ = problem("linear", 20)
    dense = fp.fisher(model, fp.Categorical(), x, "gram", "mc", 2, seed=3).to_dense()
    found = fp.spectrum(model, fp.Categorical(), x, "mc", 2, count=3, seed=3)
    exact = torch.linalg.eigvalsh(dense).flip(0)
    torch.testing.assert_close(found.eigenvalues, exact[:3], rtol=1e-6, atol=0)


def test_table_and_figure() -> None:
    """Catches a table without its numbers, and a figure without its lines."""
    model, x, _ = problem()
    found = fp.spectrum(model, fp.Categorical(), x)
    table = repr(found)
    assert table.startswith(f"Fisher spectrum: {found.parameters} parameters, 6 samples\n")
    assert f"{found.rank} (" in table
    assert "directions with 90 % of the trace" in table
    ax = found.plot()
    assert ax.get_xscale() == ax.get_yscale() == "log"
    assert len(ax.get_lines()) == 3
    assert ax.get_lines()[0].get_ydata()[0] == float(found.eigenvalues[0])


def test_arguments() -> None:
    """Catches questions that have no answer."""
    model, x, _ = problem("linear")
    likelihood = fp.Categorical()
    with pytest.raises(TypeError, match=r"^likelihood and data must be given with a network"):
        fp.spectrum(model)
    with pytest.raises(ValueError, match=r"^count must be at least 1, got 0$"):
        fp.spectrum(model, likelihood, x, count=0)
    with pytest.raises(TypeError, match=r"^count must be a whole number, got 2.5$"):
        fp.spectrum(model, likelihood, x, count=2.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^data must be readable more than once, got generator"):
        fp.spectrum(model, likelihood, (part for part in x.split(2)), count=2)
    with pytest.raises(MemoryError, match=r"vectors of \d+ parameters must fit into memory_budget"):
        fp.spectrum(model, likelihood, x, count=2, memory_budget=100)
    with pytest.raises(MemoryError, match=r"must fit into memory_budget = 100 bytes"):
        fp.spectrum(model, likelihood, x, memory_budget=100)
    found = fp.spectrum(model, likelihood, x)
    with pytest.raises(ValueError, match=r"^share must lie in \(0, 1\], got 0$"):
        found.count(0)
    with pytest.raises(ValueError, match=r"^count must lie in \[1, \d+\], got 0$"):
        found.stiff(0)
    with pytest.raises(IndexError, match=r"^number must lie in"):
        found.direction(10**6)
    silent = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with torch.no_grad():
        silent[0].bias.fill_(-100)
    with pytest.raises(ValueError, match=r"^F must not be zero, got a largest eigenvalue of 0"):
        fp.spectrum(silent, fp.Gaussian(), torch.zeros(3, 2))


def test_a_matrix_comes_alone():
    """Catches data that are given and not looked at."""
    model, x = nn.Linear(3, 2), torch.randn(5, 3)
    matrix = fp.fisher(model, fp.Gaussian(), x, "gram")
    for wrong in ({"likelihood": fp.Gaussian()}, {"data": x}, {"count": 1}):
        with pytest.raises(TypeError, match="must be left out with a Fisher matrix"):
            fp.spectrum(matrix, **wrong)
