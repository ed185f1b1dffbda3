"""Wide layers in a monitor: their Krylov spaces are carried from one measurement to the next."""

from __future__ import annotations

import io

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.estimation.krylov import KRYLOV_VECTORS, WARM_PASSES
from fisherfast.problems import CorrelatedImage

SAMPLES = 300
SIGMAS = 4.0
"""False alarm below 6e-5 per comparison: J of warm and cold starts share their samples."""


def network() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(1, 2, 5, padding=2), nn.Tanh(), nn.AvgPool2d(8), nn.Flatten(), nn.Linear(32, 2)
    )


@pytest.fixture
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
    one that forgets the old vectors, and a state without the spaces."""
    model = network()
    monitor = ff.FisherMonitor(model, data, layers=["0"])
    assert passes_of(model, monitor) > KRYLOV_VECTORS
    change(model, 0.05)
    file = io.BytesIO()
    torch.save(monitor.state_dict(), file)
    file.seek(0)
    resumed = ff.FisherMonitor(model, data, layers=["0"])
    resumed.load_state_dict(torch.load(file, weights_only=True))
    for _ in range(2):
        assert passes_of(model, monitor) < WARM_PASSES + 4  # pilot, survey, and the measurement
        resumed.step()
        assert torch.equal(resumed.history[-1].flow["0"].J, monitor.history[-1].flow["0"].J)
        change(model, 0.05)
    monitor.step()
    cold = ff.fisher_flow(model, data, layers=["0"], max_features=128)
    warm = monitor.history[-1].flow
    off = (warm["0"].J - cold["0"].J).diagonal().abs()
    assert bool((off < SIGMAS * cold["0"].stderr.diagonal()).all())
    low = warm["0"].lower.diagonal() - cold["0"].lower.diagonal()
    assert bool((low > -SIGMAS * cold["0"].lower_stderr.diagonal()).all())
