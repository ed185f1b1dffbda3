"""The imaging task: read the position of an object from camera images that are mostly noise."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fisherfast.data import FiniteDifference
from fisherfast.demo.training import VALIDATION_SHARE, Task
from fisherfast.problems import (
    Camera,
    default_camera,
    imaging_network,
    load_camera_npz,
    published_positions,
    scene_from_file,
)

SAMPLES = 10_000
EPOCHS = 20
"""The least validation error comes after 2; later epochs show how the output loses information."""
LEARNING_RATE = 3e-4
STEP = 0.6  # um, full separation of the held-out conditions, as published
HELD_OUT_FACTOR = 3
"""Held-out images per condition for each training image per position."""
LEAST_SAMPLES = 250
"""Per position: twice 750 held-out images carry the covariance of the 800 units of layer 1."""
LAYERS = ("relu1", "relu2", "relu3", "relu4")
SHOWN = (0, 3, 6, 9, 12)  # indices of the positions in the figure of sample images


@dataclass(frozen=True)
class Pictures:
    """Images for the figure of samples.

    Attributes:
        scene: the object in front of the camera [h, w], or None where it is not known.
        positions: of the images, in um.
        means: noise-free or averaged images [m, H, W], in DN.
        shots: single images [m, H, W], in DN.
        averaged: number of images in each mean; 0 where the mean is exact.
    """

    scene: Tensor | None
    positions: list[float]
    means: Tensor
    shots: Tensor
    averaged: int


@dataclass(frozen=True, kw_only=True)
class ImagingTask(Task):
    """The imaging task, with images to show."""

    pictures: Pictures


def imaging_task(
    *,
    samples: int | None = None,
    seed: int = 0,
    scene: Path | None = None,
    data: Path | None = None,
    held_out_factor: int = HELD_OUT_FACTOR,
) -> ImagingTask:
    """Camera images of a glyph, of a picture file, or the published measurements.

    Args:
        samples: training images per position; 10 000, or what the file of measurements has.
        seed: of images, weights and order.
        scene: a picture to look at instead of the letter theta.
        data: `Data1.npz` of the published experiment, instead of simulated images.
        held_out_factor: held-out images per condition for each training image per position, as far
            as a file has them.

    Raises:
        ValueError: too few samples, both scene and data, or an unreadable file.
        OSError: a file cannot be opened.
        ImportError: a scene is given and Pillow is not installed.
    """
    if scene is not None and data is not None:
        raise ValueError(
            "--scene must not be given together with --data: measurements have a scene"
        )
    if samples is not None and samples < LEAST_SAMPLES:
        raise ValueError(
            f"--samples must be at least {LEAST_SAMPLES} per position for the 800 units of layer 1,"
            f" got {samples}"
        )
    if data is not None:
        return _recorded(data, samples, seed, held_out_factor)
    camera = default_camera(None if scene is None else scene_from_file(scene))
    return _simulated(camera, scene, samples or SAMPLES, seed, held_out_factor)


def _simulated(
    camera: Camera, scene: Path | None, samples: int, seed: int, held_out_factor: int
) -> ImagingTask:
    x, theta = camera.training_set(samples, seed=seed)
    # Training sets of different seeds are independent.
    val_x, val_theta = camera.training_set(samples // VALIDATION_SHARE, seed=seed + 2**32)
    held_out = held_out_factor * samples
    minus, plus = camera.conditions(0.0, STEP, held_out, seed=seed)
    positions = published_positions()[list(SHOWN)]
    pictures = Pictures(
        scene=camera.scene,
        positions=positions.tolist(),
        means=torch.stack([camera.mean(place) for place in positions]),
        shots=x[[place * samples for place in SHOWN]].clone(),
        averaged=0,
    )
    settings = {
        "source": "simulated camera",
        "scene": "letter theta" if scene is None else scene.name,
        "signal-to-noise ratio": round(camera.snr(), 4),
        "FI of one image, per um^2": round(float(camera.fisher(0.0)), 4),
        "the same for a step of 0.6 um": round(float(camera.finite_step_fisher(0.0, STEP)), 4),
        "training images per position": samples,
        "held-out images per condition": held_out,
    }
    return _task(x, theta, val_x, val_theta, (minus[0], plus[0]), pictures, settings, seed)


def _recorded(path: Path, samples: int | None, seed: int, held_out_factor: int) -> ImagingTask:
    recording = load_camera_npz(path, seed=seed)
    positions = published_positions()
    images = recording.x.unflatten(0, (len(positions), -1))
    validation = images.shape[1] // (VALIDATION_SHARE + 1)
    available = images.shape[1] - validation
    samples = available if samples is None else samples
    if not LEAST_SAMPLES <= samples <= available:
        raise ValueError(
            f"--data must hold at least {max(samples, LEAST_SAMPLES)} training images per position"
            f" and {validation} for validation, got {available}"
        )
    pair = [part[: held_out_factor * samples] for part in (recording.minus, recording.plus)]
    if min(map(len, pair)) < HELD_OUT_FACTOR * LEAST_SAMPLES:
        raise ValueError(
            f"--data must hold at least {HELD_OUT_FACTOR * LEAST_SAMPLES} held-out images at -0.3"
            f" and +0.3 um, got {min(map(len, pair))}"
        )
    shown = images[list(SHOWN)]
    pictures = Pictures(
        scene=None,
        positions=positions[list(SHOWN)].tolist(),
        means=shown.mean(1),
        shots=shown[:, 0].clone(),
        averaged=images.shape[1],
    )
    settings = {
        "source": f"measurements in {path.name}",
        "training images per position": samples,
        "held-out images per condition": min(map(len, pair)),
    }
    training, checked = images[:, :samples], images[:, available:]
    places = positions.float()
    return _task(
        training.flatten(0, 1),
        places.repeat_interleave(samples),
        checked.flatten(0, 1),
        places.repeat_interleave(validation),
        (pair[0], pair[1]),
        pictures,
        settings,
        seed,
    )


def _task(
    x: Tensor,
    theta: Tensor,
    val_x: Tensor,
    val_theta: Tensor,
    pair: tuple[Tensor, Tensor],
    pictures: Pictures,
    settings: dict[str, Any],
    seed: int,
) -> ImagingTask:
    """Normalise all images per pixel by the training images; this keeps the information."""
    mean, std = x.mean(0), x.std(0)
    for images in (x, val_x, *pair):
        images.sub_(mean).div_(std)
    return ImagingTask(
        name="imaging",
        model=imaging_network(seed=seed),
        x=x,
        theta=theta,
        val_x=val_x,
        val_theta=val_theta,
        data=FiniteDifference(pair[0], pair[1], STEP),
        layers=LAYERS,
        unit="1/µm²",
        learning_rate=LEARNING_RATE,
        epochs=EPOCHS,
        settings={**settings, "seed": seed},
        pictures=pictures,
    )
