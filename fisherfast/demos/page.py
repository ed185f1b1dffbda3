"""The page of a report: one HTML file without anything outside of it."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterable, Mapping, Sequence
from string import Template
from typing import Any

from fisherfast.demos.figures import published_label
from fisherfast.demos.table import epoch_cells, epoch_header
from fisherfast.demos.task import Task
from fisherfast.demos.training import DemoEpoch, nearest_epoch
from fisherfast.results.comparison import unresolved_note

__all__ = ["render_page"]

CAPTIONS = {
    "samples.png": "What the camera sees: the object, the image without noise at several positions,"
    " and single images as the network gets them. The grey scales of the two rows differ.",
    "flow.png": "Information in each layer relative to the input, one line per epoch, with error"
    " bars of one standard error.",
    "training.png": "What reaches the output, and the mean square errors in units of the Cramér-Rao"
    " bound 1 / J of the input. Star: published stopping rule. Ring: least validation error.",
}

MEANING = (
    "The first figure shows where information is lost. A step down from one layer to the next means"
    " that samples which differ in theta look more alike after it. Before training most is lost on"
    " the way; training opens the way to the output. The true information never rises from layer to"
    " layer, while J, a bound from below, may rise a little where a layer makes information easier"
    " to read.",
    "The second figure compares what the output transmits with how large the errors are. An"
    " unbiased estimate cannot have a mean square error below 1 / J, the dashed line. When the"
    " training error falls below it, the network remembers noise of its training samples, and the"
    " published rule stops there. The Fisher information needs no validation set for this: it is"
    " a property of the network and of samples at two values of theta.",
    "Beyond that point the training error goes on falling while the validation error and the"
    " information at the output, both taken on samples that were not trained on, stay or become"
    " worse: the network fits noise. A validation error may lie below the line as well when the"
    " range of theta is limited, because knowing the range is information too.",
)

READING = (
    (
        "J",
        "best estimate of the Fisher information in a layer, free of finite-sample bias. It is the"
        " linear information of the activations and of random features of them, so a bound from"
        " below.",
    ),
    (
        "+-",
        "one standard error of J. Differences of less than two of them mean nothing. All epochs are"
        " measured on the same samples, so lines are more alike than the bars suggest.",
    ),
    (
        "lower",
        "a bound that trusts no correction: a readout learned on half of the samples and measured"
        " on the other half. J far above it means: take more samples.",
    ),
    (
        "J / J_input",
        "share of the information that is still there. Slightly above 1 within the error is noise"
        " of the measurement; nothing is cut off.",
    ),
)

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #fff; --line: #d5d9de; --soft: #f4f6f8; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e7ea; --paper: #15181c; --line: #3a4048; --soft: #20242a; }
}
body { margin: 0 auto; max-width: 56rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 1rem/1.55 system-ui, sans-serif; }
h1 { line-height: 1.2; } h2 { margin-top: 2.2rem; }
figure { margin: 1.5rem 0; } figure img { width: 100%; height: auto; background: #fff;
  border-radius: 6px; }
figcaption, footer { font-size: .9rem; opacity: .85; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
th { background: var(--soft); } td:first-child, th:first-child { text-align: left; }
dt { font-weight: 600; } dd { margin: 0 0 .6rem 1rem; }
.key { padding: .8rem 1rem; background: var(--soft); border-radius: 6px; }
"""

PAGE = Template("""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>fisherfast: $title</title>
<style>$style</style>
</head>
<body>
<h1>$title</h1>
$incomplete
<p class="key">$key</p>
<h2>What was run</h2>
$story
$pictures
<h2>Where the information is</h2>
$figures
<h2>What the figures mean</h2>
$meaning
<h2>Every epoch</h2>
<p>train x J and val x J: mean square error times J of the input. Layers: J / J of the input.</p>
$epochs
$published
<h2>Layers at the best epoch</h2>
<p>J in $unit, at epoch $best.</p>
$layers
<h2>How to read the numbers</h2>
$reading
<h2>Settings</h2>
$settings
<footer><p>$versions</p></footer>
</body>
</html>
""")


