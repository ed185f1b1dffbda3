"""Peak memory of exact derivatives through a ResNet-18, each way in a process of its own.

    python benchmarks/speed/dual_memory.py WAY n SIZE WIDTH P     prints bytes

Counted is what lies beyond model, input, tangents of the input and results (see `peak_memory`).
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherfast as ff
from fisherfast.model.hooks import Forward

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.speed.networks import built
from benchmarks.speed.peak_memory import peak_beyond, printed_by

NETWORK = "ResNet-18"
CHANNELS = 3
Way = Callable[[nn.Module, Tensor, Tensor], tuple[Tensor, ...]]


def plain(model: nn.Module, x: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
    """The forward pass without tangents."""
    with torch.no_grad():
        return (model(x),)


def jvp(model: nn.Module, x: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
    """Output and its tangents."""
    return ff.jvp(model, x, dx)


def propagate(model: nn.Module, x: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
    """The output alone is kept."""
    return ff.propagate(model, x, dx, layers=["output"])["output"]


def reductions(model: nn.Module, x: Tensor, dx: Tensor) -> tuple[Tensor, ...]:
    """Every layer is read, and only its means over primal and tangents are kept."""
    means: list[Tensor] = []

    def consume(name: str, kind: str, module: nn.Module | None, output: Any) -> None:
        means.append(output.stack.mean(tuple(range(1, output.dim() + 1))))

    batch = ff.dual.DualTensor.pack(x, dx)
    with Forward(model, consume) as forward, ff.dual.propagation(model, len(dx)):
        forward.run(batch)
    return (torch.stack(means),)


WAYS: dict[str, Way] = {
    "plain": plain,
    "jvp": jvp,
    "propagate": propagate,
    "reductions": reductions,
}


def extra_bytes(way: str, samples: int, size: int, width: int, directions: int) -> int:
    """Bytes at the peak of one call of a way, in a process of its own."""
    return printed_by(__file__, way, samples, size, width, directions)


def give_back_memory() -> None:
    """What was freed leaves the process, where the C library can do that: a later call could use
    it again, and its peak would not show."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def main() -> None:
    """Measure the way that the command line names."""
    way = WAYS[sys.argv[1]]
    samples, size, width, directions = map(int, sys.argv[2:])
    model = built(NETWORK, width=width)
    # What a first call loads and starts is no part of a call.
    way(model, torch.ones(1, CHANNELS, size, size), torch.ones(1, 1, CHANNELS, size, size))
    x = torch.randn(samples, CHANNELS, size, size)
    dx = torch.randn(directions, *x.shape)
    give_back_memory()
    print(peak_beyond(lambda: way(model, x, dx)))


if __name__ == "__main__":
    main()
