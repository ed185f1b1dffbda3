"""A file in the layout of the published measurements, for tests of what reads it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from fisherfast.problems import default_camera

CENTER = np.array([-0.3, 0.0, 0.3])
EDGE = np.array([p for p in np.arange(-15, 16) * 0.3 if abs(p) > 0.45])


def recording(path: Path, edge_frames: int, center_frames: int) -> Path:
    """A file in the layout of the published measurements, with images of the simulated camera."""
    camera = default_camera()
    generator = torch.Generator().manual_seed(0)

    def frames(positions: np.ndarray, count: int) -> np.ndarray:
        whole = np.full((len(positions), count, 32, 64), 100, np.uint8)
        for images, position in zip(whole, positions, strict=True):
            if abs(position) < 2:
                small = camera.sample(float(position), count, generator)
                images[:, 7:25, 20:44] = small.round().clamp(0, 255).numpy()
        return whole

    np.savez(
        path,
        data_center=frames(CENTER, center_frames),
        data_edge=frames(EDGE, edge_frames),
        position_center=CENTER,
        position_edge=EDGE,
    )
    return path
