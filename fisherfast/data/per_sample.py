"""Samples of one condition, each with its derivative or the derivative of its log density."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fisherfast._validation import check_whole
from fisherfast.data import sources
from fisherfast.data.batch import Batch
from fisherfast.data.from_sources import FromSources
from fisherfast.data.groups import check_groups
from fisherfast.data.names import check_names
from fisherfast.data.sources import Source


class PerSample(FromSources):
    """One condition at theta, each of whose samples has a companion: its tangents or score."""

    companion: str
    """Name of the companion in messages."""

    conditions = 1

    def __init__(
        self,
        x: Source,
        companion: Any,
        parameters: int | None,
        groups: Any,
        names: Sequence[str] | None = None,
    ) -> None:
        self._x = sources.check_source(x, "x")
        self._sources = [x]
        self._companion = companion
        if isinstance(x, torch.Tensor | np.ndarray):
            if parameters is not None:
                raise ValueError(
                    f"parameters must be left out for tensors, got {parameters}: it follows from"
                    f" {self.companion}"
                )
            self._companion = self._whole_companion()
        else:
            if companion is not None:
                raise TypeError(
                    f"{self.companion} must be left out when x yields batches"
                    f" (x, {self.companion}), got {type(companion).__name__}"
                )
            self.parameters = 1 if parameters is None else parameters
        self.parameters = check_whole("parameters", self.parameters, least=1)
        self.groups = check_groups(groups, [x], ["x"])
        self.names = check_names(names, self.parameters)

    @abstractmethod
    def _whole_companion(self) -> torch.Tensor:
        """Check the companion of all samples, for x a tensor, and set `parameters`."""

    @abstractmethod
    def _checked(self, x: torch.Tensor, companion: torch.Tensor, where: str) -> torch.Tensor:
        """Check samples and companion that a source has yielded, and return the companion
        [n, P, ...]."""

    def _companion_of(self, given: Any) -> torch.Tensor:
        """Convert the companion that a source has yielded to a tensor [n, ...]."""
        return sources.as_batch(given, self.companion)

    def _join(self, x: torch.Tensor, companion: torch.Tensor) -> Batch:
        if self.source in ("score", "labelled"):
            return Batch(x, score=companion)
        return Batch(x, tangents=companion.movedim(1, 0))

    def _batch(self, condition: int, item: Any, rows: slice | torch.Tensor, where: str) -> Batch:
        if self.resident():
            return self._join(sources.as_batch(item, "x"), self._companion[rows])
        paired = isinstance(item, list | tuple)
        if not paired or len(item) != 2:
            more = paired and len(item) > 2
            got = f"{len(item)} entries" if more else type(item).__name__
            hint = f": leave labels out; {sources.SEVERAL}" if more else ""
            raise TypeError(
                f"x must yield pairs (x, {self.companion}) where {self.companion} is not given,"
                f" got {got} {where}{hint}"
            )
        x, companion = sources.as_batch(item[0], "x"), self._companion_of(item[1])
        return self._join(x, self._checked(x, companion, where))

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(parameters={self.parameters}, samples={self.samples()})"


class Pathwise(PerSample):
    r"""Samples at theta with their derivatives: a differentiable simulator, a known signal.

    The derivative of a mean is the mean of the per-sample derivatives,
    :math:`\partial_\theta E[f(x)] = E[f'(x)\, dx/d\theta]`: no finite step, and far less noise than
    the difference of two conditions.

    Args:
        x: samples [n, ...] of floating dtype; or, without dx, a ``Dataset``, ``DataLoader``,
            iterable or function that yields pairs (x, dx) of the same shapes (items of a
            ``Dataset``: x [...] and dx [P, ...]).
        dx: dx/dtheta [n, P, ...], or [n, ...] for one parameter: **batch first**, dtype of x.
            (`fisherfast.jvp` takes [P, n, ...], as torch.func.vmap does.)
        parameters: P, for sources that yield pairs; 1 if None.
        groups: labels [n] of samples that depend on each other, as in `FiniteDifference`.
        names: names of the P parameters, for tables and figures.

    Raises:
        ValueError: dx has another shape or is not finite.
        TypeError: integer, boolean or complex samples (integers have no derivative: use `Score` or
            `FiniteDifference`), dx of another dtype than x, or samples of several inputs (a tuple
            or dict), which are not supported yet.

    Rounded values (camera counts, half precision) have no derivative: they are measured with added
    noise of half a step, and the result has a note (docs/theory.md, section 21).

    Cost: tensors are not copied; a measurement takes 1 + P forward passes over the samples.

    Example:
        >>> import torch, fisherfast as ff
        >>> x = torch.randn(1000, 4)
        >>> data = ff.Pathwise(x, torch.ones(1000, 4))             # a mean that moves with theta
        >>> abs(ff.fisher_information(data).value - 4) < 1
        True
    """

    source = "pathwise"
    companion = "dx"

    def __init__(
        self,
        x: Source,
        dx: Any = None,
        *,
        parameters: int | None = None,
        groups: Any = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(x, dx, parameters, groups, names)

    def _whole_companion(self) -> torch.Tensor:
        given = _as_tensor(self._companion, "dx", "[n, P, ...]")
        dx = self._by_parameter(given, self._x, "")
        _check_like(dx, sources.as_batch(self._x[:1], "x"), "")
        _check_finite(dx, "dx", "")
        self.parameters = dx.shape[1]
        return dx

    def _checked(self, x: torch.Tensor, companion: torch.Tensor, where: str) -> torch.Tensor:
        dx = self._by_parameter(companion, x, f" {where}")
        if dx.shape[1] != self.parameters:
            raise ValueError(
                f"dx must have shape [n, P, ...] = {[len(x), self.parameters, *x.shape[1:]]}, got"
                f" {list(companion.shape)} {where} (parameters={self.parameters})"
            )
        _check_like(dx, x, f" {where}")
        if dx.device.type == "cpu":
            _check_finite(dx, "dx", f" {where}")
        return dx

    @staticmethod
    def _by_parameter(dx: torch.Tensor, x: torch.Tensor | np.ndarray, where: str) -> torch.Tensor:
        """Return dx as [n, P, ...], with P = 1 where it was left out."""
        by_parameter = dx[:, None] if 0 < dx.ndim == x.ndim else dx
        shape = by_parameter.shape
        if shape[:1] + shape[2:] != x.shape or shape[1] < 1:
            swapped = tuple(dx.shape[1:]) == tuple(x.shape)
            hint = ": batch first, dx.movedim(0, 1)" if swapped and len(dx) else ""
            raise ValueError(
                "dx must have shape [n, P, ...], or [n, ...] for one parameter, with [n, ...] ="
                f" {list(x.shape)}, got {list(dx.shape)}{where}{hint}"
            )
        return by_parameter


class Score(PerSample):
    r"""Samples at theta with their score: a known noise model (Gaussian, Poisson, ...).

    With s = d log p(x | theta) / d theta the derivative of any mean is a covariance,
    :math:`\partial_\theta E[f(x)] = \mathrm{Cov}(f, s)`. This needs neither a finite step nor a
    derivative of the network, so it also works for photon counts. J is the part of the score's
    variance that the features explain, corrected for overfitting.

    Args:
        x: samples [n, ...] of floating dtype (counts converted to it); or, without score, a
            ``Dataset``, ``DataLoader``, iterable or function that yields pairs (x, score).
        score: [n, P], or [n] for one parameter, floating; Dataset items hold [P] or one number.
        parameters: P, for sources that yield pairs; 1 if None.
        groups: labels [n] of samples that depend on each other, as in `FiniteDifference`.
        names: names of the P parameters, for tables and figures.

    Raises:
        ValueError: score has another shape or is not finite.
        TypeError: integer, boolean or complex samples or score, or samples of several inputs (a
            tuple or dict), which are not supported yet.

    Warns:
        FisherWarning: during a measurement, if the mean of the score is more than 5 standard errors
            from zero: then it is not a score, or one at another theta.

    Cost: a float64 copy of the score; a measurement takes one forward pass over the samples.

    Example:
        >>> import torch, fisherfast as ff
        >>> x = torch.randn(1000, 4)                               # N(theta 1, 1) at theta = 0
        >>> abs(ff.fisher_information(ff.Score(x, x.sum(1))).value - 4) < 1
        True
    """

    source = "score"
    companion = "score"

    def __init__(
        self,
        x: Source,
        score: Any = None,
        *,
        parameters: int | None = None,
        groups: Any = None,
        names: Sequence[str] | None = None,
    ) -> None:
        super().__init__(x, score, parameters, groups, names)

    def _whole_companion(self) -> torch.Tensor:
        score = _as_tensor(self._companion, "score", "[n, P]")
        if score.ndim not in (1, 2) or len(score) != len(self._x) or score.shape[-1] < 1:
            raise ValueError(
                f"score must have shape [n, P] or [n] with n = {len(self._x)},"
                f" got {list(score.shape)}"
            )
        _check_finite(score, "score", "")
        columns = score.double().reshape(len(score), -1)
        self.parameters = columns.shape[1]
        return columns

    def _checked(self, x: torch.Tensor, companion: torch.Tensor, where: str) -> torch.Tensor:
        columns = companion[:, None] if companion.ndim == 1 else companion
        if tuple(columns.shape) != (len(x), self.parameters):
            raise ValueError(
                f"score must have shape [n, P] = {[len(x), self.parameters]}, got"
                f" {list(companion.shape)} {where} (parameters={self.parameters})"
            )
        if companion.device.type == "cpu":
            _check_finite(companion, "score", f" {where}")
        return columns.double()


def _as_tensor(value: Any, name: str, shape: str) -> torch.Tensor:
    if not isinstance(value, torch.Tensor | np.ndarray):
        raise TypeError(
            f"{name} must be a tensor or array {shape} as x is, got {type(value).__name__}"
        )
    return sources.as_batch(value, name)


def _check_like(dx: torch.Tensor, x: torch.Tensor, where: str) -> None:
    if dx.dtype != x.dtype:
        raise TypeError(f"dx must have the dtype of x, {x.dtype}, got {dx.dtype}{where}")


def _check_finite(value: torch.Tensor, name: str, where: str) -> None:
    # one pass without copies: a sum keeps NaN and infinity; if the sum overflows, look at values
    if bool(torch.isfinite(value.sum())):
        return
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity{where}")
