"""Samples of one condition, each with its derivative or the derivative of its log density."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from fisherfast._validation import check_names, check_whole
from fisherfast.data import sources
from fisherfast.data.batch import Batch
from fisherfast.data.from_sources import FromSources
from fisherfast.data.groups import check_groups
from fisherfast.data.inputs import Inputs, Samples, dx_of, floating, is_floating, tensors_of
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
        self._sources = [self._x]
        self._companion = companion
        if self.resident():
            if parameters is not None:
                raise ValueError(
                    f"parameters must be left out for tensors, got {parameters}: it follows from"
                    f" {self.companion}"
                )
            self._companion = self._whole_companion(sources.as_batch(self._x[:0], "x"))
        else:
            if companion is not None:
                raise TypeError(
                    f"{self.companion} must be left out when x yields batches"
                    f" (x, {self.companion}), got {type(companion).__name__}"
                )
            self.parameters = 1 if parameters is None else parameters
        self.parameters = check_whole("parameters", self.parameters, least=1)
        self.groups = check_groups(groups, self._sources, ["x"])
        self.names = check_names(names, self.parameters)

    @abstractmethod
    def _whole_companion(self, none: Samples) -> Samples:
        """Check the companion of all samples, for x in memory, and set `parameters`. `none` are
        samples like x, but no rows of them."""

    @abstractmethod
    def _checked(self, x: Samples, companion: Any, where: str) -> Samples:
        """Check samples and companion that a source has yielded, and return the companion
        [n, P, ...]."""

    def _join(self, x: Samples, companion: Any) -> Batch:
        """Make a batch of samples and their checked companion: score or labels."""
        return Batch(x, score=companion)

    def _batch(self, condition: int, item: Any, rows: slice | torch.Tensor, where: str) -> Batch:
        if self.resident():
            return self._join(sources.as_batch(item, "x"), self._companion[rows])
        paired = isinstance(item, list | tuple)
        if not paired or len(item) != 2:
            more = paired and len(item) > 2
            got = f"{len(item)} entries" if more else type(item).__name__
            hint = ": leave labels out; several inputs are a tuple, ((x1, x2), ...)" if more else ""
            raise TypeError(
                f"x must yield pairs (x, {self.companion}) where {self.companion} is not given,"
                f" got {got} {where}{hint}"
            )
        x = sources.as_batch(item[0], "x")
        return self._join(x, self._checked(x, item[1], where))

    def __repr__(self) -> str:
        name = type(self).__name__
        return f"{name}(parameters={self.parameters}, samples={self.samples()})"


class Pathwise(PerSample):
    r"""Samples at theta with their derivatives: a differentiable simulator, a known signal.

    The derivative of a mean is the mean of the per-sample derivatives,
    :math:`\partial_\theta E[f(x)] = E[f'(x)\, dx/d\theta]`: no finite step, and far less noise than
    the difference of two conditions.

    Args:
        x: samples [n, ...] of floating dtype, or several inputs of a model in a tuple
            (``model(*x)``) or dict (``model(**x)``), of which one at least is floating; or, without
            dx, a ``Dataset``, ``DataLoader``, iterable or function that yields pairs (x, dx) of the
            same shapes (items of a ``Dataset``: x [...] and dx [P, ...]).
        dx: dx/dtheta [n, P, ...], or [n, ...] for one parameter: **batch first**, dtype of x.
            (`fisherfast.jvp` takes [P, n, ...], as torch.func.vmap does.) Of several inputs a tuple
            or dict as x is; None, or a key left out, for an entry that does not move or that holds
            integers.
        parameters: P, for sources that yield pairs; 1 if None.
        groups: labels [n] of samples that depend on each other, as in `FiniteDifference`.
        names: names of the P parameters, for tables and figures.

    Raises:
        ValueError: dx has another shape or is not finite.
        TypeError: samples without a floating entry (integers have no derivative: use `Score` or
            `FiniteDifference`), complex ones, dx of another dtype than x.

    Rounded values (camera counts, half precision) have no derivative: they are measured with added
    noise of half a step, and the result has a note (docs/theory.md, section 21).

    Cost: tensors are not copied, except dx of several inputs, batch by batch; a measurement takes
        1 + P forward passes over the samples.

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

    def _whole_companion(self, none: Samples) -> Samples:
        dx = self._checked(self._x, self._companion, "", like=none)
        self.parameters = next(part.shape[1] for part in tensors_of(dx))
        return dx

    def _checked(self, x: Any, companion: Any, where: str, like: Samples | None = None) -> Samples:
        """Check dx of samples x, or of samples that have the dtypes of `like`."""
        like, where = x if like is None else like, where and f" {where}"
        single = isinstance(companion, list | tuple) and len(companion) == 1
        if single and not isinstance(x, Inputs):
            companion = companion[0]
        if not floating(like):
            raise TypeError(
                f"x must have a floating dtype, got {tensors_of(like)[0].dtype}{where}: integers"
                " have no derivative; use Score or FiniteDifference, or convert with .float()"
            )
        if not isinstance(x, Inputs):
            return self._of_entry(companion, x, like, "dx", where)
        alike = like.entries if isinstance(like, Inputs) else {}
        found = {
            key: self._of_entry(part, x.entries[key], alike[key], f"dx[{key!r}]", where)
            for key, part in dx_of(x, companion, where).items()
        }
        if len({part.shape[1] for part in found.values()}) != 1:
            counts = {key: part.shape[1] for key, part in found.items()}
            raise ValueError(
                f"dx must hold derivatives to the same P parameters, got {counts}{where}"
            )
        return Inputs(found, named=x.named)

    def _of_entry(self, dx: Any, x: Any, like: Any, name: str, where: str) -> torch.Tensor:
        """Check dx of one entry, and return it as [n, P, ...], with P = 1 where it was left out."""
        if not isinstance(dx, torch.Tensor | np.ndarray):
            raise TypeError(
                f"{name} must be a tensor or array [n, P, ...] as x is, got {type(dx).__name__}"
            )
        given = sources.as_batch(dx, name)
        assert isinstance(given, torch.Tensor)
        dx = given[:, None] if 0 < given.ndim == x.ndim else given
        shape = dx.shape
        if shape[:1] + shape[2:] != tuple(x.shape) or shape[1] < 1:
            swapped = tuple(given.shape[1:]) == tuple(x.shape)
            hint = ": batch first, dx.movedim(0, 1)" if swapped and len(given) else ""
            raise ValueError(
                f"{name} must have shape [n, P, ...], or [n, ...] for one parameter, with [n, ...]"
                f" = {list(x.shape)}, got {list(given.shape)}{where}{hint}"
            )
        if not self.resident() and shape[1] != self.parameters:
            raise ValueError(
                f"{name} must have shape [n, P, ...] = {[len(x), self.parameters, *x.shape[1:]]},"
                f" got {list(given.shape)}{where} (parameters={self.parameters})"
            )
        if dx.dtype != like.dtype:
            raise TypeError(f"{name} must have the dtype of x, {like.dtype}, got {dx.dtype}{where}")
        if where == "" or dx.device.type == "cpu":
            _check_finite(dx, name, where)
        return dx

    def _join(self, x: Samples, companion: Any) -> Batch:
        if not isinstance(x, Inputs):
            return Batch(x, tangents=companion.movedim(1, 0))
        parts = []
        for key, entry in x.entries.items():
            if is_floating(entry):
                dx = companion.entries.get(key)
                if dx is None:
                    dx = entry.new_zeros(()).expand(len(x), self.parameters, *entry.shape[1:])
                parts.append(dx)
        if len(parts) > 1:
            parts = [torch.cat([part.reshape(len(x), self.parameters, -1) for part in parts], 2)]
        return Batch(x, tangents=parts[0].movedim(1, 0))


