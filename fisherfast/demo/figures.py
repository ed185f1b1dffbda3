"""The figures of the demo, as matplotlib figures by file name."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fisherfast.demo.imaging import ImagingTask, Pictures
from fisherfast.results.plots import new_figure, plot_flows
from fisherfast.training import EpochRecord
from fisherfast.training.plots import plot_training

PANEL = 5.6  # inches
HEIGHT = 4.0
TILE = 1.75  # inches, one sample image
CLIP = 2.5  # standard deviations of a single image that its grey scale spans


def draw_figures(task: ImagingTask, history: Sequence[EpochRecord]) -> dict[str, Any]:
    """Flow, training, both side by side, and sample images."""
    flow, training = new_figure(PANEL + 0.6, HEIGHT), new_figure(PANEL, HEIGHT)
    both = new_figure(2 * PANEL, HEIGHT)
    left, right = both.subplots(1, 2)
    flows = {record.epoch: record.flow for record in history if record.flow is not None}
    for ax in (flow.add_subplot(), left):
        plot_flows(flows, ax, fraction=True, title="epoch")
    for ax in (training.add_subplot(), right):
        plot_training(history, ax)
    return {
        "flow.png": flow,
        "training.png": training,
        "overview.png": both,
        "samples.png": _sample_images(task.pictures),
    }


def _sample_images(pictures: Pictures) -> Any:
    """Scene, and below it the mean and a single image at each position."""
    columns = len(pictures.positions)
    with_scene = pictures.scene is not None
    height = TILE * pictures.means.shape[1] / pictures.means.shape[2]
    figure = new_figure(TILE * (columns + with_scene) + 0.6, 2 * height + 0.5)
    grid = figure.add_gridspec(2, columns + with_scene)
    if pictures.scene is not None:
        ax = figure.add_subplot(grid[:, 0])
        ax.imshow(pictures.scene.numpy(), cmap="gray")
        ax.set_title("scene", fontsize="medium")
        ax.set_xticks([])
        ax.set_yticks([])
    rows = (
        (
            "exact mean" if pictures.averaged == 0 else f"mean of {pictures.averaged}",
            pictures.means,
        ),
        ("single image", pictures.shots),
    )
    for row, (name, images) in enumerate(rows):
        middle, spread = float(images.mean()), float(images.std())
        low, high = float(images.min()), float(images.max())
        if row == 1:
            low, high = middle - CLIP * spread, middle + CLIP * spread
        for column, position in enumerate(pictures.positions):
            ax = figure.add_subplot(grid[row, column + with_scene])
            shown = ax.imshow(images[column].numpy(), cmap="gray", vmin=low, vmax=high)
            ax.set_xticks([])
            ax.set_yticks([])
            if row == 0:
                ax.set_title(f"{position:+.1f} µm".replace("+0.0", "0.0"), fontsize="medium")
            if column == 0:
                ax.set_ylabel(name)
        axes = figure.axes[-columns:]
        figure.colorbar(shown, ax=axes, label="DN", shrink=0.85, pad=0.01, aspect=12)
    return figure
