"""Progress bars for long work, shown only when asked for."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Protocol


class Bar(Protocol):
    """The methods of a progress bar that the library uses."""

    def update(self, n: int = 1) -> Any: ...
    def close(self) -> Any: ...


class _Silent:
    def update(self, n: int = 1) -> None:
        pass

    def close(self) -> None:
        pass

    def __enter__(self) -> _Silent:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def progress_bar(show: bool, *, total: int | None, title: str, unit: str = "samples") -> Any:
    """Return a tqdm bar (terminal or notebook), or one that shows nothing.

    Raises:
        ImportError: show is true and tqdm is not installed.
    """
    if not show:
        return _Silent()
    try:
        from tqdm.auto import tqdm
    except ImportError:
        raise ImportError(
            "progress bars need tqdm: pip install 'fisherfast[plots]', or pass progress=False"
        ) from None
    return tqdm(total=total, desc=title, unit=f" {unit}", unit_scale=True, leave=False)