class Score(PerSample):
    r"""Samples at theta with their score: a known noise model (Gaussian, Poisson, ...).

    With s = d log p(x | theta) / d theta the derivative of any mean is a covariance,
    :math:`\partial_\theta E[f(x)] = \mathrm{Cov}(f, s)`. This needs neither a finite step nor a
    derivative of the network, so it also works for photon counts. J is the part of the score's
    variance that the features explain, corrected for overfitting.

    Args:
        x: samples [n, ...], or several inputs of a model in a tuple (``model(*x)``) or dict
            (``model(**x)``), of any real dtype: integers stay tokens, and the information in the
            input is that of the score all the same; or, without score, a ``Dataset``,
            ``DataLoader``, iterable or function that yields pairs (x, score).
        score: [n, P], or [n] for one parameter, floating; Dataset items hold [P] or one number.
        parameters: P, for sources that yield pairs; 1 if None.
        groups: labels [n] of samples that depend on each other, as in `FiniteDifference`.
        names: names of the P parameters, for tables and figures.

    Raises:
        ValueError: score has another shape or is not finite.
        TypeError: complex samples, an integer or complex score.

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

    def _whole_companion(self, none: Samples) -> Samples:
        score = _as_score(self._companion)
        if score.ndim not in (1, 2) or len(score) != len(self._x) or score.shape[-1] < 1:
            raise ValueError(
                f"score must have shape [n, P] or [n] with n = {len(self._x)},"
                f" got {list(score.shape)}"
            )
        _check_finite(score, "score", "")
        columns = score.double().reshape(len(score), -1)
        self.parameters = columns.shape[1]
        return columns

    def _checked(self, x: Samples, companion: Any, where: str) -> Samples:
        score = _as_score(companion)
        columns = score[:, None] if score.ndim == 1 else score
        if tuple(columns.shape) != (len(x), self.parameters):
            raise ValueError(
                f"score must have shape [n, P] = {[len(x), self.parameters]}, got"
                f" {list(score.shape)} {where} (parameters={self.parameters})"
            )
        if score.device.type == "cpu":
            _check_finite(score, "score", f" {where}")
        return columns.double()


def _as_score(value: Any) -> torch.Tensor:
    if isinstance(value, list | tuple) and len(value) == 1:
        value = value[0]
    if not isinstance(value, torch.Tensor | np.ndarray):
        raise TypeError(
            f"score must be a tensor or array [n, P] as x is, got {type(value).__name__}"
        )
    score = sources.as_batch(value, "score")
    assert isinstance(score, torch.Tensor)
    if not score.is_floating_point():
        raise TypeError(
            f"score must have a floating dtype, got {score.dtype}; convert with .float()"
        )
    return score


def _check_finite(value: torch.Tensor, name: str, where: str) -> None:
    # one pass without copies: a sum keeps NaN and infinity; if the sum overflows, look at values
    if bool(torch.isfinite(value.sum())):
        return
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{name} must be finite, got NaN or infinity{where}")
