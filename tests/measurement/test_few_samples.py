"""Few samples and wide layers: no measurement is lost, and no number is wrong without saying so.

A layer that has too few samples for its covariance is compressed, whatever its width; what can
never be measured is refused before the model runs over the samples; a layer that fails leaves the
others alone.
"""

from __future__ import annotations

import itertools
import math
import re

import pytest
import torch
from support.gaussian_shift import samples
from torch import nn

import fisherfast as ff
from fisherfast.problems import GaussianShift

INFORMATION = 9.0

# few samples of independent conditions: the noise of J alone may look like a wide step
pytestmark = pytest.mark.filterwarnings("ignore:dtheta sqrt")


def signal(width: int) -> torch.Tensor:
    """A smooth signal [width] in white noise with INFORMATION in all."""
    m = torch.linspace(-1, 1, width, dtype=torch.float64).square()
    return m * math.sqrt(INFORMATION) / m.norm()


def shifted(source: str, n: int, width: int) -> ff.data.Data:
    """n samples of each condition: unit white noise moved along `signal`."""
    root = torch.eye(width, dtype=torch.float64)
    return samples(source, root, signal(width), n=n, seed=0)


def assert_measured(info) -> None:
    """Finite numbers; with white noise no layer has more than the input, and a status of "resolved"
    above that by 5 errors is a wrong number that passes for a right one."""
    assert info.J.isfinite().all(), info.name
    assert info.stderr.isfinite().all(), info.name
    assert info.lower.isfinite().all(), info.name
    excess = (info.value - INFORMATION) / max(float(info.stderr), 1e-12)
    assert info.status != "resolved" or excess < 5, (info.name, info.value, info.stderr)


# --- layers of every width -----------------------------------------------------------------------


@pytest.mark.parametrize("source", ["paired", "scores", "independent"])
def test_300_samples_with_layers_of_every_width(source):
    """Layers narrower than max_features were refused, wider ones compressed; and the whole
    measurement ended in an error because of one layer."""
    torch.manual_seed(1)
    widths = [64, 100, 200, 290, 300, 310, 400, 599, 600, 601, 4]
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(widths)]
    flow = ff.fisher_flow(nn.Sequential(*layers), shifted(source, 300, 64), max_features=512)
    assert len(flow.layers) == len(widths)
    for info in flow.layers:
        assert_measured(info)
    samples = flow["input"].samples
    for info in flow.layers[1:]:
        if info.dim >= samples:
            assert info.compressed, info.name
        if info.dim <= samples // 4:
            assert not info.compressed, info.name


@pytest.mark.parametrize(
    ("source", "width"), [("tangents", 64), ("scores", 280), ("tangents", 310), ("scores", 500)]
)
def test_compressed_layers_are_not_wrong_by_factors(source, width):
    """A linear layer wider than the input is invertible on its range, so J = 9 at every width. What
    is compressed with 300 samples keeps less; it must say so or be right. 5 errors: 6e-7."""
    torch.manual_seed(2)
    model = nn.Linear(64, width)
    info = ff.fisher_flow(model, shifted(source, 300, 64), max_features=16)["output"]
    assert_measured(info)
    error = abs(info.value - INFORMATION)
    assert info.status != "resolved" or error < 5 * float(info.stderr) + 0.1 * INFORMATION
    assert info.value > 0.2 * INFORMATION - 4 * float(info.stderr)


# --- what can never be measured -------------------------------------------------------------------


class Counting(nn.Module):
    """Counts the samples that it has seen."""

    def __init__(self, *widths: int) -> None:
        super().__init__()
        pairs = itertools.pairwise(widths)
        self.layers = nn.Sequential(*(nn.Linear(a, b) for a, b in pairs))
        self.seen = 0

    def forward(self, x):
        self.seen += len(x)
        return self.layers(x)


