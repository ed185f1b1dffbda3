"""Checks of arguments that several parts of the library take.

Each returns the value as a plain Python number, or raises an error that names the argument.
"""

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

SEEDS = 2**63
"""Seeds lie in [-SEEDS, SEEDS), the range of int64."""


def check_whole(name: str, value: Any, *, least: int | None = None) -> int:
    """Return a whole number as an int: a Python int or a NumPy integer.

    Raises:
        TypeError: the value is a float, a bool or not a number.
        ValueError: it is below `least`.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be a whole number, got {value!r}")
    if least is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")
    return int(value)


def check_seed(seed: Any) -> int:
    """Return a seed as an int. Negative seeds are valid, as for `torch.manual_seed`.

    NumPy refuses negative seeds: pass it `seed % 2**64`, which is what PyTorch uses.

    Raises:
        TypeError: the seed is not a whole number.
        ValueError: it is outside [-2**63, 2**63).
    """
    seed = check_whole("seed", seed)
    if not -SEEDS <= seed < SEEDS:
        raise ValueError(f"seed must be at least -2**63 and below 2**63, got {seed}")
    return seed


def check_same_network(
    what: str, here: Mapping[str, Sequence[int]], there: Mapping[str, Sequence[int]]
) -> None:
    """Raise ValueError, naming the first difference, unless both hold the same shapes by name."""
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"{what} must be of the same network, got {name!r}"
                f" {there.get(name, 'missing')} there and {here.get(name, 'missing')} here"
            )


def check_positive(name: str, value: Any) -> float:
    """Return a positive, finite number as a float.

    Raises:
        TypeError: the value is not a real number.
        ValueError: it is 0, negative, NaN or infinite.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not 0 < float(value) < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")
    return float(value)


def check_names(names: Sequence[str] | None, parameters: int) -> tuple[str, ...]:
    """Return the names of P parameters as a tuple; empty for None.

    Raises:
        TypeError: names is not a sequence of strings.
        ValueError: there are not P of them, two are the same, or one is empty.
    """
    if names is None:
        return ()
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"names must be a list of strings, one per parameter, got {names!r}")
    if not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be strings, got {list(names)}")
    if len(names) != parameters:
        raise ValueError(
            f"names must hold one per parameter ({parameters}), got {len(names)}: {list(names)}"
        )
    if len(set(names)) < parameters or not all(name.strip() for name in names):
        raise ValueError(f"names must be different and not empty, got {list(names)}")
    return tuple(names)
