"""Where the stopping rules stop, and what that costs in validation loss.

python benchmarks/accuracy/early_stopping.py train     all runs to their end, about a minute each
python benchmarks/accuracy/early_stopping.py judge     the rules on what the runs recorded
python benchmarks/accuracy/early_stopping.py labels    the rules on stored curves and labels alone
python benchmarks/accuracy/early_stopping.py table     markdown
python benchmarks/accuracy/early_stopping.py figure
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fisherfast as ff
from fisherfast.measurement.run import Measurement, Recall
from fisherfast.measurement.settings import MeasurementSettings, Settings
from fisherfast.training import EpochRecord, FisherEarlyStopping
from fisherfast.training.record import Errors
from fisherfast.training.rules import RULES, Transmission

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness
from benchmarks.accuracy.stopping_tasks import (
    EXAMINED_ON,
    LIMITS,
    PRIORS,
    SETTLED_ON,
    SIZES,
    TASKS,
    Size,
    StoppingTask,
    crlb_options,
)

ROOT = Path(__file__).resolve().parents[2]
RUNS = ROOT / "build" / "early_stopping"
RESULTS = ROOT / "benchmarks" / "results" / "training.json"
FIGURE = ROOT / "docs" / "figures" / "early_stopping.png"
AVERAGING = 0.99
"""Weights are averaged over about 100 steps, in all tasks: otherwise the validation loss jitters by
several per cent from epoch to epoch, and no rule that does not look at it can be within 3 %."""
RECIPES = {  # name -> rule, whether it is told where theta lies, training error along the epoch
    "transmission": ("transmission", False, False),
    "crlb": ("crlb", True, False),
    "crlb, published": ("crlb", False, False),
    "crlb, running error": ("crlb", True, True),
    "crlb, published, running error": ("crlb", False, True),
}
LABELS_ALONE = "crlb, labelled training set only"
"""Rule "crlb" of a monitor that has the training samples with their labels and nothing else."""
PRIOR_RECIPE = {"crlb, prior alone": ("crlb", True, False)}
"""Not in the table: the same as "crlb" but for the camera images."""
COLUMNS = [*RECIPES, LABELS_ALONE]
BATCH, EVALUATION_BATCH, FEATURES = 128, 2048, 64


def train(name: str, seed: int, size: Size) -> dict[str, Any]:
    """Train to the end; the records of all epochs, as plain numbers."""
    task = (TASKS | LIMITS)[name](seed, size)
    average = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
    optimizer = torch.optim.Adam(task.model.parameters(), lr=size.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    settings = MeasurementSettings.of(
        task.data, Settings(batch_size=EVALUATION_BATCH), max_features=FEATURES, ridge=1e-4
    )
    recall, records, running = Recall(), [], []
    for epoch in range(size.epochs + 1):
        start = time.perf_counter()
        running.append(math.nan)
        if epoch:
            running[-1] = train_epoch(task, average, optimizer, generator, size.passes)
        model = average.module.eval()
        flow = Measurement(model, task.data, [], settings, recall=recall).run(progress=False)
        record = EpochRecord(
            epoch=epoch,
            flow=flow,
            train_mse=mean_square_errors(model, task.x, task.theta),
            val_mse=mean_square_errors(model, task.val_x, task.val_theta),
            input_J=flow["input"].J,
            seconds=time.perf_counter() - start,
        )
        records.append(record)
    return {
        "task": name,
        "seed": seed,
        "size": size.__dict__,
        "running_mse": running,
        "records": [plain(record) for record in records],
    }


def train_epoch(
    task: StoppingTask,
    average: AveragedModel,
    optimizer: torch.optim.Optimizer,
    generator: torch.Generator,
    passes: int,
) -> float:
    """Some passes over the training samples; the mean of the loss along the way."""
    task.model.train()
    total = torch.zeros((), dtype=torch.float64)
    for _ in range(passes):
        for batch in torch.randperm(len(task.x), generator=generator).split(BATCH):
            targets = task.theta[batch].reshape(len(batch), -1)
            loss = F.mse_loss(task.model(task.x[batch]), targets)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            average.update_parameters(task.model)
            total += len(batch) * loss.detach()
    return float(total) / (passes * len(task.x))


def mean_square_errors(model: nn.Module, x: Tensor, theta: Tensor) -> tuple[float, ...]:
    """Mean of (model(x) - theta)^2 over samples [n, ...] for each parameter, without gradients."""
    with torch.no_grad():
        estimates = torch.cat([model(part) for part in x.split(EVALUATION_BATCH)])
    errors = (estimates - theta.reshape(len(x), -1)).double().square()
    return tuple(errors.mean(0).tolist())


def plain(record: EpochRecord) -> dict[str, Any]:
    """What JSON can hold."""
    return record.state_dict() | {"input_J": record.input_J.tolist()}


@dataclass
class Replay:
    """A monitor whose records come from a run that was stored."""

    history: list[EpochRecord]
    model: nn.Module
    leads: bool = False  # no line per stop


def judge(run: dict[str, Any], options: dict[str, Any]) -> dict[str, Any]:
    """Where each rule stops a run, and the validation loss there in units of the least one."""
    records = [EpochRecord.from_state_dict(as_state(entry)) for entry in run["records"]]
    weights = crlb_weights(records[0])
    losses = [weighted(record.val_mse, weights) for record in records]
    stops = {}
    told_prior = {"prior": PRIORS[run["task"]]}
    for name, (rule, told, running) in (RECIPES | PRIOR_RECIPE).items():
        if running and len(weights) > 1:
            continue
        known = told_prior if name in PRIOR_RECIPE else options if told else {}
        stopping = FisherEarlyStopping(RULES[rule](**known), restore_best=False)
        replay = Replay([], nn.Identity())
        for record in running_records(run, records) if running else records:
            replay.history.append(record)
            if stopping.step(replay):
                break
        if stopping.best_epoch is None:
            raise AssertionError(f"{name} must name a best epoch of {run['task']}")
        stops[name] = {
            "stopped": stopping.stopped_epoch,
            "best": stopping.best_epoch,
            "excess": losses[stopping.best_epoch] / min(losses) - 1,
        }
    return {
        "task": run["task"],
        "seed": run["seed"],
        "least loss at": losses.index(min(losses)),
        "least loss * J": min(losses),
        "end": losses[-1] / min(losses) - 1,
        "stops": stops,
        "curves": {
            "validation": line_of(losses),
            "training": line_of([record.train_level for record in records]),
            "errors": [
                line_of(errors)
                for errors in zip(*(r.train_mse or () for r in records), strict=True)
            ],
            "transmission": line_of(Transmission().shares(records)),
        },
    }


def judge_by_labels(run: dict[str, Any]) -> dict[str, Any]:
    """Where the rule stops a stored run if the monitor has the labelled training set alone."""
    task = (TASKS | LIMITS)[run["task"]](run["seed"], SIZES[run["task"]])
    labelled = ff.Labelled(task.x, task.theta)
    monitor = ff.FisherMonitor(task.model, labelled, layers="output", held_out=False)
    errors = training_errors(run, task)
    first = monitor.step(epoch=0, train_mse=errors[0])
    assert first is not None
    losses = numbers_of(run["curves"]["validation"])
    stopping = FisherEarlyStopping("crlb", restore_best=False)
    replay = Replay([], nn.Identity())
    for epoch, error in enumerate(errors):
        replay.history.append(replace(first, epoch=epoch, train_mse=error))
        if stopping.step(replay):
            break
    best = stopping.best_epoch
    assert best is not None
    return {
        "stopped": stopping.stopped_epoch,
        "best": best,
        "excess": losses[best] / min(losses) - 1,
    }


def training_errors(run: dict[str, Any], task: StoppingTask) -> list[tuple[float, ...]]:
    """The training errors of all epochs of a stored run."""
    if "errors" in run["curves"]:
        return list(zip(*map(numbers_of, run["curves"]["errors"]), strict=True))
    settings = MeasurementSettings.of(
        task.data, Settings(batch_size=EVALUATION_BATCH), max_features=FEATURES, ridge=1e-4
    )
    J = Measurement(task.model.eval(), task.data, [], settings, quiet=True).run()["input"].value
    return [(level / J,) for level in numbers_of(run["curves"]["training"])]


def line_of(numbers: list[float]) -> str:
    """One line of the JSON instead of one for each epoch."""
    return " ".join(f"{number:.5f}" for number in numbers)


def numbers_of(line: str) -> list[float]:
    """What `line_of` wrote."""
    return [float(number) for number in line.split()]


def as_state(entry: dict[str, Any]) -> dict[str, Any]:
    """The state of a record, of what JSON holds."""
    return entry | {"input_J": torch.tensor(entry["input_J"], dtype=torch.float64)}


def running_records(run: dict[str, Any], records: list[EpochRecord]) -> Iterator[EpochRecord]:
    """Records whose training error is the mean of the losses along the epoch, as many scripts have
    it: of weights that were not averaged, and before the end of the epoch. One parameter only."""
    for record, error in zip(records[1:], run["running_mse"][1:], strict=True):
        yield replace(record, train_mse=(error,))


def crlb_weights(record: EpochRecord) -> list[float]:
    """1 / (J^-1)_pp / P, so that several parameters add up to one loss."""
    bounds: list[float] = record.input_J.inverse().diagonal().tolist()
    return [1 / bound / len(bounds) for bound in bounds]


def weighted(errors: Errors, weights: list[float]) -> float:
    """The loss in units of the Cramer-Rao bound."""
    return sum(error * weight for error, weight in zip(errors or (), weights, strict=True))


def study(runs: Path, known: dict[str, Any]) -> dict[str, Any]:
    """Validation loss at the stop of each rule, over tasks and seeds"""
    rows: dict[str, list[dict[str, Any]]] = {}
    for name in (*TASKS, *LIMITS):
        paths = sorted(runs.glob(f"{name}_*.json"))
        options = crlb_options(name) if paths else {}
        rows[name] = [judge(json.loads(path.read_text()), options) for path in paths]
        if not paths:  # what is stored of the task
            stored = known.get("runs", []) + known.get("limits", [])
            rows[name] = [row for row in stored if row["task"] == name]
    return {
        "settled on": list(SETTLED_ON),
        "examined on": list(EXAMINED_ON),
        "runs": [row for name in TASKS for row in rows[name]],
        "limits": [row for name in LIMITS for row in rows[name]],
    }


def table(results: dict[str, Any]) -> str:
    """Markdown: mean and largest excess over the least validation loss, per task and recipe."""
    lines = [
        "| task | epochs to the least loss | least loss x J | loss at the end | "
        + " | ".join(COLUMNS)
        + " |",
        "|---|---|---|---|" + "---|" * len(COLUMNS),
    ]
    for name in dict.fromkeys(run["task"] for run in results["runs"]):
        found = [run for run in results["runs"] if run["task"] == name]
        at = [run["least loss at"] for run in found]
        level = statistics.fmean(run["least loss * J"] for run in found)
        end = min(run["end"] for run in found)
        label = f"{name}, examined" if name in results["examined on"] else name
        cells = [label, f"{min(at)} to {max(at)}", f"{level:.2f}", f"+{end:.0%} or more"]
        for recipe in COLUMNS:
            excess = [run["stops"][recipe]["excess"] for run in found if recipe in run["stops"]]
            cells.append(f"{statistics.fmean(excess):.1%} ({max(excess):.1%})" if excess else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def figure(results: dict[str, Any], target: Path) -> None:
    """One panel per task: loss and transmission of a run with its stops, and all excesses."""
    from fisherfast.results.plots import BLUE, DPI, GREEN, GREY, VERMILION, new_figure

    names = list(dict.fromkeys(run["task"] for run in results["runs"]))
    canvas = new_figure(2.9 * math.ceil((len(names) + 1) / 2), 5.6)
    panels = canvas.subplots(2, math.ceil((len(names) + 1) / 2)).flatten()
    marks = {"transmission": (BLUE, "o"), "crlb": (VERMILION, "s"), "crlb, published": (GREY, "^")}
    for axes, name in zip(panels, names, strict=False):
        run = next(run for run in results["runs"] if run["task"] == name)
        losses = numbers_of(run["curves"]["validation"])
        relative = [loss / min(losses) for loss in losses]
        axes.plot(relative, color="black", lw=1.2, label="validation loss / its least")
        axes.plot(
            numbers_of(run["curves"]["transmission"]),
            color=GREEN,
            lw=1.2,
            label="J_output / J_input",
        )
        for recipe, (color, mark) in marks.items():
            best = run["stops"][recipe]["best"]
            axes.plot(best, relative[best], mark, color=color, ms=7, mfc="none", mew=1.5)
        axes.set_ylim(0.4, 1.5)
        axes.set_title(
            name + (", examined" if name in results["examined on"] else ""), fontsize="medium"
        )
        axes.set_xlabel("epoch")
    panels[0].legend(frameon=False, fontsize="x-small", loc="lower right")
    last = panels[len(names)]
    for offset, (recipe, (color, mark)) in zip((-0.2, 0.0, 0.2), marks.items(), strict=True):
        points = [
            (100 * run["stops"][recipe]["excess"], names.index(run["task"]) + offset)
            for run in results["runs"]
        ]
        last.plot(*zip(*points, strict=True), mark, color=color, ms=5, mfc="none", label=recipe)
    for limit in (3, 6):
        last.axvline(limit, color="0.8", lw=0.8, ls="--")
    last.set_yticks(range(len(names)), names, fontsize="small")
    last.invert_yaxis()
    last.set_xlabel("loss at the stop above the least, %")
    last.legend(frameon=False, fontsize="x-small")
    for axes in panels[: len(names) + 1]:
        axes.spines[["top", "right"]].set_visible(False)
    for axes in panels[len(names) + 1 :]:
        axes.set_axis_off()
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(target, dpi=DPI)


def train_all(options: argparse.Namespace) -> None:
    """Train what is not stored yet."""
    options.runs.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.tasks:
            path = options.runs / f"{name}_{seed}.json"
            if path.exists():
                continue
            size = SIZES[name]
            run = train(name, seed, replace(size, epochs=1) if options.tiny else size)
            path.write_text(json.dumps(run))
            losses = [sum(record["val_mse"]) for record in run["records"]]
            seconds = sum(record["seconds"] for record in run["records"])
            print(f"{name} {seed}: end / least {losses[-1] / min(losses):.3f}, {seconds:.0f} s")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("train", "judge", "labels", "table", "figure"))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=[*TASKS, *LIMITS])
    parser.add_argument("--seeds", nargs="*", type=int, default=range(5))
    parser.add_argument("--runs", type=Path, default=RUNS, help="where runs are stored")
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON to add the results to")
    parser.add_argument("--to", type=Path, default=FIGURE, help="the figure")
    parser.add_argument("--tiny", action="store_true", help="one epoch, to see that it runs")
    options = parser.parse_args()
    if options.verb == "train":
        train_all(options)
        return
    stored = json.loads(options.out.read_text()) if options.out.exists() else {}
    results = stored.get("early_stopping", {}).get("figures", {})
    if options.verb in ("judge", "labels"):
        start = time.perf_counter()
        if options.verb == "judge":
            results = study(options.runs, results)
        for run in results["runs"] + results["limits"]:
            run["stops"][LABELS_ALONE] = judge_by_labels(run)
        what = (study.__doc__ or "").splitlines()[0]
        harness.store("early_stopping", what, results, time.perf_counter() - start, options.out)
        return
    if options.verb == "table":
        print(table(results))
    else:
        figure(results, options.to)


if __name__ == "__main__":
    main()
