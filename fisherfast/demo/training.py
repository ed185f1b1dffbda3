"""Train a network, and measure the information in its layers after every epoch."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fisherfast._errors import FisherWarning
from fisherfast._progress import Progress
from fisherfast.data import FiniteDifference
from fisherfast.flow import fisher_flow
from fisherfast.training import EpochRecord
from fisherfast.training.record import input_of

EVALUATION_BATCH = 4096
VALIDATION_SHARE = 5
"""Training samples for each validation sample."""


class DivergenceError(ArithmeticError):
    """The training error became infinite or NaN."""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A parameter to learn from samples, and held-out samples to measure the information with.

    Attributes:
        name: for messages and files.
        model: from samples [n, ...] to estimates [n, 1].
        x, theta: training samples [n, ...] and their parameters [n].
        val_x, val_theta: the same, not used for training.
        data: samples for the measurement, not used for training either.
        layers: names of the hidden layers to measure.
        unit: of J.
        learning_rate: of Adam.
        epochs: to train for.
        settings: how the samples were made, for the record.
        batch_size: of the training.
        max_features: of the measurement.
        checked_share: the training error is taken on every `checked_share`-th training sample.
    """

    name: str
    model: nn.Module
    x: Tensor
    theta: Tensor
    val_x: Tensor
    val_theta: Tensor
    data: FiniteDifference
    layers: tuple[str, ...]
    unit: str
    learning_rate: float
    epochs: int
    settings: Mapping[str, Any]
    batch_size: int = 128
    max_features: int = 128
    checked_share: int = VALIDATION_SHARE


def train(task: Task, *, seed: int = 0, progress: bool | None = False) -> Iterator[EpochRecord]:
    """Yield a record before training and after each epoch; the model of the task is trained.

    Adam on the mean square error. The training error is taken after the epoch, on every
    `checked_share`-th of the training samples.

    Args:
        task: what to learn.
        seed: of the order of the samples.
        progress: of each epoch and measurement, as of `fisher_flow`.

    Raises:
        DivergenceError: the error became infinite or NaN.
    """
    optimizer = torch.optim.Adam(task.model.parameters(), lr=task.learning_rate, fused=True)
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(task.epochs + 1):
        start = time.perf_counter()
        if epoch:
            order = torch.randperm(len(task.x), generator=generator)
            _train_epoch(task, optimizer, order, f"epoch {epoch}/{task.epochs}", progress)
        yield _measure(task, epoch, start, progress)


def mean_square_error(model: nn.Module, x: Tensor, theta: Tensor) -> float:
    """Mean of (model(x) - theta)^2 over samples [n, ...], without gradients, in theta^2."""
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        for samples, truth in zip(
            x.split(EVALUATION_BATCH), theta.split(EVALUATION_BATCH), strict=True
        ):
            total += F.mse_loss(model(samples)[:, 0], truth, reduction="sum").double()
    return float(total) / len(x)


def _train_epoch(
    task: Task, optimizer: torch.optim.Optimizer, order: Tensor, title: str, progress: bool | None
) -> None:
    task.model.train()
    with Progress(progress, title).bar(len(order)) as bar:
        for batch in order.split(task.batch_size):
            loss = F.mse_loss(task.model(task.x[batch])[:, 0], task.theta[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            bar.update(len(batch))
    task.model.eval()


def _measure(task: Task, epoch: int, start: float, progress: bool | None) -> EpochRecord:
    trained_on = slice(None, None, task.checked_share)
    train_mse = mean_square_error(task.model, task.x[trained_on], task.theta[trained_on])
    val_mse = mean_square_error(task.model, task.val_x, task.val_theta)
    if not torch.isfinite(torch.tensor([train_mse, val_mse])).all():
        raise DivergenceError(f"the error became {train_mse} in epoch {epoch}")
    with warnings.catch_warnings():
        # The finite step is that of the experiment; the report explains it.
        warnings.simplefilter("ignore", FisherWarning)
        flow = fisher_flow(
            task.model,
            task.data,
            layers=list(task.layers),
            max_features=task.max_features,
            progress=progress,
        )
    return EpochRecord(
        epoch=epoch,
        flow=flow,
        train_mse=(train_mse,),
        val_mse=(val_mse,),
        input_J=input_of(flow),
        seconds=time.perf_counter() - start,
    )
