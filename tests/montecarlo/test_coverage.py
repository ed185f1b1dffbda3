"""J +- 1.96 stderr holds the truth as often as it says, for independent and for paired
conditions."""

from __future__ import annotations

import warnings

import pytest
import torch

import fisherfast as ff
from fisherfast.problems import GaussianShift

REPLICATIONS = 400
TRUTH = 20.0


@pytest.mark.slow
@pytest.mark.parametrize("paired", [False, True], ids=["independent", "paired"])
def test_coverage_of_the_gaussian_shift(paired):
    """Catches stderr off by a fifth either way: 1.96 / 1.25 covers 88 %, 1.96 * 1.25 covers 98.6 %.

    400 replications know the coverage to 1.1 %, so 92 to 98 % is 2.7 standard errors around 95 %.
    The whole public path runs: pilot, lift, choice of k.
    """
    problem = GaussianShift(torch.ones(20))
    hits, errors = [], []
    for seed in range(REPLICATIONS):
        data = problem.finite_difference(0.0, 0.1, 2000, seed=seed, paired=paired)
        info = ff.fisher_information(data, max_features=100, seed=seed)
        errors.append(info.value - TRUTH)
        hits.append(abs(errors[-1]) < 1.96 * float(info.stderr))
    coverage = sum(hits) / REPLICATIONS
    assert 0.92 <= coverage <= 0.98


@pytest.mark.slow
def test_pairing_pays():
    """Pairing removes the derivative noise; independent conditions of the same samples are 4 times
    worse."""
    problem = GaussianShift(torch.ones(20))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        stderr = {
            paired: float(
                ff.fisher_information(
                    problem.finite_difference(0.0, 0.1, 2000, paired=paired), max_features=100
                ).stderr
            )
            for paired in (False, True)
        }
    assert stderr[False] > 4 * stderr[True]
