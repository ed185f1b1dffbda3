"""Scenes for the simulated camera: a generated glyph, or any picture file."""

from __future__ import annotations

import os

import numpy as np

from fisherfast._validation import check_whole

# 9.6 um x 7.2 um with a line of 2.1 um at the 0.15 um spacing of `default_camera`.
GLYPH_SHAPE = (64, 48)
GLYPH_STROKE = 14


def glyph_scene(shape: tuple[int, int] = GLYPH_SHAPE, *, stroke: int = GLYPH_STROKE) -> np.ndarray:
    """Draw the letter theta: an elliptic ring with a bar, 1 on a background of 0.

    Args:
        shape: height and width of the letter, in samples.
        stroke: width of the line, in samples.

    Returns:
        float64 `shape`, values 0 and 1.

    Raises:
        ValueError: if the line is too thick for the shape.

    Example:
        >>> from fisherfast.problems import glyph_scene
        >>> glyph_scene().shape
        (64, 48)
    """
    height, width = (check_whole("shape", size, least=1) for size in shape)
    if not 0 < 2 * stroke < min(height, width):
        raise ValueError(
            f"stroke must be positive and below half of {min(height, width)}, got {stroke}"
        )
    y = (np.arange(height) + 0.5 - height / 2)[:, None]
    x = (np.arange(width) + 0.5 - width / 2)[None, :]
    inside = (2 * y / height) ** 2 + (2 * x / width) ** 2 <= 1
    hole = (y / (height / 2 - stroke)) ** 2 + (x / (width / 2 - stroke)) ** 2 < 1
    bar = np.abs(y) <= stroke / 2
    return (inside & (~hole | bar)).astype(np.float64)


def scene_from_file(
    path: str | os.PathLike[str], *, shape: tuple[int, int] = GLYPH_SHAPE
) -> np.ndarray:
    """Read a picture file as a scene: grey, fitted into `shape`, stretched to the range 0 to 1.

    Args:
        path: any picture that Pillow can read.
        shape: largest height and width, in samples; the aspect ratio is kept.

    Returns:
        float64 [h, w].

    Raises:
        ImportError: without Pillow, which `pip install "fisherfast[plots]"` installs.
        FileNotFoundError: if there is no such file.
        ValueError: if the file is not a picture, or has one uniform grey.

    Example:
        >>> from fisherfast.problems import default_camera, scene_from_file
        >>> camera = default_camera(scene_from_file("photograph.jpg"))  # doctest: +SKIP
    """
    try:
        from PIL import Image, ImageOps, UnidentifiedImageError
    except ImportError as error:
        raise ImportError(
            'scene_from_file needs Pillow: pip install "fisherfast[plots]"'
        ) from error
    height, width = (check_whole("shape", size, least=1) for size in shape)
    try:
        with Image.open(path) as opened:
            upright = ImageOps.exif_transpose(opened)
            # "L" is luminance in 8 bits; pictures with more bits are grey already.
            deep = upright.mode.startswith(("I", "F"))
            grey = upright.convert("F" if deep else "L").convert("F")
    except FileNotFoundError:
        raise
    except (UnidentifiedImageError, OSError) as error:
        raise ValueError(
            f"path must be a picture that Pillow can read, got {os.fspath(path)!r}: {error}"
        ) from error
    scale = min(width / grey.width, height / grey.height)
    fitted = (max(1, int(grey.width * scale)), max(1, int(grey.height * scale)))
    scene = np.asarray(grey.resize(fitted, Image.Resampling.BILINEAR), dtype=np.float64)
    contrast = np.ptp(scene)
    if contrast == 0:
        raise ValueError(f"path must be a picture with contrast, got {os.fspath(path)!r}")
    return (scene - scene.min()) / contrast
