"""Read the recorded images of the published imaging experiment."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import numpy as np
import torch
from torch import Tensor

from fisherfast._validation import check_seed, check_whole
from fisherfast.data import FiniteDifference
from fisherfast.problems.camera import published_positions

Crop = tuple[tuple[int, int], tuple[int, int]]
Frames = dict[int, np.ndarray]  # by index of the published position

CENTRAL_CROP = ((7, 25), (20, 44))  # 18 x 24 of 32 x 64 pixels, as published
STEP = 0.6  # um, full separation of the two held-out conditions
TOLERANCE = 0.05  # um; positions are 0.3 um apart
HELD_OUT = 150_000  # images per condition, as published
BLOCK = 2**24  # bytes read at once


@dataclass(frozen=True, eq=False)
class CameraRecording:
    """Recorded images, split into a training part and two held-out conditions.

    Attributes:
        x: training images, float32 [n, H, W], in DN, ordered by position.
        theta: their positions, float32 [n], in um.
        minus: held-out images at -0.3 um, float32 [m, H, W], in DN.
        plus: held-out images at +0.3 um, float32 [m, H, W], in DN.
    """

    x: Tensor
    theta: Tensor
    minus: Tensor
    plus: Tensor

    def finite_difference(self) -> FiniteDifference:
        """Return the held-out pair, dtheta = 0.6 um, independent noise, as data for
        `fisher_flow`."""
        return FiniteDifference(self.minus, self.plus, STEP, paired=False)


def load_camera_npz(
    path: str | os.PathLike[str],
    *,
    crop: Crop = CENTRAL_CROP,
    held_out: int = HELD_OUT,
    seed: int = 0,
) -> CameraRecording:
    """Read `Data1.npz` of the published imaging experiment (Zenodo 10.5281/zenodo.17021436).

    The file holds images at the central positions (`data_center`, many frames each) and further out
    (`data_edge`, fewer), with `position_center` and `position_edge` in um. As in the paper, the
    frames of a central position are shuffled; as many as an edge position has are used for
    training, the others are held out. Training uses the 13 positions -1.8 to 1.8 um, the held-out
    pair those at -0.3 and +0.3 um. Frames are cropped while the file is read: memory grows with the
    kept images (1.7 kB each), not with the file. The network of the paper was trained on images
    normalised per pixel by the mean and standard deviation of the training part, which does not
    change the FI.

    Args:
        path: the file.
        crop: first and end row, first and end column to keep; the default is the published choice,
            the central 18 x 24 pixels.
        held_out: most images per held-out condition.
        seed: of the shuffle.

    Returns:
        The images, in DN, not normalised.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the file is damaged, has another layout, lacks a position, or has no frame
            left to hold out.

    Reference:
        Weimar et al., Phys. Rev. X 15, 031072 (2025).

    Example:
        >>> from fisherfast.problems import load_camera_npz
        >>> recording = load_camera_npz("Data1.npz")  # doctest: +SKIP
        >>> recording.finite_difference()  # doctest: +SKIP
    """
    check_whole("held_out", held_out, least=1)
    try:
        with zipfile.ZipFile(path) as archive:
            central, edge = (_read_frames(archive, part, crop) for part in ("center", "edge"))
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(
            f"path must be an undamaged .npz file, got {os.fspath(path)!r}: {error}"
        ) from error
    return _split(central, edge, held_out, seed)


def _read_frames(archive: zipfile.ZipFile, part: str, crop: Crop) -> Frames:
    """Read cropped frames [n, H, W] of `data_center` or `data_edge` at the published positions."""
    positions = _read_positions(archive, f"position_{part}")
    (top, bottom), (left, right) = crop
    frames: Frames = {}
    with _open_array(archive, f"data_{part}") as (stream, shape, dtype):
        if len(shape) != 4 or shape[0] != len(positions):
            raise ValueError(
                f"data_{part} must have shape [{len(positions)}, n, rows, columns] "
                f"to match position_{part}, got {shape}"
            )
        if not (0 <= top < bottom <= shape[2] and 0 <= left < right <= shape[3]):
            raise ValueError(
                f"crop must lie within {shape[2]} x {shape[3]} pixels of data_{part}, got {crop}"
            )
        for position in positions:
            index = _published_index(position)
            kept = np.empty((shape[1], bottom - top, right - left), np.float32)
            for start, block in _blocks(stream, shape[1:], dtype, f"data_{part}"):
                kept[start : start + len(block)] = block[:, top:bottom, left:right]
            if index is not None:
                frames[index] = kept
    return frames


def _split(central: Frames, edge: Frames, held_out: int, seed: int) -> CameraRecording:
    """Split the frames into training images and the held-out pair."""
    positions = published_positions()
    frames, places = edge | central, positions.tolist()
    if missing := [round(place, 3) for index, place in enumerate(places) if index not in frames]:
        raise ValueError(f"position_center and position_edge must hold {missing} um, got neither")
    middle = len(positions) // 2
    for index in (middle - 1, middle + 1):
        if index not in central:
            raise ValueError(
                f"position_center must hold {places[index]:.1f} um, "
                "the file has it in position_edge only"
            )
    training_frames = min(len(images) for images in edge.values()) if edge else 0
    rng = np.random.default_rng(check_seed(seed) % 2**64)
    training, conditions = [], {}
    for index in range(len(positions)):
        images = frames[index]
        if index in central:
            images = images[rng.permutation(len(images))]
            conditions[index] = images[training_frames : training_frames + held_out]
        training.append(images[:training_frames])
    pair = [torch.from_numpy(conditions[index]) for index in (middle - 1, middle + 1)]
    if training_frames == 0 or min(map(len, pair)) == 0:
        raise ValueError(
            "data_center must hold more frames per position than data_edge, "
            f"got {len(central[middle - 1])} and {training_frames}"
        )
    return CameraRecording(
        x=torch.from_numpy(np.concatenate(training)),
        theta=positions.float().repeat_interleave(training_frames),
        minus=pair[0],
        plus=pair[1],
    )


def _published_index(position: float) -> int | None:
    """Find the index of the published position within `TOLERANCE` of this one, or None."""
    distance = (published_positions() - position).abs()
    index = int(distance.argmin())
    return index if distance[index] < TOLERANCE else None


def _read_positions(archive: zipfile.ZipFile, name: str) -> list[float]:
    """Read a small array of positions, as floats."""
    with _open_array(archive, name) as (stream, shape, dtype):
        if len(shape) != 1 or dtype.kind not in "iuf":
            raise ValueError(f"{name} must be one row of numbers, got {dtype} of shape {shape}")
        ((_, values),) = _blocks(stream, shape, dtype, name)
        return [float(value) for value in values]


@contextmanager
def _open_array(
    archive: zipfile.ZipFile, name: str
) -> Iterator[tuple[IO[bytes], tuple[int, ...], np.dtype]]:
    """Open the stream of one array of an .npz file, at its first number, with shape and dtype."""
    if f"{name}.npy" not in archive.namelist():
        held = sorted(member.removesuffix(".npy") for member in archive.namelist())
        raise ValueError(f"path must hold the array {name}, got a file with {held}")
    with archive.open(f"{name}.npy") as stream:
        try:
            version = np.lib.format.read_magic(stream)
            read = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran_order, dtype = read(stream)
        except (ValueError, KeyError) as error:
            raise ValueError(f"{name} must be a NumPy array, got: {error}") from error
        if dtype.kind not in "iuf" or fortran_order:
            raise ValueError(
                f"{name} must hold plain numbers in C order, "
                f"got {dtype}{' in Fortran order' if fortran_order else ''}"
            )
        yield stream, shape, dtype
        if stream.read(1):  # at the end zipfile also compares the checksum
            raise ValueError(f"{name} must end after its {shape} numbers, got more bytes")


def _blocks(
    stream: IO[bytes], shape: tuple[int, ...], dtype: np.dtype, name: str
) -> Iterator[tuple[int, np.ndarray]]:
    """Read the next array of `shape` in the stream, in blocks of rows with their start."""
    row_bytes = dtype.itemsize * int(np.prod(shape[1:], dtype=np.int64))
    rows = max(1, BLOCK // max(row_bytes, 1))
    for start in range(0, shape[0], rows):
        count = min(rows, shape[0] - start)
        data = stream.read(count * row_bytes)
        if len(data) < count * row_bytes:
            raise EOFError(f"{name} ends early")
        yield start, np.frombuffer(data, dtype).reshape(count, *shape[1:])
