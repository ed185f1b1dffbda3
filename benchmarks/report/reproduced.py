"""The tables of docs/reproduce.md, from the numbers beside its figures.

    make paper ARGS="--out docs/figures/reproduce"
    python benchmarks/report/reproduced.py            # prints the page as it should be
    python benchmarks/report/reproduced.py --write    # writes it

A table stands between the comments `<!-- table NAME -->` and `<!-- end -->`.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "reproduce.md"
NUMBERS = DOCS / "figures" / "reproduce"
TABLE = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", flags=re.S)


def main() -> None:
    """Print the page with its tables made anew, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into docs/reproduce.md")
    page = filled(PAGE.read_text(encoding="utf-8"))
    if parser.parse_args().write:
        PAGE.write_text(page, encoding="utf-8")
    else:
        print(page, end="")


def filled(page: str) -> str:
    """The page with every table made from its JSON file."""
    return TABLE.sub(lambda found: f"{found[1]}{table(found[2])}\n{found[3]}", page)


def table(name: str) -> str:
    """The table of a figure in Markdown."""
    if name == "stopping":
        return _stopping([_numbers("fig10"), _numbers("fig11")])
    if name == "transmission":
        return _transmission(_numbers("transmission")["runs"])
    if name == "fig3":
        return _lift(_numbers("fig3")["points"])
    return _flow(_numbers(name)["points"])


def _lift(points: Sequence[dict[str, Any]]) -> str:
    header = ["lifted features", *(str(point["lifted"]) for point in points)]
    ours = [_value(point["J"], point["J_error"], 1) for point in points]
    theirs = [
        _value(point["J_published_lift"], point["J_published_lift_error"], 1) for point in points
    ]
    return _rows(
        header,
        ["published", *(f"{point['published']:.1f}" for point in points)],
        ["published lift, measured here", *theirs],
        ["dictionary of fisherfast", *ours],
    )


def _flow(points: Sequence[dict[str, Any]]) -> str:
    layers = list(dict.fromkeys(point["layer"] for point in points))
    rows = []
    for label in dict.fromkeys(point["published_epoch"] for point in points):
        row = [point for point in points if point["published_epoch"] == label]
        rows.append([f"published, {label}", *(f"{point['published']:.3f}" for point in row)])
        values = (_value(point["fraction"], point["fraction_error"], 3) for point in row)
        rows.append([f"here, epoch {row[0]['epoch']}", *values])
    return _rows(["J / J_input", *layers], *rows)


def _stopping(figures: Sequence[dict[str, Any]]) -> str:
    rows = []
    for numbers in figures:
        facts, (stop, end) = numbers["stopping"], numbers["points"]
        rows.append(
            [
                f"{numbers['task']} task",
                f"{facts['stop_epoch']}; {facts['least_validation_epoch']}",
                f"{100 * stop['value']:.1f} %{_published(stop)}",
                f"{100 * end['value']:.0f} %{_published(end)}",
            ]
        )
    header = ["", "epoch of the stop; of the least validation error"]
    return _rows([*header, "validation error above its minimum: at the stop", "at the end"], *rows)


def _published(point: dict[str, Any]) -> str:
    if "published_at_most" in point:
        return f" (published: at most {100 * point['published_at_most']:.0f} %)"
    return f" (published: {100 * point['published']:.0f} %)" if "published" in point else ""


def _transmission(runs: Sequence[dict[str, Any]]) -> str:
    rows = []
    for run in runs:
        loss, last = run["transmission"], run["epochs"][-1]
        rows.append(
            [
                f"{run['task']} task",
                f"{_value(loss['best'], loss['best_error'], 3)} (epoch {loss['best_epoch']})",
                f"{_value(loss['last'], loss['last_error'], 3)} (epoch {last['epoch']})",
                _value(last["training_output_fraction"], last["training_output_fraction_error"], 2),
            ]
        )
    header = ["J_output / J_input", "held-out, best", "held-out, at the end"]
    return _rows([*header, "training samples, at the end"], *rows)


def _numbers(name: str) -> dict[str, Any]:
    return json.loads((NUMBERS / f"{name}.json").read_text(encoding="utf-8"))


def _value(value: float, error: float, digits: int) -> str:
    return f"{value:.{digits}f} ± {error:.{digits}f}"


def _rows(header: Sequence[str], *rows: Sequence[str]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
