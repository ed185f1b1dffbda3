"""Check plain values, of a file or a saved state, against type hints.

A kind is a type hint: bool, int, float, str, Any (plain values), object (anything), a Literal, a
tensor, T | None, lists, tuples and dicts of kinds, or a dataclass. `Annotated` adds a `Shape`, an
`AtLeast` or a `OneOf`. A new field of a dataclass is covered by its hint alone, which must be
defined at run time; a tensor of another dtype than float64 needs a `Shape`.

NaN and infinity, for which JSON has no words, are also read from "nan", "inf" and "-inf".
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import numbers
import reprlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import torch

LISTS = {list, tuple}

WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}

LARGEST = 2**63
"""Whole numbers are below it, in magnitude."""

DEEPEST = 50
"""Levels of plain lists and dicts inside each other."""

T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of a tensor. Sizes with a name are the same in all fields of an object."""

    sizes: tuple[str | int, ...]
    dtype: torch.dtype = torch.float64


@dataclasses.dataclass(frozen=True)
class AtLeast:
    """The least of a number, or of those of a tensor; NaN is allowed."""

    least: float


@dataclasses.dataclass(frozen=True)
class OneOf:
    """The values of a text."""

    choices: tuple[str, ...]


@dataclasses.dataclass
class Scope:
    """What the fields of an object share: sizes of named dimensions, to which new ones are added,
    and whether its tensors are nested lists."""

    sizes: dict[str, int] = dataclasses.field(default_factory=dict)
    lists: bool = False


Count = Annotated[int, AtLeast(0)]
Matrix = Annotated[torch.Tensor, Shape(("P", "P"))]
ErrorMatrix = Annotated[torch.Tensor, Shape(("P", "P")), AtLeast(0)]


def build(cls: type[T], state: Any, *, complete: bool = False) -> T:
    """Make a dataclass of plain values by the name of its fields.

    Args:
        cls: the class; `check_together` follows.
        state: one value per field.
        complete: a state with all fields and tensors as they are; otherwise the result of `plain`,
            where tensors are lists, and fields that are None by default may be left out.

    Raises:
        ValueError: a value is missing, unknown or of another kind; the error names it.
    """
    fields: Any = cls
    optional = [] if complete else [f.name for f in dataclasses.fields(fields) if f.default is None]
    scope = Scope(lists=not complete)
    made = cls(**read_fields(kinds_of(fields), state, "", scope=scope, optional=optional))
    check_together(made)
    return made


def check_together(made: Any) -> None:
    """Call the method `check_fields` of a dataclass, if it has one, which raises ValueError unless
    its fields fit together."""
    check = getattr(made, "check_fields", None)
    if check is not None:
        check()


def read_fields(
    kinds: Mapping[str, Any],
    state: Any,
    name: str,
    *,
    scope: Scope | None = None,
    optional: Sequence[str] = (),
) -> dict[str, Any]:
    """Check a mapping that must have these keys and no others.

    Args:
        kinds: by key.
        state: the mapping.
        name: of the mapping, for errors; empty for that of the caller.
        scope: what is known of the fields.
        optional: keys that may be missing, for None.

    Raises:
        ValueError: a key is missing or unknown, or a value is of another kind.
    """
    what = name or "content"
    if not isinstance(state, Mapping):
        raise wrong(what, "be a mapping", state)
    missing = [key for key in kinds if key not in state and key not in optional]
    if missing:
        raise ValueError(f"{what} must hold {', '.join(map(repr, missing))}, got {_keys(state)}")
    for key in state:
        if not isinstance(key, str) or key not in kinds:
            raise ValueError(f"{what} must hold only known fields, got {reprlib.repr(key)}")
    scope = scope or Scope()
    return {
        key: read(kind, state.get(key), f"{name}.{key}" if name else key, scope)
        for key, kind in kinds.items()
    }


