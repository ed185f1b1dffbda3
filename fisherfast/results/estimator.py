"""The errors of a network that estimates theta, along theta: beside the Cramer-Rao bound."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast.model.isolation import evaluation
from fisherfast.model.unwrap import check_model, unwrapped

BATCH_SIZE = 1024
"""Samples in one forward pass."""


@dataclass(frozen=True, eq=False, repr=False)
class EstimatorErrors:
    """Errors of an estimate in bins of theta, float64 on the CPU in the unit of theta.

    The mean square error is the square of the bias plus that of the standard deviation. The
    Cramer-Rao bound limits the standard deviation of an *unbiased* estimate only: where the bias b
    changes with theta the bound is larger by the factor |1 + db/dtheta|, which is below 1 where
    estimates are drawn to the middle of the range.

    Attributes:
        theta: [Q, P] of the bins.
        samples: [Q] int64 in each bin.
        rms: [Q, P] root of the mean square error; NaN for bins with fewer than two samples.
        bias: [Q, P] mean error.
        std: [Q, P] standard deviation of the error about its mean in the bin.
        rms_stderr, bias_stderr, std_stderr: [Q, P] their standard errors.
    """

    theta: Tensor
    samples: Tensor
    rms: Tensor
    bias: Tensor
    std: Tensor
    rms_stderr: Tensor
    bias_stderr: Tensor
    std_stderr: Tensor

    def __len__(self) -> int:
        return len(self.theta)

    def __repr__(self) -> str:
        return f"EstimatorErrors(bins={len(self)}, samples={int(self.samples.sum())})"


def errors_along(centers: Tensor, model: nn.Module, x: Any, theta: Any) -> EstimatorErrors:
    """Compute RMS error, bias and standard deviation of estimates in bins of theta.

    Each sample belongs to the nearest of the bins, in units of the spread of theta.

    Args:
        centers: [Q, P] theta of the bins.
        model: estimates theta [n, P], or [n] for one parameter. It runs in eval mode without
            gradients, on its own device and in its dtype; its state is restored.
        x: samples [n, ...], a tensor or array; a tuple or dict of them for several inputs.
        theta: true theta [n, P], or [n] for one parameter.

    Raises:
        ValueError: theta, or what the model returns, has another shape, or is not finite.
        TypeError: x or theta are no tensors or arrays.

    Cost: one forward pass over the samples.
    """
    check_model(model)
    parameters = centers.shape[1]
    truth = _labels("theta", theta, parameters)
    inputs = _inputs(x)
    counts = {len(part) for part in inputs.values()}
    if counts != {len(truth)}:
        raise ValueError(
            f"x must hold as many samples as theta, {len(truth)}, got {sorted(counts)}"
        )
    estimates = torch.cat(list(_estimates(unwrapped(model), x, inputs, len(truth))))
    error = _labels("estimates of the model", estimates, parameters) - truth
    spread = truth.std(0)
    unit = torch.where(spread > 0, spread, 1)
    nearest = torch.cdist(truth / unit, centers / unit).argmin(1)
    return _in_bins(centers, error, nearest)


def _in_bins(centers: Tensor, error: Tensor, nearest: Tensor) -> EstimatorErrors:
    """Summarise errors [n, P] of samples whose bins are given, int64 [n]."""
    bins = len(centers)
    n = torch.bincount(nearest, minlength=bins)
    count = torch.where(n > 1, n, torch.nan)[:, None].double()

    def mean(values: Tensor) -> Tensor:
        sums = torch.zeros(bins, values.shape[1], dtype=torch.float64, device="cpu")
        return sums.index_add_(0, nearest, values) / count

    bias, square = mean(error), mean(error.square())
    about = error - bias[nearest]
    # the mean of a bin is known from its own samples: n - 1 degrees of freedom
    variance = mean(about.square()) * count / (count - 1)
    tails = mean(about.square().square()) - variance.square()
    of_square = mean((error.square() - square[nearest]).square())
    return EstimatorErrors(
        theta=centers,
        samples=n,
        rms=square.sqrt(),
        bias=bias,
        std=variance.sqrt(),
        rms_stderr=(of_square / count).sqrt() / (2 * square.sqrt()),
        bias_stderr=(variance / count).sqrt(),
        std_stderr=(tails.clamp_min(0) / count).sqrt() / (2 * variance.sqrt()),
    )


def _inputs(x: Any) -> dict[Any, Tensor]:
    """Return the tensors of x by key, or by number."""
    parts = x.items() if isinstance(x, dict) else enumerate(x if isinstance(x, tuple) else (x,))
    return {key: _tensor("x", part) for key, part in parts}


def _tensor(name: str, value: Any) -> Tensor:
    if isinstance(value, str | dict) or value is None:
        raise TypeError(f"{name} must be a tensor or an array, got {type(value).__name__}")
    return value.detach() if isinstance(value, Tensor) else torch.as_tensor(value)


def _labels(name: str, value: Any, parameters: int) -> Tensor:
    """Return numbers [n, P] as float64 on the CPU."""
    given = _tensor(name, value)
    shape = list(given.shape)
    if given.is_complex() or given.dtype == torch.bool:
        raise TypeError(f"{name} must be real numbers, got {given.dtype}")
    columns = given.double().cpu()
    columns = columns[:, None] if columns.ndim == 1 and parameters == 1 else columns
    if columns.ndim != 2 or columns.shape[1] != parameters:
        one = ", or [n]" if parameters == 1 else ""
        raise ValueError(f"{name} must have shape [n, {parameters}]{one}, got {shape}")
    if not bool(torch.isfinite(columns).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity")
    return columns


def _estimates(
    model: nn.Module, x: Any, inputs: dict[Any, Tensor], samples: int
) -> Iterator[Tensor]:
    """Run the model on batches."""
    weights = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    with evaluation(model, 0):
        for start in range(0, samples, BATCH_SIZE):
            batch = {
                key: _moved(part[start : start + BATCH_SIZE], weights)
                for key, part in inputs.items()
            }
            output = model(**batch) if isinstance(x, dict) else model(*batch.values())
            if not isinstance(output, Tensor):
                raise TypeError(
                    f"model must return a tensor of estimates [n, P], got {type(output).__name__}"
                )
            yield output.detach().cpu()


def _moved(part: Tensor, weights: Tensor) -> Tensor:
    """Copy a part to the model's device, floating numbers to its dtype."""
    dtype = weights.dtype if part.is_floating_point() else part.dtype
    return part.to(weights.device, dtype, copy=True)
