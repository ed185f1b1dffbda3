"""What the processes of a group tell each other while they measure together.

Two channels. Short messages (settings, layers, that a rank has failed) go through the store that
`torch.distributed` was started with: a rank that waits reads there who has arrived, who has failed
and whose heart still beats, so that a slow rank is waited for and a dead one is not. Sums go
through a gloo group of our own, in host memory, whatever the user's group runs on.

Every rank passes the same meeting points in the same order. One that fails says so at the point
that it was heading for; the others find its message there, and all go on from the next.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import numbers
import threading
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

__all__ = ["TIMEOUT", "OtherRankError", "Ranks", "ranks_of"]

TIMEOUT = 60.0
"""Seconds without a sign of life after which a rank counts as dead: a beat comes every second."""

BEAT = 1.0
"""Seconds between two signs of life; a tenth of the timeout where that is less."""

GLANCE = 1.0
"""Seconds between two looks for a failed rank, while a pass over the data runs."""

PAUSES = 5e-4, 0.05
"""Shortest and longest sleep in seconds of a rank that waits; each is twice the last."""

CHUNK_NUMBERS = 2**23
"""Numbers that are added up at a time: a buffer of 64 MB."""

_KNOWN: weakref.WeakKeyDictionary[Any, Ranks] = weakref.WeakKeyDictionary()


class OtherRankError(RuntimeError):
    """Another rank has failed, or is not heard of."""


@contextlib.contextmanager
def ranks_of(group: Any, timeout: float = TIMEOUT) -> Iterator[Ranks | None]:
    """The ranks that measure together, for one measurement; None for this process alone.

    Whatever is raised inside reaches all of them.

    Args:
        group: None for this process alone; "world" for all ranks where `torch.distributed` is
            initialised, and this process alone where it is not; or a ``ProcessGroup``.
        timeout: seconds without a sign of life after which a rank counts as dead. Ranks must come
            to a measurement within this time of each other; in it they may be as slow as they are.

    Raises:
        TypeError: group is none of these, timeout is no number.
        ValueError: this process is not in the group, timeout is not positive.
        RuntimeError: another rank has failed or died, or does not take part.
    """
    if isinstance(timeout, bool) or not isinstance(timeout, numbers.Real):
        raise TypeError(f"timeout must be a number of seconds, got {timeout!r}")
    if not 0 < timeout < math.inf:
        raise ValueError(f"timeout must be positive and finite, got {timeout}")
    ranks = _find(group)
    if ranks is None:
        yield None
        return
    with ranks.measuring(float(timeout)):
        yield ranks


def _find(group: Any) -> Ranks | None:
    if group is None:
        return None
    if isinstance(group, str):
        if group != "world":
            raise ValueError(f'group must be None, "world" or a ProcessGroup, got {group!r}')
        if not (dist.is_available() and dist.is_initialized()):
            return None
        group = dist.group.WORLD
    elif not dist.is_available() or group is dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(f"group must contain this process, got {group!r}")
    elif not isinstance(group, dist.ProcessGroup):
        raise TypeError(
            f'group must be None, "world" or a ProcessGroup, got {type(group).__name__}'
        )
    if dist.get_world_size(group) == 1:
        return None
    if group not in _KNOWN:
        _KNOWN[group] = Ranks(group)
    return _KNOWN[group]


class Ranks:
    """All processes of a group, from one of them. Made once per group; see `ranks_of`.

    Args:
        group: a process group with this process in it. It is neither used nor changed.

    Attributes:
        rank: of this process in the group.
        size: number of processes.
        doing: what this rank is at, for messages to the others.
    """

    def __init__(self, group: Any) -> None:
        self.rank = dist.get_rank(group)
        self.size = dist.get_world_size(group)
        self.doing = "starting"
        self._timeout = TIMEOUT
        self._point = 0  # number of the next meeting point
        self._glanced = 0.0
        self._sums: Any = None
        self._broken = ""
        self._busy = threading.Lock()
        with _reaching("starting"):
            store = _prefixed(f"fisherfast/{group.group_name}", _own_connection())
            # a store may outlive a group: a name that was used before has old messages in it
            life = store.add(f"life/{self.rank}", 1)
            self._name = f"fisherfast/{group.group_name}/{life}"
            self._store = _prefixed(str(life), store)

    @contextlib.contextmanager
    def measuring(self, timeout: float) -> Iterator[None]:
        """While this rank takes part in a measurement. What is raised inside reaches all ranks, at
        the end at the latest.

        Args:
            timeout: see `ranks_of`.
        """
        if not self._busy.acquire(blocking=False):
            raise RuntimeError("a group must serve one measurement at a time, got a second")
        if self._broken:
            self._busy.release()
            raise RuntimeError(f"group must be made anew, it has lost a rank: {self._broken}")
        self._timeout = timeout
        self.doing = "preparing the measurement"
        heart = _Heart(self._store, f"alive/{self.rank}", min(BEAT, timeout / 10))
        try:
            heart.start()
            yield
            self.exchange("ending the measurement")
        except OtherRankError:
            raise
        except BaseException as error:
            self._tell(f"{type(error).__name__}: {error}")
            raise
        finally:
            heart.stop()
            self._busy.release()

    def exchange(self, doing: str, value: Any = None) -> list[Any]:
        """Meet all other ranks.

        Args:
            doing: the meeting point, the same on all ranks.
            value: anything that JSON holds.

        Returns:
            What each rank has brought.

        Raises:
            RuntimeError: a rank has failed, died or is elsewhere.
        """
        self.doing = doing
        with _reaching(doing):
            self._store.set(self._key(self.rank), json.dumps([doing, value]))
            self._wait_for_all()
            told = [json.loads(self._store.get(self._key(r))) for r in range(self.size)]
            self._point += 1
            if self._point > 1:  # all have come here, and so have read what was there before
                self._store.delete_key(self._key(self.rank, self._point - 2))
        self._raise_if_elsewhere([place for place, _ in told])
        return [value for _, value in told]

    def agree(self, doing: str, values: Mapping[str, Any], hint: str = "") -> None:
        """Raise ValueError on all ranks unless they have the same values.

        Args:
            doing: the meeting point.
            values: what must be the same, by the names that messages call it.
            hint: what to do where it is not.
        """
        if self.same(doing, values):
            return
        told = self.exchange(doing, dict(values))
        names = dict.fromkeys(name for each in told for name in each)
        for name in names:
            held: dict[str, list[int]] = {}
            for rank, each in enumerate(told):
                value = _readable(each[name]) if name in each else "none"
                held.setdefault(value, []).append(rank)
            if len(held) > 1:
                who = "; ".join(f"{value} on {_ranks(ranks)}" for value, ranks in held.items())
                raise ValueError(f"{name} must be the same on all ranks, got {who}{hint}")

    def same(self, doing: str, value: Any) -> bool:
        """Whether all ranks have the same value; only its digest is sent."""
        digest = hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
        return len(set(self.exchange(doing, digest))) == 1

    def glance(self) -> None:
        """Raise RuntimeError if another rank has failed; looks once a second."""
        if time.monotonic() - self._glanced > GLANCE:
            with _reaching(self.doing):
                self._raise_if_failed()
            self._glanced = time.monotonic()

    def add_up(self, doing: str, tensors: Sequence[torch.Tensor]) -> None:
        """Replace tensors by their sums over all ranks, in place, with the same bits on all.

        Sums are taken in float64, in one buffer in host memory after the other.

        Args:
            doing: the meeting point.
            tensors: of any shape, strides and device, none of them part of another; as many
                numbers on all ranks.

        Cost: 8 bytes sent and received per number, twice, whatever the number of ranks.
        """
        sizes = [tensor.numel() for tensor in tensors]
        self.agree(doing, {"sums over samples": [len(sizes), sum(sizes)]})
        for pieces in buffers(tensors, CHUNK_NUMBERS):
            self._add_pieces(pieces)

    def _add_pieces(self, pieces: list[torch.Tensor]) -> None:
        flat = torch.cat([piece.detach().reshape(-1).double() for piece in pieces])
        total = flat.cpu().contiguous()
        try:
            with _reaching(self.doing):
                self._all_reduce(total)
        except OtherRankError as error:
            self._broken = str(error)  # gloo has no way back
            self._raise_if_failed()  # which says more, if it was said
            raise
        parts = total.to(flat.device).split([piece.numel() for piece in pieces])
        for piece, part in zip(pieces, parts, strict=True):
            piece.copy_(part.view(piece.shape))

    def _all_reduce(self, total: torch.Tensor) -> None:
        """In a gloo group that nobody else knows: the user's may run on NCCL, or wait for other
        work. Its ring adds in one order and hands the result to all: the same bits."""
        patience = timedelta(seconds=self._timeout)
        if self._sums is None:
            store = _prefixed(f"{self._name}/sums", _own_connection())
            self._sums = dist.ProcessGroupGloo(store, self.rank, self.size, timeout=patience)
        options = dist.AllreduceOptions()
        options.timeout = patience
        self._sums.allreduce([total], options).wait()

    def _key(self, rank: int | str, point: int | None = None) -> str:
        return f"{self._point if point is None else point}/{rank}"

    def _wait_for_all(self) -> None:
        """Until every rank has come here; those that wait do not wait for the dead."""
        pulses = {r: _Pulse(self._store, f"alive/{r}") for r in range(self.size)}
        missing = list(range(self.size))
        pause, looked = PAUSES[0], time.monotonic()
        while missing:
            self._raise_if_failed()
            before = len(missing)
            while missing and self._store.check([self._key(missing[0])]):
                missing.pop(0)
            if missing and time.monotonic() - looked > min(BEAT, self._timeout / 10):
                looked = time.monotonic()
                missing = [r for r in missing if not self._store.check([self._key(r)])]
                silent = [r for r in missing if pulses[r].silence() > self._timeout]
                if silent:
                    self._give_up(silent)
            pause = PAUSES[0] if len(missing) < before else min(2 * pause, PAUSES[1])
            if missing:
                time.sleep(pause)

    def _give_up(self, silent: list[int]) -> None:
        message = (
            f"{_ranks(silent)} not heard of for {self._timeout:g} s while {self.doing}: dead, or"
            " not in this measurement (timeout= waits longer)"
        )
        self._tell(message)
        raise OtherRankError(message)

    def _tell(self, message: str) -> None:
        """Leave word for the ranks that come to the next meeting point."""
        failure = json.dumps([self.rank, self.doing, message])
        with contextlib.suppress(Exception):  # the error itself matters more
            self._store.set(self._key("failed"), failure)
        self._point += 1

    def _raise_if_failed(self) -> None:
        if self._store.check([self._key("failed")]):
            rank, doing, message = json.loads(self._store.get(self._key("failed")))
            self._point += 1
            raise OtherRankError(f"rank {rank} failed while {doing}: {message}")

    def _raise_if_elsewhere(self, places: list[str]) -> None:
        if len(set(places)) > 1:
            who = "; ".join(f"rank {r} is {place}" for r, place in enumerate(places))
            raise ValueError(f"all ranks must take the same steps, got: {who}")


class _Heart(threading.Thread):
    """Says that this rank is alive, as long as it measures."""

    def __init__(self, store: Any, key: str, interval: float) -> None:
        super().__init__(name="fisherfast heartbeat", daemon=True)
        self._store, self._key, self._interval = store, key, interval
        self._stopped = threading.Event()

    def run(self) -> None:
        with contextlib.suppress(Exception):  # without a store the others know anyway
            while not self._stopped.wait(self._interval):
                self._store.add(self._key, 1)

    def stop(self) -> None:
        self._stopped.set()
        if self.ident is not None:
            self.join(self._interval)


class _Pulse:
    """The beats of another rank, from when one begins to listen."""

    def __init__(self, store: Any, key: str) -> None:
        self._store, self._key = store, key
        self._last: bytes | None = None
        self._since = time.monotonic()

    def silence(self) -> float:
        """Seconds since a new beat was heard."""
        beat = self._store.get(self._key) if self._store.check([self._key]) else None
        if beat != self._last:
            self._last, self._since = beat, time.monotonic()
        return time.monotonic() - self._since


@contextlib.contextmanager
def _reaching(doing: str) -> Iterator[None]:
    """What torch raises when it cannot reach a rank or the store, as an error that says so."""
    try:
        yield
    except (OtherRankError, ValueError):
        raise
    except (RuntimeError, OSError) as error:  # torch's own are among these
        reason = str(error).partition("\n")[0]
        raise OtherRankError(
            f"the other ranks could not be reached while {doing}, one has died: {reason}"
        ) from error


def _own_connection() -> Any:
    """The store that the processes met in; a connection of our own where it can be had: a call that
    waits on one keeps all others waiting."""
    store = dist.distributed_c10d._get_default_store()
    return store.clone() if hasattr(store, "clone") else store


def _prefixed(prefix: str, store: Any) -> Any:
    return dist.distributed_c10d.PrefixStore(prefix, store)


def buffers(tensors: Sequence[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    """Views of tensors in lists of at most `limit` numbers of one device, in order."""
    held: list[torch.Tensor] = []
    size = 0
    for tensor in tensors:
        for piece in _cut(tensor, limit):
            if held and (size + piece.numel() > limit or piece.device != held[0].device):
                yield held
                held, size = [], 0
            held.append(piece)
            size += piece.numel()
    if held:
        yield held


def _cut(tensor: torch.Tensor, limit: int) -> Iterator[torch.Tensor]:
    """Views of a tensor, each of at most `limit` numbers; none of an empty one."""
    if tensor.numel() == 0:
        return
    if tensor.numel() <= limit:
        yield tensor
        return
    rows = limit // (tensor.numel() // len(tensor))
    for part in tensor.split(rows) if rows else tensor:
        yield from _cut(part, limit)


def _readable(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else "ranks " + ", ".join(map(str, ranks))
