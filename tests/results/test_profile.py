"""Bounds along theta and the errors of a network beside them, and the figures of several panels."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch
from support.training_histories import layer as layer_of

import fisherfast as ff
from fisherfast.results import forecast_plots
from fisherfast.results.profile import Profile

J2 = torch.tensor([[4.0, 1.0], [1.0, 3.0]], dtype=torch.float64)


def profile_of(theta: torch.Tensor, J: torch.Tensor) -> Profile:
    """The same J, with errors of a tenth, at every theta [Q, P]."""
    whole = J.expand(len(theta), *J.shape)
    return Profile(theta, whole, whole.abs() / 10, torch.full((len(theta),), 100))


GRID = torch.linspace(-1, 1, 5, dtype=torch.float64)[:, None]
ONE = profile_of(GRID, torch.full((1, 1), 4.0, dtype=torch.float64))


class Shrunk(torch.nn.Module):
    """Half of x: an estimate that is drawn to the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.share = torch.nn.Parameter(torch.tensor(0.5))
        self.dropout = torch.nn.Dropout(0.9)

    def forward(self, x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        y = self.dropout(self.share * x)
        return y if more is None else y + more


def samples(n: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """x = theta + noise of deviation 0.3 at the theta of the grid."""
    generator = torch.Generator().manual_seed(seed)
    theta = GRID[torch.arange(n) % 5].float()
    return theta + 0.3 * torch.randn(n, 1, generator=generator), theta


def test_errors_of_a_bound_are_first_order():
    """The spread of the bound over 20 000 draws of J with independent errors of 1 %, to 2 %.
    Catches the error of J in place of that of its inverse, off-diagonal entries counted once, and
    the lack of a root."""
    generator = torch.Generator().manual_seed(0)
    profile = Profile(GRID[:1].expand(1, 2), J2[None], J2[None] / 100, torch.tensor([100]))
    noise = torch.randn(20_000, 2, 2, generator=generator, dtype=torch.float64)
    noise = noise.tril() + noise.tril(-1).mT
    drawn = torch.linalg.inv(J2 * (1 + noise / 100)).diagonal(dim1=1, dim2=2).sqrt()
    assert torch.allclose(profile.crlb_stderr[0], drawn.std(0), rtol=0.03)
    assert float(ONE.crlb_stderr[0]) == pytest.approx(0.5 * 0.1 / 2)
    nothing = profile_of(GRID[:1].expand(1, 2), torch.ones(2, 2, dtype=torch.float64))
    assert nothing.crlb_stderr.isnan().all()


def test_errors_of_a_biased_network():
    """Half of x has bias -theta/2 and a deviation of 0.15: below the bound of 0.5, and nothing is
    wrong. Catches a bias of the other sign, labels of another bin, and the deviation of estimates
    taken for that of errors."""
    x, theta = samples(5000)
    found = ONE.errors(Shrunk(), x, theta[:, 0])
    assert found.samples.tolist() == [1000] * 5
    for value, error, truth in (
        (found.bias, found.bias_stderr, -GRID / 2),
        (found.std, found.std_stderr, torch.full_like(GRID, 0.15)),
        (found.rms, found.rms_stderr, (GRID.square() / 4 + 0.15**2).sqrt()),
    ):
        assert ((value - truth).abs() < 4 * error).all()
        assert (error < 0.01).all()
    parts = found.bias.square() + found.std.square() * 999 / 1000
    assert torch.allclose(found.rms.square(), parts)
    assert (found.std < ONE.crlb).all()


def test_stated_errors_are_the_spread():
    """Over 200 runs of 250 samples the spread is 0.8 to 1.2 of the stated error (4 errors of 200
    spreads are 0.2), in each of 5 bins. Catches a missing factor of 2, and n for its root."""
    runs = [ONE.errors(Shrunk(), *samples(250, seed)) for seed in range(200)]
    for name in ("rms", "bias", "std"):
        spread = torch.stack([getattr(run, name) for run in runs]).std(0)
        stated = torch.stack([getattr(run, f"{name}_stderr") for run in runs]).square().mean(0)
        assert ((spread / stated.sqrt() - 1).abs() < 0.2).all(), name


def test_samples_belong_to_the_nearest_theta_in_units_of_its_spread():
    """Catches distances in which a parameter in nanometres does not count, and the error of one
    parameter under the name of another; empty bins are NaN."""
    centers = torch.tensor([[0.0, 0.0], [0.0, 1e9], [1.0, 0.0], [1.0, 1e9], [9.0, 9e9]])
    theta = centers[:4].double().repeat(50, 1) + torch.tensor([0.1, 1e8])
    profile = profile_of(centers.double(), J2)
    found = profile.errors(torch.nn.Identity(), theta + torch.tensor([0.0, 5e7]), theta)
    assert found.samples.tolist() == [50] * 4 + [0]
    assert torch.allclose(found.bias[:4, 1], torch.tensor(5e7).double())
    assert found.bias[:4, 0].abs().max() < 1e-6
    for name in ("rms", "bias", "std", "rms_stderr", "bias_stderr", "std_stderr"):
        assert getattr(found, name)[4].isnan().all()


def test_the_network_is_left_as_it_was():
    """Catches dropout in the estimates, a mode that stays, gradients, and used random numbers; x of
    several inputs as the network takes them, in its dtype."""
    model, (x, theta) = Shrunk().train(), samples(100)
    before = torch.get_rng_state()
    found = ONE.errors(model, x.double().requires_grad_(), theta.numpy())
    assert model.training
    assert model.share.grad is None
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(found.bias, ONE.errors(model, (x, torch.zeros(100, 1)), theta).bias)
    named = {"x": x, "more": torch.ones(100, 1)}
    assert torch.allclose(ONE.errors(model, named, theta).bias, found.bias + 1)


X, T = torch.ones(4, 1), torch.ones(4)
SHAPE = "must have shape [n, 1], or [n], got"


@pytest.mark.parametrize(
    ("x", "theta", "error", "message"),
    [
        (X, T[:3], ValueError, "x must hold as many samples as theta, 3, got [4]"),
        (X, T.expand(2, 4).T, ValueError, f"theta {SHAPE} [4, 2]"),
        (X, T * math.nan, ValueError, "theta must be finite, got NaN or infinity"),
        (X.expand(4, 2), T, ValueError, f"estimates of the model {SHAPE} [4, 2]"),
        (X * math.nan, T, ValueError, "estimates of the model must be finite, got NaN or infinity"),
        (None, T, TypeError, "x must be a tensor or an array, got NoneType"),
        (X, "labels", TypeError, "theta must be a tensor or an array, got str"),
    ],
)
def test_wrong_samples_are_refused(x, theta, error, message):
    """Catches labels that are broadcast over estimates of another shape."""
    with pytest.raises(error, match=f"^{re.escape(message)}$"):
        ONE.errors(Shrunk(), x, theta)


# --- figures ---


def flow_with(profile: Profile | None, J: torch.Tensor, names: tuple[str, ...]) -> ff.FisherFlow:
    layers = [
        dataclasses.replace(
            layer_of(name, share * J, stderr=0.1),
            parameter_names=names,
            profile=profile
            and dataclasses.replace(profile, J=share * profile.J, stderr=share * profile.stderr),
        )
        for name, share in (("input", 1.0), ("output", 0.25))
    ]
    return ff.FisherFlow(tuple(layers))


def test_profile_figure(tmp_path):
    """Catches J in place of its bound, one layer for another, and a figure without the bias."""
    pytest.importorskip("matplotlib")
    flow = flow_with(ONE, torch.full((1, 1), 4.0, dtype=torch.float64), ("x (µm)",))
    x, theta = samples(500)
    figure = flow.plot_profile(errors=(Shrunk(), x, theta))
    upper, lower = figure.axes
    lines = {line.get_label(): line for line in upper.get_lines()}
    assert list(lines["bound, input"].get_ydata()) == pytest.approx([0.5] * 5)
    assert list(lines["bound, output"].get_ydata()) == pytest.approx([1.0] * 5)
    assert list(lines["bound, input"].get_xdata()) == GRID[:, 0].tolist()
    found = ONE.errors(Shrunk(), x, theta)
    shown = [bars.lines[0].get_ydata().tolist() for bars in (*upper.containers, *lower.containers)]
    assert shown == [getattr(found, name)[:, 0].tolist() for name in ("rms", "std", "bias")]
    assert lower.get_xlabel() == "x (µm)"
    assert len(flow.plot_profile(["output"]).axes) == 1
    lost = dataclasses.replace(ONE, J=ONE.J.clone().index_fill_(0, torch.tensor([2]), 1.0))
    partly = [dataclasses.replace(layer, profile=lost) for layer in flow]
    legend = forecast_plots.plot_profile(partly).legends[0].get_texts()
    assert legend[0].get_text() == "bound, input (partly unbounded)"
    pair = flow_with(profile_of(torch.rand(6, 2).double(), J2), J2, ())
    figure = pair.plot_profile()
    assert [ax.get_xlabel() for ax in figure.axes] == ["θ[0]", "θ[1]"]
    figure.savefig(tmp_path / "profile.png")
    with pytest.raises(
        ValueError, match=r"^layers must have a profile along theta, got none of \['i"
    ):
        flow_with(None, J2, ()).plot_profile()


def test_ellipses_figure(tmp_path):
    """Catches panels for wrong pairs, an ellipse of Delta chi^2 = 1, and levels that are not
    stated; a layer without information on a parameter is named and not drawn."""
    pytest.importorskip("matplotlib")
    J = torch.diag(torch.tensor([4.0, 1.0, 0.25], dtype=torch.float64))
    flow = flow_with(None, J, ("x", "y", "z"))
    flat = dataclasses.replace(flow["output"], J=torch.ones(3, 3, dtype=torch.float64))
    flow = dataclasses.replace(flow, layers=(flow["input"], flat))
    figure = flow.plot_ellipses(center=[1.0, 2.0, 3.0])
    labels = [(ax.get_xlabel(), ax.get_ylabel()) for ax in figure.axes]
    assert labels == [("", "y"), ("x", "z"), ("y", "")]
    outer, inner = figure.axes[1].get_lines()
    for line, chi2 in ((inner, 2.2977), (outer, 6.1579)):
        x, y = (torch.tensor(values) for values in line.get_data())
        assert float(x.max() - 1) == pytest.approx(0.5 * math.sqrt(chi2), rel=1e-3)
        assert float(y.max() - 3) == pytest.approx(2.0 * math.sqrt(chi2), rel=1e-3)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["input", "output (unbounded)", "68.3 %", "95.4 %"]
    one = flow.plot_ellipses(["input"], ["z", "x"], levels=[0.9])
    assert [(ax.get_xlabel(), ax.get_ylabel()) for ax in one.axes] == [("Δz", "Δx")]
    one.savefig(tmp_path / "ellipses.png")
    for message, arguments in {
        "layers must hold at least one layer, got none": ([],),
        "params must hold at least two parameters, got 1": (flow.layers, ["x"]),
        "keep must be one of ['x', 'y', 'z'], got 'w'": (flow.layers, ["x", "w"]),
    }.items():
        with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
            forecast_plots.plot_ellipses(*arguments)
    for levels in ([], [1.0], [math.nan]):
        with pytest.raises(ValueError, match=r"^levels must be between 0 and 1, got \["):
            flow.plot_ellipses(levels=levels)
