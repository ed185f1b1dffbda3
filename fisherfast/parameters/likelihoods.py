"""The likelihoods of regression, classification and counts."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fisherfast.parameters.likelihood import (
    Likelihood,
    check_finite,
    check_shape,
    one_output_each,
    uniform,
)


class Gaussian(Likelihood):
    """y ~ N(f, variance), independent for each output: the Fisher matrix of f is 1 / variance.

    Args:
        variance: sigma^2, a positive number or a tensor that broadcasts to the outputs of one
            sample ([C], say), in the square of y's unit. A Fisher matrix has 1 / sigma^2 in it.

    Raises:
        ValueError: a variance that is not finite and positive.

    Labels are numbers in the shape of f. The mean squared error (y - f)^2 is -log p of variance 1/2
    up to a constant, and its half that of variance 1.

    Example:
        >>> import torch, fisherfast as ff
        >>> f, y = torch.tensor([[1.0, 2.0]]), torch.tensor([[2.0, 2.5]])
        >>> ff.parameters.Gaussian(torch.tensor([0.5, 0.25])).score(f, y)
        tensor([[2., 2.]])
    """

    def __init__(self, variance: float | Tensor = 1.0) -> None:
        super().__init__()
        dtype = torch.float64 if isinstance(variance, float) else None  # the default rounds more
        try:
            given = torch.as_tensor(variance, dtype=dtype, device="cpu").detach()
        except (TypeError, ValueError, RuntimeError) as error:
            raise TypeError(f"variance must be a number or a tensor, got {variance!r}") from error
        if given.is_complex() or given.dtype == torch.bool:
            raise TypeError(f"variance must be real numbers, got {given.dtype}")
        self.variance = given.double().clone()
        if not bool(((self.variance > 0) & torch.isfinite(self.variance)).all()):
            raise ValueError(f"variance must be finite and positive, got {_short(variance)}")

    def __repr__(self) -> str:
        return f"Gaussian(variance={_short(self.variance)})"

    def check_outputs(self, f: Tensor) -> None:
        one = (1, *f.shape[1:])
        try:
            fits = torch.broadcast_shapes(self.variance.shape, one) == one
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"variance must broadcast to the outputs of a sample, {list(f.shape[1:])}, got"
                f" shape {list(self.variance.shape)}"
            )

    def _variance(self, f: Tensor) -> Tensor:
        return self.variance.to(f).expand(f.shape)

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        check_finite(f, y)
        return y.to(f.dtype)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        variance = self._variance(f)
        each = (y - f).square() / variance + variance.log() + math.log(2 * math.pi)
        return -0.5 * _by_sample(each)

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        return (y - f) / self._variance(f)

    def draw(self, f: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        normal = torch.special.ndtri(uniform(f, samples, generator)).to(f)
        return f + self._variance(f).sqrt() * normal

    def root(self, f: Tensor) -> Iterator[Tensor]:
        return one_output_each(self._variance(f).rsqrt())


class Categorical(Likelihood):
    """y one of C classes, f [n, C] logits: the Fisher matrix of f is diag(p) - p p^T, p of f.

    With f [n, C, *positions] there is one label per position, y [n, *positions], as in
    ``torch.nn.functional.cross_entropy``; the labels of one sample count as one observation.

    The root is one vector less than there are classes: class c against all later ones,

        r_c = sqrt(p_c q_c / q_(c-1)) (e_c - p_(>c) / q_c),    q_c = sum_(k > c) p_k,

    the factor L of diag(p) - p p^T = L L^T (Tanabe and Sagae 1992, J. R. Stat. Soc. B 54, 211).

    Labels are whole numbers in [0, C).

    Example:
        >>> import torch, fisherfast as ff
        >>> root = torch.stack(list(ff.parameters.Categorical().root(torch.zeros(1, 2))))
        >>> root.shape, root[0]
        (torch.Size([1, 1, 2]), tensor([[ 0.5000, -0.5000]]))
    """

    def __init__(self) -> None:
        super().__init__()

    def check_outputs(self, f: Tensor) -> None:
        if f.dim() < 2:
            raise ValueError(
                f"outputs of the model must have shape [n, C, ...], got {list(f.shape)}"
            )
        if f.shape[1] < 2:
            raise ValueError(
                f"outputs of the model must be logits of two classes at least, got {f.shape[1]};"
                " for one logit take Bernoulli()"
            )

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        if y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise TypeError(f"labels must be whole numbers of classes, got {y.dtype}")
        wanted = [len(f), *f.shape[2:]]
        if list(y.shape) != wanted:
            raise ValueError(f"labels must have shape {wanted}, got {list(y.shape)}")
        y = y.long()
        if y.numel() and (int(y.min()) < 0 or int(y.max()) >= f.shape[1]):
            raise ValueError(
                f"labels must lie in [0, {f.shape[1]}), got {int(y.min())} to {int(y.max())}"
            )
        return y

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return _by_sample(f.log_softmax(1).gather(1, y.unsqueeze(1)))

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        one = torch.ones((), dtype=f.dtype, device=f.device).expand(len(y), 1, *y.shape[1:])
        return (-f.softmax(1)).scatter_add(1, y.unsqueeze(1), one)

    def draw(self, f: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        last = f.movedim(1, -1).double()  # [n, *positions, C]
        cumulative = last.softmax(-1).cumsum(-1).contiguous()
        drawn = uniform(f[:, 0], samples, generator).movedim(0, -1).contiguous()
        found = torch.searchsorted(cumulative, drawn, right=True).movedim(-1, 0)
        return found.clamp_max(f.shape[1] - 1)

    def root(self, f: Tensor) -> Iterator[Tensor]:
        log_p = f.log_softmax(1)
        log_tail = log_p.flip(1).logcumsumexp(1).flip(1)  # of class c and all later ones
        places = f.shape[2:].numel()
        for label in range(f.shape[1] - 1):
            here, later = log_p[:, label], log_tail[:, label + 1]
            scale = (0.5 * (here + later - log_tail[:, label])).exp()
            vector = torch.zeros_like(f)
            vector[:, label] = scale
            vector[:, label + 1 :] = (
                -scale[:, None] * (log_p[:, label + 1 :] - later[:, None]).exp()
            )
            if places == 1:
                yield vector
                continue
            flat = vector.reshape(*f.shape[:2], places)
            for place in range(places):
                alone = torch.zeros_like(flat)
                alone[..., place] = flat[..., place]
                yield alone.reshape(f.shape)


class Bernoulli(Likelihood):
    """Each y 0 or 1, f logits of the same shape: the Fisher matrix of f is p (1 - p), p of f.

    Labels are 0 or 1, of any real dtype; several outputs are independent (many labels at once).

    Example:
        >>> import torch, fisherfast as ff
        >>> ff.parameters.Bernoulli().score(torch.zeros(1, 2), torch.tensor([[0, 1]]))
        tensor([[-0.5000,  0.5000]])
    """

    def __init__(self) -> None:
        super().__init__()

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        if y.is_complex():
            raise TypeError(f"labels must be 0 or 1, got {y.dtype}")
        check_shape(f, y)
        wrong = y[(y != 0) & (y != 1)]
        if len(wrong):
            raise ValueError(f"labels must be 0 or 1, got {float(wrong[0]):g}")
        return y.to(f.dtype)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        return _by_sample(torch.nn.functional.logsigmoid(torch.where(y > 0, f, -f)))

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        return torch.where(y > 0, (-f).sigmoid(), -f.sigmoid())

    def draw(self, f: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        return (uniform(f, samples, generator) < f.double().sigmoid()).to(f.dtype)

    def root(self, f: Tensor) -> Iterator[Tensor]:
        return one_output_each((f.sigmoid() * (-f).sigmoid()).sqrt())


class Poisson(Likelihood):
    """Each y a count, f the logarithm of its rate: the Fisher matrix of f is the rate.

    Args:
        log_rate: False if f is the rate itself, which must then be positive: its Fisher matrix is
            1 / rate.

    Labels are whole numbers of at least 0, of any real dtype, in the shape of f.

    Example:
        >>> import torch, fisherfast as ff
        >>> rate, y = torch.tensor([[2.0]]), torch.tensor([[3]])
        >>> ff.parameters.Poisson(log_rate=False).score(rate, y)
        tensor([[0.5000]])
    """

    def __init__(self, *, log_rate: bool = True) -> None:
        super().__init__()
        if not isinstance(log_rate, bool):
            raise TypeError(f"log_rate must be True or False, got {log_rate!r}")
        self.log_rate = log_rate
        self.allowed = (
            "logarithms of rates, and these finite" if log_rate else "rates, finite and positive"
        )

    def __repr__(self) -> str:
        return f"Poisson(log_rate={self.log_rate})"

    def _rate(self, f: Tensor) -> Tensor:
        return f.exp() if self.log_rate else f

    def valid(self, f: Tensor) -> Tensor:
        rate = self._rate(f)
        return (torch.isfinite(f) & torch.isfinite(rate) & (rate > 0)).all()

    def check(self, f: Tensor, y: Tensor) -> Tensor:
        check_finite(f, y)
        wrong = y[(y < 0) | (y != y.round())]
        if len(wrong):
            raise ValueError(f"labels must be counts 0, 1, 2, ..., got {float(wrong[0]):g}")
        return y.to(f.dtype)

    def log_prob(self, f: Tensor, y: Tensor) -> Tensor:
        log_rate = f if self.log_rate else f.log()
        return _by_sample(y * log_rate - self._rate(f) - (y.to(f.dtype) + 1).lgamma())

    def score(self, f: Tensor, y: Tensor) -> Tensor:
        return y - f.exp() if self.log_rate else y / f - 1

    def draw(self, f: Tensor, samples: int, generator: torch.Generator) -> Tensor:
        drawn = uniform(f, samples, generator)
        return _poisson_quantile(self._rate(f.double()).expand(drawn.shape), drawn).to(f.dtype)

    def root(self, f: Tensor) -> Iterator[Tensor]:
        return one_output_each((0.5 * f).exp() if self.log_rate else f.rsqrt())


BY_NAME: dict[str, type[Gaussian | Categorical | Bernoulli | Poisson]] = {
    "gaussian": Gaussian,
    "categorical": Categorical,
    "bernoulli": Bernoulli,
    "poisson": Poisson,
}
"""Likelihoods that a name stands for, with their default arguments."""


def as_likelihood(likelihood: Any) -> Likelihood:
    """The likelihood that a name stands for, or the instance given.

    Raises:
        TypeError: neither, or a class in place of an instance.
        ValueError: an unknown name.
    """
    if isinstance(likelihood, str):
        if likelihood not in BY_NAME:
            raise ValueError(
                f"likelihood must be one of {', '.join(map(repr, BY_NAME))} or an instance, got"
                f" {likelihood!r}"
            )
        return BY_NAME[likelihood]()
    if isinstance(likelihood, type) and issubclass(likelihood, Likelihood):
        raise TypeError(
            f"likelihood must be an instance, got the class {likelihood.__name__}: write"
            f" {likelihood.__name__}()"
        )
    if not isinstance(likelihood, Likelihood):
        raise TypeError(
            "likelihood must be a name or a Gaussian, Categorical, Bernoulli, Poisson or another"
            f" Likelihood, got {type(likelihood).__name__}"
        )
    return likelihood


TAIL_SIGMAS, TAIL_COUNTS = 10.0, 60.0
"""rate +- 10 sqrt(rate) +- 60 holds all counts but 1e-20: Bernstein's bound for t events beyond is
exp(-t^2 / (2 rate + 2 t / 3))."""


def _poisson_quantile(rate: Tensor, probability: Tensor) -> Tensor:
    """The smallest count k with P(count <= k) >= probability, by bisection."""
    reach = TAIL_SIGMAS * rate.sqrt() + TAIL_COUNTS
    below, above = (rate - reach).floor().clamp_min(-1), (rate + reach).ceil()
    widest = float((above - below).max()) if rate.numel() else 1.0
    for _ in range(math.ceil(math.log2(widest)) + 1 if math.isfinite(widest) else 0):
        middle = ((below + above) / 2).floor()
        enough = torch.special.gammaincc(middle + 1, rate) >= probability
        open_ = above - below > 1
        above = torch.where(enough & open_, middle, above)
        below = torch.where(~enough & open_, middle, below)
    return above


def _by_sample(values: Tensor) -> Tensor:
    """Sums over everything but the samples: [n]."""
    return values.reshape(len(values), values[:1].numel()).sum(1)


def _short(variance: float | Tensor) -> str:
    """A number, or a shape and range."""
    if not isinstance(variance, Tensor):
        return repr(variance)
    if variance.numel() == 1:
        return f"{float(variance):g}"
    return f"[{float(variance.min()):g} to {float(variance.max()):g}], {list(variance.shape)}"
