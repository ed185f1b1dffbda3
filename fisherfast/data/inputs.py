"""Samples as a model takes them: one tensor, several by position (a tuple), or several by name.

`Inputs` holds several entries and is sliced, moved and copied like one tensor. What is measured of
samples, and what their tangents belong to, is `joined`: the floating entries side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

CONSTANTS = (bool, int, float, str, np.generic, type(None))
"""Entries that are no samples: the model gets them as they are."""


class Inputs:
    """Several inputs of a model: entries [n, ...] of any dtype, and constants.

    Args:
        entries: by position 0, 1, ... or by name.
        named: by name.
    """

    def __init__(self, entries: Mapping[Any, Any], *, named: bool) -> None:
        self.entries, self.named = dict(entries), named

    @classmethod
    def of(cls, value: Any) -> Any:
        """Make inputs of a tuple, list or dict, and return anything else as it is."""
        if isinstance(value, Mapping):
            return cls(value, named=True)
        if isinstance(value, tuple | list):
            return cls(dict(enumerate(value)), named=False)
        return value

    def map(self, change: Callable[[Any], Any]) -> Inputs:
        """Apply a change to all entries that hold samples."""
        changed = {k: change(v) if is_samples(v) else v for k, v in self.entries.items()}
        return Inputs(changed, named=self.named)

    def replaced(self, tensors: Sequence[Any]) -> Inputs:
        """Put others in place of the entries that hold samples, in their order."""
        others = iter(tensors)
        return self.map(lambda entry: next(others))

    def ordered(self, keys: Iterable[Any]) -> Inputs:
        """Put the entries in the order of these keys."""
        return Inputs({key: self.entries[key] for key in keys}, named=self.named)

    @property
    def samples(self) -> list[Any]:
        """The entries that hold samples."""
        return [entry for entry in self.entries.values() if is_samples(entry)]

    def __len__(self) -> int:
        return len(self.samples[0])

    def __getitem__(self, rows: Any) -> Inputs:
        return self.map(lambda entry: rows_of(entry, rows))

    @property
    def device(self) -> torch.device:
        """Where the first entry is."""
        device: torch.device = self.samples[0].device
        return device

    @property
    def nbytes(self) -> int:
        """Bytes of all entries."""
        return sum(entry.nbytes for entry in self.samples)

    def clone(self) -> Inputs:
        """Copy all entries."""
        return self.map(torch.clone)

    def roll(self, shifts: int, dims: int) -> Inputs:
        """Roll all entries, as `torch.roll` does."""
        return self.map(lambda entry: entry.roll(shifts, dims))

    def flip(self, dims: int) -> Inputs:
        """Flip all entries, as `torch.flip` does."""
        return self.map(lambda entry: entry.flip(dims))

    def detach(self) -> Inputs:
        """Return all entries without gradients."""
        return self.map(torch.detach)

    def __repr__(self) -> str:
        return f"Inputs({in_words(self)})"


Samples = Tensor | Inputs
"""Samples x [n, ...] of one input or of several."""

Form = tuple[Any, ...]
"""Shape of a sample; of several inputs the keys, in order, with their shapes, None for
constants."""


def is_samples(entry: Any) -> bool:
    """Return whether an entry has one row per sample: a tensor or array with dimensions."""
    return isinstance(entry, Tensor | np.ndarray) and entry.ndim > 0


def is_floating(entry: Any) -> bool:
    """Return whether an entry has one row per sample and a floating dtype."""
    if not is_samples(entry):
        return False
    return entry.is_floating_point() if isinstance(entry, Tensor) else entry.dtype.kind == "f"


def is_constant(entry: Any) -> bool:
    """Return whether an entry is the same for all samples: a number, a string or None."""
    single = isinstance(entry, Tensor | np.ndarray) and entry.ndim == 0
    return single or isinstance(entry, CONSTANTS)


def rows_of(entry: Any, rows: Any) -> Any:
    """Return some rows of a tensor, an array or inputs."""
    if isinstance(rows, Tensor) and not isinstance(entry, Inputs):
        rows = rows.numpy() if isinstance(entry, np.ndarray) else rows.to(entry.device)
    return entry[rows]


def tensors_of(x: Samples) -> list[Tensor]:
    """Return the tensors [n, ...] of samples."""
    return [x] if isinstance(x, Tensor) else x.samples


def floating(x: Samples) -> list[Tensor]:
    """Return the tensors of samples that have a floating dtype."""
    return [entry for entry in tensors_of(x) if entry.is_floating_point()]


def mapped(x: Samples, change: Callable[[Tensor], Tensor]) -> Samples:
    """Apply a change to the tensors of samples."""
    return change(x) if isinstance(x, Tensor) else x.map(change)


def moved(
    x: Samples, device: torch.device | None, dtype: torch.dtype | None, *, copy: bool = False
) -> Samples:
    """Move samples to a device, and the floating ones to a dtype; None keeps either."""

    def move(entry: Tensor) -> Tensor:
        own = dtype if entry.is_floating_point() else None
        return entry.to(device=device or entry.device, dtype=own or entry.dtype, copy=copy)

    return mapped(x, move)


def joined(x: Samples) -> Tensor:
    """Return the floating entries side by side, [n, d]; a single one as it is, [n, ...]; without
    any, zeros [n]."""
    parts = floating(x)
    if len(parts) == 1:
        return parts[0]
    if not parts:
        return torch.zeros((), dtype=torch.float32, device=x.device).expand(len(x))
    return torch.cat([part.flatten(1) if part.ndim > 1 else part[:, None] for part in parts], 1)


def spread(x: Samples, side: Tensor, change: Callable[[Tensor, Tensor], Tensor]) -> Samples:
    """Put change(entry, part) in place of each floating entry.

    Args:
        x: samples.
        side: [..., n, d], what belongs to the entries of `joined`, such as their tangents.
        change: gets an entry [n, ...] and its part [..., n, ...] of side.
    """
    entries = floating(x)
    parts = [side]
    if len(entries) > 1:
        columns = side.split([entry.shape[1:].numel() for entry in entries], -1)
        parts = [
            part.reshape(*side.shape[:-1], *entry.shape[1:])
            for part, entry in zip(columns, entries, strict=True)
        ]
    left = iter(parts)
    return mapped(x, lambda e: change(e, next(left)) if e.is_floating_point() else e)


def dx_of(x: Inputs, dx: Any, where: str = "") -> dict[Any, Any]:
    """Return the tangents that are given for entries of x, by key; the rest are zero.

    Raises:
        TypeError: dx is no tuple or dict as x is, or has tangents of an entry without a derivative.
        ValueError: dx has other entries than x, or none.
    """
    given = Inputs.of(dx)
    if not isinstance(given, Inputs) or given.named != x.named:
        kind = "dict" if x.named else "tuple"
        raise TypeError(f"dx must be a {kind} as x is, got {type(dx).__name__}{where}")
    keys, own = list(given.entries), list(x.entries)
    if not set(keys) <= set(own) or not (x.named or len(keys) == len(own)):
        raise ValueError(f"dx must have the entries of x, {own}, got {keys}{where}")
    parts = {key: part for key, part in given.entries.items() if part is not None}
    if not parts:
        raise ValueError(f"dx must hold tangents of at least one entry, got none{where}")
    for key, part in parts.items():
        if not is_floating(x.entries[key]):
            raise TypeError(
                f"dx[{key!r}] must be None, got {type(part).__name__}{where}: only floating entries"
                " have a derivative"
            )
    return parts


def concatenated(batches: Sequence[Samples]) -> Samples:
    """Join batches of samples."""
    first = batches[0]
    if isinstance(first, Tensor):
        return torch.cat([entry for batch in batches for entry in tensors_of(batch)])
    columns = zip(*map(tensors_of, batches), strict=True)
    return first.replaced([torch.cat(column) for column in columns])


def equal(a: Samples, b: Samples) -> bool:
    """Return whether samples are equal."""
    return all(map(torch.equal, tensors_of(a), tensors_of(b)))


def form(x: Samples) -> Form:
    """Return the shape of a sample; of several inputs the keys with their shapes."""
    if not isinstance(x, Inputs):
        return tuple(x.shape[1:])
    entries = sorted(x.entries.items()) if x.named else x.entries.items()
    return tuple((k, tuple(v.shape[1:]) if is_samples(v) else None) for k, v in entries)


def in_words(x: Samples) -> str:
    """Write the shapes of a sample for a message: "[8]", "([8], None)" or "{'x': [8]}"."""
    if not isinstance(x, Inputs):
        return f"{list(x.shape[1:])}"
    shapes = {k: list(v.shape[1:]) if is_samples(v) else None for k, v in x.entries.items()}
    return f"{shapes if x.named else tuple(shapes.values())}"


def described(x: Samples) -> str:
    """Write how a model is called, for errors of the model: "model(*x), x = (float32 [8, 1, 28,
    28], int64 [8])", and what may be wrong with that."""

    def words(entry: Any) -> str:
        if not isinstance(entry, Tensor):
            return repr(entry)
        return f"{str(entry.dtype).removeprefix('torch.')} {list(entry.shape)}"

    if not isinstance(x, Inputs):
        hint = "" if floating(x) else "; integers stay as they are, convert counts with .float()"
        return f"model(x), x = {words(x)}{hint}"
    if x.named:
        return f"model(**x), x = {{{', '.join(f'{k}: {words(v)}' for k, v in x.entries.items())}}}"
    entries = ", ".join(map(words, x.entries.values()))
    return f"model(*x), x = ({entries}); labels are left out of x"


def left_out(x: Samples) -> str | None:
    """Say which entries `joined` leaves out; None for none."""
    if not floating(x):
        return "x holds integers alone, which have no density: give the score of the samples"
    if not isinstance(x, Inputs):
        return None
    integers = [k for k, v in x.entries.items() if is_samples(v) and not v.is_floating_point()]
    return f"integers are left out: {', '.join(map(repr, integers))}" if integers else None


def check_forms(conditions: Iterable[Samples]) -> None:
    """Raise ValueError unless all conditions have samples of the same form."""
    forms = {form(x): x for x in conditions}
    if len(forms) > 1:
        several = any(isinstance(x, Inputs) for x in forms.values())
        got = " and ".join(map(in_words, forms.values())) if several else f"{sorted(forms)}"
        raise ValueError(f"all conditions must have samples of the same shape, got {got}")


def arguments(x: Samples) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Return the positional and the named arguments that a model gets."""
    if isinstance(x, Tensor):
        return (x,), {}
    return ((), x.entries) if x.named else (tuple(x.entries.values()), {})


def call(model: nn.Module, x: Samples) -> Any:
    """Run a model: model(x), model(*x) or model(**x)."""
    args, kwargs = arguments(x)
    return model(*args, **kwargs)
