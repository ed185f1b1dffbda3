"""Scenes drawn here and read from picture files."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from fisherfast.problems import glyph_scene, scene_from_file


def test_glyph_is_a_symmetric_ring_with_a_bar():
    glyph = glyph_scene((40, 30), stroke=4)
    assert glyph.shape == (40, 30)
    assert set(np.unique(glyph)) == {0.0, 1.0}
    assert np.array_equal(glyph, glyph[::-1])
    assert np.array_equal(glyph, glyph[:, ::-1])
    assert (glyph[20, 15], glyph[10, 15], glyph[0, 0]) == (1, 0, 0)  # bar, hole, ground


def test_picture_keeps_its_aspect_and_orientation(tmp_path):
    """Catches width for height, and a mirrored picture: a ramp that brightens to the right."""
    image = pytest.importorskip("PIL.Image")
    ramp = np.broadcast_to(np.arange(200, dtype=np.uint8), (50, 200))
    image.fromarray(ramp).save(tmp_path / "ramp.png")
    scene = scene_from_file(tmp_path / "ramp.png", shape=(60, 40))
    assert (scene.shape, scene.min(), scene.max()) == ((10, 40), 0, 1)
    assert (np.diff(scene, axis=1) > 0).all()


def test_sixteen_bit_picture_is_not_clipped(tmp_path):
    """Catches a conversion to 8 bits, which saturates at 255."""
    image = pytest.importorskip("PIL.Image")
    ramp = np.broadcast_to(np.linspace(0, 60_000, 64).astype(np.uint16), (8, 64))
    image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "deep.png")
    scene = scene_from_file(tmp_path / "deep.png", shape=(8, 64))
    np.testing.assert_allclose(scene[0], np.linspace(0, 1, 64), atol=1e-3)


def test_wrong_input(tmp_path, monkeypatch):
    image = pytest.importorskip("PIL.Image")
    with pytest.raises(ValueError, match="stroke must be positive and below half of 8, got 4"):
        glyph_scene((8, 8), stroke=4)
    with pytest.raises(FileNotFoundError):
        scene_from_file(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(ValueError, match="path must be a picture that Pillow can read, got '"):
        scene_from_file(tmp_path / "text.png")
    image.new("L", (5, 5), 7).save(tmp_path / "flat.png")
    with pytest.raises(ValueError, match="path must be a picture with contrast, got '"):
        scene_from_file(tmp_path / "flat.png")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r'needs Pillow: pip install "fisherfast\[plots\]"'):
        scene_from_file(tmp_path / "flat.png")