@pytest.mark.parametrize("source", ["paired", "scores"])
def test_ten_samples_are_refused_before_the_model_has_run_over_them(source):
    """The message holds the number of samples that is needed: with so many it is not raised."""
    model = Counting(12, 12, 11, 3)
    data = shifted(source, 10, 12)
    with pytest.raises(ValueError, match=r"samples") as error:
        ff.fisher_flow(model, data, settings=ff.Settings(batch_size=2))
    conditions = 2 if source in ("paired", "independent") else 1
    assert model.seen < 10 * conditions
    needed = int(re.search(r"at least (\d+) samples", str(error.value)).group(1))
    assert needed > 10
    for info in ff.fisher_flow(
        model, shifted(source, needed, 12), settings=ff.Settings(batch_size=2)
    ).layers:
        assert_measured(info)


def test_the_samples_that_a_note_asks_for_are_enough():
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(20, 400), nn.Linear(400, 6))
    notes = ff.fisher_flow(model, stream(300, 20), max_features=32)["0"].notes
    needed = int(re.search(r"at least (\d+) samples", notes[0]).group(1))
    assert needed > 300
    assert_measured(ff.fisher_flow(model, stream(needed, 20), max_features=32)["0"])


# --- data that do not repeat ----------------------------------------------------------------------


BATCH = 50


def scored(n: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, width, generator=torch.Generator().manual_seed(3))
    return x, (x @ signal(width).float())[:, None]


def shuffled(n: int, width: int):
    dataset = torch.utils.data.TensorDataset(*scored(n, width))
    return ff.Score(torch.utils.data.DataLoader(dataset, batch_size=BATCH, shuffle=True))


def stream(n: int, width: int):
    pieces = (part.split(BATCH) for part in scored(n, width))
    batches = list(zip(*pieces, strict=True))
    return ff.Score(lambda: iter(batches))


@pytest.mark.parametrize("make", [shuffled, stream])
def test_too_few_samples_that_do_not_repeat(make):
    """Compression takes several passes. What has one pass only is sketched, or is NaN with a note;
    the layers with enough samples are as they would be alone."""
    torch.manual_seed(4)
    model = nn.Sequential(nn.Linear(20, 400), nn.Linear(400, 6), nn.Linear(6, 1))
    flow = ff.fisher_flow(model, make(300, 20), max_features=32)
    assert flow.names == ["input", "0", "1", "output"]
    wide = flow["0"]
    if make is shuffled:  # its length is known: a sketch
        assert wide.compressed
        assert wide.notes
        assert_measured(wide)
    else:
        assert any(note.startswith("not measured") for note in wide.notes)
        assert wide.status == "unresolved"
    for name in ("1", "output"):
        assert_measured(flow[name])
        assert not flow[name].compressed
        assert flow[name].samples == 300
    assert "0" in str(flow)
    alone = ff.fisher_flow(model, make(300, 20), max_features=32, layers=["1"])
    assert alone["1"].value == pytest.approx(flow["1"].value, rel=0.05)
    with pytest.raises(ValueError, match="samples"):  # all layers fail: no table of NaN
        ff.fisher_flow(nn.Linear(20, 20), make(10, 20))


def test_one_tangent_is_not_known():
    """All tangents but one are zero. Other folds know nothing of it: J = 0 +- 0 is no result."""
    dx = torch.zeros(400, 3)
    dx[7] = 1.0
    layer = ff.fisher_information(ff.Pathwise(torch.randn(400, 3), dx))
    assert layer.status == "noisy"
    assert float(layer.naive) > 0


def test_the_doubt_of_one_parameter_is_not_that_of_another():
    """Two parameters, of which the second hardly depends on the lift. Catches the gain of one, in
    units of its folds, applied to the other: an error of 39 for J = 2.7."""
    problem = GaussianShift(torch.tensor([[2.0, 0.0], [1.0, 0.5]]), torch.eye(2) + 0.5)
    data = problem.pathwise([0.0, 0.0], 400, seed=1017)
    found = ff.fisher_information(data, max_features=8)
    assert (found.stderr.diagonal() < found.J.diagonal() / 5).all()
