"""The effective dimension against dense determinants, and its limits."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable

import pytest
import torch
from support.parameters_oracle import brute_force
from support.parameters_zoo import NETWORKS, Network
from torch import Tensor, nn

from fisherfast import parameters as fp

module = importlib.import_module(
    "fisherfast.parameters.analysis.effective_dimension"
)  # not the function
NAMES = ["linear", "conv2d strided", "batch norm 2d", "embedding", "called twice"]


def redraw(model: nn.Module, generator: torch.Generator) -> None:
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator))


def dense(network: Network, x: Tensor, n: float, gamma: float, draws: int) -> float:
    """Equation 2 of Abbas et al. (2021), by dense matrices."""
    matrices = []
    for draw in range(draws):
        model = network.make()
        with torch.no_grad():
            redraw(model, torch.Generator().manual_seed(5 + draw))
        matrices.append(brute_force(model, "categorical", x))
    F = torch.stack(matrices)
    size = F.shape[1]
    trace = F.diagonal(dim1=1, dim2=2).sum(1).mean()
    kappa = gamma * n / (2 * math.pi * math.log(n))
    inside = torch.eye(size, dtype=torch.float64) + kappa * size / trace * F
    return float(2 * torch.linalg.det(inside).sqrt().mean().log() / math.log(kappa))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("n", "gamma"), [(1000, 1.0), (200, 0.7)])
def test_equals_the_definition(name: str, n: int, gamma: float) -> None:
    """Catches a lost factor 2 pi, a trace of one draw in place of the mean, a mean of logarithms in
    place of the logarithm of the mean."""
    network = NETWORKS[name]
    x = network.inputs(6)
    found = fp.effective_dimension(
        network.make(),
        fp.Categorical(),
        x,
        n=n,
        gamma=gamma,
        draws=3,
        initialise=redraw,
        batch_size=4,
        seed=5,
    )
    assert math.isclose(found.value, dense(network, x, n, gamma, 3), rel_tol=1e-10)
    assert float(found) == found.value
    assert found.share == found.value / found.parameters


def test_more_data_than_parameters() -> None:
    """Catches a determinant of the wrong one of the two matrices."""
    network = NETWORKS["linear"]
    x = network.inputs(60)
    model = network.make()
    settings = {"n": 500, "initialise": redraw, "draws": 2, "seed": 5}
    found = fp.effective_dimension(model, fp.Categorical(), x, **settings)  # type: ignore[arg-type]
    assert found.parameters < 3 * 60
    assert math.isclose(found.value, dense(network, x, 500, 1.0, 2), rel_tol=1e-10)


def test_by_eigenvalues_where_rounding_would_count(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the slower way being wrong, which small problems never take."""
    network = NETWORKS["conv2d strided"]
    x = network.inputs(6)
    settings = {"n": 1000, "draws": 2, "initialise": redraw}
    fast = fp.effective_dimension(network.make(), fp.Categorical(), x, **settings)  # type: ignore[arg-type]
    monkeypatch.setattr(module, "NEGLIGIBLE", 0.0)
    slow = fp.effective_dimension(network.make(), fp.Categorical(), x, **settings)  # type: ignore[arg-type]
    assert math.isclose(fast.value, slow.value, rel_tol=1e-10)


def test_tends_to_the_rank() -> None:
    """Catches zero eigenvalues that rounding turns into dimensions: with kappa from 1e150 to 1e250
    log det grows by the rank for each unit of log kappa."""
    network = NETWORKS["conv2d"]
    model, x = network.make(), network.inputs(4)
    few, many = (
        fp.local_effective_dimension(model, fp.Categorical(), x, n=n) for n in (1e150, 1e250)
    )
    logs = [math.log(f.n / (2 * math.pi * math.log(f.n))) for f in (few, many)]
    slope = float(many.log_determinants - few.log_determinants) / (logs[1] - logs[0])
    assert math.isclose(slope, 4 * 2, rel_tol=1e-9)


def test_local_is_that_of_the_parameters_there_are() -> None:
    """Catches parameters that are moved although the centre is asked for."""
    network = NETWORKS["linear"]
    model, x = network.make(), network.inputs(5)
    found = fp.local_effective_dimension(model, fp.Categorical(), x, n=300)
    F = brute_force(model, "categorical", x)
    kappa = 300 / (2 * math.pi * math.log(300))
    inside = torch.eye(len(F), dtype=torch.float64) + kappa * len(F) / F.trace() * F
    assert math.isclose(found.value, float(torch.logdet(inside)) / math.log(kappa), rel_tol=1e-10)


