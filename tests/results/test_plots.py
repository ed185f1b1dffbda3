"""Figures: what is drawn, its labels, and that nothing global is touched."""

from __future__ import annotations

import math
import sys
from dataclasses import replace

import pytest
import torch
from support.training_histories import flow as flow_of
from support.training_histories import number

import fisherfast as ff
from fisherfast.problems import GaussianShift, mlp
from fisherfast.results import plots
from fisherfast.training import plots as training_plots
from fisherfast.training.record import EpochRecord, Stop

matplotlib = pytest.importorskip("matplotlib")


def epoch_of(
    epoch: int, train: float, val: float, flow: ff.FisherFlow | None = None
) -> EpochRecord:
    """Errors in units of the bound."""
    return EpochRecord(epoch, flow, (train,), (val,), number(1.0))


@pytest.fixture(scope="module")
def flow() -> ff.FisherFlow:
    data = GaussianShift(torch.ones(6)).finite_difference(0.0, 0.2, 2000, seed=1)
    return ff.fisher_flow(mlp([6, 8, 1], seed=0), data, max_features=40)


@pytest.fixture(scope="module")
def flow_of_two() -> ff.FisherFlow:
    data = GaussianShift(torch.eye(6)[:, :2]).finite_difference([0.0, 0.0], 0.2, 2000, seed=1)
    return ff.fisher_flow(mlp([6, 8, 2], seed=0), data, max_features=40)


@pytest.fixture
def history(flow: ff.FisherFlow) -> list[EpochRecord]:
    """Training error x J of 2, 1.1, 0.9, 0.8, and the least validation error in epoch 1."""
    levels = [(2.0, 2.1), (1.1, 1.2), (0.9, 1.3), (0.8, 1.4)]
    return [epoch_of(epoch, *pair, flow) for epoch, pair in enumerate(levels)]


def legend(ax) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def bars(ax) -> list:
    """The error-bar containers of an axes."""
    return [c for c in ax.containers if isinstance(c, matplotlib.container.ErrorbarContainer)]


def heights(ax, number: int) -> list[float]:
    return list(bars(ax)[number].lines[0].get_ydata())


def lengths(ax) -> list[float]:
    """Of the first error bars."""
    (segments,) = bars(ax)[0].lines[2]
    return [s[1, 1] - s[0, 1] for s in segments.get_segments()]


def points(ax) -> dict[str, tuple[list[float], list[float]]]:
    """x and y of each line, by the first two words of its label."""
    return {
        " ".join(line.get_label().split()[:2]): (list(line.get_xdata()), list(line.get_ydata()))
        for line in ax.get_lines()
    }


def test_flow_has_points_errors_and_bound(flow, flow_of_two):
    """Catches values of another quantity, errors that are not J's, a missing lower bound, a method
    that drops its arguments, and the off-diagonal or only the first parameter drawn."""
    ax = plots.plot_flow(flow, label="now", unit="1/µm²")
    assert heights(ax, 0) == [layer.value for layer in flow]
    assert lengths(ax) == pytest.approx([2 * float(layer.stderr) for layer in flow])
    assert list(ax.get_lines()[-1].get_ydata()) == [float(layer.lower) for layer in flow]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == flow.names
    assert ax.get_ylabel() == "Fisher information J (1/µm²)"
    assert ax.get_xlabel() == "layer"
    assert sorted(legend(ax)) == ["honest lower bound", "now"]
    ax = flow.plot(plots.new_figure().add_subplot(), fraction=True)
    assert heights(ax, 0) == list(flow.fractions().values())
    assert "input" in ax.get_ylabel()
    ax = plots.plot_flow(flow_of_two)
    assert len(bars(ax)) == 2
    assert heights(ax, 1) == [float(layer.J[1, 1]) for layer in flow_of_two]
    assert {"J[0]", "J[1]"} <= set(legend(ax))
    assert len(bars(plots.plot_flow(flow_of_two, fraction=True))) == 1


