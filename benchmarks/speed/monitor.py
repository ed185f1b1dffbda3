"""What the monitor costs: a measurement per epoch, and `observe` per training step."""

from __future__ import annotations

import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional as F

import fisherfast as ff
from fisherfast.problems import GaussianShift, gaussian_network

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import ROOT, main

RESULTS = Path(ROOT) / "benchmarks" / "results" / "training.json"

THETAS, SAMPLES = 31, 20_000  # of the published Gaussian task
HELD_OUT = 20_000  # per condition
BATCH = 128
LEARNING_RATE = 1e-6
DTHETA = 0.03


def monitor(tiny: bool) -> dict[str, Any]:
    """Share of an epoch that a measurement of all layers takes, Gaussian task, once per epoch."""
    epochs = 2 if tiny else 7
    task = _Task(200 if tiny else SAMPLES, 2000 if tiny else HELD_OUT)
    watch = ff.FisherMonitor(task.model, task.held_out)
    first = watch.step(epoch=0)  # learns what the later ones reuse
    training, measuring = [], []
    for _ in range(epochs):
        start = time.perf_counter()
        task.train_epoch()
        training.append(time.perf_counter() - start)
        record = watch.step()
        measuring.append(record.seconds)
    epoch, step = statistics.median(training), statistics.median(measuring)
    return {
        "training samples": task.x.shape[0],
        "held-out samples": 2 * task.count,
        "layers": len(record.flow.names) if record.flow is not None else 0,
        "epoch seconds": epoch,
        "first measurement seconds": first.seconds,
        "measurement seconds": step,
        "share of an epoch": step / epoch,
        "epochs": epochs,
        "all": [m / t for m, t in zip(measuring, training, strict=True)],
    }


def observe(tiny: bool) -> dict[str, Any]:
    """Share of a training step that `observe` takes: blocks of steps with and without, in turns."""
    blocks, steps = (2, 16) if tiny else (24, 512)
    task = _Task(200 if tiny else SAMPLES // 10, 100)
    watch = ff.FisherMonitor(task.model, task.held_out)
    order = torch.randperm(len(task.x)).split(BATCH)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    inside = 0.0
    task.steps([order[i % len(order)] for i in range(steps)], None)
    for block in range(2 * blocks):
        batches = [order[(block * steps + i) % len(order)] for i in range(steps)]
        watched = bool(block % 2)
        start = time.perf_counter()
        inside += task.steps(batches, watch if watched else None)
        seconds[watched].append(time.perf_counter() - start)
        watch.close()
    step = statistics.median(seconds[False]) / steps
    ratios = [on / off for on, off in zip(seconds[True], seconds[False], strict=True)]
    return {
        "step seconds": step,
        "inside observe, share of a step": inside / (blocks * steps) / step,
        "whole, share of a step": statistics.median(ratios) - 1,
        "steps": 2 * blocks * steps,
    }


class _Task:
    """The published Gaussian task, in training."""

    def __init__(self, samples: int, held_out: int) -> None:
        self.count = held_out
        problem = GaussianShift(torch.ones(256))
        generator = torch.Generator().manual_seed(0)
        thetas = torch.linspace(-1, 1, THETAS)
        self.x = torch.cat([problem.sample(float(t), samples, generator) for t in thetas])
        self.theta = thetas.repeat_interleave(samples)[:, None]
        self.model = gaussian_network(seed=0)
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=LEARNING_RATE, fused=True)
        self.held_out = problem.finite_difference(0.0, DTHETA, held_out, seed=1)

    def train_epoch(self) -> None:
        """All samples once, without a monitor's `observe`."""
        self.steps(torch.randperm(len(self.x)).split(BATCH), None)

    def steps(self, batches: Any, watch: ff.FisherMonitor | None) -> float:
        """Training steps; returns the seconds inside `observe`."""
        inside = 0.0
        for batch in batches:
            theta = self.theta[batch]
            loss = F.mse_loss(self.model(self.x[batch]), theta)
            if watch is not None:
                start = time.perf_counter()
                watch.observe(theta)
                inside += time.perf_counter() - start
            self.optimizer.zero_grad()
            loss.backward()
            self.optimizer.step()
        return inside


if __name__ == "__main__":
    main(__doc__, {"monitor": monitor, "observe": observe}, results=RESULTS)
