"""The tables of docs/parameters.md, from the results that the benchmarks stored.

python benchmarks/report/parameter_tables.py [--results FILE] [--write]

With --write they take the place of what stands between their marks in the page, <!-- name --> and
<!-- end of name -->.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "parameters.json"
PAGE = ROOT / "docs" / "parameters.md"

ROUNDING = 1e-6  # errors below it are float32's or float64's
RIVALS = ("nngeometry", "BackPACK", "hooks", "vmap(grad), whole batch", "vmap(grad)")
MEGA = 1e6


def speed(results: dict[str, Any]) -> str:
    """Times of the diagonal beside those of others."""
    lines = [
        "| network | type | fisherfast | a training step | forward and backward | "
        + " | ".join(RIVALS)
        + " |",
        "|---" * (5 + len(RIVALS)) + "|",
    ]
    for row in results["diagonal"]["figures"]:
        seconds, against = row["seconds"], row["against"]
        times = (seconds[n] for n in ("fisherfast", "training step", "forward and backward"))
        rivals = (
            f"{against[rival]['ratio']:.2f} \N{MULTIPLICATION SIGN}" if rival in against else "none"
            for rival in RIVALS
        )
        cells = [row["network"], row["fisher_type"], *(f"{1e3 * t:.0f} ms" for t in times), *rivals]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def memory(results: dict[str, Any]) -> str:
    """Peak memory beside that of a step of SGD."""
    rows = results["diagonal_memory"]["figures"]
    ways = [way for way in rows[0]["over a step of SGD"] if way != "step, SGD"]
    lines = ["| width | a step of SGD | " + " | ".join(ways) + " |", "|---" * (2 + len(ways)) + "|"]
    for row in rows:
        over = row["over a step of SGD"]
        step = f"{row['bytes']['step, SGD'] / MEGA:.0f} MB"
        cells = [str(row["width"]), step, *(f"{over[w]:.2f}" if w in over else "" for w in ways)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def same(results: dict[str, Any]) -> str:
    """How far the same numbers are apart."""
    found: dict[str, list[float]] = {}
    for row in results["peers"]["figures"]["same"]:
        found.setdefault(row["peer"], []).append(row["error"])
    lines = ["| theirs | matrices compared | largest error of an entry |", "|---|---|---|"]
    lines += [f"| {peer} | {len(e)} | {max(e):.0e} |" for peer, e in found.items()]
    return "\n".join(lines)


def different(results: dict[str, Any]) -> str:
    """Networks on which not all libraries give the Fisher matrix."""
    rows = results["peers"]["figures"]["different"]
    names = list(rows[0]["errors"])
    lines = ["| network | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
    for row in rows:
        cells = [row["network"], *(_verdict(row["errors"][name]) for name in names)]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def _verdict(error: float | str) -> str:
    if isinstance(error, str):
        return error if error == "not a number" else "an error"
    return "right" if error < ROUNDING else f"wrong by {100 * error:.1f} %"


def batches(results: dict[str, Any]) -> str:
    """The squared mean gradient of a batch, over the truth."""
    lines = ["| batch size | squared mean gradient / F | fisherfast / F |", "|---|---|---|"]
    for row in results["peers"]["figures"]["squared mean gradient"]:
        wrong, ours = row["squared mean gradient / truth"], row["fisherfast / truth"]
        lines.append(f"| {row['batch']} | {wrong:.2f} | {ours:.2f} |")
    return "\n".join(lines)


def spectrum(results: dict[str, Any]) -> str:
    """Networks of a million parameters."""
    lines = [
        "| network | P | N | time of the spectrum | of the effective dimension | peak memory"
        " | effective rank"
        " | participation ratio | effective dimension |",
        "|---" * 9 + "|",
    ]
    for name, row in results["spectrum"]["figures"].items():
        if not isinstance(row, dict):
            continue
        seconds = row["seconds"]
        cells = [
            name,
            str(row["parameters"]),
            str(row["rows"]),
            f"{seconds['spectrum, all of it']:.0f} s",
            f"{seconds['effective dimension, all of it']:.0f} s",
            f"{row['peak memory in bytes'] / 1e9:.1f} GB",
            f"{row['effective rank']:.0f}",
            f"{row['participation ratio']:.0f}",
            f"{row['effective dimension']:.0f}",
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "peers, same": same,
    "peers, different": different,
    "peers, batches": batches,
    "diagonal": speed,
    "diagonal_memory": memory,
    "spectrum": spectrum,
}


def stored(results: dict[str, Any]) -> dict[str, str]:
    """Every table whose part is stored, by name."""
    return {
        name: table(results) for name, table in TABLES.items() if name.partition(",")[0] in results
    }


def written(page: str, tables: dict[str, str]) -> str:
    """A page with its tables put between their marks."""
    for name, table in tables.items():
        marks = f"<!-- {name} -->", f"<!-- end of {name} -->"
        between = f"{re.escape(marks[0])}.*?{re.escape(marks[1])}"
        text = "\n".join([marks[0], table, marks[1]])
        page = re.sub(between, lambda _, text=text: text, page, flags=re.DOTALL)  # type: ignore[misc]
    return page


def main() -> None:
    """Print every table whose part is stored, or write them into the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    tables = stored(json.loads(arguments.results.read_text()))
    if arguments.write:
        PAGE.write_text(written(PAGE.read_text(encoding="utf-8"), tables), encoding="utf-8")
        return
    for name, table in tables.items():
        print(f"{name}\n\n{table}\n")


if __name__ == "__main__":
    main()
