"""Names of the parameters theta."""

from __future__ import annotations

from collections.abc import Sequence


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
