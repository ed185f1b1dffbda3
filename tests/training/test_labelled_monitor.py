"""A monitor that has the labelled training samples alone: its level, its rules and its records."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fisherfast as ff

DIM, RANGE = 64, 1.0


def labelled(samples: int, seed: int, *, bins: int = 8) -> ff.Labelled:
    """N(theta 1, I): J = 64 at every theta."""
    g = torch.Generator().manual_seed(seed)
    theta = RANGE * (2 * torch.rand(samples, generator=g) - 1)
    return ff.Labelled(theta[:, None] + torch.randn(samples, DIM, generator=g), theta, bins=bins)


def level_of(samples: int, seed: int) -> float:
    """1 / J of a monitor in units of the truth."""
    monitor = ff.FisherMonitor(nn.Linear(DIM, 1), labelled(samples, seed), layers="output")
    record = monitor.step(train_mse=1.0)
    assert record is not None
    return DIM / float(record.input_J)


def test_the_level_is_right_on_few_samples_per_bin():
    """8 bins of 500 samples: the mean of 8 data sets within 4 of its errors of the truth (false
    alarm 0.5 %), and within 4 %. Catches the mean of 1 / J of the bins as it comes, which is 6 %
    too large: their errors are a fifth of J."""
    levels = torch.tensor([level_of(4000, seed) for seed in range(8)])
    assert abs(float(levels.mean()) - 1) < 4 * float(levels.std()) / math.sqrt(8)
    assert abs(float(levels.mean()) - 1) < 0.04


def test_which_rule_may_stop_on_which_samples():
    """Catches a transmission of memorised outputs, and a record that does not say what it used."""
    model, data = nn.Linear(DIM, 1), labelled(4000, 0)
    for held_out, known in ((None, "unknown"), (False, "samples that are trained on")):
        monitor = ff.FisherMonitor(model, data, held_out=held_out, layers="output")
        record = monitor.step(train_mse=1e-4)
        assert record.held_out is held_out
        assert record.source == "labelled"
        with pytest.raises(
            ValueError, match=rf"held-out samples for rule 'transmission', got {known}"
        ):
            ff.FisherEarlyStopping("transmission").step(monitor)
        stopping = ff.FisherEarlyStopping("crlb")
        assert stopping.step(monitor)
        assert "attainable error" in stopping.reason
    monitor = ff.FisherMonitor(model, data, held_out=True, layers="output")
    monitor.step(train_mse=1e-4)
    assert not ff.FisherEarlyStopping("transmission").step(monitor)
    with pytest.raises(TypeError, match=r"^held_out must be True, False or None, got 'no'$"):
        ff.FisherMonitor(model, data, held_out="no")
