"""The ridge takes no information that the arithmetic carries, wherever a ridge is used.

The problem of most tests: Gaussian noise of known covariance, moved by theta along the smaller half
of its principal axes. The fixed ridge of 1e-4 kept 0.92, 0.19 and 0.007 of the information at
condition 1e4, 1e6 and 1e8.
"""

from __future__ import annotations

import math

import pytest
import torch
from support.gaussian_shift import DTHETA, samples
from torch import nn

import fisherfast as ff

DIM = 45
INFORMATION = 9.0
SOURCES = ["paired", "tangents", "scores", "independent"]
TOLERANCE = 0.03


class SmallDirections:
    """x = theta m + noise, the eigenvalues of whose covariance fall from 1 to 1 / condition along
    random axes; m lies in the smaller half of them, most of its information in the smallest."""

    def __init__(self, condition: float, dim: int = DIM) -> None:
        generator = torch.Generator().manual_seed(11)
        eigenvalues = condition ** -torch.linspace(0, 1, dim, dtype=torch.float64)
        axes = torch.linalg.qr(torch.randn(dim, dim, dtype=torch.float64, generator=generator)).Q
        self.root = axes * eigenvalues.sqrt()  # x = root z, covariance = root root^T
        inverse = axes / eigenvalues.sqrt()
        small = (torch.arange(dim, dtype=torch.float64) - dim // 2).clamp(min=0) ** 2
        self.whitened = small * math.sqrt(INFORMATION) / small.norm()
        self.signal = self.root @ self.whitened
        self.readout = inverse @ self.whitened
        self.covariance = self.root @ self.root.T

    def data(self, source: str, n: int, dtype: torch.dtype = torch.float32):
        return samples(source, self.root, self.whitened, n=n, seed=0, dtype=dtype)


def assert_all_information(J, stderr, truth=INFORMATION, errors=4) -> None:
    """J / truth within 0.97 to 1.03 beyond 4 errors: false alarms below 6e-5 of the cases."""
    J, stderr = float(J), float(stderr)
    assert math.isfinite(J)
    assert math.isfinite(stderr)
    assert abs(J - truth) < TOLERANCE * truth + errors * stderr, f"{J / truth:.3f} +- {stderr}"
    assert stderr < 0.15 * truth  # an error that is as large as J would excuse everything


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize(
    ("condition", "dtype"), [(1e4, torch.float32), (1e8, torch.float32), (1e12, torch.float64)]
)
def test_data_up_to_the_condition_that_they_carry(source, condition, dtype):
    """Catches a fixed ridge (0.007 to 0.92), float32 products without one (1.06 to 1.12), and a
    ridge of the rounding of float32 where the data are float64."""
    n = 12_000 if source == "independent" else 6000  # the bound depends on who is in a half
    data = SmallDirections(condition).data(source, n, dtype)
    info = ff.fisher_information(data, max_features=64)
    assert_all_information(info.J, info.stderr)
    assert_all_information(info.linear, info.linear_stderr)
    assert float(info.lower) > INFORMATION * (1 - TOLERANCE) - 4 * float(info.lower_stderr) - 1.0
    assert info.carried
    assert not any("ridge" in note for note in info.notes)


@pytest.mark.parametrize("source", ["independent", "scores"])
def test_a_lower_bound_that_the_ridge_leaves_alone(source):
    """The readout of `lower` had the same ridge: 0.74 of the information at condition 1e6, where a
    readout learned on 10 000 samples of 45 activations keeps 0.99 of it."""
    info = ff.fisher_information(SmallDirections(1e6).data(source, 20000), max_features=64)
    assert float(info.lower) > 0.96 * INFORMATION - 4 * float(info.lower_stderr)
    assert float(info.lower) < INFORMATION + 4 * float(info.lower_stderr)
    assert float(info.lower_stderr) < 0.1 * INFORMATION


@pytest.mark.parametrize("source", ["tangents", "scores"])
def test_what_float32_cannot_carry_is_not_resolved(source):
    """At condition 1e16 the small directions lie below the rounding of float32: J may be wrong, but
    is "resolved" only where it is right. With a score J of the input is Cov(score), which needs no
    covariance of the data: there the layer after it is looked at."""
    model = nn.Linear(DIM, DIM, bias=False)
    nn.init.orthogonal_(model.weight, generator=torch.Generator().manual_seed(0))
    data = SmallDirections(1e16).data(source, 4000)
    info = ff.fisher_flow(model, data, max_features=64)["output"]
    right = abs(info.value - INFORMATION) < TOLERANCE * INFORMATION + 4 * float(info.stderr)
    assert right or info.status != "resolved"
    assert not info.carried


def test_a_number_as_ridge_takes_information_and_says_so():
    """ridge=1e-4 is kept as it is given; the table says what it costs."""
    problem = SmallDirections(1e6)
    flow = ff.fisher_flow(nn.Linear(DIM, 3), problem.data("tangents", 6000), ridge=1e-4)
    info = flow["input"]
    ridged = problem.covariance + 1e-4 * problem.covariance.diag().diag()
    left = float(problem.signal @ torch.linalg.solve(ridged, problem.signal))
    assert left < 0.5 * INFORMATION
    assert_all_information(info.linear, info.linear_stderr, left)
    assert any("ridge" in note for note in info.notes)
    assert "ridge" in str(flow)
    assert flow.settings["ridge"] == 1e-4
    assert info.status != "resolved"
    tiny = ff.fisher_information(problem.data("tangents", 6000), max_features=64, ridge=1e-12)
    assert_all_information(tiny.linear, tiny.linear_stderr)
    assert not any("ridge" in note for note in tiny.notes)


@pytest.mark.parametrize("ridge", ["none", -1e-9, math.nan, math.inf, None])
def test_a_wrong_ridge_is_refused(ridge):
    data = SmallDirections(10).data("scores", 600)
    x = torch.randn(2, 600, 3)
    calls = [
        lambda: ff.fisher_information(data, ridge=ridge),
        lambda: ff.fisher_flow(nn.Linear(DIM, 1), data, ridge=ridge),
        lambda: ff.FisherMonitor(nn.Linear(DIM, 1), data, ridge=ridge),
        lambda: ff.linear_fisher(x[0], x[1], 0.1, ridge=ridge),
        lambda: ff.InformationLoss(0.1, ridge=ridge),
    ]
    for call in calls:
        with pytest.raises((ValueError, TypeError), match='ridge must be "auto" or'):
            call()


def whitening(problem: SmallDirections) -> nn.Linear:
    """The inverse Cholesky factor of the covariance."""
    factor = torch.linalg.cholesky(problem.covariance)
    layer = nn.Linear(len(factor), len(factor), bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.linalg.inv(factor))
    return layer


@pytest.mark.parametrize("source", SOURCES)
def test_a_whitening_layer_keeps_what_it_gets(source):
    """J / J_input was 5.2: what the ridge took from the input, the layer gave back."""
    problem = SmallDirections(1e6)
    model = nn.Sequential(whitening(problem), nn.Linear(DIM, DIM))
    flow = ff.fisher_flow(model, problem.data(source, 6000), max_features=64)
    for name, fraction in flow.fractions().items():
        assert abs(fraction - 1) < TOLERANCE + 4 * flow.fraction_errors()[name], name
    for info in flow.layers:
        assert_all_information(info.J, info.stderr)


@pytest.mark.parametrize("source", ["paired", "tangents", "scores"])
def test_a_monitor_and_its_rule_behind_a_whitening_layer(source):
    """The transmission was 5.4. The published rule compares the error with 1 / J_input: an input
    that loses four fifths of its information stops a run at epoch 0."""
    problem = SmallDirections(1e6)
    model = whitening(problem)
    monitor = ff.FisherMonitor(model, problem.data(source, 6000))
    stopping = ff.FisherEarlyStopping(rule="crlb")
    record = monitor.step(epoch=0, train_mse=1.5 / INFORMATION)
    assert abs(record.transmission - 1) < TOLERANCE + 4 * record.transmission_error
    assert record.transmission_error < 0.05
    assert not stopping.step(monitor)
    monitor.step(epoch=1, train_mse=0.7 / INFORMATION)
    assert stopping.step(monitor)


@pytest.mark.parametrize("source", SOURCES)
def test_maps_of_channels_that_are_nearly_equal(source):
    """Two channels correlated by 1 - 1e-6, and a signal in their difference, at one position of
    six: a ridge of 1e-4 leaves 0.5 % of it."""
    n, height, width = 6000, 2, 3
    gap = math.sqrt(2e-6)  # correlation 1 - gap^2 / 2
    # channels 0 and 1 at six positions one after the other, of common and own noise
    root = torch.kron(torch.eye(6), torch.tensor([[1.0, 0.0], [1.0, gap]])).double()
    whitened = torch.zeros(12, dtype=torch.float64)
    whitened[-1] = math.sqrt(INFORMATION)  # the last position
    order = torch.arange(12).reshape(6, 2).T.flatten()  # channels first
    data = samples(source, root[order], whitened, n=n, seed=5, shape=(2, height, width))
    layer = nn.Conv2d(2, 2, 1, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[0.8, -0.6], [0.6, 0.8]])[:, :, None, None])
    model = nn.Sequential(layer, nn.Flatten())
    flow = ff.fisher_flow(model, data, max_features=16, settings=ff.Settings(maps=True))
    for name in ("input", "0"):
        found = flow.map(name)
        assert_all_information(found.value[1, 2], found.stderr[1, 2])
        empty = found.value.flatten()[:5].abs()
        assert (empty < 5 * found.stderr.reshape(6)[:5] + 0.01 * INFORMATION).all()


