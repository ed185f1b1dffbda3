"""`ff.Settings`: what is checked when it is made, and with which data it goes."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
import pytest
import torch

import fisherfast as ff

X = torch.randn(200, 4, generator=torch.Generator().manual_seed(0))

REFUSED = {
    "batch_size": (0, ValueError, "batch_size must be at least 1, got 0"),
    "batch_size, fraction": (16.5, TypeError, "batch_size must be a whole number, got 16.5"),
    "folds": (3, ValueError, "folds must be even and at least 4, got 3"),
    "folds, few": (2, ValueError, "folds must be even and at least 4, got 2"),
    "folds, fraction": (16.5, TypeError, "folds must be a whole number, got 16.5"),
    "grow": ("yes", TypeError, "grow must be True or False, got 'yes'"),
    "maps": ("conv", TypeError, "maps must be True or False or a list of layers, got 'conv'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_wrong_settings_are_refused_when_they_are_made(case):
    """Catches a setting that fails only inside a measurement, or not at all."""
    value, error, message = REFUSED[case]
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ff.Settings(**{case.partition(",")[0]: value})


def test_settings_are_plain_and_frozen():
    """Catches a list that the user can still change, and numbers that JSON cannot hold."""
    settings = ff.Settings(batch_size=np.int64(7), maps=["conv"])
    assert (type(settings.batch_size), settings.maps) == (int, ("conv",))
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.folds = 8


def test_settings_that_the_call_refuses():
    """Catches maps of a call that returns none. Folds: `test_fewest_folds` of the flow."""
    with pytest.raises(ValueError, match=r"^maps must be False for fisher_information, got True: "):
        ff.fisher_information(ff.Score(X, X[:, 0]), settings=ff.Settings(maps=True))
