"""A default device of the user's: the same numbers as without one, and the user's code sees it.

The device "meta" holds no data, so whatever the library makes on it by mistake cannot be read.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.training import attainable_error, attainable_error_of_samples

DIM, ROWS = 5, 600
SEEN = []


@contextmanager
def default_device(device: str) -> Iterator[None]:
    """Put back afterwards."""
    before = torch.get_default_device()
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(before if before.type != "cpu" else None)


class Network(nn.Module):
    """Notes on which device its tensors are made."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(DIM, 4), nn.Linear(4, 2)

    def forward(self, x):
        SEEN.append(torch.empty(0).device.type)
        return self.last(torch.relu(self.first(x)))


def noise(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, ROWS, DIM, generator=torch.Generator().manual_seed(seed))


def shifted(step: float):
    return [noise(p) + step * torch.eye(DIM)[p] for p in range(2)]


NOISE = noise()[0]


def batches():
    """Samples and scores, made where the user's code makes them."""
    for batch in NOISE.split(200):
        SEEN.append(torch.empty(0).device.type)
        yield batch, batch[:, 0]


DATA = {
    "conditions": lambda: ff.FiniteDifference(
        [z[0] for z in shifted(-0.1)], [z[1] for z in shifted(0.1)], dtheta=[0.2, 0.2]
    ),
    "tangents": lambda: ff.Pathwise(NOISE, torch.eye(DIM)[:2].repeat(ROWS, 1, 1)),
    "score": lambda: ff.Score(NOISE, NOISE[:, :2]),
    "function": lambda: ff.Score(batches),
}
MEASURED = {
    "plain": {},
    "grown": {"max_features": 100, "settings": ff.Settings(grow=True)},
    "budget": {"memory_budget": "300 MB"},
    "probe": {"probe": "network"},
}


@pytest.mark.parametrize(
    ("source", "case"),
    [
        ("tangents", "plain"),
        ("function", "plain"),
        ("score", "grown"),
        ("conditions", "budget"),
        ("score", "probe"),
    ],
)
def test_a_flow_is_the_same_bit_for_bit(source, case, monkeypatch):
    """Catches statistics on the user's device, and a network or source that sees another."""
    monkeypatch.setattr("fisherfast.estimation.probe.LEAST_STEPS", 20)  # of the probe's training
    torch.manual_seed(0)
    model, data = Network(), DATA[source]()
    expected = ff.fisher_flow(model, data, **MEASURED[case])
    SEEN.clear()
    with default_device("meta"):
        flow = ff.fisher_flow(model, data, **MEASURED[case])
        table, errors = str(flow), flow.fraction_errors()
    assert set(SEEN) == {"meta"}
    assert (table, errors) == (str(expected), expected.fraction_errors())
    assert all(torch.equal(a.J, b.J) for a, b in zip(flow, expected, strict=True))


def test_maps():
    """Catches maps on the user's device."""
    x = torch.randn(400, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    data = ff.FiniteDifference(x - 0.02, x + 0.02, dtheta=0.04, paired=True)
    model, settings = nn.Conv2d(1, 3, 3), ff.Settings(maps=True)
    expected = ff.fisher_flow(model, data, settings=settings).map("output").J
    with default_device("meta"):
        found = ff.fisher_flow(model, data, settings=settings).map("output").J
    assert torch.equal(found, expected)


def test_a_training_is_watched_and_stopped():
    """Catches a monitor, the live trend or a rule that makes tensors on the user's device."""
    theta = torch.rand(200, 2, generator=torch.Generator().manual_seed(2))
    x = noise()[0, :200]

    def train(device: str) -> tuple[str, list[int | None]]:
        torch.manual_seed(0)
        model, data = Network(), DATA["tangents"]()  # an input that rules act on
        with default_device(device):
            monitor = ff.FisherMonitor(model, data, observe_every=1)
            known = ff.CramerRao(prior=[(-1, 1), theta[:, 0]], smoothing=3)
            rules = [
                ff.FisherEarlyStopping(rule, min_delta=0.5) for rule in (known, "transmission")
            ]
            for _ in range(4):
                model(x)
                monitor.observe(theta)
                monitor.step(train_mse=[0.3, 0.2])
                for rule in rules:
                    rule.step(monitor)
            monitor.load_state_dict(monitor.state_dict())
            rows = [row | {"seconds": 0.0} for row in monitor.rows()]
        return repr(rows), [rule.best_epoch for rule in rules]

    assert train("meta") == train("cpu")


def test_attainable_errors():
    """Catches integrals on the user's device."""
    x, theta = NOISE, torch.linspace(-1, 1, ROWS)
    calls = (
        lambda: attainable_error(10.0, (-1, 1)),
        lambda: attainable_error(10.0, theta),
        lambda: attainable_error(10.0, theta.round()),
        lambda: attainable_error_of_samples(x + theta[:, None], theta),
    )
    expected = [call() for call in calls]
    with default_device("meta"):
        assert [call() for call in calls] == expected


def test_the_users_device_is_back_after_an_error():
    """Catches a default that stays the library's."""
    x = torch.full((100, DIM), torch.nan)
    with default_device("meta"):
        with pytest.raises(ValueError, match="finite"):
            ff.fisher_information(ff.Score(x, x[:, 0]))
        assert torch.empty(0).device.type == "meta"
    assert torch.empty(0).device.type == "cpu"