def render_page(
    task: Task,
    history: Sequence[DemoEpoch],
    images: Mapping[str, bytes],
    numbers: Mapping[str, Any],
) -> str:
    """The page as text.

    Args:
        task: what was learned.
        history: at least one epoch.
        images: PNG files by name; those with a caption are embedded.
        numbers: what goes into the JSON file.
    """
    facts = numbers["summary"]
    best = next(record for record in history if record.epoch == facts["best_output_epoch"])
    drawn = {name: _figure(name, images[name]) for name in CAPTIONS if name in images}
    return PAGE.substitute(
        title=html.escape(task.title),
        style=STYLE,
        incomplete="" if numbers["complete"] else _paragraphs(["This run was interrupted early."]),
        key=html.escape(_key(task, facts, history)),
        story=_paragraphs(task.story),
        pictures=drawn.pop("samples.png", ""),
        figures="\n".join(drawn.values()),
        meaning=_paragraphs(MEANING),
        epochs=_epoch_table(task, history),
        published=_published_table(task, history),
        unit=html.escape(task.unit),
        best=best.epoch,
        layers=_table(*_split(best.flow.table())),
        reading=_definitions(READING),
        settings=_table(
            ["setting", "value"], [[k, str(v)] for k, v in numbers["settings"].items()]
        ),
        versions=html.escape(", ".join(f"{k} {v}" for k, v in numbers["versions"].items())),
    )


def _key(task: Task, facts: Mapping[str, Any], history: Sequence[DemoEpoch]) -> str:
    """The result in three sentences."""
    start = history[0].flow.fractions()["output"]
    source = history[0].flow["input"]
    stop = facts["stop_epoch"]
    held = f"The input holds {source.value:.4g} ± {float(source.stderr):.2g} {task.unit}."
    if math.isnan(start):
        return f"{held} {unresolved_note(source)}: use more samples."
    sentences = [
        held,
        f"The output transmits {round(100 * start, 1) + 0.0:.1f} % of it before training and"
        f" {100 * facts['best_output_fraction']:.0f} ±"
        f" {100 * facts['best_output_fraction_error']:.0f} % at its best, in epoch"
        f" {facts['best_output_epoch']}.",
        "The training error did not reach the Cramér-Rao bound."
        if stop is None
        else f"The training error falls below the Cramér-Rao bound in epoch {stop};"
        f" the validation error is least in epoch {facts['least_validation_epoch']}.",
    ]
    return " ".join(sentences)


def _epoch_table(task: Task, history: Sequence[DemoEpoch]) -> str:
    rows = [epoch_cells(record, task.layers) for record in history]
    return _table(epoch_header(task.layers), rows)


def _published_table(task: Task, history: Sequence[DemoEpoch]) -> str:
    """Each published epoch above the epoch of this run with the nearest output."""
    if not task.published:
        return ""
    rows = []
    for epoch, values in task.published.items():
        nearest = nearest_epoch(history, values[-1])
        fractions = nearest.flow.fractions()
        ours = [fractions[name] for name in (*task.layers, "output")]
        rows.append([f"published, {published_label(epoch)}", *(f"{value:.3f}" for value in values)])
        rows.append([f"here, epoch {nearest.epoch}", *(f"{value:.3f}" for value in ours)])
    intro = (
        "Published values of J / J of the input, each above the epoch of this run with the nearest"
        " output. Compare at equal output, not at equal epoch: the runs differ in their length."
    )
    table = _table(["", *task.layers, "output"], rows)
    return f"<h2>Beside the published numbers</h2>\n<p>{html.escape(intro)}</p>\n{table}"


def _figure(name: str, image: bytes) -> str:
    caption = html.escape(CAPTIONS[name])
    data = base64.b64encode(image).decode()
    return (
        f'<figure><img alt="{caption}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _table(header: Iterable[str], rows: Iterable[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "\n".join(
        "<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>\n{body}\n</tbody></table></div>"
    )


def _split(table: Sequence[Sequence[str]]) -> tuple[Sequence[str], Sequence[Sequence[str]]]:
    return table[0], table[1:]


def _paragraphs(texts: Iterable[str]) -> str:
    return "\n".join(f"<p>{_text(text)}</p>" for text in texts)


def _definitions(entries: Iterable[tuple[str, str]]) -> str:
    items = "\n".join(f"<dt>{_text(term)}</dt><dd>{_text(text)}</dd>" for term, text in entries)
    return f"<dl>\n{items}\n</dl>"


def _text(text: str) -> str:
    """Escaped, with a true plus-minus and multiplication sign."""
    return html.escape(text).replace("+-", "&plusmn;").replace(" x ", " &times; ")
