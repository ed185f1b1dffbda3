"""The speed table and figure of docs/benchmarks.md, from the results that `make bench` stored.

python benchmarks/report/tables.py --table [--results benchmarks/results/cpu.json]
python benchmarks/report/tables.py --figure [--to docs/figures/performance.png]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "cpu.json"
FIGURE = ROOT / "docs" / "figures" / "performance.png"

TORCH, BY_HAND, PLAIN = "torch", "by hand", "plain"  # families of contenders, see `harness`
DTYPES = ("float32", "float64")
RATIO_TICKS = (0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200)
TIMES = "\N{MULTIPLICATION SIGN}"
Row = dict[str, Any]


def table(results: dict[str, Any]) -> str:
    """Markdown: times faster than the best of torch, and the share of what the machine can do."""
    lines = ["| what | size | float32 | float64 |", "|---|---|---|---|"]
    lines += solve_lines(results["fisher_solve"]["figures"]) if "fisher_solve" in results else []
    for row in figures(results, "moments"):
        groups = f", {row['groups']} groups" if row["groups"] > 1 else ""
        lines.append(line("`moments`", f"{row['rows']} rows, d = {row['d']}{groups}", cell(row)))
    for row in figures(results, "spatial_moments"):
        size = f"{row['shape']}, {row['layout'].replace('_', ' ')}"
        lines.append(line("`spatial_moments`", size, f"{cell(row)}; {memory(row)}"))
    for row in figures(results, "gradient_squares"):
        lines.append(line("`gradient_squares`", gradient_size(row), cell(row)))
    for row in figures(results, "curve"):
        lines.append(curve_line(row))
    lines += [jvp_line(row) for row in figures(results, "jvp")]
    lines += [memory_line(row) for row in figures(results, "dual_memory")]
    lines += [dual_line(row) for row in figures(results, "dual_ops")]
    return "\n".join([*lines, "", footnote(results)])


def figures(results: dict[str, Any], part: str) -> list[Row]:
    """Rows of a part; none when it was not run."""
    return results[part]["figures"] if part in results else []


def line(*cells: str) -> str:
    """A row of the table; the last columns stay empty."""
    return "| " + " | ".join([*cells, *[""] * (4 - len(cells))]) + " |"


def solve_lines(rows: list[Row]) -> list[str]:
    """One line per size, one column per dtype."""
    sizes = dict.fromkeys((row["d"], row["systems"]) for row in rows)
    lines = []
    for dim, systems in sizes:
        found = {r["dtype"]: r for r in rows if (r["d"], r["systems"]) == (dim, systems)}
        cells = [cell(found[dtype]) if dtype in found else "" for dtype in DTYPES]
        lines.append(
            line("`fisher_solve`", f"d = {dim}, {systems} system{'s' * (systems > 1)}", *cells)
        )
    return lines


def gradient_size(row: Row) -> str:
    """A layer: 64 x [16, 32, 32] to 16 channels, 3 x 3."""
    layer = row["layer"]
    image = [layer["inputs"], layer["size"], layer["size"]]
    kernel = f"{layer['kernel']} x {layer['kernel']}"
    text = f"{layer['samples']} {TIMES} {image} to {layer['outputs']} channels, {kernel}"
    return text + (", depthwise" if layer["groups"] > 1 else "")


def cell(row: Row) -> str:
    """Ratios, then the share of the limit: 12.3 x (by hand 1.9 x), 45 % of loads."""
    against = row["against"]
    text = f"{number(against[TORCH]['ratio'])} {TIMES}" if TORCH in against else "no correct rival"
    if BY_HAND in against:
        text += f" (by hand {number(against[BY_HAND]['ratio'])} {TIMES})"
    share, limit = best_share(row)
    return f"{text}, {share:.0%} of {limit}"


def number(ratio: float) -> str:
    """Two digits."""
    return f"{ratio:.0f}" if ratio >= 9.95 else f"{ratio:.1f}"


def best_share(row: Row) -> tuple[float, str]:
    """The share of the limit that is nearer, and its name."""
    limits = row["limits"]
    return max(limits["share of copy"], limits["share of gemm"]), limits["limit"]


def memory(row: Row) -> str:
    """Extra memory of ours and of the fastest of torch."""
    extra = row["extra memory / input"]
    text = f"extra memory {extra['fisherfast']:.0%} of the input"
    best = row["against"].get(TORCH, {}).get("best", "").removesuffix(", 1 thread")
    return f"{text} ({extra[best]:.0%} in torch)" if best in extra else text


def curve_line(row: Row) -> str:
    """The curve against the published loop."""
    ours, loop = row["fisherfast"], row["published loop"]
    what = f"J(k) to {row['features'][-1]} features, {row['problem']}"
    size = f"{row['samples per condition']} samples per condition, d = {row['d']}"
    text = (
        f"{number(row['ratio'])} {TIMES} the published loop ({ours['seconds']:.2f} s, "
        f"{loop['seconds']:.1f} s); J / I {estimate(ours)}, loop {estimate(loop)}"
    )
    return line(what, size, text)


def jvp_line(row: Row) -> str:
    """ff.jvp against forward mode of torch, in forward passes of the same layout and of the
    fastest."""
    passes, ratio = row["passes / (1 + P)"], row["ratio by layout"]
    text = f"{rival(row)}, {passes['contiguous']:.2f} (1 + P) forward passes"
    if "channels last" in ratio and "channels last" in passes:
        last = passes["channels last"]
        text += f"; channels last {number(ratio['channels last'])} {TIMES}, {last:.2f} (1 + P)"
    text += f"; {passes['of the fastest']:.2f} (1 + P) of the fastest layout"
    return line("`ff.jvp`", f"{row['network']} {row['shape']}, P = {row['P']}", text)


def rival(row: Row) -> str:
    """Ratio to the fastest way of torch, with its name: 2.1 x (vmap of jvp)."""
    best = row["against"].get(TORCH)
    return f"{number(best['ratio'])} {TIMES} ({best['best']})" if best else "no correct rival"


def memory_line(row: Row) -> str:
    """Peak memory in those of 1 + P forward passes."""
    passes = row["passes / (1 + P)"]
    text = ", ".join(f"{way} {share:.2f}" for way, share in passes.items() if share is not None)
    size = f"{row['network']} {row['shape']}, P = {row['P']}"
    return line("peak memory / (1 + P) forward passes", size, text)


def dual_line(row: Row) -> str:
    """A fused dual op: against torch, against 1 + P plain ops, share of a copy."""
    limits, plain_ops = row["limits"], row["against"][PLAIN]["ratio"]
    text = (
        f"{rival(row)}, {number(plain_ops)} {TIMES} plain op on 1 + P slices, "
        f"{limits['share of copy']:.0%} of torch's copy, "
        f"{limits['share of the fastest copy']:.0%} of the fastest"
    )
    return line(f"dual {row['op']}", str(row["shape"]), text)


def estimate(entry: Row) -> str:
    """J / I and its standard error."""
    error = entry["stderr"] * entry["J / I"] / entry["J"]
    return f"{entry['J / I']:.3f} ± {error:.3f}"


def footnote(results: dict[str, Any]) -> str:
    """How to read the table, and what it was measured on."""
    m = next(iter(results.values()))["machine"]
    machine = f"{m['processor']}, {m['threads']} threads, torch {m['torch']}, {m['compiler']}"
    copies = (
        "*Dual* ops: share of the speed of torch's own copy and of the fastest copy; above 100% "
        "where the op writes around the caches and the copy does not. "
    )
    return (
        f"12 {TIMES}: 12 times faster than the fastest torch code with correct results (*by hand*: "
        "than a Cholesky factorisation written in torch operations over the whole batch). "
        "Percentages: share of the machine's own limit, which is the bandwidth of a copy (*loads*) "
        "or the speed of a matrix product (*arithmetic*), whichever is closer. "
        + (copies if "dual_ops" in results else "")
        + f"{machine} ({m['simd']}), commit {m['commit']}."
    )


# --- figure --------------------------------------------------------------------------------------


def figure(results: dict[str, Any], target: Path) -> None:
    """Left: ratio to torch against d. Right: share of the nearer limit."""
    from fisherfast.results.plots import DPI, new_figure

    canvas = new_figure(9.5, 4.0)
    ratio_axes, share_axes = canvas.subplots(1, 2)
    draw_ratios(ratio_axes, results["fisher_solve"]["figures"])
    draw_shares(share_axes, results["fisher_solve"]["figures"])
    for axes in (ratio_axes, share_axes):
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(plain)
        axes.set_xlabel("features d")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", lw=0.8)
        axes.set_axisbelow(True)
        axes.legend(frameon=False, fontsize="small")
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(target, dpi=DPI)


def draw_ratios(axes: Any, rows: list[Row]) -> None:
    """Times faster than torch, and than torch operations by hand, for the batches."""
    from matplotlib.ticker import NullLocator

    from fisherfast.results.plots import GREY

    for dtype, color in colours().items():
        for family, style, label in (
            (TORCH, "-o", dtype),
            (BY_HAND, ":s", f"{dtype}, against a factorisation by hand"),
        ):
            points = [
                (row["d"], row["against"][family]["ratio"])
                for row in batches(rows, dtype)
                if family in row["against"]
            ]
            if points:
                axes.plot(*zip(*points, strict=True), style, color=color, ms=5, label=label)
    axes.axhline(1, color=GREY, ls="--", lw=1)
    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(NullLocator())
    low, high = axes.get_ylim()
    axes.set_yticks([tick for tick in RATIO_TICKS if low <= tick <= high])
    axes.yaxis.set_major_formatter(plain)
    axes.set_ylabel("times faster than the best of torch")
    axes.set_title("fisher_solve, batches, P = 2", fontsize="medium")


def plain(value: float, _: int) -> str:
    """A tick in plain digits."""
    return f"{value:g}"


def draw_shares(axes: Any, rows: list[Row]) -> None:
    """The share of the nearer limit; filled for loads, open for arithmetic."""
    for dtype, color in colours().items():
        chosen = batches(rows, dtype)
        shares = [best_share(row) for row in chosen]
        dims = [row["d"] for row in chosen]
        axes.plot(dims, [share for share, _ in shares], "-", color=color, lw=1)
        for limit, fill in (("loads", color), ("arithmetic", "white")):
            points = [(d, s) for d, (s, name) in zip(dims, shares, strict=True) if name == limit]
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    "o",
                    color=color,
                    mfc=fill,
                    label=f"{dtype}, limit: {limit}",
                )
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_ylabel("share of the machine's limit")
    axes.set_title("loads: of a copy; arithmetic: of a matrix product", fontsize="medium")


def batches(rows: list[Row], dtype: str) -> list[Row]:
    """For each d the row with the most systems, by d."""
    largest: dict[int, Row] = {}
    for row in rows:
        if row["dtype"] == dtype:
            known = largest.setdefault(row["d"], row)
            largest[row["d"]] = max(known, row, key=lambda r: r["systems"])
    return [largest[dim] for dim in sorted(largest)]


def colours() -> dict[str, str]:
    """One per dtype."""
    from fisherfast.results.plots import BLUE, VERMILION

    return dict(zip(DTYPES, (BLUE, VERMILION), strict=True))


def main() -> None:
    """Print the table, draw the figure."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table")
    parser.add_argument("--figure", action="store_true", help="draw the figure")
    parser.add_argument("--to", type=Path, default=FIGURE, help="where the figure goes")
    options = parser.parse_args()
    if not (options.table or options.figure):
        parser.error("--table or --figure must be given, got neither")
    results = json.loads(options.results.read_text())
    if options.table:
        print(table(results))
    if options.figure:
        figure(results, options.to)


if __name__ == "__main__":
    main()
