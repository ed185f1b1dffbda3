"""Printed tables of networks with branches: indented, folded, notes of one kind in one line."""

from __future__ import annotations

import io
import sys
from dataclasses import replace

import pytest
import torch
from support.training_histories import layer, number

import fisherfast as ff
from fisherfast.results import text
from fisherfast.results.table import notes

BLOCKS = 8


def row(name: str, J: float, *, cut: bool | None, **fields: object) -> ff.LayerFisher:
    return replace(layer(name, number(J), stderr=0.04), cut=cut, **fields)


def residual(blocks: int = BLOCKS) -> ff.FisherFlow:
    """A stem and blocks of three layers that are added to what goes around them."""
    rows = [row("input", 4.0, cut=True), row("stem", 3.5, cut=True, copies=("norm",))]
    for block in range(blocks):
        inside = [f"l.{block}.conv1", f"l.{block}.relu", f"l.{block}.conv2"]
        rows += [row(name, 1.0 + place, cut=False) for place, name in enumerate(inside)]
        end = {"aliases": (f"l.{block}",), "label": f"l.{block} (sum)"}
        rows.append(row(f"l.{block}.relu#2", 3.0, cut=True, **end))
    return ff.FisherFlow((*rows, row("output", 2.0, cut=True, aliases=("fc",))))


def first_cells(flow: ff.FisherFlow, **options: bool) -> list[str]:
    return [cells[0] for cells in flow.table(**options)[1:]]


def test_long_tables_fold_their_blocks():
    """Catches a page of rows, a cut that is folded away, a row that is lost from the full table,
    branches that are not told from cuts, and a short table that is folded."""
    flow = residual()
    folded = [f"l.{block} (sum, 3 rows)" for block in range(BLOCKS)]
    assert first_cells(flow) == ["input", "stem = norm", *folded, "output = fc"]
    assert len(str(flow).splitlines()) == 15  # header, rule, eleven rows, unit, what is folded
    assert "24 rows of branches are folded: flow.table(full=True) has all" in str(flow)
    full = first_cells(flow, full=True)
    assert len(full) == len(flow)
    assert full[2:6] == ["  l.0.conv1", "  l.0.relu", "  l.0.conv2", "l.0 (sum)"]
    short = residual(blocks=2)
    assert first_cells(short) == first_cells(short, full=True)
    assert "folded" not in str(short)


def test_branches_that_end_in_no_cut_of_their_own():
    """The coarse side of a U-Net. Catches one row for blocks that have nothing in common, a range
    that is not that of the block, and a row on its own that is folded."""
    inside = [
        row(f"{block}.{n}", n + 1.0, cut=False) for block in ("down", "up") for n in range(12)
    ]
    flow = ff.FisherFlow(
        (
            row("input", 4.0, cut=True),
            *inside,
            row("pool", 1.0, cut=False),
            row("output", 2.0, cut=True),
        )
    )
    assert first_cells(flow) == ["input", "  down", "  up", "  pool", "output"]
    header, _, down, *_ = flow.table()
    cells = dict(zip(header, down, strict=True))
    assert (cells["shape"], cells["J"], cells["J / J_input"]) == (
        "12 rows",
        "1.000 to 12.000",
        "0.250 to 3.000",
    )


def test_html_is_indented_and_has_all_notes():
    """Catches spaces that HTML drops, and footnotes of the text that notebooks do not show."""
    html = residual(blocks=2)._repr_html_()
    assert "<td>&nbsp;&nbsp;l.0.conv1</td>" in html
    assert "<td>l.0 (sum)</td>" in html
    noted = row("input", 4.0, cut=True, notes=("a <b> note",))
    assert "<br>note: input: a &lt;b&gt; note" in ff.FisherFlow((noted,))._repr_html_()


def test_notes_of_one_kind_are_one_line():
    """Catches a line per layer, numbers of the first layer for all, a number inside of a name that
    is taken for one that differs, and kinds that are mixed up."""
    told = [
        ("fc1", "3 constant features dropped"),
        ("fc2", "17 constant features dropped"),
        ("fc3", "5 constant features dropped"),
        ("fc4", "5 constant features dropped"),
        ("fc4", "fc5, a function of this layer, has more: flow.tightened() applies it here"),
        ("fc5", "fc6, a function of this layer, has more: flow.tightened() applies it here"),
        ("fc6", "float32 products do not carry more"),
    ]
    layers = [row(name, 1.0, cut=True, notes=(note,)) for name, note in told]
    assert notes(layers) == [
        "note: 4 layers (fc1, fc2, fc3, ...): 3 to 17 constant features dropped",
        "note: 2 layers (fc4, fc5): a later layer, a function of this layer, has more:"
        " flow.tightened() applies it here",
        "note: fc6: float32 products do not carry more",
    ]


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0.0, "0.000"),
        (64.4512, "64.451"),
        (0.0123, "0.012"),
        (0.00004, "4.0e-05"),
        (-0.00004, "-4.0e-05"),
        (1.234e8, "1.23e+08"),
        (float("nan"), "-"),
        (float("inf"), "inf"),
    ],
)
def test_numbers(value, shown):
    """Catches 0.000 for a small number, and a row of digits that are noise."""
    assert text.number(value) == shown


def test_symbols_that_standard_output_cannot_show(monkeypatch):
    """Catches a UnicodeEncodeError from `print(flow)` under an ASCII locale."""
    for encoding, unit in (
        ("ascii", "theta squared"),
        ("utf-8", "θ²"),
        ("latin-1", "theta squared"),
    ):
        output = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", output)
        print(residual())
        output.flush()
        assert f"J per unit of {unit};" in output.buffer.getvalue().decode(encoding)


def test_names_of_sums_and_copies_come_back_from_files(tmp_path):
    flow = residual(blocks=1)
    flow.save(tmp_path / "flow.json")
    back = ff.FisherFlow.load(tmp_path / "flow.json")
    assert str(back) == str(flow)
    assert back["l.0 (sum)"] is back["l.0"] is back["l.0.relu#2"]
    assert torch.equal(back["l.0"].J, flow["l.0"].J)
