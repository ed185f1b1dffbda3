"""Peak memory of the diagonal of the parameters' Fisher matrix, each way in a process of its own.

    python benchmarks/peers/memory.py WAY SAMPLES WIDTH STAGES BLOCKS     prints bytes

Counted is everything beyond the model and its data, results included, so that a training step pays
for its gradients and the state of its optimiser, and the diagonal for its P numbers.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fisherfast as ff

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.peers import libraries, networks, ways
from benchmarks.peers.libraries import Case
from benchmarks.speed.dual_memory import give_back_memory
from benchmarks.speed.peak_memory import peak_beyond, printed_by

CLASSES = 10
CHUNK = 8  # samples of a chunk of vmap: about the fastest on CPUs, and a small one
FEW = 2


def ours(case: Case, fisher_type: str) -> Any:
    """The diagonal by fisherfast."""
    return ff.parameters.fisher(
        case.model, case.likelihood(), (case.x, case.y), structure="diag", fisher_type=fisher_type
    )


def training_step(case: Case, optimiser: type[torch.optim.Optimizer]) -> Any:
    """Forward, backward and the first step of an optimiser, in train mode."""
    case.model.train()
    chosen = optimiser(case.model.parameters(), lr=0.0)
    nn.functional.cross_entropy(case.model(case.x), case.y).backward()
    chosen.step()
    return chosen


def by_vmap(case: Case, chunk: int) -> Any:
    """Per-sample gradients by torch.func, a chunk at a time."""
    return ways.by_vmap(case.model, case.x, case.y, exact=False, chunk=chunk)


WAYS: dict[str, Callable[[Case], Any]] = {
    "step, SGD": partial(training_step, optimiser=torch.optim.SGD),
    "step, Adam": partial(training_step, optimiser=torch.optim.Adam),
    "fisherfast, empirical": partial(ours, fisher_type="empirical"),
    "fisherfast, mc": partial(ours, fisher_type="mc"),
    "fisherfast, exact": partial(ours, fisher_type="exact"),
    f"vmap of {CHUNK}": partial(by_vmap, chunk=CHUNK),
    "vmap of all": partial(by_vmap, chunk=sys.maxsize),
}
PEERS: dict[str, Callable[[Case], Any]] = {
    "nngeometry": partial(libraries.nngeometry_diag, fisher_type="empirical"),
    "BackPACK": lambda case: libraries.BackPack(case, "empirical")(),
}


def extra_bytes(way: str, samples: int, width: int, stages: int, blocks: int) -> int:
    """Bytes at the peak of one call of a way, in a process of its own."""
    return printed_by(__file__, way, samples, width, stages, blocks)


def main() -> None:
    """Measure the way that the command line names."""
    way = (WAYS | PEERS)[sys.argv[1]]
    samples, width, stages, blocks = map(int, sys.argv[2:])
    shape = (networks.CHANNELS, networks.SIZE, networks.SIZE)

    def case(samples: int) -> Case:
        model = networks.drawn(lambda: networks.residual(width, stages, blocks, CLASSES))
        return Case(model, "categorical", *networks.data(shape, CLASSES, samples))

    way(case(FEW))  # what a first call loads and starts is no part of a call
    measured = case(samples)
    give_back_memory()

    def call() -> tuple[torch.Tensor, ...]:
        way(measured)
        return ()

    print(peak_beyond(call))


if __name__ == "__main__":
    main()
