"""How many parameters the data can tell apart: the effective dimension of a network."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast.model.unwrap import unwrapped
from fisherfast.parameters.backward.batches import Data
from fisherfast.parameters.checks import check_count, check_number, check_seed
from fisherfast.parameters.fisher import fisher
from fisherfast.parameters.layout import ParameterLayout, Selection
from fisherfast.parameters.likelihoods import Likelihood
from fisherfast.parameters.structures.gram import GramFisher, rounding_noise

__all__ = ["EffectiveDimension", "effective_dimension", "local_effective_dimension"]

NEGLIGIBLE = 1e-3
"""What a zero eigenvalue that rounding made positive may add to log det(1 + c F) by a Cholesky
factor; each of the others adds several. Otherwise eigenvalues are computed, ten times slower."""

Initialise = Callable[[nn.Module, torch.Generator], Any]
"""Draws new parameters of a network in place, from the generator (or from torch's own, which is
seeded for it)."""


@dataclass(frozen=True, eq=False)
class EffectiveDimension:
    """The effective dimension of a network for n samples.

    Attributes:
        value: d, between 0 and the number of parameters (larger only where log kappa is near 0).
        n: samples that the network is imagined to be trained on.
        gamma: share of them that counts.
        parameters: P.
        traces: [draws] of the Fisher matrix, in 1 / w^2.
        log_determinants: [draws] log det(1 + kappa F^), F^ the normalised Fisher matrix.
    """

    value: float
    n: float
    gamma: float
    parameters: int
    traces: Tensor
    log_determinants: Tensor

    @property
    def share(self) -> float:
        """value / P, the normalised effective dimension."""
        return self.value / self.parameters

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        return (
            f"EffectiveDimension({self.value:.6g} of {self.parameters} parameters"
            f" ({100 * self.share:.3g} %), n={self.n:g}, gamma={self.gamma:g},"
            f" draws={len(self.traces)})"
        )


def effective_dimension(
    model: nn.Module,
    likelihood: Likelihood,
    x: Data,
    *,
    n: float,
    gamma: float = 1.0,
    draws: int = 10,
    initialise: Initialise | None = None,
    parameters: Selection = None,
    batch_size: int = 256,
    seed: int = 0,
    memory_budget: int | str = "8 GiB",
) -> EffectiveDimension:
    r"""The effective dimension over networks drawn at random.

    .. math::
        d_{\gamma,n} = \frac{2 \log \langle \sqrt{\det(1 + \kappa \hat F(w))} \rangle_w}
                            {\log \kappa}, \qquad
        \kappa = \frac{\gamma n}{2 \pi \log n}, \qquad
        \hat F(w) = \frac{P F(w)}{\langle \mathrm{tr} F(w) \rangle_w}

    The mean < > goes over draws of the parameters w. As n grows, d tends to the largest rank of F.
    Determinants are those of Gram matrices [N, N], N = samples x columns, where N < P.

    Args:
        model: in eval mode; its parameters are as before afterwards, also after an error.
        likelihood: of the outputs.
        x: inputs over which F is averaged, data that can be read again and again.
        n: samples that the network is imagined to be trained on; kappa must be above 1.
        gamma: in (0, 1].
        draws: of the parameters. The mean is that of exponentials in P: few draws are ruled by the
            largest determinant, and d is then too low.
        initialise: called with (model, generator) for each draw, changes the parameters in place;
            None calls ``reset_parameters()`` of every layer.
        parameters: those that are measured, see `fisher`; initialise may draw others too.
        batch_size: samples at a time.
        seed: of the draws.
        memory_budget: bytes of one Gram matrix and what it is made of, a number or like "8 GiB".

    Returns:
        `EffectiveDimension`.

    Raises:
        ValueError: n, gamma or draws out of range; a Fisher matrix of zero; a network without
            ``reset_parameters``.
        MemoryError: the Gram matrix does not fit.

    Cost: for each draw one exact Fisher matrix through its Gram matrix, N^3 / 3 operations for the
    determinant, and a pass for the trace; a copy of the parameters for each draw.

    Reference: Abbas, Sutter, Zoufal, Lucchi, Figalli, Woerner (2021), "The power of quantum neural
    networks", Nature Computational Science 1, 403, equations 2 and 3.

    Example:
        >>> import torch, fisherfast as ff
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3))
        >>> x = torch.randn(50, 4)
        >>> found = ff.parameters.effective_dimension(
        ...     model, ff.parameters.Categorical(), x, n=1000, draws=3
        ... )
        >>> 0 < found.value < found.parameters
        True
    """
    kappa = _kappa(n, gamma)
    check_count("draws", draws)
    check_seed(seed)
    if initialise is not None and not callable(initialise):
        raise TypeError(f"initialise must be a function, got {initialise!r}")
    if isinstance(x, Iterator):
        raise TypeError(
            f"x must be data that can be read again, got {type(x).__name__}: pass a list of it"
        )
    model = unwrapped(model)
    layout = ParameterLayout.of(model, parameters)
    measure = partial(
        fisher, model, likelihood, x, parameters=list(layout.names), batch_size=batch_size
    )

    with restored(model):
        drawn = []
        for draw in range(draws):
            _draw(model, initialise or _reset, seed + draw)
            drawn.append(_copies(model))
        traces = []
        if draws > 1:
            for copy in drawn:
                _put(model, copy)
                traces.append(measure(structure="diag").trace())
        log_determinants = []
        for copy in drawn:
            _put(model, copy)
            matrix = measure(structure="gram", memory_budget=memory_budget)
            assert isinstance(matrix, GramFisher)
            if draws == 1:
                traces.append(matrix.trace())
            mean = sum(traces) / draws
            if not 0 < mean < math.inf:
                raise ValueError(f"the Fisher matrix must have a positive trace, got {mean}")
            log_determinants.append(log_det_one_plus(matrix, kappa * layout.size / mean))
    halves = 0.5 * torch.tensor(log_determinants, dtype=torch.float64, device="cpu")
    mean_root = float(halves.logsumexp(0)) - math.log(draws)
    return EffectiveDimension(
        value=2 * mean_root / math.log(kappa),
        n=float(n),
        gamma=float(gamma),
        parameters=layout.size,
        traces=torch.tensor(traces, dtype=torch.float64, device="cpu"),
        log_determinants=2 * halves,
    )


def local_effective_dimension(
    model: nn.Module,
    likelihood: Likelihood,
    x: Data,
    *,
    n: float,
    gamma: float = 1.0,
    draws: int = 1,
    radius: float | None = None,
    parameters: Selection = None,
    batch_size: int = 256,
    seed: int = 0,
    memory_budget: int | str = "8 GiB",
) -> EffectiveDimension:
    """The effective dimension around the parameters that the network has, a trained one's say.

    As `effective_dimension`, the mean going over a ball around the present parameters. With one
    draw, the default, that is the centre: for a small ball F hardly changes.

    Args:
        model: in eval mode; its parameters are as before afterwards, also after an error.
        likelihood: of the outputs.
        x: inputs over which F is averaged.
        n: samples that the network was trained on.
        gamma: in (0, 1].
        draws: 1 for the centre; more are drawn uniformly from the ball.
        radius: of the ball, in the unit of the parameters; None for 1 / sqrt(n).
        parameters: those that are measured, and moved.
        batch_size: samples at a time.
        seed: of the draws.
        memory_budget: bytes of one Gram matrix and what it is made of, a number or like "8 GiB".

    Returns:
        `EffectiveDimension`.

    Raises:
        ValueError: n, gamma, draws or radius out of range; a Fisher matrix of zero.
        MemoryError: the Gram matrix does not fit.

    Cost: that of `effective_dimension`, without the pass for the trace where there is one draw.

    Reference: Abbas, Sutter, Figalli, Woerner (2021), "Effective dimension of machine learning
    models", arXiv:2112.04807, definition 1.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(4, 3)
        >>> found = ff.parameters.local_effective_dimension(
        ...     model, ff.parameters.Categorical(), torch.randn(50, 4), n=1000
        ... )
        >>> 0 < found.value < 15
        True
    """
    _kappa(n, gamma)
    reach = 1 / math.sqrt(n) if radius is None else radius
    check_number("radius", reach)
    if not 0 < reach < math.inf:
        raise ValueError(f"radius must be positive and finite, got {radius}")
    model = unwrapped(model)
    layout = ParameterLayout.of(model, parameters)
    centre = _copies(model)

    def move(network: nn.Module, generator: torch.Generator) -> None:
        _put(network, centre)
        if draws == 1:
            return
        step = torch.randn(
            layout.size, generator=generator, dtype=torch.float64, device=generator.device
        )
        shrink = float(
            torch.rand((), generator=generator, dtype=torch.float64, device=generator.device)
        ) ** (1 / layout.size)
        step *= reach * shrink / step.norm()
        own = dict(network.named_parameters())
        for name, part in layout.unflatten(step).items():
            own[name].add_(part.to(own[name]))

    return effective_dimension(
        model,
        likelihood,
        x,
        n=n,
        gamma=gamma,
        draws=draws,
        initialise=move,
        parameters=parameters,
        batch_size=batch_size,
        seed=seed,
        memory_budget=memory_budget,
    )


def _kappa(n: float, gamma: float) -> float:
    check_number("gamma", gamma)
    check_number("n", n)
    if not 0 < gamma <= 1:
        raise ValueError(f"gamma must lie in (0, 1], got {gamma}")
    kappa = gamma * n / (2 * math.pi * math.log(n)) if 1 < n < math.inf else 0.0
    if kappa <= 1:
        raise ValueError(
            f"n must be so large that gamma n / (2 pi log n) is above 1, got n = {n} with"
            f" gamma = {gamma}; n = 20 is enough for gamma = 1"
        )
    return kappa


def log_det_one_plus(matrix: GramFisher, scale: float) -> float:
    """log det(1 + scale F), through the smaller one of F and its Gram matrix."""
    smaller = matrix.smaller()
    length = float(smaller.norm())  # at least the largest eigenvalue
    noise = rounding_noise(len(smaller), length, matrix.precision)
    if scale * noise < NEGLIGIBLE:
        damped = scale * smaller
        damped.diagonal().add_(1)
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return 2 * float(factor.diagonal().log().sum())
    values = torch.linalg.eigvalsh(smaller)
    noise = rounding_noise(len(values), float(values.max()), matrix.precision)
    return float((scale * values[values > noise]).log1p().sum())


def _reset(model: nn.Module, generator: torch.Generator) -> None:
    """Every layer's own initialisation."""
    for name, module in model.named_modules():
        own = [value for value in module._parameters.values() if value is not None]
        reset = getattr(module, "reset_parameters", None) or getattr(
            module, "_reset_parameters", None
        )
        if own and reset is None:
            raise ValueError(
                f"initialise must be given for {name or 'model'!r}"
                f" ({type(module).__name__}), which has parameters and no reset_parameters()"
            )
        if reset is not None:
            reset()


def _draw(model: nn.Module, initialise: Initialise, seed: int) -> None:
    """New parameters; torch's own random state is put back."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.default_generator.manual_seed(seed)
        initialise(model, generator)


def _copies(model: nn.Module) -> dict[str, Tensor]:
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: tensor.detach().clone() for name, tensor in named}


@torch.no_grad()
def _put(model: nn.Module, copies: dict[str, Tensor]) -> None:
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        tensor.copy_(copies[name])


@contextlib.contextmanager
def restored(model: nn.Module) -> Iterator[None]:
    """Parameters and buffers are afterwards what they were, also those that were replaced."""
    parameters = [(m, dict(m._parameters)) for m in model.modules()]
    buffers = [(m, dict(m._buffers)) for m in model.modules()]
    copies = _copies(model)
    try:
        yield
    finally:
        for module, own in parameters:
            module._parameters.update(own)
        for module, others in buffers:
            module._buffers.update(others)
        _put(model, copies)
