"""Targets in another unit than theta: which runs get a note."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fisherfast as ff
from fisherfast.problems import GaussianShift, mlp

DIM = 16
RANGE = 1.0  # theta in [-1, 1]


def samples(n: int, seed: int, parameters: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """x [n, DIM] and theta [n, P]."""
    generator = torch.Generator().manual_seed(seed)
    theta = RANGE * (2 * torch.rand(n, parameters, generator=generator) - 1)
    x = theta @ directions(parameters).T + torch.randn(n, DIM, generator=generator)
    return x, theta


def directions(parameters: int) -> torch.Tensor:
    return torch.eye(DIM).unflatten(0, (-1, parameters)).sum(0).T.contiguous() * 2


def held_out(parameters: int = 1) -> ff.FiniteDifference:
    problem = GaussianShift(directions(parameters))
    return problem.finite_difference([0.0] * parameters, 0.05, 4000, seed=3)


def regression(x: torch.Tensor, target: torch.Tensor) -> nn.Linear:
    """The network that a training with these targets ends at."""
    model = nn.Linear(DIM, target.shape[1])
    design = torch.cat([x, torch.ones(len(x), 1)], 1).double()
    solution = torch.linalg.lstsq(design, target.double()).solution.float()
    with torch.no_grad():
        model.weight.copy_(solution[:-1].T)
        model.bias.copy_(solution[-1])
    return model


def errors(model: nn.Module, x: torch.Tensor, target: torch.Tensor) -> list[float]:
    with torch.no_grad():
        return (model(x) - target).square().mean(0).tolist()


def notes_of(
    model: nn.Module, parameters: int = 1, *, target_scale: float = 1.0, **given: object
) -> tuple[str, ...]:
    data, options = held_out(parameters), {"max_features": 16, "target_scale": target_scale}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ff.FisherWarning)
        return ff.FisherMonitor(model, data, **options).step(**given).notes


def assert_names(note: str, scale: float) -> None:
    """The factor in the note; the network answers by 0.95 of a unit."""
    assert float(note.rpartition("target_scale=")[2]) == pytest.approx(scale, rel=0.15)


# micrometres for millimetres and the reverse; targets divided by their standard deviation; a scale
# that is what is wrong
@pytest.mark.parametrize(
    ("factor", "scale", "side"),
    [
        (1000.0, 1.0, "train_mse"),
        (1e-3, 1.0, "val_mse"),
        (1 / 8, 1.0, "train_mse"),
        (5.0, 1.0, "val_mse"),
        (1.0, 100.0, "train_mse"),
    ],
)
def test_another_unit_is_noted_with_its_factor(factor, scale, side):
    """Catches a factor upside down or squared, a unit that only large outputs betray, and a check
    that looks at the output alone."""
    x, theta = samples(4000, 1)
    model = regression(x, factor * theta)
    given = {side: errors(model, x, factor * theta)}
    (note,) = notes_of(model, target_scale=scale, **given)
    start = "targets seem to be in another unit than theta: the output moves by"
    assert note.startswith(start)
    assert_names(note, 1 / factor)


def test_the_parameter_in_another_unit_is_named():
    """Catches one factor for all parameters, and an alarm where units are right."""
    x, theta = samples(4000, 1, parameters=2)
    target = theta * torch.tensor([1.0, 1000.0])
    model = regression(x, target)
    (note,) = notes_of(model, 2, train_mse=errors(model, x, target))
    assert "the output of parameter 1 moves by" in note
    assert_names(note, 1e-3)
    plain = regression(x, theta)
    assert notes_of(plain, 2, train_mse=errors(plain, x, theta)) == ()


# --- no false alarm -------------------------------------------------------------------------------


@pytest.mark.parametrize(("loud", "seed"), [(1.0, 0), (30.0, 0), (30.0, 1)])
def test_an_untrained_network_is_left_alone(loud, seed):
    """A network that knows nothing yet may move by any amount: small weights, or raw counts as
    input. Catches a check of the response alone."""
    model = mlp([DIM, 12, 1], seed=seed)
    with torch.no_grad():
        model.fc2.weight.mul_(loud)
    x, theta = samples(2000, 1)
    assert notes_of(model, train_mse=errors(model, x, theta)) == ()


@pytest.mark.parametrize(("caution", "remembered"), [(1, 1), (0.5, 1), (0.1, 1), (0.05, 1e-6)])
def test_a_trained_network_is_left_alone(caution, remembered):
    """Noise that is strong beside the range shrinks the response of a good network: here to a half.
    At a tenth its error is mostly bias. One that remembers its samples has a training error near
    zero and a small response to fresh ones: catches a small error taken for a small unit."""
    x, theta = samples(4000, 1)
    model = regression(x, theta)
    with torch.no_grad():
        model.weight.mul_(caution)
    (error,) = errors(model, x, theta)
    assert notes_of(model, train_mse=remembered * error) == ()


def test_numbers_that_say_nothing_give_no_note():
    """Catches a comparison that a NaN decides, a warning about targets without errors, and a
    classifier's logits compared with theta."""
    x, theta = samples(4000, 1)
    model = regression(x, 1e-3 * theta)
    for value in (float("nan"), 0.0, None):
        assert not any("unit" in note for note in notes_of(model, train_mse=value))
    assert notes_of(mlp([DIM, 12, 5], seed=0), train_mse=0.3) == ()
