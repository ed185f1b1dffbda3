"""Samples of a Gaussian shift with a covariance of choice, as each source gives them."""

from __future__ import annotations

import torch

import fisherfast as ff

DTHETA = 0.1


def samples(
    source: str,
    root: torch.Tensor,
    whitened: torch.Tensor,
    *,
    n: int,
    seed: int,
    dtype: torch.dtype = torch.float32,
    shape: tuple[int, ...] = (-1,),
) -> ff.data.Data:
    """Draw n samples of each condition, x = root (white + theta whitened): |whitened|^2 is the
    information, root root^T the covariance.

    Args:
        source: "tangents", "scores", "paired" or "independent".
        shape: of one sample.
    """
    generator = torch.Generator().manual_seed(seed)

    def noise() -> torch.Tensor:
        return torch.randn(n, len(root), dtype=torch.float64, generator=generator)

    white, signal = noise(), (root @ whitened).reshape(shape)
    x = (white @ root.T).reshape(n, *shape)
    if source == "tangents":
        return ff.Pathwise(x.to(dtype), signal.to(dtype).expand(x.shape))
    if source == "scores":
        return ff.Score(x.to(dtype), white @ whitened)
    other = x if source == "paired" else (noise() @ root.T).reshape(n, *shape)
    step = signal * DTHETA / 2
    minus, plus = (x - step).to(dtype), (other + step).to(dtype)
    return ff.FiniteDifference(minus, plus, DTHETA, paired=source == "paired")
