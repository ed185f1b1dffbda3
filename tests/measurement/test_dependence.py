"""Samples that depend on their neighbours are found, independent ones are not accused."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from support.scripts import ROOT

import fisherfast as ff
from benchmarks.accuracy import assumptions

N = 2000


def normal(n: int = N, d: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


def series(seed: int = 0) -> torch.Tensor:
    """Autoregressive, 0.9."""
    values = [normal(seed=seed)[0]]
    for step in normal(seed=seed)[1:]:
        values.append(0.9 * values[-1] + math.sqrt(1 - 0.81) * step)
    return torch.stack(values)


DEPENDENT = {
    "sorted": lambda: normal(d=1).sort(0).values,
    "antithetic pairs": lambda: torch.stack([normal(N // 2), -normal(N // 2)], 1).flatten(0, 1),
    "every sample twice": lambda: normal(N // 2).repeat_interleave(2, 0),
    "time series": series,
}
SOURCES = {
    "tangents": lambda x: ff.Pathwise(x, torch.ones_like(x)),
    "scores": lambda x: ff.Score(x, x.sum(1).double()),
    "conditions": lambda x: ff.FiniteDifference(
        x - 0.05, (x if len(x.unique()) < N // 2 else x.flip(0)) + 0.05, 0.1
    ),
}


@pytest.mark.parametrize(
    ("source", "case"),
    [
        ("tangents", "sorted"),
        ("tangents", "antithetic pairs"),
        ("scores", "every sample twice"),
        ("scores", "antithetic pairs"),
        ("conditions", "time series"),
    ],
)
def test_dependent_samples_are_found(case, source):
    """A warning with the remedy, and no layer that is called resolved."""
    torch.manual_seed(0)
    data = SOURCES[source](DEPENDENT[case]())
    with pytest.warns(ff.FisherWarning, match="depend on each other.*shuffle"):
        flow = ff.fisher_flow(torch.nn.Linear(next(data.read(0, 2)).x.shape[1], 2), data)
    for layer in flow:
        assert not layer.independent
        assert layer.status != "resolved"
        assert any("depend on each other" in note for note in layer.notes)


def test_wide_layers_are_looked_at():
    """More activations than samples: the layer is compressed, and each half tells."""
    trend = torch.linspace(-1, 1, 600)[:, None]
    x = torch.randn(600, 800, generator=torch.Generator().manual_seed(0)) + trend
    with pytest.warns(ff.FisherWarning, match="depend on each other"):
        info = ff.fisher_information(ff.Pathwise(x, torch.ones(600, 800)))
    assert info.compressed
    assert not info.independent
    shuffled = x[torch.randperm(600, generator=torch.Generator().manual_seed(1))]
    assert ff.fisher_information(ff.Pathwise(shuffled, torch.ones(600, 800))).independent


@pytest.mark.parametrize("source", SOURCES)
def test_shuffled_they_are_not(source):
    """The same samples in a random order, but for those that are there twice."""
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    with warnings.catch_warnings():
        warnings.simplefilter("error", ff.FisherWarning)
        for case in ("sorted", "antithetic pairs", "time series"):
            ff.fisher_information(SOURCES[source](DEPENDENT[case]()[order]))


@pytest.mark.parametrize("tails", [1.0, 3.0])
def test_independent_samples_are_not_accused(tails):
    """20 data sets of Student's t with 1 (no mean) and 3 degrees of freedom: none at 5 standard
    errors, where 6e-7 are expected of normal correlations. One accused in 20 is found with a
    probability of 0.98 by the 80 measurements of both."""
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        chi = 2 * torch._standard_gamma(torch.full((300, 2), tails / 2), generator=generator)
        x = torch.randn(300, 2, generator=generator) * (tails / chi).sqrt()
        score = torch.randn(300, generator=generator).double()
        moved, few = ff.Pathwise(x, torch.ones(300, 2)), {"max_features": 16}
        assert ff.fisher_information(moved, seed=seed, **few).independent
        assert ff.fisher_flow(torch.nn.Linear(2, 1), ff.Score(x, score), **few)[
            "output"
        ].independent


def test_the_table_of_assumptions_is_that_of_the_benchmark():
    """Every case has its row in the page, and a row is measured. Catches a dropped case."""
    page = (ROOT / "docs" / "assumptions.md").read_text()
    table = [line for line in page.splitlines() if line.startswith("| ")]
    names = [row.split(" | ")[0].removeprefix("| ") for row in table]
    assert names == ["case", *(case.name for case in assumptions.CASES)]
    row = assumptions.measured(assumptions.CASES[0], 2)
    assert row.startswith("| Gaussian | 1 |")
    assert row.count("|") == table[0].count("|")