@pytest.mark.parametrize("source", ["independent", "tangents", "scores"])
def test_the_loss_at_condition_1e8(source):
    """float32 outputs, default settings; the error of J is that of n samples: sqrt(2 / n) of it and
    that of the mean difference, with the finite-sample bias removed."""
    n = 20_000
    data, relative = SmallDirections(1e8).data(source, n), math.sqrt(2 / n)
    (batch,) = data.read(0, n)
    if source == "independent":
        plus = next(data.read(1, n)).x
        J = ff.linear_fisher(batch.x, plus, DTHETA, corrected=True)
        c = 2 / n / DTHETA**2
        relative = math.sqrt(4 * c / INFORMATION + 2 * c**2 * DIM / INFORMATION**2 + 1 / n)
    else:
        carried = {"tangents": batch.tangents, "score": batch.score}
        J = ff.linear_fisher(batch.x, **carried, corrected=True)
    assert_all_information(J, relative * INFORMATION)


def test_the_loss_lets_gradients_pass_at_condition_1e8():
    problem = SmallDirections(1e8)
    minus, plus = (next(problem.data("paired", 4000).read(c, 4000)).x for c in (0, 1))
    layer = whitening(problem)
    J = ff.linear_fisher(layer(minus), layer(plus), DTHETA, paired=True, corrected=True)
    (-J.logdet()).backward()
    assert layer.weight.grad.isfinite().all()


