"""Paired conditions that have more in common than their noise: files sorted by a value."""

from __future__ import annotations

import pytest
import torch

import fisherfast as ff

N, DIM, P = 150, 12, 3
STEP = 0.02


def sorted_pairs(turn: torch.Tensor) -> ff.FiniteDifference:
    """Pairs for three parameters, each with noise of its own, all sorted along one direction that
    varies a hundred times more than the others; features times turn [d, d].

    The noise of a pair is the same, that of two pairs is not: nu is half the number of samples.
    """
    generator = torch.Generator().manual_seed(3)
    minus, plus = [], []
    for p in range(P):
        noise = torch.randn(N, DIM, generator=generator, dtype=torch.float64)
        noise[:, 0] *= 100
        noise = noise[noise[:, 0].argsort()]
        mixed = noise @ torch.linalg.qr(mixing())[0]
        shift = torch.zeros(DIM, dtype=torch.float64)
        shift[p] = STEP / 2
        minus.append((mixed - shift) @ turn)
        plus.append((mixed + shift) @ turn)
    return ff.FiniteDifference(minus, plus, [STEP] * P, paired=True)


def mixing() -> torch.Tensor:
    """A fixed matrix [d, d]: all activations share the large direction."""
    return torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(8), dtype=torch.float64)


def test_degrees_of_freedom_do_not_depend_on_the_basis():
    """Catches correlations of the features themselves, which make J of these activations 20 % less
    than that of an invertible affine layer after them."""
    basis = torch.linalg.qr(mixing())[0].T  # back to independent components
    basis[:, 0] /= 100
    raw = ff.fisher_information(sorted_pairs(torch.eye(DIM, dtype=torch.float64)), max_features=1)
    turned = ff.fisher_information(sorted_pairs(basis), max_features=1)
    torch.testing.assert_close(raw.linear, turned.linear, rtol=0.01, atol=1e-6)


@pytest.mark.parametrize("same", [True, False])
def test_pairs_that_share_their_noise_count_once(same):
    """Catches nu of independent samples: with the same noise for all parameters nu is that of one
    condition, and J after the correction is I; it would be 40 % too small or too large."""
    generator = torch.Generator().manual_seed(5)
    k, n, values = 60, 200, []
    for _ in range(20):
        noises = [torch.randn(n, k, generator=generator, dtype=torch.float64) for _ in range(P)]
        if same:
            noises = [noises[0]] * P
        shifts = torch.eye(k, dtype=torch.float64)[:P] / 4
        data = ff.FiniteDifference(
            [x - s for x, s in zip(noises, shifts, strict=True)],
            [x + s for x, s in zip(noises, shifts, strict=True)],
            [0.5] * P,
            paired=True,
        )
        values.append(ff.fisher_information(data, max_features=1).linear.diagonal())
    J = torch.stack(values)
    error = J.std() / J.numel() ** 0.5 * (P if same else 1)
    assert abs(float(J.mean()) - 1) < 4 * float(error)
