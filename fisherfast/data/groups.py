"""Groups of samples that depend on each other, from labels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fisherfast.data import sources
from fisherfast.data.sources import Source

Label = int | float | str

NAMED = 5
"""Most labels listed in a message."""


@dataclass(frozen=True, eq=False)
class Groups:
    """The group of each sample.

    Attributes:
        labels: of the groups, in the order of their first samples.
        numbers: for each condition int64 [n], the number of each sample's group.
        present: int64 numbers of the groups that some of the samples belong to; None for all.
    """

    labels: tuple[Label, ...]
    numbers: tuple[torch.Tensor, ...]
    present: torch.Tensor | None = None

    def __len__(self) -> int:
        return len(self.labels) if self.present is None else len(self.present)


def check_groups(
    given: Any, conditions: Sequence[Source], names: Sequence[str], *, paired: bool = False
) -> Groups | None:
    """Check the labels of some conditions and number their groups; None for none.

    Args:
        given: labels [n], a tensor, array or sequence of whole numbers or strings, for all
            conditions; or a list of such, one for each.
        conditions: sources of the samples.
        names: of the conditions, for messages.
        paired: the i-th samples of all conditions belong together.

    Raises:
        TypeError: labels are neither numbers nor strings.
        ValueError: the number of labels is not that of the samples, the samples have no fixed
            order, a label is NaN, there is only one group, or conditions differ in their groups.
    """
    if given is None:
        return None
    labels = _of_conditions(given, len(conditions))
    for source, name, own in zip(conditions, names, labels, strict=True):
        samples = sources.count(source)
        if samples is None or not sources.repeats(source):
            raise ValueError(
                "groups must label samples whose number and order are fixed (tensors, arrays,"
                f" Datasets, DataLoaders that do not shuffle), got {type(source).__name__} for"
                f" {name}"
            )
        if len(own) != samples:
            raise ValueError(
                f"groups must hold one label for each of the {samples} samples of {name}, got"
                f" {len(own)}"
            )
    if paired:
        _check_equal(labels, names)
    return _numbered(labels, names)


def joined_groups(shares: Sequence[Groups]) -> Groups:
    """Join the groups of consecutive samples: a label means the same group in all of them."""
    table: dict[Label, int] = {}
    parts: list[list[torch.Tensor]] = [[] for _ in shares[0].numbers]
    for share in shares:
        number = [table.setdefault(label, len(table)) for label in share.labels]
        renumbered = torch.tensor(number, dtype=torch.int64)
        for part, own in zip(parts, share.numbers, strict=True):
            part.append(renumbered[own])
    return Groups(tuple(table), tuple(map(torch.cat, parts)))


def _of_conditions(given: Any, conditions: int) -> list[list[Label]]:
    """Return the labels of each condition; the same list for all if only one is given."""
    several = isinstance(given, list) and len(given) > 0 and all(map(_is_array, given))
    if several:
        if len(given) != conditions:
            raise ValueError(
                f"groups must be one array, or one for each of the {conditions} conditions, got"
                f" {len(given)}"
            )
        return list(map(_labels, given))
    return [_labels(given)] * conditions


def _is_array(given: Any) -> bool:
    return isinstance(given, torch.Tensor | np.ndarray | list | tuple)


def _labels(given: Any) -> list[Label]:
    array = given.detach().cpu().numpy() if isinstance(given, torch.Tensor) else np.asarray(given)
    if array.ndim != 1:
        raise ValueError(f"groups must have shape [n], got {list(array.shape)}")
    if array.dtype.kind not in "iufUO":
        raise TypeError(f"groups must be whole numbers or strings, got {array.dtype}")
    labels: list[Label] = array.tolist()
    if array.dtype.kind == "O":
        wrong = next((label for label in labels if not isinstance(label, int | float | str)), "")
        if wrong != "":
            raise TypeError(f"groups must be whole numbers or strings, got {wrong!r}")
    if any(label != label for label in labels):
        raise ValueError("groups must hold a label for each sample, got NaN")
    return labels


def _check_equal(labels: list[list[Label]], names: Sequence[str]) -> None:
    for name, own in zip(names, labels, strict=True):
        if own != labels[0]:
            first = next(i for i, label in enumerate(own) if label != labels[0][i])
            raise ValueError(
                f"groups must be the same for paired conditions, got {own[first]!r} in {name} and"
                f" {labels[0][first]!r} in {names[0]} for sample {first}"
            )


def _numbered(labels: list[list[Label]], names: Sequence[str]) -> Groups:
    table: dict[Label, int] = {}
    numbers: list[torch.Tensor] = []
    for c, own in enumerate(labels):
        if c and own == labels[0]:
            numbers.append(numbers[0])
            continue
        numbers.append(torch.tensor([table.setdefault(label, len(table)) for label in own]).long())
        _check_same_labels(set(own), set(labels[0]), names[c], names[0])
    if len(table) < 2:
        raise ValueError(
            f"groups must be at least two, got {len(table)}: {next(iter(table), 'none')!r}"
        )
    return Groups(tuple(table), tuple(numbers))


def _check_same_labels(own: set[Label], others: set[Label], name: str, other: str) -> None:
    for more, less, where, not_where in ((own, others, name, other), (others, own, other, name)):
        missing = sorted(map(repr, more - less))
        if missing:
            shown = ", ".join(missing[:NAMED]) + (", ..." if len(missing) > NAMED else "")
            raise ValueError(
                f"groups must be the same in all conditions, got {shown} in {where} and not in"
                f" {not_where}"
            )