def read(kind: Any, value: Any, name: str, scope: Scope | None = None) -> Any:
    """Return a value as its kind, with lists and dicts copied.

    Args:
        kind: a type hint.
        value: a plain value or a tensor.
        name: for errors.
        scope: of the fields around it.

    Raises:
        ValueError: the value is of another kind.
    """
    scope = scope or Scope()
    origin, args = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _read_annotated(args[0], args[1:], value, name, scope)
    if origin in (Union, types.UnionType):
        return _read_union(args, value, name, scope)
    if origin is Literal:
        return _read_annotated(str, (OneOf(args),), value, name, scope)
    if kind is torch.Tensor:
        return _read_tensor(value, name, None, scope)
    if kind in _SIMPLE:
        return _SIMPLE[kind](value, name)
    if isinstance(kind, type) and dataclasses.is_dataclass(kind):
        with inside(name):
            reader = getattr(kind, "from_dict", None) or getattr(kind, "from_state_dict", None)
            if reader is None:
                return build(kind, value, complete=not scope.lists)
            return reader(value)
    return _read_container(origin, args, value, name, scope)


def has_version(state: Any, key: str, version: Any) -> bool:
    """Return whether a mapping has this version, or format, under a key."""
    found = state.get(key) if isinstance(state, Mapping) else None
    return type(found) is type(version) and bool(found == version)


@contextlib.contextmanager
def inside(name: str) -> Iterator[None]:
    """Put the name of a part in front of the ValueErrors of the block."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def wrong(name: str, condition: str, value: Any) -> ValueError:
    """Make the error of a value that is not what it must be."""
    if isinstance(value, torch.Tensor):
        got = f"a tensor {list(value.shape)} of {value.dtype}"
    else:
        got = reprlib.repr(value)
    return ValueError(f"{name} must {condition}, got {got}")


def plain(value: Any) -> Any:
    """Return plain numbers, strings, lists and dicts; NaN and infinity as words, fields of a
    dataclass by name unless they are None."""
    if isinstance(value, torch.Tensor):
        numbers_of = value.tolist()
        return numbers_of if bool(torch.isfinite(value).all()) else plain(numbers_of)
    if dataclasses.is_dataclass(value):
        fields: Any = type(value)
        entries = {name: plain(getattr(value, name)) for name in kinds_of(fields)}
        return {name: entry for name, entry in entries.items() if entry is not None}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


@cache
def kinds_of(cls: Any) -> dict[str, Any]:
    """Return the type hints of the fields that make an object of a dataclass."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls) if field.init}


def _read_annotated(base: Any, marks: Sequence[Any], value: Any, name: str, scope: Scope) -> Any:
    shape = next((mark for mark in marks if isinstance(mark, Shape)), None)
    if shape is not None:
        found = _read_tensor(value, name, shape, scope)
    else:
        found = read(base, value, name, scope)
    for mark in marks:
        if isinstance(mark, OneOf) and found not in mark.choices:
            raise wrong(name, f"be one of {', '.join(map(repr, mark.choices))}", value)
        if isinstance(mark, AtLeast):
            low = found < mark.least
            if bool(low.any()) if isinstance(low, torch.Tensor) else low:
                raise wrong(name, f"be at least {mark.least:g}", value)
    return found


def _read_union(args: Sequence[Any], value: Any, name: str, scope: Scope) -> Any:
    """Read one kind, or None, True, False or text where these are among the kinds."""
    if type(value) in args and type(value) in (type(None), bool, str):
        return value
    kinds = [each for each in args if each is not type(None)]
    return read(min(kinds, key=lambda kind: (kind is bool, kind is str)), value, name, scope)


def _read_container(origin: Any, args: Sequence[Any], value: Any, name: str, scope: Scope) -> Any:
    if origin not in (dict, Mapping, list, tuple, Sequence):
        raise TypeError(f"{name} must have a type hint that can be checked, got {origin}")
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            raise wrong(name, "be a mapping", value)
        for key in value:
            if not isinstance(key, str):
                raise wrong(name, "have text as keys", key)
        return {key: read(args[1], item, f"{name}[{key!r}]", scope) for key, item in value.items()}
    if not isinstance(value, list | tuple):
        raise wrong(name, "be a list", value)
    if origin is tuple and Ellipsis not in args:
        if len(value) != len(args):
            raise wrong(name, f"have {len(args)} entries", value)
        kinds: Any = args
    else:
        kinds = itertools.repeat(args[0], len(value))
    found = (
        read(each, item, f"{name}[{number}]", scope)
        for number, (each, item) in enumerate(zip(kinds, value, strict=True))
    )
    return tuple(found) if origin is tuple else list(found)


