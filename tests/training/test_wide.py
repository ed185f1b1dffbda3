"""Wide layers in a monitor: their Krylov spaces are carried from one measurement to the next."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.estimation.krylov import KRYLOV_VECTORS, WARM_PASSES, KrylovSpace
from fisherfast.estimation.pilot import PilotMoments
from fisherfast.problems import CorrelatedImage

SAMPLES = 300
SIGMAS = 4.0
"""False alarm below 6e-5 per comparison: J of warm and cold starts share their samples."""


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 2, 5, padding=2), nn.Tanh(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(32, 2)
    )


@pytest.fixture(scope="module")
def data() -> ff.Pathwise:
    g = torch.Generator().manual_seed(0)
    problem = CorrelatedImage((32, 32))
    x, dx = problem.sample_with_tangent((0.0, 1.0), SAMPLES, g)
    return ff.Pathwise(x[:, None], dx[:, :, None].contiguous())


def change(model: nn.Module, size: float) -> None:
    g = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(size * p.std() * torch.randn(p.shape, generator=g))


def passes_of(model: nn.Module, monitor: ff.FisherMonitor) -> float:
    """Passes over the samples that one step takes."""
    seen = []
    handle = model[0].register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    monitor.step()
    handle.remove()
    return sum(seen) / SAMPLES


def test_later_measurements_take_fewer_passes_and_say_the_same(data):
    """Catches a space that is learned anew each time, one that is not renewed for the new weights,
    and one that forgets the old vectors."""
    model = network()
    monitor = ff.FisherMonitor(model, data, layers=["0"])
    assert passes_of(model, monitor) > KRYLOV_VECTORS
    for _ in range(2):
        change(model, 0.05)
        assert passes_of(model, monitor) < WARM_PASSES + 4  # pilot, survey, and the measurement
        cold = ff.fisher_flow(model, data, layers=["0"], max_features=128)
        warm = monitor.history[-1].flow
        off = (warm["0"].J - cold["0"].J).diagonal().abs()
        assert bool((off < SIGMAS * cold["0"].stderr.diagonal()).all())
        low = warm["0"].lower.diagonal() - cold["0"].lower.diagonal()
        assert bool((low > -SIGMAS * cold["0"].lower_stderr.diagonal()).all())
        assert warm["0"].feature_kind == "krylov"


def test_a_renewed_space_holds_the_derivative_and_the_old_vectors():
    """Catches a warm start that loses what was learned, in units of other samples at that, or that
    lacks the derivative of the network as it is now."""
    g = torch.Generator().manual_seed(0)
    d, P, q = 60, 2, 6
    x = torch.randn(500, d, generator=g, dtype=torch.float64) * torch.linspace(1, 3, d)
    tangents = torch.randn(P, 1, d, generator=g, dtype=torch.float64).expand(P, 500, d)
    old = torch.randn(P * q, d, generator=g, dtype=torch.float64)  # weights of activations
    pilot = PilotMoments()
    pilot.update(x)
    options = {"conditions": 1, "parameters": P, "steps": q, "dtype": torch.float64}
    space = KrylovSpace(pilot.standardisation(), **options, start=old)
    passes = 1
    space.observe(0, x, tangents)
    while space.advance(torch.zeros(1, P, dtype=torch.float64)):
        space.observe(0, x, tangents)
        passes += 1
    assert passes == WARM_PASSES
    assert len(space) == P * q
    weights = space.projection()
    kept = [tangents[:, 0] / x.var(0), old[: P * (q - WARM_PASSES)]]
    for rows in kept:
        solved = torch.linalg.lstsq(weights.T, rows.T).solution
        assert torch.allclose(weights.T @ solved, rows.T, atol=1e-6)
    lost = old[P * (q - WARM_PASSES) :]
    solved = torch.linalg.lstsq(weights.T, lost.T).solution
    assert not torch.allclose(weights.T @ solved, lost.T, atol=1e-2)  # there was no room


def test_resumed_runs_continue_bit_for_bit(data):
    """Catches a state without the spaces."""
    states = []
    for resumed in (False, True):
        model = network()
        monitor = ff.FisherMonitor(model, data, layers=["0"])
        monitor.step()
        change(model, 0.05)
        if resumed:
            file = io.BytesIO()
            torch.save(monitor.state_dict(), file)
            file.seek(0)
            monitor = ff.FisherMonitor(model, data, layers=["0"])
            monitor.load_state_dict(torch.load(file, weights_only=True))
        monitor.step()
        states.append(monitor.history[-1].flow["0"].J)
    assert torch.equal(*states)