def test_flows_have_one_line_each_in_distinct_colours(flow):
    """Catches a legend of forty lines, one without the first and the last, and flows of different
    layers in one figure."""
    ax = plots.plot_flows({"first": flow, "second": flow, "third": flow}, title="epoch")
    assert legend(ax) == ["first", "second", "third"]
    assert len({c.lines[0].get_color() for c in bars(ax)}) == 3
    ax = plots.plot_flows(dict.fromkeys(range(40), flow))
    assert len(bars(ax)) == 40
    assert len(legend(ax)) <= plots.LEGEND_ENTRIES
    assert {"0", "39"} <= set(legend(ax))
    with pytest.raises(ValueError, match="flows must have the same layers, got"):
        plots.plot_flows({0: flow, 1: ff.FisherFlow(flow.layers[:2])})
    with pytest.raises(ValueError, match="flows must hold at least one flow, got none"):
        plots.plot_flows({})


def test_the_line_goes_through_cuts(flow):
    """Catches a line that falls and rises through branches, points of branches that are not drawn
    or at the place of another layer, and ticks without the name of a sum."""
    input, inside, sum_of, output = flow.layers
    inside = replace(inside, cut=False)
    branched = ff.FisherFlow((input, inside, replace(sum_of, label="block (sum)"), output))
    for ax in (plots.plot_flow(branched), plots.plot_flows({"now": branched})):
        line, branch = (container.lines[0] for container in bars(ax))
        assert list(line.get_xdata()) == [0, 2, 3]
        assert list(line.get_ydata()) == [input.value, sum_of.value, output.value]
        assert (list(branch.get_xdata()), list(branch.get_ydata())) == ([1], [inside.value])
        assert (branch.get_linestyle(), branch.get_markerfacecolor()) == ("None", "white")
        assert ax.get_xticklabels()[2].get_text() == "block (sum)"
    assert "inside a branch" in legend(plots.plot_flow(branched))


def test_flows_that_gain_a_row(flow):
    """A copy whose scale becomes zero is measured from then on. Catches a figure of the epochs that
    fails then, and a name that belongs to another point."""
    input, one, two, output = flow.layers
    before = ff.FisherFlow((input, replace(one, aliases=(two.name,)), output))
    for flows in ((before, flow), (flow, before)):
        ax = plots.plot_flows(dict(enumerate(flows)))
        assert [tick.get_text() for tick in ax.get_xticklabels()] == before.names
        assert heights(ax, 0) == heights(ax, 1) == [input.value, one.value, output.value]


def test_fractions_of_an_input_that_cannot_be_told_from_zero(tmp_path):
    """Catches a figure of shares of noise, and limits of an axis that are NaN."""
    unresolved = flow_of(number(0.02), number(6.35), stderr=0.04)
    ax = plots.plot_flows({0: unresolved}, fraction=True)
    assert all(math.isnan(height) for height in heights(ax, 0))
    ax.figure.savefig(tmp_path / "flow.png")


def test_curve_has_its_band(flow):
    layer = flow.layers[1]
    ax = plots.plot_curve(layer)
    (band,) = ax.collections
    J, error = layer.curve_J[:, 0, 0], layer.curve_stderr[:, 0, 0]
    ys = band.get_paths()[0].vertices[:, 1]
    assert ys.max() == pytest.approx(float((J + error).max()))
    assert list(ax.get_lines()[0].get_ydata()) == J.tolist()
    assert ax.get_title() == layer.name
    assert ax.get_xlabel() == "features k"


def test_training_marks_the_published_stop(history):
    """Catches a stop at the least validation error, one epoch early, or errors without J."""
    ax = training_plots.plot_training(history)
    assert points(ax)["published stop"] == ([2], pytest.approx([0.9]))
    assert points(ax)["least validation"][0] == [1]
    assert points(ax)["Cramér-Rao bound"][1] == [1, 1]
    assert heights(ax, 0) == [history[0].transmission] * 4
    assert lengths(ax) == pytest.approx([2 * history[0].transmission_error] * 4)
    assert not ax.texts
    assert training_plots.crossing_epoch(history) == 2
    assert training_plots.crossing_epoch(history[:2]) is None
    with pytest.raises(ValueError, match="history must hold at least one epoch, got none"):
        training_plots.plot_training([])


