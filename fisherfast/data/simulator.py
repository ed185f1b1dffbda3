"""Samples from a function that draws them at any theta, differentiated in forward mode or by finite
steps."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.autograd import forward_ad

from fisherfast._errors import FisherWarning
from fisherfast._validation import check_names, check_seed, check_whole
from fisherfast.data.batch import Batch, Data, Numbered
from fisherfast.data.finite_difference import check_dtheta
from fisherfast.data.inputs import (
    Inputs,
    Samples,
    equal,
    floating,
    joined,
    mapped,
    rows_of,
    tensors_of,
)
from fisherfast.data.sources import as_batch, check_dense, check_entries

Draw = Callable[[torch.Tensor, int, torch.Generator], Any]

DERIVATIVES = ("pathwise", "paired", "independent")

STEP_ROUNDING = 1e-3
"""Largest relative error of dtheta by the rounding of theta -+ dtheta / 2."""

PROBE_STEP = 1e-2
"""Change of theta, relative to 1 + |theta|, that is visible in a batch of any simulator that
depends on theta."""

HINT = 'use derivative="paired" with a dtheta'


class Simulator(Data):
    """Samples drawn by a function, batch by batch, the same ones at every pass.

    Args:
        fn: fn(theta [P], n, generator) -> x [n, ...], or a tuple or dict of the inputs of a model;
            integers for finite steps only, except beside floating entries. All random numbers must
            come from the generator: the same generator state must give the same noise.
        theta: where to measure, P numbers; or [Q, P], Q points along theta, for a profile ([Q, 1]
            for one parameter). It reaches fn as a tensor [P] of torch's default dtype, or of its
            own dtype if it is a floating tensor; x keeps the dtype that fn returns.
        samples: number of samples at each theta, of each condition for finite steps.
        derivative: "pathwise": dx/dtheta by PyTorch's forward mode through fn, one parameter at a
            time (P calls of fn per batch). "paired": two conditions with the same noise, for a fn
            that PyTorch cannot differentiate. "independent": two conditions with independent noise.
        dtheta: full separation of the two conditions, one number or P of them; only for "paired"
            and "independent".
        seed: a batch depends on seed, condition and its number only: a measurement with another
            batch size draws other samples.
        device: of theta and of the generator.
        names: names of the P parameters, for tables and figures.

    Raises:
        ValueError: dtheta is missing, not positive or lost in the rounding of theta; during a
            measurement: fn gives other samples from the same generator state, the same from
            another one, or has no derivative.
        TypeError: fn cannot be called, or does not return tensors.

    Warns:
        FisherWarning: during a measurement, if x does not depend on theta: J = 0.

    Cost: nothing is kept; every pass draws all samples again, "pathwise" P times.

    Example:
        >>> import torch, fisherfast as ff
        >>> def fn(theta, n, generator):
        ...     return torch.exp(theta + torch.randn(n, 3, generator=generator))
        >>> data = ff.Simulator(fn, theta=0.5, samples=4000)
        >>> data.parameters, data.source
        (1, 'pathwise')
    """

    def __init__(
        self,
        fn: Draw,
        theta: float | Sequence[float] | np.ndarray | torch.Tensor,
        *,
        samples: int = 20_000,
        derivative: str = "pathwise",
        dtheta: float | Sequence[float] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
        names: Sequence[str] | None = None,
    ) -> None:
        if not callable(fn):
            raise TypeError(f"fn must be a function, got {type(fn).__name__}")
        if derivative not in DERIVATIVES:
            raise ValueError(f"derivative must be one of {DERIVATIVES}, got {derivative!r}")
        self._fn = fn
        given = _as_theta(theta).to(device)
        self._points = given if given.ndim == 2 else given[None]
        self._samples = check_whole("samples", samples, least=1)
        self._seed = check_seed(seed) % 2**64
        self.source = derivative
        self.parameters = given.shape[-1]
        if given.ndim == 2:
            self.points, self.centres = len(given), given.double().cpu()
        self.names = check_names(names, self.parameters)
        self.paired = derivative == "paired"
        if derivative == "pathwise":
            if dtheta is not None:
                raise ValueError(f'dtheta must be left out for derivative="pathwise", got {dtheta}')
            self.conditions = len(self._points)
        else:
            if dtheta is None:
                raise ValueError(f'dtheta must be given for derivative="{derivative}", got None')
            self.dtheta = check_dtheta(dtheta, self.parameters)
            self.conditions = 2 * self.parameters * len(self._points)
            self._check_rounding()
        self._checked = False

    def samples(self, condition: int = 0) -> int:
        """Return the number of samples of a condition."""
        return self._samples

    def repeats(self, condition: int = 0) -> bool:
        """Return True: a batch depends on seed, condition and its number only."""
        return True

    def read(self, condition: int, batch_size: int) -> Iterator[Batch]:
        """Draw the samples of one condition, in batches."""
        for _, batch in self.deal(condition, batch_size):
            yield batch

    def deal(
        self, condition: int, batch_size: int, begin: int = 0, step: int = 1
    ) -> Iterator[Numbered]:
        """Draw every step-th batch of one condition, after checking the function on the first."""
        if not self._checked:
            self._check_simulator(min(batch_size, self._samples))
            self._checked = True
        for first in range(begin * batch_size, self._samples, step * batch_size):
            n = min(batch_size, self._samples - first)
            yield first, self._batch(condition, first // batch_size, n)

    def _batch(self, condition: int, number: int, n: int) -> Batch:
        if self.source == "pathwise":
            return self._differentiate(condition, number, n)
        return Batch(self._draw(self._point(condition), condition, number, n))

    def _point(self, condition: int) -> torch.Tensor:
        """Return theta of a condition, [P]."""
        number, condition = divmod(condition, self.conditions // len(self._points))
        point = self._points[number].clone()
        if self.dtheta:
            side = 0.5 if condition % 2 else -0.5
            point[condition // 2] += side * self.dtheta[condition // 2]
        return point

    def _generator(self, condition: int, number: int) -> torch.Generator:
        """Make the generator of one batch, the same for both conditions of a pair."""
        stream = condition // 2 if self.paired else condition
        state = np.random.SeedSequence((self._seed, stream, number)).generate_state(1, np.uint64)
        return torch.Generator(self._points.device).manual_seed(int(state[0]))

    def _draw(self, theta: torch.Tensor, condition: int, number: int, n: int) -> Samples:
        """Draw one batch at any theta, from the random numbers of a condition's batch."""
        x = as_batch(self._call(theta, self._generator(condition, number), n), "fn")
        return x.clone()  # fn may draw the next batch into the same memory

    def _call(self, theta: torch.Tensor, generator: torch.Generator, n: int) -> Samples:
        x = self._fn(theta.clone(), n, generator)  # fn may convert units in place
        inputs = isinstance(x, tuple | Mapping) and len(x) > 0
        if not (inputs or isinstance(x, torch.Tensor)):
            raise TypeError(f"fn must return a tensor [n, ...], got {type(x).__name__}")
        if isinstance(x, torch.Tensor) and (x.ndim < 1 or len(x) != n):
            raise ValueError(f"fn must return n = {n} samples, got shape {list(x.shape)}")
        samples: Samples = check_entries(Inputs.of(x), "fn", check_dense) if inputs else x
        if len(samples) != n:
            raise ValueError(f"fn must return n = {n} samples, got {len(samples)}")
        if self.source == "pathwise" and not floating(samples):
            raise TypeError(
                f"fn must return a floating tensor, got {tensors_of(samples)[0].dtype}: convert"
                f" with .float(); counts have no derivative: {HINT}"
            )
        return samples

    def _differentiate(self, condition: int, number: int, n: int) -> Batch:
        """Compute x and dx/dtheta by forward mode: each parameter in turn, with the same noise."""
        for parameter in range(self.parameters):
            x, tangent = self._jvp(parameter, condition, number, n)
            if parameter == 0:
                side = joined(x)
                tangents = side.new_zeros((self.parameters, *side.shape))
            if tangent is not None:
                tangents[parameter] = tangent
            del tangent  # keep one at a time besides the batch
        return Batch(x, tangents=tangents)

    def _jvp(
        self, parameter: int, condition: int, number: int, n: int
    ) -> tuple[Samples, torch.Tensor | None]:
        """Compute x of one batch and the derivative of `joined` x to one parameter; None if x does
        not depend on it."""
        direction = torch.zeros_like(self._points[0])
        direction[parameter] = 1
        with warnings.catch_warnings():
            # torch compiles its decompositions at the first use of forward mode, with a warning
            warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
            with torch.inference_mode(False), forward_ad.dual_level():
                theta = forward_ad.make_dual(self._points[condition].clone(), direction)
                try:
                    x = self._call(theta, self._generator(condition, number), n)
                except NotImplementedError as error:
                    reason = str(error).partition("\n")[0].rstrip(".")
                    raise ValueError(
                        f"fn must be differentiable in forward mode, got: {reason}; {HINT}"
                    ) from error
                primal = mapped(x, lambda entry: forward_ad.unpack_dual(entry).primal)
                tangent = forward_ad.unpack_dual(joined(x)).tangent
                x = as_batch(primal, "fn").clone()
                return x, None if tangent is None else tangent.detach().clone()

    def _check_simulator(self, n: int) -> None:
        """Check on the first batch that fn draws all noise from the generator, and that x depends
        on theta."""
        theta = self._points[0]
        first = self._draw(theta, 0, 0, n)
        if not equal(self._draw(theta, 0, 0, n), first):
            raise ValueError(
                "fn must give the same samples from the same generator state, got others:"
                " draw every random number from the generator that it is given"
            )
        varied = not equal(first, rows_of(first, torch.zeros(n, dtype=torch.int64)))
        if varied and equal(self._draw(theta, 0, 1, n), first):
            raise ValueError(
                "fn must draw other samples from another generator state, got the same: draw every"
                " random number from the generator that it is given"
            )
        for p in range(self.parameters):
            if not self._depends_on(p, n, first):
                warnings.warn(
                    f"fn must depend on theta, got the same samples for another theta[{p}]: J = 0",
                    FisherWarning,
                    stacklevel=2,
                )

    def _depends_on(self, parameter: int, n: int, first: Samples) -> bool:
        """Return whether the first batch changes with a parameter.

        Raises:
            ValueError: it changes, but has no derivative.
        """
        if self.source != "pathwise":
            minus, plus = (
                self._draw(self._point(2 * parameter + side), 0, 0, n) for side in (0, 1)
            )
            return not equal(minus, plus)
        tangent = self._jvp(parameter, 0, 0, n)[1]
        if tangent is not None and bool(tangent.any()):
            return True
        moved = self._points[0].clone()
        moved[parameter] += PROBE_STEP * (1 + float(moved[parameter].abs()))
        if equal(self._draw(moved, 0, 0, n), first):
            return False
        raise ValueError(
            f"fn must be differentiable in theta[{parameter}], got samples that change with it but"
            f" have no derivative (counts, comparisons, NumPy): {HINT}"
        )

    def _check_rounding(self) -> None:
        for condition in range(0, self.conditions, 2):
            p = condition // 2 % self.parameters
            step = self.dtheta[p]
            minus, plus = (self._point(condition + side)[p].double() for side in (0, 1))
            if abs(float(plus - minus) / step - 1) > STEP_ROUNDING:
                raise ValueError(
                    f"dtheta must be resolved by theta of {self._points.dtype}, got"
                    f" {step:g} at {float((minus + plus) / 2):g}: pass theta as a float64 tensor"
                )

    def __repr__(self) -> str:
        step = f", dtheta={list(self.dtheta)}" if self.dtheta else ""
        theta = (self._points if self.points else self._points[0]).tolist()
        return f"Simulator({self.source}{step}, theta={theta}, samples={self._samples})"


def _as_theta(theta: float | Sequence[float] | np.ndarray | torch.Tensor) -> torch.Tensor:
    """Return theta as a finite tensor [P], or [Q, P] for Q points."""
    if isinstance(theta, torch.Tensor) and theta.is_floating_point():
        vector = theta.detach().clone()
    else:
        vector = torch.as_tensor(theta)
        if vector.is_complex() or vector.dtype == torch.bool:
            raise TypeError(f"theta must be real numbers, got {vector.dtype}")
        vector = vector.to(torch.get_default_dtype())
    if vector.ndim > 2 or vector.numel() < 1:
        raise ValueError(f"theta must have shape [P] or [Q, P], got {list(vector.shape)}")
    if not bool(torch.isfinite(vector).all()):
        raise ValueError(f"theta must be finite, got {vector.tolist()}")
    return vector.reshape(-1) if vector.ndim < 2 else vector
