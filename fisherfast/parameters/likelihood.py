"""The distribution of labels given the outputs of a network: p(y | f), f = f(x, w).

The Fisher matrix of the parameters needs three things of a likelihood: the score
d log p(y | f) / df at a label, labels drawn from the network's own p(y | f), and the Fisher matrix
of f itself, as a root of it: vectors r with sum_r r r^T = E_y[score score^T].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from fisherfast.model.default_device import outside

LogProb = Callable[[Tensor, Tensor], Tensor]
"""(f [n, ...], y [n, ...]) to log p(y_i | f_i) [n]."""

Sample = Callable[[Tensor, torch.Generator], Tensor]
"""(f [n, ...], generator) to labels [n, ...]."""

LEAST_UNIFORM = 2.0**-54
"""Replaces 0, which has no quantile: half of the smallest step of a float64 uniform number."""

NEGATIVE = 1e-5
"""Share of the largest eigenvalue of an information matrix that may be below zero by rounding: a
rank-one matrix [64, 64] in float32 had -3e-7."""

SEEDS = 2**62
"""Seeds that data samples draw from; a million of them meet with probability 1e-7."""


class Likelihood:
    """A likelihood by two functions, or the base of a class that overrides its methods.

    Args:
        log_prob: (f [n, ...], y [n, ...]) to log p(y_i | f_i) [n] in nats, differentiable in f; row
            i must depend on row i only.
        sample: (f [n, ...], generator) to labels y [n, ...] drawn from p(y_i | f_i) with a
            generator of the CPU; f is on the CPU, n copies of the outputs of one data sample.
            Needed for fisher_type="mc".
        information: f [n, ...] to E_y[score score^T] [n, N, N] of the N outputs of each sample.
            Needed for fisher_type="exact".

    A subclass overrides `log_prob` or `score`, and `draw` and `root` where they are used.

    Example:
        >>> import math, torch, fisherfast as ff
        >>> def log_prob(f, y):  # exponential waiting times, f the logarithm of the rate
        ...     return (f - y * f.exp()).sum(1)
        >>> def sample(f, generator):
        ...     return torch.empty_like(f).exponential_(generator=generator) / f.exp()
        >>> waiting = ff.parameters.Likelihood(
        ...     log_prob, sample, information=lambda f: torch.diag_embed(torch.ones_like(f)))
        >>> f, y = torch.tensor([[0.0]]), torch.tensor([[3.0]])
        >>> waiting.score(f, y)
        tensor([[-2.]])
    """

    allowed = "finite"
    """The outputs that `valid` accepts, in words."""

    def __init__(
        self,
        log_prob: LogProb | None = None,
        sample: Sample | None = None,
        information: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        given = {"log_prob": log_prob, "sample": sample, "information": information}
        for name, function in given.items():
            if function is not None and not callable(function):
                raise TypeError(f"{name} must be a function, got {function!r}")
        self._log_prob, self._sample, self._information = log_prob, sample, information

    def __repr__(self) -> str:
        return f"{type(self).__name__}()"

    def check_outputs(self, f: Tensor) -> None:
        """Check the shape of the outputs, not their values.

        Raises:
            ValueError: outputs of a shape that the likelihood cannot read.
        """

    def valid(self, f: Tensor) -> Tensor:
        """True where all outputs are `allowed`: one bool on their device."""
        return torch.isfinite(f).all()

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        """The labels as they are used, [n, ...].

        Raises:
            TypeError: labels of a wrong dtype.
            ValueError: labels of a wrong shape or range.
        """
        if len(y) != len(f):
            raise ValueError(f"labels must be one per sample ({len(f)}), got {len(y)}")
        return y

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        """log p(y_i | f_i) [n], in nats."""
        if self._log_prob is None:
            raise NotImplementedError(f"{type(self).__name__} must override log_prob or score")
        return self._log_prob(f, y)

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        """d log p(y | f) / df, in the shape of f."""
        with torch.inference_mode(False), torch.enable_grad(), outside():
            f = f.detach().clone().requires_grad_()
            found = self.log_prob(f, y)
            if found.shape != f.shape[:1]:
                raise ValueError(
                    f"log_prob must return shape [n] = [{len(f)}], got {list(found.shape)}"
                )
            if found.grad_fn is None:
                raise ValueError("log_prob must depend on the outputs, got one without gradient")
            return torch.autograd.grad(found.sum(), f)[0]

    def draw(self, f: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        """Labels [samples, n, ...] drawn from p(y | f); the same numbers for a data sample, however
        the data are batched. The generator is one of the CPU.

        Raises:
            ValueError: `sample` is missing.
        """
        if self._sample is None:
            raise ValueError(
                'likelihood must have sample= for fisher_type "mc", got none: give a function'
                " (f, generator) -> labels"
            )
        seeds = torch.randint(SEEDS, (len(f),), generator=generator, device="cpu").tolist()
        drawn = []
        with outside():
            for row, seed in zip(f.cpu(), seeds, strict=True):
                own = torch.Generator("cpu").manual_seed(seed)
                labels = self._sample(row.expand(samples, *row.shape).clone(), own)
                if not isinstance(labels, Tensor) or labels.shape[:1] != (samples,):
                    raise ValueError(
                        "sample must return one label for each row of f"
                        f" ({samples}), got {_described(labels)}"
                    )
                drawn.append(labels)
        return torch.stack(drawn, 1).to(f.device)

    def root(self, f: Tensor) -> Iterator[Tensor]:
        """Vectors r_1, r_2, ..., each in the shape of f, with sum_r r r^T the Fisher matrix of f.

        Raises:
            ValueError: it is not known, or is no covariance.
        """
        if self._information is None:
            raise ValueError(
                'likelihood must have information= for fisher_type "exact", got none: give a'
                ' function f -> [n, N, N], or draw labels with fisher_type="mc"'
            )
        outputs = f[0].numel()
        with outside():
            matrix = self._information(f)
        if matrix.shape != (len(f), outputs, outputs):
            raise ValueError(
                f"information must return shape [n, N, N] = {[len(f), outputs, outputs]}, got"
                f" {list(matrix.shape)}"
            )
        values, vectors = torch.linalg.eigh(matrix.detach().double())
        if bool((values[:, :1] < -NEGATIVE * values[:, -1:].abs()).any()):
            raise ValueError(
                "information must be positive semi-definite, got the eigenvalue"
                f" {float(values.min()):.3g}"
            )
        root = vectors * values.clamp_min(0).sqrt()[:, None]
        return (root[:, :, column].reshape(f.shape).to(f.dtype) for column in range(outputs))


def _described(value: object) -> str:
    return f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def uniform(f: Tensor, samples: int, generator: torch.Generator) -> Tensor:
    """[samples, n, ...] uniform numbers in (0, 1) in the shape of f, float64, on its device: those
    of one data sample follow each other in the stream."""
    shape = (len(f), samples, *f.shape[1:])
    drawn = torch.rand(shape, dtype=torch.float64, generator=generator, device="cpu")
    return drawn.clamp_min(LEAST_UNIFORM).transpose(0, 1).to(f.device)


def one_output_each(scale: Tensor) -> Iterator[Tensor]:
    """One vector for each output: its scale there, zero elsewhere."""
    flat = scale.reshape(len(scale), -1)
    for output in range(flat.shape[1]):
        vector = torch.zeros_like(flat)
        vector[:, output] = flat[:, output]
        yield vector.reshape(scale.shape)


def check_shape(f: Tensor, y: Tensor) -> None:
    """Raise ValueError unless each output has one label."""
    if y.shape != f.shape:
        raise ValueError(
            f"labels must have the shape of the outputs, {list(f.shape)}, got {list(y.shape)}"
        )


def check_finite(f: Tensor, y: Tensor) -> None:
    """Raise unless each output has one label, a finite real number."""
    if y.is_complex() or y.dtype == torch.bool:
        raise TypeError(f"labels must be real numbers, got {y.dtype}")
    check_shape(f, y)
    finite = torch.isfinite(y)
    if not bool(finite.all()):
        raise ValueError(f"labels must be finite, got {float(y[~finite][0])}")