@pytest.mark.parametrize(("rule", "height"), [("crlb", 0.8), ("transmission", None), ("own", 1.0)])
def test_training_marks_the_stop_of_the_rule_that_ran(history, rule, height):
    """Best epoch 3, stopped in 5. Catches the published crossing (epoch 2) beside the stop of
    another rule, a star at the stop, and one on the curve of another rule."""
    ax = training_plots.plot_training(history, stop=Stop(rule, 5, 3, "why"))
    wanted = history[3].transmission if height is None else height
    assert points(ax)["best epoch"] == ([3], pytest.approx([wanted]))
    assert points(ax)[f"stop ({rule})"][0] == [5, 5]
    assert "published stop" not in points(ax)
    unknown = training_plots.plot_training(history, stop=Stop(rule, 5, None, "why"))
    assert "best epoch" not in points(unknown)


def test_the_legend_names_what_is_drawn(history, flow):
    """Catches entries of curves without a point, and a warning of a legend without entries (an
    error here)."""
    nan, share, bound = math.nan, "J$_{output}$ /", "Cramér-Rao bound"
    for record, wanted in (
        (epoch_of(0, nan, nan), []),
        (epoch_of(0, nan, nan, flow), [share]),
        (epoch_of(0, 2.0, nan), [bound, "training MSE"]),
        (epoch_of(0, nan, 2.0, flow), [bound, share, "validation MSE", "least validation"]),
    ):
        ax = training_plots.plot_training([record])
        named = legend(ax) if ax.get_legend() else []
        assert sorted(" ".join(name.split()[:2]) for name in named) == sorted(wanted)


def test_what_is_not_known_is_not_drawn(flow, history, tmp_path):
    """Catches a NaN among the points of measured epochs, which breaks the line, points at the wrong
    epoch, and a figure that needs a measurement or an error; an unknown error that is drawn as
    zero, or taken for a crossing or the least. An error above the axis is written down."""
    nan = math.nan
    ax = training_plots.plot_training([history[0], epoch_of(1, 1.1, 1.2), epoch_of(2, 0.9, 1.3)])
    assert heights(ax, 0) == [history[0].transmission]
    assert points(ax)["published stop"][0] == [2]
    assert points(ax)["least validation"][0] == [1]
    assert points(ax)["training MSE"][0] == [0, 1, 2]
    unknown = [epoch_of(0, 100, 120), epoch_of(1, nan, 1.5), epoch_of(2, 1.2, nan)]
    ax = training_plots.plot_training(unknown)
    assert not bars(ax)
    assert "published stop" not in points(ax)
    assert points(ax)["least validation"][0] == [1]
    assert [math.isfinite(y) for y in points(ax)["training MSE"][1]] == [True, False, True]
    assert ax.get_ylim() == (0, training_plots.CEILING)
    assert [text.get_text() for text in ax.texts] == ["↑ 120"]
    for known_by_nothing in (epoch_of(0, nan, nan, flow), epoch_of(0, nan, nan)):
        ax = training_plots.plot_training([known_by_nothing])
        assert not {"published stop", "least validation"} & set(points(ax))
        ax.figure.savefig(tmp_path / "figure.png")


