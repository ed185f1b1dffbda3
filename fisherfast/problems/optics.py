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
