"""Live estimates of networks with several inputs."""

from __future__ import annotations

import pytest
import torch
from support.several_inputs import (
    KEEP,
    ONE,
    PIXELS,
    SOURCES,
    Answering,
    ByHand,
    MapAnswer,
    named,
    seeded,
)

import fisherfast as ff


@pytest.mark.parametrize("pack", [KEEP, named])
def test_live_estimates_of_several_inputs(pack):
    """Catches a live "input" that is the image alone, or missing for named inputs, and an output in
    an object that is not read."""
    models = [seeded(lambda: Answering(MapAnswer)), seeded(ByHand)]
    data = SOURCES["independent"](pack, lambda x: x), SOURCES["independent"](ONE, lambda x: x)
    monitors = [
        ff.FisherMonitor(m, d, observe_every=1, max_features=8)
        for m, d in zip(models, data, strict=True)
    ]
    generator = torch.Generator().manual_seed(3)
    for _ in range(40):
        theta = torch.randn(64, generator=generator)
        image = torch.randn(64, *PIXELS, generator=generator) + theta[:, None, None, None]
        entries = image, torch.randn(64, 2, generator=generator)
        for model, monitor, own in zip(models, monitors, (pack, ONE), strict=True):
            x = own(*(entry.clone() for entry in entries))
            model.train()
            model(**x) if isinstance(x, dict) else model(*x) if isinstance(x, tuple) else model(x)
            monitor.observe(theta)
    seen, expected = (monitor.live() for monitor in monitors)
    assert set(seen) == set(expected) >= {"input", "output"}
    for name in ("input", "output"):
        assert torch.equal(seen[name].J, expected[name].J)
