"""The figure of a spectrum."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fisherfast.plots import BLUE, GREY, VERMILION, new_figure, tidy

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from fisherfast.parameters.spectrum import Spectrum

__all__ = ["plot_spectrum"]


def plot_spectrum(
    spectrum: Spectrum, ax: Axes | None = None, *, label: str | None = None, color: Any = BLUE
) -> Axes:
    """Eigenvalues against their number, with the effective rank and the participation ratio.

    Args:
        spectrum: what is drawn.
        ax: axes to draw into; None makes a new figure.
        label: for the legend.
        color: any matplotlib colour.

    Returns:
        The axes.

    Raises:
        ImportError: matplotlib is not installed.
    """
    if ax is None:
        ax = new_figure().add_subplot()
    values = spectrum.eigenvalues.tolist()
    name = label or f"{spectrum.rank} of {spectrum.parameters} eigenvalues"
    ax.plot(range(1, len(values) + 1), values, label=name, color=color)
    marks = (
        ("effective rank", spectrum.effective_rank, VERMILION),
        ("participation ratio", spectrum.participation_ratio, GREY),
    )
    for what, place, shade in marks:
        if place == place:  # NaN where only the largest eigenvalues are known
            ax.axvline(place, label=f"{what} {place:.3g}", color=shade, lw=1)
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.set_xlabel("direction of the parameters, stiffest first")
    ax.set_ylabel("eigenvalue of the Fisher matrix (1/w²)")
    ax.legend(frameon=False, fontsize="small")
    tidy(ax)
    return ax
