"""Where the stopping rules stop, and what that costs in validation loss.

python benchmarks/early_stopping.py train [--tasks gaussian ...] [--seeds 0 1 2 3 4]
"""

from __future__ import annotations

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import torch
from stopping_tasks import SIZES, TASKS, Size, StoppingTask
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from fisherfast.measurement import Measurement
from fisherfast.recall import Recall
from fisherfast.settings import check_passes, check_settings
from fisherfast.training.record import EpochRecord

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "build" / "early_stopping"
AVERAGING = 0.99
"""Weights are averaged over about 100 steps, in all tasks: otherwise the validation loss jitters by
several per cent from epoch to epoch, and no rule that does not look at it can be within 3 %."""
BATCH, EVALUATION_BATCH, FEATURES = 128, 2048, 64


def train(name: str, seed: int, size: Size) -> dict[str, Any]:
    """Train to the end; the records of all epochs, as plain numbers."""
    task = TASKS[name](seed, size)
    average = AveragedModel(task.model, multi_avg_fn=get_ema_multi_avg_fn(AVERAGING))
    optimizer = torch.optim.Adam(task.model.parameters(), lr=size.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    settings = check_settings(task.data, FEATURES, None, EVALUATION_BATCH, 0, 1e-4, 16)
    settings |= check_passes(task.data, grow=False, maps=False)
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


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("verb", choices=("train",))
    parser.add_argument("--tasks", nargs="*", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--seeds", nargs="*", type=int, default=range(5))
    parser.add_argument("--runs", type=Path, default=RUNS)
    options = parser.parse_args()
    options.runs.mkdir(parents=True, exist_ok=True)
    for seed in options.seeds:
        for name in options.tasks:
            path = options.runs / f"{name}_{seed}.json"
            if path.exists():
                continue
            run = train(name, seed, SIZES[name])
            path.write_text(json.dumps(run))
            losses = [sum(record["val_mse"]) for record in run["records"]]
            seconds = sum(record["seconds"] for record in run["records"])
            print(
                f"{name} {seed}: end / min {losses[-1] / min(losses):.3f}, {seconds:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
