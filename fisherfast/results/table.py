"""Tables as text and as HTML, and that of a flow."""

from __future__ import annotations

import html
import itertools
import re
from collections.abc import Mapping, Sequence

from fisherfast.results.comparison import divides, unresolved_note
from fisherfast.results.layer import LayerFisher
from fisherfast.results.text import diagonal_text, error_diagonal, number, theta, with_error

HEADER = ["layer", "shape", "dim", "J", "+-", "lower", "J / J_input", "features", "status"]

LEFT_ALIGNED = ("layer", "shape", "features", "status", "most lost in", "parameter", "at")

FOLD_ABOVE = 24
"""Rows of a table in which branches are folded: more than a screen shows."""

NAMED = 3
"""Layers that a note for several of them names."""

VARIES = re.compile(
    r"(\S+(?=, a function of this layer)|(?<=tightened by )\S+|'[^']*'"
    r"|(?<![\w.])-?\d+(?:\.\d+)?(?:e[+-]?\d+)?(?!\w))"
)
"""What differs between notes of the same kind: other layers, names and numbers."""

BINS = re.compile(r" \(bin [\d, ]+\)$")
"""Bins of one layer, which the note for several leaves out."""


def rows(
    layers: Sequence[LayerFisher],
    ratios: Mapping[str, tuple[float, float]],
    *,
    full: bool = True,
) -> list[list[str]]:
    """Return the header and one row of text per layer; layers that are no cut are indented.

    Args:
        layers: in execution order.
        ratios: J / J_input and its standard error by layer.
        full: False folds the branches of a long table, see `folded`.
    """
    names = ", ".join(layers[0].parameter_names) if layers else ""
    table = [[f"J ({names})" if name == "J" and names else name for name in HEADER]]
    for block, inside in [("", [layer]) for layer in layers] if full else folded(layers):
        layer = inside[-1]
        if layer.cut is False and len(inside) > 1:
            table.append(_folded_row(block, inside, ratios))
            continue
        fraction, error = ratios[layer.name]
        table.append(
            [
                ("  " if layer.cut is False else "") + _title(layer, len(inside) - 1),
                "x".join(map(str, layer.shape)) or "1",
                str(layer.dim),
                diagonal_text(layer.J),
                error_diagonal(layer.stderr),
                diagonal_text(layer.lower),
                with_error(fraction, error),
                f"{layer.feature_kind} {layer.features}",
                layer.status,
            ]
        )
    return table


def folded(layers: Sequence[LayerFisher]) -> list[tuple[str, list[LayerFisher]]]:
    """Fold the branches of a long table: neighbouring layers of a block share one row. If the block
    ends in a cut, that is the row of the cut.

    Returns:
        For each row the block and its layers, the last of which has the numbers of a cut's row.
    """
    if len(layers) <= FOLD_ABOVE:
        return [("", [layer]) for layer in layers]
    found: list[tuple[str, list[LayerFisher]]] = []
    for is_branch, run in itertools.groupby(layers, lambda layer: layer.cut is False):
        members = list(run)
        if not is_branch:
            if found and found[-1][0] in (members[0].name, *members[0].aliases):
                found[-1][1].append(members.pop(0))
            found += [("", [layer]) for layer in members]
            continue
        paths = [_modules(layer) for layer in members]
        depth = len(_shared(paths)) or 1
        named = zip((".".join(path[:depth]) for path in paths), members, strict=True)
        for block, group in itertools.groupby(named, lambda pair: pair[0]):
            found.append((block, [layer for _, layer in group]))
    return found


def footnotes(layers: Sequence[LayerFisher], source: str) -> list[str]:
    """Return a line with unit and source of the numbers, one on what is folded, then a line for
    each kind of note."""
    first = layers[0]
    step = ", ".join(f"{value:g}" for value in first.dtheta)
    per = "diagonal of J shown; " if first.parameters > 1 else ""
    if first.prior is not None:
        per += f"with a prior of {diagonal_text(first.prior)}; "
    how = f"dtheta {step}" if step else source
    lines = [f"J per unit of {theta('²')}; {per}{how}; {first.samples} samples"]
    hidden = len(layers) - len(folded(layers))
    if hidden:
        lines.append(f"{hidden} rows of branches are folded: flow.table(full=True) has all")
    if not divides(first):
        lines.append(f"note: {unresolved_note(first)}")
    return lines + notes(layers)


