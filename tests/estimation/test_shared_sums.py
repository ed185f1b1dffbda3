"""What several processes add up: the sums of parts of the samples are those of all."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from fisherfast.data.dealing import Place
from fisherfast.estimation.features import Lift
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.estimation.krylov import KrylovSpace
from fisherfast.estimation.maps import MapMoments
from fisherfast.estimation.pilot import Standardisation

FOLDS, RAW = 4, 5


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pilot_of(width: int) -> Standardisation:
    """Of activations with mean 0 and variance 1."""
    scale = torch.ones(width, dtype=torch.float64)
    return Standardisation(torch.zeros_like(scale), scale, scale > 0, 1e-12, 1e-12)


BATCHES = (7, 3, 5, 6, 4)
SAMPLES = sum(BATCHES)
KINDS = {
    "independent": (2, {}),
    "paired": (2, {"paired": True}),
    "tangents": (1, {"tangents": 2}),
    "score": (1, {"score": 2}),
}


def deal(
    whole: Any, parts: list[Any], conditions: int, add: Callable[[Any, slice, int], None]
) -> None:
    """Add all batches to the whole, and in turn to its parts; what is left in the first part is
    what many processes have after adding up."""
    for number in range(len(BATCHES)):
        rows = slice(sum(BATCHES[:number]), sum(BATCHES[: number + 1]))
        for condition in range(conditions):
            add(whole, rows, condition)
            add(parts[number % len(parts)], rows, condition)
    for mine, *others in zip(*(part.shared_sums() for part in parts), strict=True):
        for other in others:
            mine += other


def placed(rows: slice, *columns: torch.Tensor | None) -> tuple[Place, list[torch.Tensor | None]]:
    """The place of rows that are dealt in turn, and those of columns [..., n, k] in its order."""
    place, order = Place.in_turn(rows.start, rows.stop - rows.start, FOLDS)
    return place, [None if c is None else c[..., rows, :][..., order, :] for c in columns]


def carried_by(kind: str, size: int) -> torch.Tensor | None:
    if kind == "tangents":
        return normal(2, SAMPLES, size, seed=1)
    return normal(SAMPLES, 2, seed=1) if kind == "score" else None


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("known", [0, RAW + 2])
def test_moments_of_processes_are_those_of_one(kind, known):
    """Catches counts of own samples alone, a sum that is not shared, and one of a known feature
    that is shared again."""
    conditions, settings = KINDS[kind]
    x, carried = normal(2, SAMPLES, RAW), carried_by(kind, RAW)
    lift = Lift(normal(7, RAW, seed=2), normal(7, seed=3), torch.zeros(7, dtype=torch.float64))

    def add(moments: FoldMoments, rows: slice, condition: int) -> None:
        place, (raw, extra) = placed(rows, x[condition], carried)
        own = lift.leading(moments.size - RAW)
        moments.update(condition, raw, own, extra, place)
        if kind == "paired" and condition:
            held = [x[c, rows] for c in range(conditions)]
            moments.update_products([torch.cat([raw, own(raw)], 1) for raw in held])

    def begin() -> FoldMoments:
        moments = FoldMoments(known or RAW + 7, conditions, folds=FOLDS, **settings)
        if known:
            for condition in range(conditions):
                add(moments, slice(0, SAMPLES), condition)
            moments = moments.grown(RAW + 7)
        return moments

    whole, parts = begin(), [begin(), begin(), begin()]
    deal(whole, parts, conditions, add)
    assert parts[0].seen == whole.seen == [SAMPLES] * conditions
    for name in ("counts", "sums", "products"):
        torch.testing.assert_close(getattr(parts[0], name), getattr(whole, name))
    torch.testing.assert_close(parts[0].cross.tril(), whole.cross.tril())
    if carried is not None:
        for name in ("sums", "column_sums", "column_cross")[: 3 if kind == "score" else 1]:
            found, expected = (getattr(moments.carried, name) for moments in (parts[0], whole))
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", KINDS)
def test_maps_of_processes_are_those_of_one(kind):
    """Catches the same at each position of a map."""
    conditions, settings = KINDS[kind]
    x, carried = normal(2, SAMPLES, 11, 2, 3), carried_by(kind, 66)

    def add(moments: MapMoments, rows: slice, condition: int) -> None:
        place, (flat, extra) = placed(rows, x[condition].flatten(1), carried)
        if kind == "tangents":
            extra = extra.unflatten(-1, (11, 2, 3))
        moments.update(condition, flat.unflatten(1, (11, 2, 3)), extra, place)

    whole, *parts = (
        MapMoments(pilot_of(66), (11, 2, 3), conditions, folds=FOLDS, **settings) for _ in range(3)
    )
    deal(whole, parts, conditions, add)
    contrast = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)[:conditions]
    expected, found = (moments.statistics(contrast) for moments in (whole, parts[0]))
    for name in ("covariance", "derivative", "fold_derivatives"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name))


@pytest.mark.parametrize("kind", ["independent", "tangents", "score"])
def test_krylov_spaces_of_processes_are_that_of_one(kind):
    """Catches products or counts of own samples alone: other vectors, from the first pass on; and a
    process without a sample of its own that lists fewer sums."""
    conditions, _ = KINDS[kind]
    x, carried = normal(2, SAMPLES, 40) + 1, carried_by(kind, 40)
    pilot = pilot_of(40)

    def add(space: KrylovSpace, rows: slice, condition: int) -> None:
        extra = None if carried is None else carried[..., rows, :]
        also = {"tangents": extra} if kind == "tangents" else {"score": extra}
        space.observe(condition, x[condition, rows], **also)

    whole, *parts = (
        KrylovSpace(
            pilot,
            conditions=conditions,
            parameters=1 if kind == "independent" else 2,
            steps=3,
            dtype=torch.float64,
            scored=kind == "score",
        )
        for _ in range(4)
    )
    contrast = torch.tensor([[-1.0], [1.0]], dtype=torch.float64)
    if kind != "independent":
        contrast = torch.zeros(1, 2, dtype=torch.float64)
    idle = [len(part.shared_sums()) for part in parts]
    for _ in range(3):
        deal(whole, parts, conditions, add)
        for part in parts[1:]:
            for mine, theirs in zip(part.shared_sums(), parts[0].shared_sums(), strict=True):
                mine.copy_(theirs)
        more = [space.advance(contrast) for space in (whole, *parts)]
        assert len(set(more)) == 1
    assert len(set(idle)) == 1
    assert len(whole) == 3 * (1 if kind == "independent" else 2)
    torch.testing.assert_close(parts[2].projection(), whole.projection(), rtol=1e-7, atol=1e-9)
