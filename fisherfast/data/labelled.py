"""A regression data set: samples x with labels theta, in bins of theta."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch

from fisherfast._validation import check_names, check_whole
from fisherfast.data import sources
from fisherfast.data.batch import Batch, Numbered
from fisherfast.data.bins import (
    LEAST_SAMPLES,
    Bins,
    check_centres,
    check_edges,
    cluster_bins,
    quantile_bins,
)
from fisherfast.data.groups import Groups
from fisherfast.data.inputs import Samples
from fisherfast.data.per_sample import PerSample
from fisherfast.data.sources import Source

READ_BATCH = 1024
"""Samples read at a time while only their labels are needed."""

ONCE = (
    "edges or at must be given for samples that can be read once only: pass a function that returns"
    " a new iterator, or the edges of the bins"
)


class Labelled(PerSample):
    r"""A regression data set: samples with the theta that each was taken at.

    The samples are dealt to Q bins of theta. In each bin the features are regressed on
    :math:`\theta - \bar\theta`, and on its square against curvature: the slope B is the derivative
    of their mean, the rest their covariance S, and

    .. math::
        J(\theta_q) = \frac{\nu - k_\text{eff} - 1}{\nu} B^T S^{-1} B - k_\text{eff}\, c, \qquad
        c = \Big(\sum (\theta - \bar\theta)(\theta - \bar\theta)^T\Big)^{-1}

    ``LayerFisher.profile`` holds J along theta; the J of a layer is its mean over the samples. J of
    a bin is that of the mean slope and noise in it (docs/theory.md, 23).

    Args:
        x: samples [n, ...] of floating dtype, a tensor or array; or, without theta, a ``Dataset``,
            ``DataLoader``, iterable or function that yields pairs (x, theta). Their labels are read
            once beforehand, unless edges or at are given; samples that can be read once only need
            these.
        theta: labels [n] of one parameter or [n, P] of several, whole or floating numbers: a
            tensor, an array or a sequence. They may lie on a grid: a bin is then a run of at least
            two neighbouring values.
        bins: Q, at most. Bins hold about equally many samples, those of several parameters the
            samples nearest to one of Q centres; bins with fewer than 64 samples are merged with a
            neighbour.
        edges: edges [Q + 1] of the bins of one parameter, ascending. Samples outside are left out.
        at: centres [Q, P] of the bins: each sample counts for the nearest one, with distances in
            units of the standard deviation of each parameter.
        groups: labels [n] of samples that depend on each other, as in `FiniteDifference`.
        names: names of the P parameters.

    Raises:
        ValueError: theta has another length than x, is not finite or constant, takes only one value
            in a bin, or is needed beforehand but can be read once only; edges are not ascending, at
            has another shape; the samples are empty.
        TypeError: complex or boolean theta, integer or complex samples.

    Cost: tensors are not copied, except for the labels; a measurement takes one forward pass over
        the samples.

    Example:
        >>> import torch, fisherfast as ff
        >>> theta = torch.rand(8000)
        >>> x = theta[:, None] * 10 + torch.randn(8000, 4)         # N(10 theta, 1): J = 400
        >>> info = ff.fisher_information(ff.Labelled(x, theta, bins=4))
        >>> len(info.profile), bool(((info.profile.J[:, 0, 0] - 400).abs() < 120).all())
        (4, True)
    """

    source = "labelled"
    companion = "theta"

    def __init__(
        self,
        x: Source,
        theta: Any = None,
        *,
        bins: int = 8,
        edges: Any = None,
        at: Any = None,
        groups: Any = None,
        names: Sequence[str] | None = None,
    ) -> None:
        asked = check_whole("bins", bins, least=1)
        self._given = x, theta, {"groups": groups, "names": names}
        if edges is not None and at is not None:
            raise ValueError("edges must be left out where at is given, got both")
        if isinstance(x, torch.utils.data.TensorDataset) and theta is None and len(x.tensors) == 2:
            x, theta = x.tensors
        self._edges = None if edges is None else check_edges(edges)
        self._own_bins = edges is None and at is None
        self._bin_of: torch.Tensor | None = None
        self._counts: list[int] | None = None
        self._notes: list[str] = []
        labels: torch.Tensor | None = None
        x = sources.check_source(x, "x")
        if sources.resident(x):
            super().__init__(x, theta, None, groups)
            labels = self._companion
        else:
            if theta is None and self._own_bins:
                labels = _labels_of(x)
            parameters = 1
            if labels is not None:
                parameters = labels.shape[1]
            elif at is not None:
                parameters = check_centres(at, None).shape[1]
            super().__init__(x, theta, parameters, groups)
        if self._edges is not None and self.parameters != 1:
            raise ValueError(
                f"edges must be left out for {self.parameters} parameters, got {edges}: pass at=,"
                " centres [Q, P]"
            )
        self._order: torch.Tensor | None = None
        self._bins = self._make_bins(labels, asked, at)
        if self._bin_of is not None and self.resident():
            self._read_by_bins(self._bin_of)
        self.points = len(self._bins)
        self.centres = self._bins.centres
        self.names = check_names(names, self.parameters)

    def _make_bins(self, labels: torch.Tensor | None, asked: int, at: Any) -> Bins:
        """Make the bins, and deal the labels to them if they are known."""
        if labels is None:
            if self._edges is not None:
                return Bins.by_edges(self._edges)
            centres = check_centres(at, self.parameters)
            spread = centres.std(0) if len(centres) > 1 else torch.ones(self.parameters)
            return Bins(centres, None, torch.where(spread > 0, spread, 1.0).double())
        _check_varied(labels)
        affordable = min(asked, max(len(labels) // LEAST_SAMPLES, 1))
        if self._edges is not None:
            bins = Bins.by_edges(self._edges)
        elif at is not None:
            bins = Bins(check_centres(at, self.parameters), None, labels.std(0))
        elif self.parameters == 1:
            bins = quantile_bins(labels[:, 0], affordable)
        else:
            bins = cluster_bins(labels, affordable)
        before = len(bins) if at is not None or self._edges is not None else asked
        bins = bins.merged(labels)
        if len(bins) < before:
            self._notes.append(
                f"bins merged from {before} to {len(bins)}: each needs {LEAST_SAMPLES} samples and"
                " two values of theta"
            )
        own = bins.of(labels)
        self._counts = bins.counts(labels)
        if left := int((own < 0).sum()):
            self._notes.append(f"{left} samples outside of the edges left out")
        _check_bins(bins, own, labels)
        if sources.repeats(self._sources[0]):
            self._bin_of = own
        return bins

    def _read_by_bins(self, bin_of: torch.Tensor) -> None:
        """Read the samples bin by bin, in their order, without those outside: their numbers count
        in this order, and a batch has samples of few bins."""
        inside = (bin_of >= 0).nonzero()[:, 0]
        self._order = inside[bin_of[inside].argsort(stable=True)]
        self._bin_of = bin_of[self._order]
        if self.groups is not None:
            numbers = self.groups.numbers[0][self._order]
            self.groups = Groups(self.groups.labels, (numbers,), numbers.unique())

    def samples(self, condition: int = 0) -> int | None:
        """Return the number of samples that are read, or None for a stream of unknown length."""
        return super().samples(condition) if self._order is None else len(self._order)

    def read(self, condition: int, batch_size: int) -> Iterator[Batch]:
        """Yield the samples: of tensors and arrays bin by bin, else in order."""
        if self._order is None:
            yield from super().read(condition, batch_size)
            return
        for _, batch in self.deal(condition, batch_size):
            yield batch

    def deal(
        self, condition: int, batch_size: int, begin: int = 0, step: int = 1
    ) -> Iterator[Numbered]:
        """Every step-th batch, as `read`."""
        if self._order is None:
            yield from super().deal(condition, batch_size, begin, step)
            return
        for start in range(begin * batch_size, len(self._order), step * batch_size):
            batch = self.pick(condition, torch.arange(start, start + batch_size))
            assert batch is not None
            yield start, batch

    def pick(self, condition: int, numbers: torch.Tensor) -> Batch | None:
        """Read some samples, as far as there are so many."""
        if self._order is not None:
            numbers = self._order[numbers[numbers < len(self._order)]]
        return super().pick(condition, numbers)

    def point_of(self, labels: torch.Tensor) -> torch.Tensor:
        """Return the bin of each of these labels [n, P], int64 [n]; -1 outside of the edges."""
        return self._bins.of(labels)

    def samples_at(self, point: int, condition: int = 0) -> int | None:
        """Return the number of samples in a bin, or None if labels have not been read."""
        return None if self._counts is None else self._counts[point]

    def first_at(self, point: int) -> int | None:
        """Return the number of the first sample in a bin; None unless they are read by bins."""
        if self._order is None or self._counts is None:
            return None
        return sum(self._counts[:point])

    def groups_at(self, point: int) -> Groups | None:
        """Return the groups that have samples in a bin, of these samples if they are read by
        bins."""
        if self.groups is None or self._bin_of is None:
            return self.groups
        inside, numbers = self._bin_of == point, self.groups.numbers[0]
        own = numbers if self._order is None else numbers[inside]
        return Groups(self.groups.labels, (own,), numbers[inside].unique())

    def strata(self) -> torch.Tensor | None:
        """Return the bin of each sample, int64 [n]; None for loaders that shuffle and streams."""
        return self._bin_of

    def notes(self) -> tuple[str, ...]:
        """Return which bins were merged, and how many samples are outside."""
        return tuple(self._notes)

    def with_bins(self, bins: int) -> Labelled:
        """Return the same samples in another number of bins, which follow from their labels."""
        x, theta, more = self._given
        return Labelled(x, theta, bins=bins, **more)

    @property
    def chosen_bins(self) -> bool:
        """True if the bins follow from the labels, and not from edges or centres given."""
        return self._own_bins

    def _whole_companion(self, none: Samples) -> torch.Tensor:
        if self._companion is None:
            raise TypeError("theta must be given for x a tensor or array, got None")
        labels = _as_labels(self._companion)
        if len(labels) != len(self._x):
            raise ValueError(
                f"theta must hold one label for each of the {len(self._x)} samples, got"
                f" {len(labels)}"
            )
        if not len(labels):
            raise ValueError("x must hold at least one sample, got none")
        self.parameters = labels.shape[1]
        return labels

    def _checked(self, x: Samples, companion: Any, where: str) -> torch.Tensor:
        labels = _as_labels(companion)
        if tuple(labels.shape) != (len(x), self.parameters):
            raise ValueError(
                f"theta must have shape [n, P] = {[len(x), self.parameters]}, got"
                f" {list(labels.shape)} {where}"
            )
        return labels

    def __repr__(self) -> str:
        return (
            f"Labelled(parameters={self.parameters}, bins={self.points}, samples={self.samples()})"
        )


def _as_labels(given: Any) -> torch.Tensor:
    """Convert labels to [n, P] float64 on the CPU."""
    if isinstance(given, torch.Tensor):
        values = given.detach().cpu()
        if values.is_complex() or values.dtype == torch.bool:
            raise TypeError(f"theta must be real numbers, got {values.dtype}")
    else:
        array = np.asarray(given)
        if array.dtype.kind not in "iuf":
            raise TypeError(f"theta must be real numbers, got {type(given).__name__}")
        values = torch.from_numpy(array.astype(np.float64))
    if values.ndim not in (1, 2) or 0 in values.shape[1:]:
        raise ValueError(f"theta must have shape [n] or [n, P], got {list(values.shape)}")
    labels = values.double().reshape(len(values), -1)
    wrong = (~torch.isfinite(labels)).any(1).nonzero()
    if len(wrong):
        raise ValueError(f"theta must be finite, got NaN or infinity for sample {int(wrong[0])}")
    return labels


def _labels_of(x: Source) -> torch.Tensor:
    """Read the labels of all samples that a source yields."""
    if isinstance(x, Iterator):
        raise ValueError(f"{ONCE}, got {type(x).__name__}")
    parts = []
    for number, item in enumerate(sources.iterate(x, READ_BATCH, "x")):
        if not isinstance(item, list | tuple) or len(item) != 2:
            raise TypeError(
                f"x must yield pairs (x, theta) where theta is not given, got"
                f" {type(item).__name__} in batch {number}"
            )
        parts.append(_as_labels(item[1]))
    if not sum(map(len, parts)):
        raise ValueError("x must yield at least one sample, got an empty source")
    widths = sorted({part.shape[1] for part in parts})
    if len(widths) > 1:
        raise ValueError(f"theta must have the same P for all samples, got {widths}")
    return torch.cat(parts)


def _check_varied(labels: torch.Tensor) -> None:
    for p, column in enumerate(labels.T):
        if bool((column == column[0]).all()):
            name = "theta" if labels.shape[1] == 1 else f"theta[{p}]"
            raise ValueError(
                f"{name} must vary among the samples, got {float(column[0]):g} for all: samples at"
                " one theta are ff.FiniteDifference, ff.Pathwise or ff.Score"
            )


def _check_bins(bins: Bins, own: torch.Tensor, labels: torch.Tensor) -> None:
    for q in range(len(bins)):
        inside = labels[own == q]
        for p, column in enumerate(inside.T):
            if len(inside) and bool((column == column[0]).all()):
                name = "theta" if labels.shape[1] == 1 else f"theta[{p}]"
                raise ValueError(
                    f"{name} must take at least two values in each bin, got only"
                    f" {float(column[0]):g} in bin {q} of {len(bins)}: use fewer bins"
                )
        if not len(inside):
            raise ValueError(f"bins must hold samples, got none in bin {q} of {len(bins)}")
