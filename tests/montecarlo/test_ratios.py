"""The errors that `fractions` states are the spread that repeated measurements show, and intervals
hold the truth where the covariance is ill conditioned."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import nn

import fisherfast as ff

SOURCES = ["paired", "tangents", "scores", "independent"]
REPEATS = 100
SAMPLES = 4000
WIDTHS = (16, 12, 8, 4, 2, 1)
DTHETA = 0.1
INFORMATION = 9.0
TOLERANCE = 0.15
SPREAD = 1 / math.sqrt(2 * (REPEATS - 1))  # relative standard error of a standard deviation
RAW_ONLY = 1
BOUND = TOLERANCE + 3 * SPREAD


def samples(source: str, root: torch.Tensor, whitened: torch.Tensor, n: int, seed: int):
    """n samples of each condition of a Gaussian shift: x = root (white + theta whitened), with
    |whitened|^2 in information."""
    generator = torch.Generator().manual_seed(seed)
    white = torch.randn(n, len(root), dtype=torch.float64, generator=generator)
    x, signal = white @ root.T, root @ whitened
    if source == "tangents":
        return ff.Pathwise(x.float(), signal.float().expand(n, -1))
    if source == "scores":
        return ff.Score(x.float(), white @ whitened)
    other = x
    if source == "independent":
        other = torch.randn(n, len(root), dtype=torch.float64, generator=generator) @ root.T
    step = signal * DTHETA / 2
    minus, plus = (x - step).float(), (other + step).float()
    return ff.FiniteDifference(minus, plus, DTHETA, paired=source == "paired")


def chain(activation: type[nn.Module] | None) -> nn.Module:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for a, b in itertools.pairwise(WIDTHS):
        layers.append(nn.Linear(a, b))
        if activation is not None and b > 1:
            layers.append(activation())
    return nn.Sequential(*layers)


def in_square(flow: ff.FisherFlow, name: str) -> float:
    """The wrong formula: the errors of J and J_input as if they were independent."""
    a, b = flow[name], flow["input"]
    relative = math.hypot(float(a.stderr) / a.value, float(b.stderr) / b.value)
    return abs(a.value / b.value) * relative


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("activation", "max_features"),
    [(None, 32), (nn.ReLU, RAW_ONLY), (nn.ReLU, 32)],
    ids=["linear", "relu", "relu lifted"],
)
def test_stated_errors_of_fractions_are_those_seen(source, activation, max_features):
    """Root mean square of the stated errors over the standard deviation of 100 repeats, each layer
    that loses information: 0.85 to 1.15 beyond 3 standard errors of a standard deviation (7 %;
    false alarm 0.3 % a layer; the layers of a chain rise and fall together). Errors added in square
    were 1.2 to 1.8 times too large and must fail in the linear chain. Behind a ReLU the features
    are the activations alone, so that all repeats measure the same ones, or chosen anew each time:
    an error that leaves out the choice was 0.34 to 0.80 of the spread. With the choice it may be
    too wide, 3.0 times at worst seen, in the last layers of tangents."""
    model = chain(activation)
    whitened = torch.linspace(-1, 1, WIDTHS[0], dtype=torch.float64)
    whitened *= math.sqrt(INFORMATION) / whitened.norm()
    root = torch.eye(WIDTHS[0], dtype=torch.float64)
    fractions, errors, wrong = [], [], []
    for seed in range(REPEATS):
        data = samples(source, root, whitened, SAMPLES, 1000 + seed)
        flow = ff.fisher_flow(model, data, max_features=max_features)
        names = [name for name in flow.names if name != "input"]
        fractions.append([flow.fractions()[name] for name in names])
        errors.append([flow.fraction_errors()[name] for name in names])
        wrong.append([in_square(flow, name) for name in names])
    seen = torch.tensor(fractions, dtype=torch.float64).std(0)
    lossy = seen > 1e-3  # without the invertible layers, whose ratio is 1.0 +- 0.0
    assert lossy.sum() >= 3
    stated = torch.tensor(errors, dtype=torch.float64).square().mean(0).sqrt()
    ratio = (stated / seen)[lossy]
    print(source, activation, "stated / seen", ratio.tolist())
    assert (ratio > 1 - BOUND).all(), ratio
    chosen_anew = activation is not None and max_features > RAW_ONLY
    assert chosen_anew or (ratio < 1 + BOUND).all(), ratio
    square = torch.tensor(wrong, dtype=torch.float64).square().mean(0).sqrt()
    print("in square / seen", (square / seen)[lossy].tolist())
    if activation is None:
        assert ((square / seen)[lossy] > 1 + BOUND).any()


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_coverage_at_condition_2000(source):
    """J +- t(15) stderr holds the truth in 92 to 98 % of 300 repeats (95 % +- 1.3 %; false alarm
    2 % for the nominal coverage). The fixed ridge of 1e-4 gave 68 % for paired conditions."""
    dim, repeats, folds_t = 10, 300, 2.131
    generator = torch.Generator().manual_seed(7)
    axes = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
    root = axes * (2000.0 ** -torch.linspace(0, 1, dim, dtype=torch.float64)).sqrt()
    whitened = torch.zeros(dim, dtype=torch.float64)
    whitened[dim // 2 :] = math.sqrt(INFORMATION / (dim - dim // 2))
    hits = 0
    for seed in range(repeats):
        info = ff.fisher_information(samples(source, root, whitened, 2000, 5000 + seed), seed=seed)
        hits += abs(info.value - INFORMATION) < folds_t * float(info.stderr)
    print(source, hits / repeats)
    assert 0.92 <= hits / repeats <= 0.98
