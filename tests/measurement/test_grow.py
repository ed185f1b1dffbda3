"""Dictionaries that grow: the same bits as one pass, fewer passes where the curve is flat."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fisherfast as ff
from fisherfast.estimation.features import BLOCK_ROWS

# Many dimensions far apart know much about the step; nothing here depends on it.
pytestmark = pytest.mark.filterwarnings("ignore:dtheta sqrt:fisherfast.FisherWarning")

SAMPLES, DIM = 4000, 6
WIDE = 30  # a scale of so many dimensions needs more than the first 64 lifted features
GROWN = WIDE + 2 * BLOCK_ROWS


def shifted(generator: torch.Generator) -> ff.FiniteDifference:
    """A Gaussian shift: the raw activations know everything."""
    x = torch.randn(2, SAMPLES, DIM, generator=generator)
    return ff.FiniteDifference(x[0] - 0.05, x[1] + 0.05, dtheta=0.1)


def scaled(kind: str, generator: torch.Generator) -> ff.data.Data:
    """A Gaussian scale: the raw activations know nothing, and every lifted feature adds."""
    x = torch.randn(2, SAMPLES, WIDE, generator=generator)
    if kind == "score":
        return ff.Score(x.flatten(0, 1), x.flatten(0, 1).square().sum(1) - WIDE)
    if kind == "simulator":
        return ff.Simulator(
            lambda theta, n, g: theta * torch.randn(n, WIDE, generator=g), 1.0, samples=2 * SAMPLES
        )
    paired = kind == "paired"
    return ff.FiniteDifference(0.95 * x[0], 1.05 * x[int(not paired)], dtheta=0.1, paired=paired)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("kind", ["independent", "paired", "score", "simulator"])
def test_growing_to_the_end_equals_one_pass_to_the_bit(generator, kind):
    """Catches moments of known features that are added twice, features of another draw, folds that
    go on where the last pass ended, products of pairs that are added twice, and a later pass whose
    score or tangents are those of other samples. The curve still rises at the first size (a power
    check: it is left), so that all features are reached."""
    data = scaled(kind, generator)
    grown = ff.fisher_information(data, max_features=GROWN, settings=ff.Settings(grow=True))
    fixed = ff.fisher_information(data, max_features=GROWN)
    assert int(grown.curve_k[-1]) == GROWN
    for name in ("J", "stderr", "lower", "naive", "linear", "curve_k", "curve_J"):
        assert torch.equal(getattr(grown, name), getattr(fixed, name)), name
    assert grown.samples == fixed.samples == 2 * SAMPLES


def test_growth_stops_at_the_plateau(generator):
    """Catches a width that is not chosen from the curve: the shift needs no second pass."""
    seen, settings = [], {"max_features": 512}
    model = nn.Identity()
    model.register_forward_hook(lambda _, args, out: seen.append(len(out)))
    data = shifted(generator)
    flow = ff.fisher_flow(model, data, settings=ff.Settings(grow=True), **settings)
    assert flow["output"].plateau
    assert int(flow["output"].curve_k[-1]) == DIM + BLOCK_ROWS
    grown = sum(seen)
    ff.fisher_flow(model, data, **settings)
    assert sum(seen) == 2 * grown > 0


def test_samples_carry_only_so_many_features(generator):
    """Catches growth beyond half the degrees of freedom, where the features would be cut again."""
    x = torch.randn(2, 120, DIM, generator=generator)
    info = ff.fisher_information(
        ff.FiniteDifference(0.9 * x[0], 1.1 * x[1], dtheta=0.2),
        max_features=512,
        settings=ff.Settings(grow=True),
    )
    assert int(info.curve_k[-1]) <= 208 // 2


def test_data_that_do_not_repeat_are_refused():
    """Catches features learned on other samples than they are measured on."""
    x = torch.randn(64, DIM)
    shuffled = DataLoader(TensorDataset(x), batch_size=16, shuffle=True)
    data = ff.FiniteDifference(shuffled, shuffled, dtheta=0.1)
    with pytest.raises(ValueError, match="data must come in the same order at every pass for grow"):
        ff.fisher_information(data, settings=ff.Settings(grow=True))
    ordered = DataLoader(TensorDataset(torch.randn(3000, DIM)), batch_size=256)
    ff.fisher_information(
        ff.FiniteDifference(ordered, ordered, dtheta=5.0), settings=ff.Settings(grow=True)
    )
