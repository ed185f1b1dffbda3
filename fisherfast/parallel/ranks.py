"""`Ranks`: the processes that make one measurement together, on `torch.distributed`.

Every rank passes the same meeting points in the same order (`Ranks.exchange`). A rank that raises
an error brings its text to one more meeting point; the others read and raise it, and all ranks
continue from the next point. Tensors are sent after a point that all have reached without an error.
Ranks at different points raise an error that names them. A collective waits for a rank that is
slow, has ended, was stopped or does not take part until the timeout of the process group, and then
raises an error.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

_ON_HOST: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
"""A gloo group of the same ranks for each group that cannot send tensors on the CPU."""


class OtherRankError(RuntimeError):
    """Another rank has failed or does not answer."""


@contextlib.contextmanager
def ranks_of(group: Any) -> Iterator[Ranks | None]:
    """Yield the ranks of one measurement; None for this process alone.

    An error inside the block reaches all of them.

    Args:
        group: see `find_ranks`.

    Raises:
        TypeError, ValueError: as `find_ranks`.
        RuntimeError: another rank has failed, has ended or does not take part.
    """
    ranks = find_ranks(group)
    if ranks is None:
        yield None
        return
    try:
        yield ranks
        ranks.exchange("ending the measurement")
    except OtherRankError:
        raise
    except Exception as error:
        with contextlib.suppress(OtherRankError):  # the error itself matters more
            ranks.report(f"{type(error).__name__}: {error}")
        raise


def find_ranks(group: Any) -> Ranks | None:
    """Return the ranks of a group; None for this process alone.

    Args:
        group: None for this process alone; "world" for all ranks where `torch.distributed` is
            initialised, and this process alone where it is not; or a ``ProcessGroup``.

    Raises:
        TypeError: group is none of these.
        ValueError: this process is not in the group.
    """
    if group is None:
        return None
    if isinstance(group, str):
        if group != "world":
            raise ValueError(
                f'process_group must be None, "world" or a ProcessGroup, got {group!r}'
            )
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    elif not dist.is_available() or group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"process_group must contain this process, got {group!r}")
    elif not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f'process_group must be None, "world" or a ProcessGroup, got {type(group).__name__}'
        )
    return None if dist.get_world_size(group) == 1 else Ranks(group)


class Ranks:
    """All processes of a group, from one of them.

    Args:
        group: a process group with this process in it.

    Attributes:
        rank: of this process in the group.
        size: number of processes.
    """

    def __init__(self, group: Any) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self._group = _on_host(group)

    def exchange(self, doing: str, value: Any = None) -> list[Any]:
        """Meet all other ranks.

        Args:
            doing: the meeting point, the same on all ranks.
            value: anything that can be pickled.

        Returns:
            The values of all ranks.

        Raises:
            OtherRankError: a rank has failed, has ended or does not answer.
            ValueError: a rank is at another point.
        """
        everywhere = self._gathered(doing, (doing, "", value))
        for rank, (_, error, _) in enumerate(everywhere):
            if error:
                raise OtherRankError(f"rank {rank} failed: {error}")
        points = [point for point, *_ in everywhere]
        if len(set(points)) > 1:
            who = "; ".join(f"rank {rank} is {point}" for rank, point in enumerate(points))
            raise ValueError(f"all ranks must take the same steps, got: {who}")
        return [value for *_, value in everywhere]

    def report(self, error: str) -> None:
        """Meet all other ranks with the text of an error, which they raise."""
        self._gathered("reporting an error", ("", error, None))

    def agree(self, doing: str, values: Mapping[str, Any], hint: str = "") -> None:
        """Raise ValueError on all ranks unless they have the same values.

        Args:
            doing: the meeting point.
            values: what must be the same, by its name in messages.
            hint: what to do if it is not.
        """
        check_same(self.exchange(doing, dict(values)), hint)

    def add_up(self, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their sums over all ranks, in place, with the same bits on all.

        Args:
            tensors: of any shape, strides, dtype and device, without overlap; as many numbers on
                all ranks.

        Cost: one sum in float64 in host memory: 8 bytes sent and received per number, twice, for
            any number of ranks.
        """
        flat = torch.cat([tensor.detach().reshape(-1).double().cpu() for tensor in tensors])
        with _reaching("adding up"):
            dist.all_reduce(flat, group=self._group)
        parts = flat.split([tensor.numel() for tensor in tensors])
        for tensor, part in zip(tensors, parts, strict=True):
            tensor.detach().copy_(part.view(tensor.shape))

    def broadcast(self, tensors: Sequence[torch.Tensor], source: int = 0) -> None:
        """Replace tensors by those of one rank, in place, bit for bit.

        Args:
            tensors: of the same shapes and dtypes on all ranks.
            source: the rank.
        """
        for tensor in tensors:
            value = tensor.detach().cpu().contiguous()
            root = dist.get_global_rank(self._group, source)
            with _reaching("broadcasting"):
                dist.broadcast(value.reshape(-1).view(torch.uint8), root, group=self._group)
            tensor.detach().copy_(value)

    def _gathered(self, doing: str, value: Any) -> list[Any]:
        everywhere: list[Any] = [None] * self.size
        with _reaching(doing):
            dist.all_gather_object(everywhere, value, group=self._group)
        return everywhere


def check_same(everywhere: Sequence[Mapping[str, Any]], hint: str = "") -> None:
    """Raise ValueError unless all ranks have the same values; see `Ranks.agree`."""
    for name in dict.fromkeys(name for each in everywhere for name in each):
        held: dict[str, list[int]] = {}
        for rank, each in enumerate(everywhere):
            held.setdefault(str(each.get(name, "none")), []).append(rank)
        if len(held) > 1:
            who = "; ".join(f"{value} on {_named(ranks)}" for value, ranks in held.items())
            raise ValueError(f"{name} must be the same on all ranks, got {who}{hint}")


def _on_host(group: Any) -> Any:
    """Return a group of the same ranks that sends tensors on the CPU: itself, or a gloo group."""
    config = dist.get_backend_config(group)
    if "cpu:" in config:
        return group
    if group not in _ON_HOST:
        backend = group._get_backend(torch.device(config.partition(":")[0]))
        _ON_HOST[group] = dist.new_group(
            dist.get_process_group_ranks(group),
            timeout=getattr(getattr(backend, "options", None), "_timeout", None),
            backend="gloo",
            use_local_synchronization=True,
        )
    return _ON_HOST[group]


@contextlib.contextmanager
def _reaching(doing: str) -> Iterator[None]:
    """Turn the error of torch for a rank that does not answer into one that says so."""
    try:
        yield
    except RuntimeError as error:  # torch's own are among these
        reason = str(error).partition("\n")[0]
        raise OtherRankError(
            f"the other ranks could not be reached while {doing}: one has ended, or has not come"
            " within the timeout of the process group (init_process_group(timeout=...) sets it):"
            f" {reason}"
        ) from error


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