def _read_whole(value: Any, name: str) -> int:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise wrong(name, "be a whole number", value)
    found = int(value)
    if not -LARGEST <= found < LARGEST:
        raise wrong(name, "be a whole number below 2**63", value)
    return found


def _read_number(value: Any, name: str) -> float:
    if isinstance(value, str) and value in WORDS:
        return WORDS[value]
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise wrong(name, "be a number", value)
    try:
        return float(value)
    except OverflowError:
        raise wrong(name, "be a number that float64 can hold", value) from None


def _read_bool(value: Any, name: str) -> bool:
    if not isinstance(value, bool):
        raise wrong(name, "be True or False", value)
    return value


def _read_text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise wrong(name, "be text", value)
    return value


def _read_plain(value: Any, name: str, depth: int = 0) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if depth < DEEPEST and isinstance(value, list | tuple):
        found = [_read_plain(item, name, depth + 1) for item in value]
        return tuple(found) if isinstance(value, tuple) else found
    if depth < DEEPEST and isinstance(value, Mapping) and all(isinstance(k, str) for k in value):
        return {key: _read_plain(item, name, depth + 1) for key, item in value.items()}
    raise wrong(name, "be made of plain numbers, text, lists and dicts", value)


_SIMPLE: dict[Any, Callable[[Any, str], Any]] = {
    int: _read_whole,
    float: _read_number,
    bool: _read_bool,
    str: _read_text,
    Any: _read_plain,
    object: lambda value, name: value,
}


def _read_tensor(value: Any, name: str, shape: Shape | None, scope: Scope) -> torch.Tensor:
    """Return a tensor as it is, or one of nested lists of numbers."""
    dtype = torch.float64 if shape is None else shape.dtype
    if scope.lists:
        found = _from_lists(value, name, shape, dtype, scope.sizes)
    elif not isinstance(value, torch.Tensor):
        raise wrong(name, "be a tensor", value)
    elif value.layout is not torch.strided or value.device.type == "meta":
        raise wrong(name, "be a dense tensor with numbers", value)
    elif shape is not None and value.dtype != dtype:
        raise wrong(name, f"be a tensor of {dtype}", value)
    else:
        found = value
    if shape is None:
        return found
    known = scope.sizes
    if found.dim() == len(shape.sizes):
        asked = [
            known.setdefault(size, actual) if isinstance(size, str) else size
            for size, actual in zip(shape.sizes, found.shape, strict=True)
        ]
        if asked == list(found.shape):
            return found
    text = ", ".join(f"{s} = {known[s]}" if s in known else str(s) for s in map(str, shape.sizes))
    raise ValueError(f"{name} must have the shape [{text}], got {list(found.shape)}")


def _from_lists(
    value: Any, name: str, shape: Shape | None, dtype: torch.dtype, sizes: Mapping[str, int]
) -> torch.Tensor:
    """Make a tensor on the CPU of nested lists, all of one length at each level."""
    form: list[int] = []
    level = [value]
    while level and type(level[0]) in LISTS:
        lengths = set(map(len, level)) if LISTS.issuperset(map(type, level)) else ()
        if len(lengths) != 1:
            raise wrong(name, "be a regular array of numbers", value)
        form.extend(lengths)
        level = list(itertools.chain.from_iterable(level))
    if not form:
        raise wrong(name, "be a list of numbers", value)
    flat = level
    if set(map(type, level)) != {int if dtype == torch.int64 else float}:
        one = _read_whole if dtype == torch.int64 else _read_number
        flat = [one(item, f"an entry of {name}") for item in level]
    rest = () if shape is None or level else shape.sizes[len(form) :]
    if all(isinstance(size, int) or size in sizes for size in rest):  # [] for [0, P, P]
        form += [size if isinstance(size, int) else sizes[size] for size in rest]
    try:
        return torch.tensor(flat, dtype=dtype, device="cpu").reshape(form)
    except (OverflowError, RuntimeError, ValueError):
        raise wrong(name, f"hold numbers of {dtype}", value) from None


def _keys(state: Mapping[Any, Any]) -> str:
    return reprlib.repr(sorted(map(str, state)))
