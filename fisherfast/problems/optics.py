"""Shift, blur and bin a picture with sub-pixel accuracy, in Fourier space."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def angular_frequencies(size: int, spacing: float, *, half: bool = False) -> Tensor:
    """Return k of a discrete Fourier transform, float64 [size] or half of it, per unit length."""
    frequencies = torch.fft.rfftfreq if half else torch.fft.fftfreq
    return 2 * math.pi * frequencies(size, d=spacing, dtype=torch.float64)


def shift_image(image: np.ndarray | Tensor, shift: float) -> Tensor:
    """Shift a picture along its columns by any fraction of a sample, periodically.

        F(k) -> F(k) exp(-i k shift)

    Args:
        image: [h, w].
        shift: to the right, in samples.

    Returns:
        float64 [h, w]. Exact for band-limited pictures.

    Example:
        >>> import torch
        >>> from fisherfast.problems import shift_image
        >>> shift_image(torch.tensor([[1.0, 0.0, 0.0]]), 1.0).round().abs()
        tensor([[0., 1., 0.]], dtype=torch.float64)
    """
    picture = torch.as_tensor(image, dtype=torch.float64)
    width = picture.shape[-1]
    phase = torch.exp(-1j * angular_frequencies(width, 1.0, half=True) * shift)
    return torch.fft.irfft(torch.fft.rfft(picture) * phase, n=width)


def blurred_spectrum(canvas: Tensor, spacing: float, psf_sigma: float) -> Tensor:
    """Compute F(k) exp(-|k|^2 sigma^2 / 2): a canvas [h, w] blurred by a Gaussian point-spread
    function.

    Args:
        canvas: float64 [h, w].
        spacing: distance of two samples, in um.
        psf_sigma: standard deviation of the point-spread function, in um.

    Returns:
        complex128 [h, w // 2 + 1].
    """
    rows = angular_frequencies(canvas.shape[0], spacing).unsqueeze(1)
    columns = angular_frequencies(canvas.shape[1], spacing, half=True)
    return torch.fft.rfft2(canvas) * torch.exp(-(rows**2 + columns**2) * psf_sigma**2 / 2)


def centred_canvas(scene: Tensor, height: int, width: int, padding: str) -> Tensor:
    """Centre the scene on a canvas of at least [height, width], padded with zero or its edge."""
    margins = []
    for size, least in zip(scene.shape, (height, width), strict=True):
        free = max(least - size, 0)
        margins.append((free // 2, free - free // 2))
    mode = "constant" if padding == "zero" else "edge"
    return torch.from_numpy(np.pad(scene.numpy(), margins, mode=mode))  # type: ignore[call-overload]


def crop_and_bin(image: Tensor, height: int, width: int, factor: int) -> Tensor:
    """Average factor x factor samples in the middle of `image` to pixels [height, width]."""
    top = (image.shape[0] - height * factor) // 2
    left = (image.shape[1] - width * factor) // 2
    view = image[top : top + height * factor, left : left + width * factor]
    return view.reshape(height, factor, width, factor).mean((1, 3))