def test_ball_around_the_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches draws outside of the ball, or all at one place of it, and all the same."""
    network = NETWORKS["linear"]
    model, x = network.make(), network.inputs(5)
    centre = torch.cat([p.detach().flatten() for p in model.parameters()])
    seen = []
    original = module._draw

    def spy(network: nn.Module, initialise: Callable[..., None], seed: int) -> None:
        original(network, initialise, seed)
        moved = torch.cat([p.detach().flatten() for p in network.parameters()])
        seen.append((moved - centre).clone())

    monkeypatch.setattr(module, "_draw", spy)
    fp.local_effective_dimension(model, fp.Categorical(), x, n=300, draws=40, radius=0.5)
    lengths = torch.stack(seen).norm(dim=1)
    assert bool((lengths <= 0.5 * (1 + 1e-12)).all())
    # uniform in a ball of P dimensions: (length / radius)^P is uniform, mean 1/2, 4 sigma of 40
    mean = float((lengths / 0.5).pow(len(centre)).mean())
    assert abs(mean - 0.5) < 4 * math.sqrt(1 / 12 / 40)
    assert abs(float(torch.stack(seen).mean(0).norm())) < 0.5 * 4 / math.sqrt(40)


@pytest.mark.parametrize("fails", [False, True])
def test_parameters_and_random_state_are_put_back(fails: bool) -> None:
    """Catches a network that is left as it was drawn last, even by an error, and parameters that
    were replaced."""
    network = NETWORKS["batch norm 2d"]
    model, x = network.make(), network.inputs(4)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    identities = [id(p) for p in model.parameters()]
    calls = 0

    def initialise(net: nn.Module, generator: torch.Generator) -> None:
        nonlocal calls
        calls += 1
        redraw(net, generator)
        for buffer in net.buffers():
            if buffer.is_floating_point():
                buffer.add_(1)
        torch.randn(3)
        if fails and calls == 2:
            net[0].weight = nn.Parameter(torch.zeros(1))  # type: ignore[index]
            raise RuntimeError("on purpose")

    state = torch.get_rng_state()
    if fails:
        with pytest.raises(RuntimeError, match="on purpose"):
            fp.effective_dimension(
                model, fp.Categorical(), x, n=100, draws=3, initialise=initialise
            )
    else:
        fp.effective_dimension(model, fp.Categorical(), x, n=100, draws=3, initialise=initialise)
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(p) for p in model.parameters()] == identities
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_layers_draw_themselves() -> None:
    """Catches draws that are all alike, or differ from run to run."""
    network = NETWORKS["linear"]
    model, x = network.make(), network.inputs(5)
    first, second, other = (
        fp.effective_dimension(model, fp.Categorical(), x, n=100, draws=3, seed=seed)
        for seed in (0, 0, 9)
    )
    assert len(set(first.log_determinants.tolist())) == 3
    assert torch.equal(first.log_determinants, second.log_determinants)
    assert not torch.equal(first.log_determinants, other.log_determinants)
    assert repr(first).startswith("EffectiveDimension(")


def test_arguments() -> None:
    """Catches a logarithm of less than 1, and a network that cannot draw itself."""
    network = NETWORKS["linear"]
    model, x = network.make(), network.inputs(4)
    likelihood = fp.Categorical()
    with pytest.raises(ValueError, match=r"^n must be so large that gamma n / \(2 pi log n\)"):
        fp.effective_dimension(model, likelihood, x, n=10)
    with pytest.raises(ValueError, match=r"^gamma must lie in \(0, 1\], got 1.5$"):
        fp.effective_dimension(model, likelihood, x, n=1000, gamma=1.5)
    with pytest.raises(ValueError, match=r"^draws must be at least 1, got 0$"):
        fp.effective_dimension(model, likelihood, x, n=1000, draws=0)
    with pytest.raises(TypeError, match=r"^draws must be a whole number, got 1.5$"):
        fp.effective_dimension(model, likelihood, x, n=1000, draws=1.5)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"^n must be a number, got '1000'$"):
        fp.effective_dimension(model, likelihood, x, n="1000")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^radius must be positive and finite, got -1$"):
        fp.local_effective_dimension(model, likelihood, x, n=1000, radius=-1)
    own = NETWORKS["expression"]
    with pytest.raises(ValueError, match=r"^initialise must be given for 'model' \(Expression\)"):
        fp.effective_dimension(own.make(), likelihood, own.inputs(4), n=1000)
    silent = nn.Sequential(nn.Linear(2, 3), nn.ReLU())
    with torch.no_grad():
        silent[0].bias.fill_(-100)
    with pytest.raises(ValueError, match=r"^the Fisher matrix must have a positive trace, got 0"):
        fp.local_effective_dimension(silent, fp.Gaussian(), torch.zeros(3, 2), n=1000)
