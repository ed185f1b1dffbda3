"""Figures of a training run, over epochs. They are drawn as those of `results.plots`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from fisherfast.results.flow import FisherFlow
from fisherfast.results.plots import BLUE, GREEN, GREY, VERMILION, axes_or_new, thinned, tidy
from fisherfast.training.record import EpochRecord, Stop

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CEILING = 2.5  # upper end of the axis of errors: values near 1 matter, untrained ones are far above
_SHARE = r"J$_{output}$ / J$_{input}$"


def measured_flows(history: Sequence[EpochRecord]) -> dict[int, FisherFlow]:
    """Return flows by epoch, at most twelve, evenly spaced, with the first and the last.

    Args:
        history: the epochs in their order.

    Example:
        >>> from fisherfast.training.plots import measured_flows
        >>> measured_flows([])
        {}
    """
    flows = [(record.epoch, record.flow) for record in history if record.flow is not None]
    return dict(thinned(flows))


def plot_training(
    history: Sequence[EpochRecord], ax: Axes | None = None, *, stop: Stop | None = None
) -> Axes:
    """Plot transmission, and the errors in units of the Cramer-Rao bound, over epochs.

    It shows J_output / J_input with error bars, and training and validation error (mean square
    error times J_input), as far as they are known. No unbiased estimate is below the line at 1:
    with a training error there the network memorises, and the published rule stops. The ring marks
    the least validation error. The axis ends at 2.5; an arrow with a number marks a larger error.

    Args:
        history: the epochs in their order, as `FisherMonitor.history`.
        ax: axes to draw into; None makes a new figure.
        stop: where a rule has stopped, as `FisherMonitor.stop`: a line, and a star at the best
            epoch. None marks the epoch at which the published rule would stop.

    Returns:
        The axes.

    Raises:
        ValueError: the history is empty.
        ImportError: matplotlib is not installed.
    """
    if not history:
        raise ValueError("history must hold at least one epoch, got none")
    ax = axes_or_new(ax)
    from matplotlib.ticker import MaxNLocator

    bound = ax.axhline(1, color=GREY, ls="--", lw=1)
    measured = [entry for entry in history if not math.isnan(entry.transmission)]
    share = [entry.transmission for entry in measured]
    if measured:
        ax.errorbar(
            [entry.epoch for entry in measured],
            share,
            [entry.transmission_error for entry in measured],
            color=BLUE,
            marker="o",
            ms=4,
            capsize=3,
            label=_SHARE,
        )
    for name, levels, color, marker in (
        ("training", [entry.train_level for entry in history], VERMILION, "s"),
        ("validation", [entry.val_level for entry in history], GREEN, "^"),
    ):
        if not all(map(math.isnan, levels)):
            bound.set_label("Cramér-Rao bound")
            label = rf"{name} MSE $\times$ J$_{{input}}$"
            epochs = [entry.epoch for entry in history]
            ax.plot(epochs, levels, color=color, marker=marker, ms=4, label=label)
    _mark_stop(ax, history, stop)
    _mark_least_error(ax, history)
    _limit_errors(ax, history, lowest=min([0.0, *share]))
    ax.set_xlabel("epoch")
    ax.set_ylabel("in units of J$_{input}$")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(ax)
    if ax.get_legend_handles_labels()[0]:
        ax.legend(frameon=False, fontsize="small")
    return ax


def crossing_epoch(history: Sequence[EpochRecord]) -> int | None:
    """Find the first epoch with training MSE * J_input <= 1, where the published rule stops, or
    None.

    Reference: Weimar et al., Phys. Rev. X 15, 031072 (2025).
    """
    return next((entry.epoch for entry in history if entry.train_level <= 1), None)


def _mark_stop(ax: Axes, history: Sequence[EpochRecord], stop: Stop | None) -> None:
    """Mark the stop of the rule that ran, or else that of the published rule."""
    level = {entry.epoch: entry.train_level for entry in history}
    share = {entry.epoch: entry.transmission for entry in history}
    if stop is None:
        crossing = crossing_epoch(history)
        if crossing is not None:
            ax.axvline(crossing, color=VERMILION, lw=1, ls=":", alpha=0.8)
            _star(ax, crossing, level[crossing], VERMILION, "published stop")
        return
    read, color = {"crlb": (level, VERMILION), "transmission": (share, BLUE)}.get(
        stop.rule, ({}, GREY)
    )
    ax.axvline(stop.epoch, color=color, lw=1, ls=":", alpha=0.8, label=f"stop ({stop.rule})")
    if stop.best_epoch is not None:
        height = read.get(stop.best_epoch, math.nan)
        _star(ax, stop.best_epoch, 1.0 if math.isnan(height) else height, color, "best epoch")


def _star(ax: Axes, epoch: int, height: float, color: str, label: str) -> None:
    ax.plot([epoch], [height], "*", color=color, ms=14, mec="white", label=label)


def _mark_least_error(ax: Axes, history: Sequence[EpochRecord]) -> None:
    """Mark the least validation error with a ring."""
    known = [(e.val_level, e.epoch) for e in history if not math.isnan(e.val_level)]
    if known:
        level, epoch = min(known)
        ax.plot([epoch], [level], "o", color=GREEN, mfc="none", ms=10, label="least validation MSE")


def _limit_errors(ax: Axes, history: Sequence[EpochRecord], *, lowest: float) -> None:
    """Limit the axis from `lowest` to at most `CEILING`; an arrow marks the first validation error
    above."""
    ax.set_ylim(bottom=lowest, top=min(CEILING, ax.get_ylim()[1]))
    above = next((entry for entry in history if entry.val_level > CEILING), None)
    if above is not None:
        note = f"\N{UPWARDS ARROW} {above.val_level:.3g}"
        ax.text(above.epoch, CEILING, note, ha="center", va="top", color=GREEN, fontsize="small")
