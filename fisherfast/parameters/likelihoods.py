"""What the outputs of a network say about the labels: p(y | f), f = f(x, w).

The Fisher matrix of the parameters needs three things of a likelihood: the score
d log p(y | f) / df at a label, labels drawn from the network's own p(y | f), and the Fisher matrix
of f itself, as a root of it: vectors r with sum_r r r^T = E_y[score score^T].
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["Bernoulli", "Categorical", "Gaussian", "Likelihood", "Poisson"]


class Likelihood:
    """A likelihood of one's own overrides `score`, `draw` and, for fisher_type="exact", `root`."""

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        """The labels as they are used, [n, ...].

        Raises:
            TypeError: labels of a wrong dtype.
            ValueError: labels of a wrong shape or range.
        """
        return y

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """log p(y_i | f_i) [n], in nats."""
        raise NotImplementedError

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """d log p(y | f) / df, in the shape of f."""
        raise NotImplementedError

    def draw(self, f: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Labels [samples, n, ...] drawn from p(y | f); the same numbers for a sample, however the
        samples are batched. The generator is one of the CPU."""
        raise NotImplementedError

    def root(self, f: Tensor) -> Iterator[Tensor]:
        """Vectors r_1, r_2, ..., each in the shape of f, with sum_r r r^T the Fisher matrix of f.

        Raises:
            NotImplementedError: it is not known; fisher_type="mc" needs none.
        """
        raise NotImplementedError


def _uniform(f: Tensor, samples: int, numbers: int, generator: torch.Generator) -> Tensor:
    """[samples, n, numbers] uniform numbers in (0, 1), float64, on the device of f: those of one
    data sample follow each other in the stream."""
    drawn = torch.rand(len(f), samples, numbers, dtype=torch.float64, generator=generator)
    return drawn.transpose(0, 1).to(f.device)


class Gaussian(Likelihood):
    """y ~ N(f, variance): the Fisher matrix of f is 1 / variance.

    Args:
        variance: sigma^2, a positive number or a tensor that broadcasts to f, in the square of y's
            unit. The Fisher matrix has the unit 1 / w^2, with 1 / sigma^2 in it.
    """

    def __init__(self, variance: float | Tensor = 1.0) -> None:
        self.variance = torch.as_tensor(variance, dtype=torch.float64)
        if not bool((self.variance > 0).all()):
            raise ValueError(f"variance must be positive, got {variance!r}")

    def _variance(self, f: Tensor) -> Tensor:
        return self.variance.to(f).expand(f.shape)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        variance = self._variance(f)
        each = (y - f).square() / variance + variance.log() + math.log(2 * math.pi)
        return -0.5 * each.flatten(1).sum(1)

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        return (y - f) / self._variance(f)

    def draw(self, f: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        uniform = _uniform(f, samples, f[0].numel(), generator)
        normal = torch.special.ndtri(uniform).to(f).reshape(samples, *f.shape)
        return f + self._variance(f).sqrt() * normal

    def root(self, f: Tensor) -> Iterator[Tensor]:
        return _axes(self._variance(f).rsqrt())


def _axes(scale: Tensor) -> Iterator[Tensor]:
    """One vector for each output: its scale there, zero elsewhere."""
    flat = scale.reshape(len(scale), -1)
    for output in range(flat.shape[1]):
        vector = torch.zeros_like(flat)
        vector[:, output] = flat[:, output]
        yield vector.reshape(scale.shape)


class Categorical(Likelihood):
    """y one of C classes, f [n, C] logits: the Fisher matrix of f is diag(p) - p p^T."""

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point() or y.dtype == torch.bool:
            raise TypeError(f"labels must be whole numbers of classes, got {y.dtype}")
        if y.shape != f.shape[:1]:
            raise ValueError(f"labels must have shape [n] = {[len(f)]}, got {list(y.shape)}")
        if len(y) and (int(y.min()) < 0 or int(y.max()) >= f.shape[1]):
            raise ValueError(
                f"labels must lie in [0, {f.shape[1]}), got {int(y.min())} to {int(y.max())}"
            )
        return y.long()

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return f.log_softmax(1).gather(1, y[:, None])[:, 0]

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.nn.functional.one_hot(y, f.shape[1]).to(f) - f.softmax(1)

    def draw(self, f: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        cumulative = f.double().softmax(1).cumsum(1)
        uniform = _uniform(f, samples, 1, generator)[..., 0]  # [samples, n]
        found = torch.searchsorted(cumulative, uniform.T.contiguous()).T
        return found.clamp_max(f.shape[1] - 1)

    def root(self, f: Tensor) -> Iterator[Tensor]:
        p = f.softmax(1)
        for label in range(f.shape[1]):
            vector = -p
            vector[:, label] += 1
            yield p[:, label : label + 1].sqrt() * vector


class Bernoulli(Likelihood):
    """Each y 0 or 1, f logits of the same shape: the Fisher matrix of f is p (1 - p)."""


class Poisson(Likelihood):
    """Each y a count, f the logarithm of its rate: the Fisher matrix of f is the rate."""