def notes(layers: Sequence[LayerFisher]) -> list[str]:
    """Return one line for each kind of note, with the layers that have it and the range of its
    numbers."""
    kinds: dict[str, tuple[list[str], list[str]]] = {}
    for layer in layers:
        for note in layer.notes:
            kind = VARIES.sub("#", BINS.sub("", note))
            names, texts = kinds.setdefault(kind, ([], []))
            names.append(_label(layer))
            texts.append(note)
    return [f"note: {_who(names)}: {_common(texts)}" for names, texts in kinds.values()]


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


def as_html(table: list[list[str]], below: Sequence[str] = ()) -> str:
    """Format an HTML table, for notebooks."""
    head, *body = (
        "".join(f"<{tag}>{_cell(cell)}</{tag}>" for cell in row)
        for row, tag in zip(table, ["th"] + ["td"] * len(table), strict=False)
    )
    lines = "".join(f"<tr>{cells}</tr>" for cells in body)
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table>"
        f"<p>{'<br>'.join(map(html.escape, below))}</p>"
    )


def _cell(text: str) -> str:
    """Escape a cell; the spaces that indent it stay."""
    indent = len(text) - len(text.lstrip(" "))
    return "&nbsp;" * indent + html.escape(text[indent:])


def _folded_row(
    block: str, layers: Sequence[LayerFisher], ratios: Mapping[str, tuple[float, float]]
) -> list[str]:
    J = [float(layer.J) for layer in layers] if layers[0].parameters == 1 else []
    status = ", ".join(dict.fromkeys(layer.status for layer in layers))
    shares = [ratios[layer.name][0] for layer in layers]
    return [f"  {block}", f"{len(layers)} rows", "", _range(J), "", "", _range(shares), "", status]


def _range(values: Sequence[float]) -> str:
    low, high = (min(values), max(values)) if values else (0.0, 0.0)
    return f"{number(low)} to {number(high)}" if low < high else ""


def _title(layer: LayerFisher, inside: int) -> str:
    """Return the name of a row: with the other names of the same numbers, and the rows folded."""
    if layer.name == "output":
        return " = ".join([layer.name, *layer.aliases[:1]])
    title = " = ".join([_label(layer), *layer.copies])
    if not inside:
        return title
    sum_of = title.removesuffix(" (sum)")
    return f"{sum_of} ({'' if sum_of == title else 'sum, '}{inside} rows)"


def _label(layer: LayerFisher) -> str:
    return layer.label or layer.name


def _modules(layer: LayerFisher) -> list[str]:
    """Return the path of the module that a layer is in; its own name at the top."""
    path = re.split(r"[/#]", layer.name)[0].split(".")
    return path[:-1] or path


def _shared(paths: Sequence[Sequence[str]]) -> list[str]:
    """Return what all paths begin with."""
    shared = []
    for parts in zip(*paths, strict=False):
        if len(set(parts)) > 1:
            break
        shared.append(parts[0])
    return shared


def _who(names: Sequence[str]) -> str:
    if len(names) == 1:
        return names[0]
    more = [] if len(names) <= NAMED else ["..."]
    return f"{len(names)} layers ({', '.join([*names[:NAMED], *more])})"


def _common(texts: Sequence[str]) -> str:
    """Join notes of the same kind into one."""
    if len(texts) > 1:
        texts = [BINS.sub("", text) for text in texts]
    split = [VARIES.split(text) for text in texts]
    return "".join(
        parts[0] if place % 2 == 0 else _varying(list(dict.fromkeys(parts)))
        for place, parts in enumerate(zip(*split, strict=True))
    )


def _varying(words: Sequence[str]) -> str:
    if len(words) == 1:
        return words[0]
    try:
        ordered = sorted(words, key=float)
    except ValueError:
        return "'...'" if words[0].startswith("'") else "a later layer"
    return f"{ordered[0]} to {ordered[-1]}"
