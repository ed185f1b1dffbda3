"""Tables as text and as HTML, and that of a flow."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence

from fisherfast.results.comparison import divides, unresolved_note
from fisherfast.results.layer import LayerFisher
from fisherfast.results.marginal import diagonal_text

HEADER = ["layer", "shape", "dim", "J", "+-", "lower", "J / J_input", "features", "status"]

LEFT_ALIGNED = ("layer", "shape", "features", "status", "most lost in", "parameter", "at")


def rows(
    layers: Sequence[LayerFisher], ratios: Mapping[str, tuple[float, float]]
) -> list[list[str]]:
    """Return the header and one row of text per layer.

    Args:
        layers: in execution order.
        ratios: J / J_input and its standard error by layer.
    """
    names = ", ".join(layers[0].parameter_names) if layers else ""
    table = [[f"J ({names})" if name == "J" and names else name for name in HEADER]]
    for layer in layers:
        fraction, error = ratios[layer.name]
        table.append(
            [
                " = ".join(_main_names(layer)),
                "x".join(map(str, layer.shape)) or "1",
                str(layer.dim),
                diagonal_text(layer.J),
                diagonal_text(layer.stderr),
                diagonal_text(layer.lower),
                with_error(fraction, error),
                f"{layer.feature_kind} {layer.features}",
                layer.status,
            ]
        )
    return table


def with_error(fraction: float, error: float) -> str:
    """Format a ratio of J with its error; "-" for NaN."""
    return "-" if math.isnan(fraction) else f"{fraction:.3f} +- {error:.3f}"


def footnotes(layers: Sequence[LayerFisher], source: str) -> list[str]:
    """Return a line with unit and source of the numbers, then a line for each note."""
    first = layers[0]
    step = ", ".join(f"{value:g}" for value in first.dtheta)
    per = "diagonal of J shown; " if first.parameters > 1 else ""
    if first.prior is not None:
        per += f"with a prior of {diagonal_text(first.prior)}; "
    how = f"dtheta {step}" if step else source
    lines = [f"J per unit of theta squared; {per}{how}; {first.samples} samples"]
    if not divides(first):
        lines.append(f"note: {unresolved_note(first)}")
    return lines + [f"note: {layer.name}: {note}" for layer in layers for note in layer.notes]


def aligned(table: Sequence[Sequence[str]]) -> list[str]:
    """Format aligned columns, a line per row."""
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    lines = []
    for row in table:
        cells = [
            cell.ljust(width) if name in LEFT_ALIGNED else cell.rjust(width)
            for name, cell, width in zip(table[0], row, widths, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def as_text(table: list[list[str]], below: Sequence[str] = ()) -> str:
    """Format aligned columns under a ruled header, the first row."""
    lines = aligned(table)
    lines.insert(1, "-" * max(map(len, lines)))
    return "\n".join([*lines, *below])


def as_html(table: list[list[str]], below: str = "") -> str:
    """Format an HTML table, for notebooks."""
    head, *body = (
        "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row)
        for row, tag in zip(table, ["th"] + ["td"] * len(table), strict=False)
    )
    lines = "".join(f"<tr>{cells}</tr>" for cells in body)
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
        f"<p>{html.escape(below)}</p>"
    )


def _main_names(layer: LayerFisher) -> list[str]:
    """Return the name, and for the output also the name of its layer."""
    return [layer.name, *layer.aliases[:1]] if layer.name == "output" else [layer.name]
