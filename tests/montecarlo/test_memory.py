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

samples, batch = int(sys.argv[1]), 4096

def stream(shift, seed):
    def batches():
        generator = torch.Generator().manual_seed(seed)
        for start in range(0, samples, batch):
            yield torch.randn(min(batch, samples - start), 64, generator=generator) + shift
    return batches

def carried(what):
    def batches():
        for x in stream(0.0, 0)():
            yield (x, torch.ones_like(x)[:, None] if what == "pathwise" else x.sum(1))
    return batches

data = {
    "two conditions": lambda: ff.FiniteDifference(stream(-0.02, 0), stream(0.02, 1), dtheta=0.04),
    "pathwise": lambda: ff.Pathwise(carried("pathwise")),
    "score": lambda: ff.Score(carried("score")),
}[sys.argv[2]]()
flow = ff.fisher_flow(mlp([64, 48, 16, 1], seed=0), data, max_features=128)
assert flow["output"].samples == data.conditions * samples
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak_kilobytes(samples: int, source: str) -> int:
    command = [sys.executable, "-c", PROGRAM, str(samples), source]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize("source", ["two conditions", "pathwise"])
def test_memory_is_flat_from_1e4_to_3e5_samples(source):
    """Catches inputs, activations or features that are kept: 3 10^5 x 64 floats alone are 77 MB.

    A process with torch peaks near 400 MB; within 15 % means less than 60 MB for thirtyfold
    more.
    """
    small, large = peak_kilobytes(10_000, source), peak_kilobytes(300_000, source)
    assert large < 1.15 * small
