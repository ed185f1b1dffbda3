"""Structural mutants of states: what damage, other programs and hands do to files."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Iterator
from typing import Any

import torch

VALUES = (
    None, True, False, -1, 0, 3, 1e999, -1e999, math.nan, 0.5, 10**400, "text", "nan", "", [], {},
    [[1.0]], [[[["x"]]]], (2,), {"a": None}, torch.ones(2),
)  # fmt: skip
"""What takes the place of a value."""

Path = tuple[Any, ...]


def mutants(state: Any, count: int, *, seed: int) -> Iterator[tuple[str, Any]]:
    """Copies of a state with one to three changes each, and a line that says which."""
    chance = random.Random(seed)
    for _ in range(count):
        mutant, said = copy.deepcopy(state), []
        for _ in range(chance.choice((1, 1, 1, 2, 3))):
            mutant, line = _changed(mutant, chance)
            said.append(line)
        yield "; ".join(said), mutant


def _paths(value: Any, path: Path = ()) -> Iterator[Path]:
    yield path
    if isinstance(value, dict):
        for key in value:
            yield from _paths(value[key], (*path, key))
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _paths(item, (*path, place))


def _at(state: Any, path: Path) -> Any:
    for key in path:
        state = state[key]
    return state


def _put(state: Any, path: Path, value: Any) -> Any:
    """The state with another value at a path; tuples on the way are made again."""
    if not path:
        return value
    inner = _put(_at(state, path[:1]), path[1:], value)
    if isinstance(state, tuple):
        return (*state[: path[0]], inner, *state[path[0] + 1 :])
    state[path[0]] = inner
    return state


def _changed(state: Any, chance: random.Random) -> tuple[Any, str]:
    """Another state: every depth is hit, leaves of long lists are not most of them."""
    every = list(_paths(state))
    depth = chance.randrange(1 + max(map(len, every)))
    path = chance.choice([path for path in every if len(path) == depth])
    value = _at(state, path)
    changes = [copy.deepcopy(chance.choice(VALUES)) for _ in range(2)]
    if isinstance(value, torch.Tensor) and not (
        value.is_meta or value.is_sparse or value.is_complex() or value.dtype == torch.bool
    ):
        changes += _tensors(value, chance)
    if isinstance(value, int | float) and type(value) is not bool and abs(value) != 10**400:
        changes += [-value, value + 1, 2.5 * value, float(value)]
    if isinstance(value, list | tuple) and value:
        items = list(value)
        changes += [items[:-1], [*items, items[0]], items[::-1], items[0]]
    if isinstance(value, dict) and value:
        key, other = chance.choice(list(value)), chance.choice(list(value))
        changes += [
            {k: v for k, v in value.items() if k != key},
            value | {key: value[other], other: value[key]},
            {(f"{k}?" if k == key else k): v for k, v in value.items()},
            {(3 if k == key else k): v for k, v in value.items()},
            value | {"more": 1},
        ]
    new = chance.choice(changes)
    return _put(state, path, new), f"{path} = {str(new)[:60]}"


def _tensors(value: torch.Tensor, chance: random.Random) -> list[Any]:
    flat = value.flatten()
    return [
        value.float() if value.dtype == torch.float64 else value.double(),
        value.to(torch.complex64),
        value > 0,
        value[None],
        flat[:-1],
        value.to_sparse(),
        value.to("meta"),
        value.tolist(),
        -value,
        torch.full_like(value, math.nan) if value.is_floating_point() else value + 1,
        torch.cat([flat, flat[:1]]) if flat.numel() else value,
    ]


def same(one: Any, other: Any) -> bool:
    """Whether two states mean the same: absent or None, list or tuple, NaN or "nan"."""
    if isinstance(one, torch.Tensor) or isinstance(other, torch.Tensor):
        return (
            isinstance(one, torch.Tensor)
            and isinstance(other, torch.Tensor)
            and (one.dtype, one.device) == (other.dtype, other.device)
            and torch.equal(*(t.to_dense().nan_to_num(-7.5) for t in (one, other)))
        )
    if isinstance(one, dict) and isinstance(other, dict):
        keys = {key for key in {**one, **other} if not one.get(key) is other.get(key) is None}
        return all(same(one.get(key), other.get(key)) for key in keys)
    if isinstance(one, list | tuple) and isinstance(other, list | tuple):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, float) or isinstance(other, float):
        one, other = (float(x) if x in ("nan", "inf", "-inf") else x for x in (one, other))
        return one == other or (one != one and other != other)
    return type(one) is type(other) and bool(one == other)