def test_the_live_estimate_of_an_ill_conditioned_layer():
    """What `observe` reads while a network trains: the input at condition 1e6, the same layer
    whitened, and the output. A ridge of 1e-4 leaves 0.27 of the first. J is a lower bound of the
    mean over the batches' thetas, equal to it for a Gaussian shift."""
    problem = SmallDirections(1e6)
    torch.manual_seed(0)
    model = nn.Sequential(whitening(problem), nn.Linear(DIM, 1))
    with torch.no_grad():
        model[1].weight.copy_(problem.readout @ torch.linalg.cholesky(problem.covariance))
    data = problem.data("tangents", 600)
    monitor = ff.FisherMonitor(model, data, observe_every=1)
    generator = torch.Generator().manual_seed(2)
    model.train()
    monitor.observe(torch.zeros(1))  # listens from the next forward pass on
    for _ in range(40):
        theta = 2 * torch.rand(256, 1, generator=generator) - 1
        noise = torch.randn(256, DIM, dtype=torch.float64, generator=generator)
        x = noise @ problem.root.T + theta.double() * problem.signal
        model(x.float())
        monitor.observe(theta)
    found = monitor.live()
    monitor.close()
    for name in ("input", "0", "output"):
        assert_all_information(found[name].J, found[name].stderr)
