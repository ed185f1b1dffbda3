"""Reading the published experiment's file, on small files of the same layout made here."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from support.recorded_camera import CENTER, EDGE

from fisherfast.problems import load_camera_npz, published_positions

CENTER_FRAMES, EDGE_FRAMES = 9, 4


def recording() -> dict[str, np.ndarray]:
    """Frames whose pixels name their position, frame, row and column."""

    def frames(positions: np.ndarray, count: int) -> np.ndarray:
        place = 1000 * np.round(positions / 0.3 + 15).astype(np.uint16)
        images = place[:, None, None, None] + 100 * np.arange(count)[:, None, None]
        return (images + np.zeros((32, 64)) + np.arange(32)[:, None]).astype(np.uint16)

    arrays = {"position_center": CENTER, "position_edge": EDGE + 1e-3}
    return arrays | {
        "data_center": frames(CENTER, CENTER_FRAMES),
        "data_edge": frames(EDGE, EDGE_FRAMES),
    }


def load(tmp_path, arrays, save=np.savez, **options):
    path = tmp_path / "data.npz"
    save(path, **arrays)
    return load_camera_npz(path, **options)


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_published_layout(tmp_path, save):
    """Catches images beside the wrong position, training images held out, a wrong crop or pair,
    dtheta = 0.3."""
    data = load(tmp_path, recording(), save)
    assert data.x.shape == (13 * EDGE_FRAMES, 18, 24)
    assert data.minus.shape == data.plus.shape == (CENTER_FRAMES - EDGE_FRAMES, 18, 24)
    assert data.x.dtype == data.theta.dtype == data.minus.dtype == torch.float32
    torch.testing.assert_close(data.theta[::EDGE_FRAMES], published_positions().float())
    place = torch.div(data.x[:, 0, 0], 1000, rounding_mode="floor")
    torch.testing.assert_close((place - 15) * 0.3, data.theta)
    assert (data.minus // 1000 == 14).all()
    assert (data.plus // 1000 == 16).all()
    assert torch.equal(data.x[0, :, 0] % 100, torch.arange(7.0, 25.0))
    pair = data.finite_difference()
    assert (pair.dtheta, pair.paired) == (pytest.approx((0.6,)), False)
    trained = data.x[(data.theta + 0.3).abs() < 0.01][:, 0, 0]
    every = torch.cat([trained, data.minus[:, 0, 0]]).sort().values
    assert torch.equal(every, 14_007 + 100 * torch.arange(CENTER_FRAMES).float())


def test_seed_crop_and_limit(tmp_path):
    """Catches frames split in the order they were taken, and options without effect."""
    first = load(tmp_path, recording(), seed=1)
    again = load(tmp_path, recording(), seed=1)
    other = load(tmp_path, recording(), seed=2)
    assert torch.equal(first.minus, again.minus)
    assert not torch.equal(first.minus, other.minus)
    small = load(tmp_path, recording(), crop=((0, 2), (60, 64)), held_out=3)
    assert small.plus.shape == (3, 2, 4)
    assert small.plus[0, :, 0].remainder(100).tolist() == [0.0, 1.0]


def changed(**arrays: np.ndarray) -> dict[str, np.ndarray]:
    return {**recording(), **arrays}


# the held-out pair needs the many frames of the centre
edges = np.where(np.isclose(EDGE, -0.9), -0.3, EDGE)
SWAPPED = {"position_center": np.array([-0.9, 0.0, 0.3]), "position_edge": edges}
WRONG = [
    ({"x": np.zeros(3)}, r"path must hold the array position_center, got .* \['x'\]"),
    (changed(position_center=np.zeros((3, 2))), r"got float64 of shape \(3, 2\)"),
    (changed(position_edge=np.array([None, 1])), "position_edge must hold plain .*, got object"),
    (changed(data_edge=np.zeros((4, 2, 32, 64))), r"data_edge must have shape \[28, n, rows, "),
    (changed(data_center=np.asfortranarray(np.zeros((3, 9, 32, 64)))), "in Fortran order"),
    (changed(data_center=np.zeros((3, 9, 16, 64))), "crop must lie within 16 x 64 pixels"),
    (changed(position_edge=EDGE * 1e3), r"edge must hold \[-1.8, -1.5, -1.2, -0.9"),
    (changed(**SWAPPED), "position_center must hold -0.3 um, the file has it in"),
    (changed(data_center=np.zeros((3, 4, 32, 64))), "more frames .* than data_edge, got 4 and 4"),
]


@pytest.mark.parametrize(("arrays", "message"), WRONG)
def test_wrong_layout(tmp_path, arrays, message):
    with pytest.raises(ValueError, match=message):
        load(tmp_path, arrays)


def test_damaged_file(tmp_path):
    """Catches damage that is only noticed later, as strange numbers: a file cut off, a bit that
    flipped, and frames that do not stand where their header puts them."""
    path = tmp_path / "data.npz"
    np.savez(path, **recording())
    whole, header = path.read_bytes(), io.BytesIO()
    for damaged in (whole[: len(whole) // 2], whole[:5000] + b"?" + whole[5001:]):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"path must be an undamaged \.npz file, got '"):
            load_camera_npz(path)
    np.savez(path, **{k: v for k, v in recording().items() if k != "position_center"})
    np.save(header, CENTER)
    with zipfile.ZipFile(path, "a") as archive:
        archive.writestr("position_center.npy", header.getvalue() + b"more")
    with pytest.raises(ValueError, match=r"position_center must end after its \(3,\) numbers, got"):
        load_camera_npz(path)
    with pytest.raises(FileNotFoundError):
        load_camera_npz(tmp_path / "nothing.npz")
