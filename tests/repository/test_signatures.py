"""Options of the public callables are keyword-only; what they work on is positional."""

from __future__ import annotations

import dataclasses
import inspect

import pytest

import fisherfast as ff

DATA = {
    "Pathwise": {"dx"},  # left out for sources that yield pairs
    "Score": {"score"},
    "Labelled": {"theta"},
    "linear_fisher": {"z_plus", "dtheta"},  # left out for tangents and scores
    "InformationLoss": {"dtheta"},
    "FisherEarlyStopping": {"rule"},
    "score": {"y"},  # of the parameters: left out for a loader
    "Gaussian": {"variance"},
    "Likelihood": {"log_prob", "sample", "information"},
}
"""Positional parameters that have a default: the data and the law that they follow."""


CALLABLES = {
    name: entry
    for module in (ff, ff.parameters)
    for name in module.__all__
    if callable(entry := getattr(module, name))
    and not (inspect.isclass(entry) and issubclass(entry, Warning))
    # the library makes the other dataclasses, not the user
    and (entry in (ff.Settings, ff.CramerRao) or not dataclasses.is_dataclass(entry))
}


@pytest.mark.parametrize("name", CALLABLES)
def test_options_are_keyword_only(name):
    """Catches an option that may be given by its place."""
    options = {
        parameter.name
        for parameter in inspect.signature(CALLABLES[name]).parameters.values()
        if parameter.kind is parameter.POSITIONAL_OR_KEYWORD
        and parameter.default is not parameter.empty
    }
    assert options <= DATA.get(name, set())
