"""`Task`: everything that a demonstration needs to know before it starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from fisherfast.data import FiniteDifference

__all__ = ["VALIDATION_SHARE", "Pictures", "Task"]

VALIDATION_SHARE = 5
"""One validation sample for so many training samples."""


@dataclass(frozen=True)
class Pictures:
    """What the camera sees, for the figure of sample images.

    Attributes:
        scene: what the camera looks at [h, w], or None where it is not known.
        positions: of the images, in um.
        means: noise-free or averaged images [m, H, W], in DN.
        shots: single images [m, H, W], in DN.
        averaged: frames behind each mean; 0 where the mean is exact.
    """

    scene: Tensor | None
    positions: list[float]
    means: Tensor
    shots: Tensor
    averaged: int


@dataclass(frozen=True)
class Task:
    """A parameter to be learned from samples, and the samples to measure the information with.

    Attributes:
        name: as in the command line.
        title: heading of the report.
        story: paragraphs that say what is run.
        model: from samples [n, ...] to estimates [n, 1].
        x, theta: training samples [n, ...] and their parameters [n].
        val_x, val_theta: the same, not used for training.
        data: samples that the information is measured with, not used for training either.
        layers: names of the hidden layers to measure.
        unit: of J.
        learning_rate: of Adam.
        epochs: to train for.
        settings: what the samples were made with, for the record.
        batch_size: of the training.
        max_features: of the measurement.
        checked_share: the training error is taken on one of so many training samples.
        published: J / J_input of hidden layers and output by epoch, from the publication.
        pictures: for the figure of sample images; None where samples are no images.
    """

    name: str
    title: str
    story: tuple[str, ...]
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
    published: Mapping[int, tuple[float, ...]] = field(default_factory=dict)
    pictures: Pictures | None = None
