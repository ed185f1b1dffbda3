"""The Fisher matrix of the parameters by brute force: one sample and one label after the other.

F = 1/n sum_i sum_y p(y | x_i) s s^T, s = d log p(y | x_i, w) / dw by autograd, every sample alone
in its batch, log-probabilities from `torch.distributions`. Nothing of the library is used.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Distribution, Normal, Poisson

POISSON_TAIL = 60
"""Counts that are summed: rates of the tests are below 10, the rest has less than 1e-25."""


def distribution(kind: str, f: Tensor, variance: float = 1.0) -> Distribution:
    """p(y | f): "categorical" and "bernoulli" of logits, "gaussian", "poisson" of log rates."""
    if kind == "categorical":
        return Categorical(logits=f)
    if kind == "gaussian":
        return Normal(f, torch.full_like(f, variance**0.5))  # a number would be of float32
    if kind == "bernoulli":
        return Bernoulli(logits=f)
    if kind == "poisson":
        return Poisson(f.exp())
    raise ValueError(f"kind must be that of a likelihood, got {kind!r}")


def gradients(outputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """d outputs / d parameters of one number, side by side [P]; zero where autograd sees none."""
    found = torch.autograd.grad(outputs, parameters, retain_graph=True, allow_unused=True)
    parts = []
    for gradient, parameter in zip(found, parameters, strict=True):
        part = torch.zeros_like(parameter) if gradient is None else gradient
        parts.append((part.to_dense() if part.is_sparse else part).flatten())
    return torch.cat(parts)


def brute_force(
    model: nn.Module,
    kind: str,
    x: Tensor,
    y: Tensor | None = None,
    *,
    variance: float = 1.0,
    chosen: Callable[[str], bool] | None = None,
) -> Tensor:
    """F [P, P] over the parameters that require grad.

    Args:
        model: maps [n, ...] to [n, ...].
        kind: of likelihood, see `distribution`.
        x: inputs [n, ...].
        y: labels [n, ...] of the empirical matrix; None for the exact one.
        variance: of the Gaussian.
        chosen: parameters by name; None for all that require grad.
    """
    total: Tensor | float = 0.0
    for _, weight, s in _scores(model, kind, x, y, variance, chosen):
        total = total + weight * torch.outer(s, s)
    assert isinstance(total, Tensor)
    return total / len(x)


def moments_of_trace(model: nn.Module, kind: str, x: Tensor) -> tuple[float, float]:
    """Mean and variance, over labels drawn once for each sample, of the Monte Carlo trace.

    The trace is 1/n sum_i |s_i|^2, with the s_i of different samples independent.
    """
    mean = torch.zeros(len(x), dtype=torch.float64)
    square = torch.zeros_like(mean)
    for i, weight, s in _scores(model, kind, x, None, 1.0, None):
        mean[i] += weight * s.dot(s)
        square[i] += weight * s.dot(s) ** 2
    return float(mean.mean()), float((square - mean**2).sum()) / len(x) ** 2


def _scores(
    model: nn.Module,
    kind: str,
    x: Tensor,
    y: Tensor | None,
    variance: float,
    chosen: Callable[[str], bool] | None,
) -> Iterator[tuple[int, float, Tensor]]:
    """(sample, weight, s [P] float64) of every sample and label."""
    named = model.named_parameters()
    parameters = [p for n, p in named if p.requires_grad and (chosen is None or chosen(n))]
    for i in range(len(x)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tests of the library see its own
            f = model(x[i : i + 1])
            if y is not None:
                log = distribution(kind, f, variance).log_prob(y[i : i + 1])
                yield i, 1.0, gradients(log.sum(), parameters).double()
                continue
            for weight, log in _labels(kind, f, variance):
                yield i, weight, gradients(log, parameters).double()


def _labels(kind: str, f: Tensor, variance: float) -> Iterator[tuple[float, Tensor]]:
    """Weights and log-probabilities of labels, so that sums over them are expectations of s s^T."""
    p = distribution(kind, f, variance)
    if kind == "gaussian":  # s is linear in y: one deviation of sigma in each output
        for j in range(f.numel()):
            y = f.detach().clone()
            y.view(-1)[j] += variance**0.5
            yield 1.0, p.log_prob(y).sum()
    elif kind == "poisson":  # scores of different outputs are independent and of mean zero
        for count in range(POISSON_TAIL):
            logs = p.log_prob(torch.full_like(f, count)).flatten()
            for log in logs:
                yield float(log.detach().exp()), log
    else:
        choices = range(f.shape[1]) if kind == "categorical" else (0.0, 1.0)
        for label in itertools.product(choices, repeat=1 if kind == "categorical" else f.numel()):
            y = torch.tensor(label).reshape(f.shape[:1] if kind == "categorical" else f.shape)
            log = p.log_prob(y.to(f) if kind == "bernoulli" else y).sum()
            yield float(log.detach().exp()), log
