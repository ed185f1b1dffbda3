"""Warnings and errors that several parts of the library raise."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


class FisherWarning(UserWarning):
    """Warn that a result may be wrong: the finite step is too wide, the mean score is far from
    zero, samples do not depend on theta or depend on each other, or the network draws random
    numbers in eval mode."""


@contextmanager
def explained(note: Callable[[], str]) -> Iterator[None]:
    """Add a line to what a traceback shows of an error of the user's own model, whose class and
    message stay. A ValueError is left alone: this library's own say what is wrong."""
    try:
        yield
    except Exception as error:
        if isinstance(error, ValueError):
            raise
        if hasattr(error, "add_note"):
            error.add_note(note())
        else:  # Python 3.10
            error.args = (f"{error}\n{note()}",)
        raise
