"""Peak memory does not grow with the number of samples."""

from __future__ import annotations

import subprocess
import sys

import pytest

PROGRAM = """
import resource, sys
import torch
torch.set_num_threads(1)
import fisherfast as ff
from fisherfast.problems import mlp

DIM, batch = 128, 4096

def stream(samples, shift, seed):
    def batches():
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, samples, batch):
            yield torch.randn(min(batch, samples - start), DIM, generator=generator) + shift
    return batches

def carried(samples, of):
    return lambda: ((x, of(x)) for x in stream(samples, 0.0, 0)())

for samples in map(int, sys.argv[2:]):
    data = {
        "two conditions": lambda: ff.FiniteDifference(
            stream(samples, -0.02, 0), stream(samples, 0.02, 1), dtheta=0.04
        ),
        "pathwise": lambda: ff.Pathwise(carried(samples, lambda x: torch.ones_like(x)[:, None])),
        "score": lambda: ff.Score(carried(samples, lambda x: x.sum(1))),
    }[sys.argv[1]]()
    flow = ff.fisher_flow(mlp([DIM, 96, 16, 1], seed=0), data, max_features=DIM)
    assert flow["output"].samples == data.conditions * samples
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kilobytes(source: str, *samples: int) -> list[int]:
    """Peak memory of one process after each of several measurements, of that many samples each."""
    command = [sys.executable, "-c", PROGRAM, source, *map(str, samples)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return [int(line) for line in done.stdout.split()]


@pytest.mark.slow
@pytest.mark.parametrize("source", ["two conditions", "pathwise"])
def test_memory_is_flat_from_10_000_to_150_000_samples(source):
    """Catches inputs, activations or features that are kept: 1.5 10^5 x 128 floats alone are 77 MB.

    A process with torch peaks near 400 MB; within 15 % means less than 60 MB for 15 times more.
    """
    small, large = peak_kilobytes(source, 10_000, 150_000)
    assert large < 1.15 * small
