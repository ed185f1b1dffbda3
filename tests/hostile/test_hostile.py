"""Generated problems with a closed form: no measurement of them is wrong.

What must hold is in judge.py; `make hostile` examines thousands more. A statistical property that
fails at 4 sigma (6e-4 of the checks, Student with 15 degrees of freedom) must fail again on other
noise with four times the samples: about 3e-7 of the checks do where the library is right.
"""

from __future__ import annotations

import pytest
from hostile.generator import SAMPLES, Layer, Problem, from_seed
from hostile.judge import verdict

# Three parameters and two activations, J slightly negative in one direction: the variance of the
# errors there was negative too.
MORE_PARAMETERS_THAN_ACTIVATIONS = Problem(
    seed=1,
    source="paired",
    dtype="float32",
    dim=2,
    parameters=3,
    samples=100,
    condition=1.0,
    units=0.0,
    step=0.125,
    layers=(Layer("random", 100000.0, 0.0, True), Layer("random", 1.0, 0.0, True)),
)
SMALL = [from_seed(seed, samples=(SAMPLES[0], 1000.0)) for seed in range(20)]
LARGE = [pytest.param(from_seed(seed), marks=pytest.mark.slow) for seed in range(20)]


@pytest.mark.parametrize("problem", [MORE_PARAMETERS_THAN_ACTIVATIONS, *SMALL, *LARGE])
def test_problems(problem: Problem):
    """Catches a ridge that eats information, a J above I, a status that is wrong."""
    assert verdict(problem).violations == []