def test_nothing_global_is_touched(flow, history, tmp_path):
    """Catches pyplot figures, changed settings, and axes of the user that are not drawn into."""
    import matplotlib.pyplot as plt

    before, open_figures = dict(matplotlib.rcParams), plt.get_fignums()
    for draw, shown in (
        (plots.plot_flow, flow),
        (plots.plot_flows, {0: flow}),
        (plots.plot_curve, flow.layers[0]),
        (training_plots.plot_training, history),
    ):
        given = plots.new_figure().add_subplot()
        assert draw(shown, given) is given
        draw(shown).figure.savefig(tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert dict(matplotlib.rcParams) == before
    assert plt.get_fignums() == open_figures


def test_missing_matplotlib_says_how_to_get_it(flow, monkeypatch):
    for name in [n for n in sys.modules if n.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(ImportError, match=r"pip install 'fisherfast\[plots\]'"):
        plots.plot_flow(flow)


# --- maps -----------------------------------------------------------------------------------------


def map_of(*values: float) -> ff.InformationMap:
    """A map [2, 3] of two parameters; the second is ten times the first."""
    J = torch.tensor(values, dtype=torch.float64).reshape(2, 3)
    both = torch.diag_embed(torch.stack([J, 10 * J], -1))
    return ff.InformationMap("conv", both, both)


def test_a_map_lies_over_its_picture():
    """Catches H and W exchanged, a map in its own pixels in a corner of the picture, a picture that
    is hidden, or whose rows are upside down, J of another parameter, and noise below zero that sets
    the scale."""
    picture = torch.arange(48.0).reshape(1, 6, 8).requires_grad_()
    ax = map_of(0.0, 1.0, 2.0, -9.0, math.nan, 4.0).plot(over=picture, parameter=1)
    below, above = ax.get_images()
    assert list(below.get_extent()) == list(above.get_extent()) == [-0.5, 7.5, 5.5, -0.5]
    assert below.origin == above.origin == "upper"
    assert torch.equal(torch.tensor(below.get_array()), picture[0].detach().double() / 47)
    assert above.get_array().filled(math.nan)[0].tolist() == [0.0, 10.0, 20.0]
    assert above.get_clim() == (0.0, 40.0)
    opacity = torch.tensor(above.get_alpha())
    expected = torch.tensor([[0.0, 0.25, 0.5], [0.0, 0.0, 1.0]], dtype=torch.float64)
    assert torch.allclose(opacity, 0.7 * expected)
    assert ax.figure.axes[1].get_ylabel() == "J of theta[1] at each position (1/theta²)"
    alone = map_of(*range(6)).plot()
    assert list(alone.get_images()[0].get_extent()) == [-0.5, 2.5, 1.5, -0.5]
    assert alone.get_images()[0].get_alpha() is None


def test_forms_of_a_picture():
    """Catches channels that are taken for rows, and numbers of a device or dtype that matplotlib
    does not draw."""
    grey = torch.rand(4, 5)
    colours = torch.stack([grey, grey.flip(0), grey.flip(1)])
    for given, expected in (
        (grey, grey),
        (grey[None], grey),
        (grey[..., None], grey),
        (grey.numpy(), grey),
        (grey.bfloat16(), grey.bfloat16()),
        (grey > 0.5, grey > 0.5),
        (colours, colours.movedim(0, 2)),
        (colours.movedim(0, 2), colours.movedim(0, 2)),
    ):
        drawn = torch.tensor(map_of(*range(6)).plot(over=given).get_images()[0].get_array())
        expected = expected.double()
        low, high = expected.aminmax()
        assert torch.allclose(drawn, (expected - low) / (high - low))
    assert not map_of(*range(6)).plot(over=torch.ones(4, 5)).get_images()[0].get_array().any()


def test_pictures_that_are_refused():
    """Catches a batch, or a picture of many channels, that is drawn as something else."""
    chart = map_of(*range(6))
    for given, error, text in (
        (torch.rand(7, 4, 5), ValueError, r"over must be a picture .*, got \[7, 4, 5\]: choose"),
        (torch.rand(2, 1, 4, 5), ValueError, r"over must be a picture .*, got \[2, 1, 4, 5\]"),
        (torch.rand(0, 5), ValueError, r"over must be a picture .*, got \[0, 5\]"),
        (torch.tensor([[math.nan]]), ValueError, "over must be finite, got NaN or infinity"),
        (torch.ones(4, 5) * 1j, TypeError, "over must be real, got torch.complex64"),
    ):
        with pytest.raises(error, match=text):
            chart.plot(over=given)
    with pytest.raises(ValueError, match="parameter must be below 2 and at least 0, got 2"):
        chart.plot(parameter=2)
    with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got 2"):
        chart.plot(alpha=2)
