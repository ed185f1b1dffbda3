"""The stored figures of validation.py as the accuracy table of docs/benchmarks.md."""

from __future__ import annotations

from typing import Any

from benchmarks.accuracy.validation_derivatives import IMAGE_SEEDS, MORE_SCORE_SEEDS, SCORE_SEEDS

Row = tuple[str, str, str]
"""What, the truth, what was measured."""
WAYS = ("rule", "fallback", "failed")  # how an operation on tangents is served


def table(results: dict[str, Any]) -> str:
    """The stored figures as a Markdown table."""
    rows = [("what", "truth", "measured")]
    for name, r in results["seeds"]["figures"].items():
        lower = sum(r["lower / J"]) / len(r["lower / J"])
        text = f"{r['mean J / I']:.3f} ± {r['stderr / I'] / 5**0.5:.3f}; lower / J {lower:.2f}"
        rows.append((f"J / I, {name}, T = 100 000, mean of 5 seeds", "1", text))
    for name, r in results["bias"]["figures"].items():
        ours, wrong, naive = (r[key] for key in ("k_eff", "classical", "naive"))
        text = (
            f"{ours[0]:.1f} ± {ours[1]:.1f} (classical {wrong[0]:.1f}, uncorrected {naive[0]:.1f})"
        )
        label, truth = name.split(", I = ")
        rows.append((f"mean J, few samples: Gaussian {label}", truth, text))
    for name, r in results["coverage"]["figures"].items():
        rows.append((f"coverage of J ± 1.96 stderr, {name}", "95 %", f"{r['coverage']:.1%}"))
    rows += coverage_rows(results)
    last = list(results["figure3"]["figures"].items())[-1]
    text = f"{last[1][0]:.1f} ± {last[1][1]:.1f} (published 97.7)"
    rows.append((f"published figure 3, {last[0]} lifted features, T = 20 000", "100", text))
    chained = results["chain"]["figures"]["output"]
    text = f"{chained[0]:.2f} ± {chained[2]:.2f} (linear {chained[1]:.2f})"
    rows.append(("J / I after six invertible leaky-ReLU layers", "1", text))
    rows += derivative_rows(results)
    ratios = []
    for small, large in (r.values() for r in results["memory"]["figures"].values()):
        ratios.append(f"{large / small:.2f}")
    what = "peak memory, 10^6 over 10^4 samples (two conditions, tangents, scores)"
    rows.append((what, "1", ", ".join(ratios)))
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "|---|---|---|", *lines[1:]])


def coverage_rows(results: dict[str, Any]) -> list[Row]:
    """Coverage of the error bars with tangents and scores. They must cover the mean of J, not I:
    64 features do not carry all of I on most of these problems."""
    names = {"pathwise": "tangents", "scored": "scores"}
    rows = []
    for kind, cases in results["error_bars"]["figures"].items():
        text = ", ".join(f"{r['coverage']:.1%} ({name})" for name, r in cases.items())
        what = f"coverage of the mean J by J ± 1.96 stderr, {names[kind]}"
        rows.append((what, "95 %", text))
    return rows


def derivative_rows(results: dict[str, Any]) -> list[Row]:
    """The remaining rows."""
    return [
        *_tangent_rows(results["tangents"]["figures"]),
        *_score_rows(results["score"]["figures"]),
        *_camera_rows(results["camera"]["figures"]),
        *_wide_rows(results["wide"]["figures"]),
        _operation_row(results["operations"]["figures"]),
    ]


def _tangent_rows(figures: dict[str, Any]) -> list[Row]:
    untrained, trained = figures["untrained"], figures["trained"]
    worst = [
        max(ratio for layer, ratio in each["stderr ratio"].items() if layer != "input")
        for each in (untrained, trained)
    ]
    kept = trained["J, tangents"]["output"] / trained["J, tangents"]["input"]
    what = "stderr of J with tangents over that with two conditions, Gaussian task, 30 000 samples"
    input_theory, input_ratio = figures["theory, input"], untrained["stderr ratio"]["input"]
    text = f"{worst[0]:.2f} untrained, {worst[1]:.2f} trained (output keeps {kept:.0%})"
    return [
        (f"{what}: input", f"{input_theory:.2f}", f"{input_ratio:.2f}"),
        ("the same, largest over the later layers", "< 1", text),
    ]


def _score_rows(figures: dict[str, Any]) -> list[Row]:
    few, many = (figures[f"{count} seeds"] for count in (SCORE_SEEDS, MORE_SCORE_SEEDS))
    what = "J, scores, log-normal d=10, 300 features, 4000 samples"
    mean = (
        f"{few['mean J']:.2f} ({SCORE_SEEDS} seeds), {many['mean J']:.2f} ({MORE_SCORE_SEEDS});"
        f" of J / V {many['mean J / V']:.3f}"
    )
    large = (
        f"{figures['large-sample J']:.2f}, of J / V {figures['large-sample J / V']:.3f}"
        " (200 000 samples)"
    )
    spread = (
        f"{few['std of J']:.3f}, {many['std of J']:.3f} (V on the same seeds"
        f" {few['std of V']:.3f}, {many['std of V']:.3f}); of J / V {many['std of J / V']:.4f}"
    )
    return [
        (f"mean of {what}", large, mean),
        ("its standard deviation", f"{figures['exact std of V']:.3f} (that of V)", spread),
    ]


def _camera_rows(figures: dict[str, Any]) -> list[Row]:
    photons = figures["photon counts"]
    text = f"{photons['J']:.3f} ± {photons['stderr']:.3f}"
    rows = [("J, photon counts of a camera, scores, 4000 images", f"{photons['I']:.3f}", text)]
    for kind, name in (("pathwise", "tangents"), ("scored", "scores")):
        layers = list(figures[f"place and brightness, {kind}"].values())
        linear = max(max(layer.values()) for layer in layers[1:])
        text = (
            f"J {layers[0]['J']:.1f}, marginals {layers[0]['marginal']:.1f},"
            f" linear layers {linear:.1f}"
        )
        what = f"three unknowns of a camera, {name}: largest deviation from the closed form"
        rows.append((what, "< 3 stderr", text))
    return rows


def _wide_rows(figures: dict[str, Any]) -> list[Row]:
    what = "J / I, 128 x 128 pixels, correlated noise, 2000 samples: position, amplitude"
    rows = []
    for name, by_parameter in figures.items():
        cells = [
            f"{r['mean J']:.2f} ± {r['mean stderr'] / IMAGE_SEEDS**0.5:.2f}"
            for r in by_parameter.values()
        ]
        lower = ", ".join(f"{r['mean lower']:.2f}" for r in by_parameter.values())
        rows.append((f"{what}; {name}", "1", f"{', '.join(cells)}; lower {lower}"))
    return rows


def _operation_row(figures: dict[str, Any]) -> Row:
    served = {how: sum(each[how] for each in figures.values()) for how in WAYS}
    executed = sum(served.values())
    text = f"{served['rule'] / executed:.1%} of {executed}, {served['failed']} failed"
    return (f"operations of {len(figures)} networks with a derivative rule", "≥ 95 %", text)
