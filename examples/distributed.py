"""One measurement on any number of processes: the same J on one, two or a hundred.

    python examples/distributed.py
    torchrun --nproc-per-node 2 examples/distributed.py

The first table is of data that every process has: batches are dealt to them in turn. The second is
of data that each process has a share of, as with files spread over machines.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist

import fisherfast as ff

SAMPLES, PIXELS, STEP = 20_000, 36, 0.06


def main() -> None:
    """Measure a small network, whose weights and samples every process draws with the same seed."""
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:  # started by torchrun
        dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))

    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(PIXELS, 32), torch.nn.ReLU(), torch.nn.Linear(32, 1)
    ).to(device)
    noise = torch.randn(2, SAMPLES, PIXELS)
    minus, plus = noise[0] - STEP / 2, noise[1] + STEP / 2

    data = ff.FiniteDifference(minus, plus, dtheta=STEP)
    flow = ff.fisher_flow(model, data, max_features=128, process_group="world")

    mine = [part.chunk(size)[rank] for part in (minus, plus)]  # or files that only this one has
    share = ff.Shard(ff.FiniteDifference(*mine, dtheta=STEP))
    shared = ff.fisher_flow(model, share, max_features=128, process_group="world")

    if rank == 0:
        print(flow)
        print(shared)
    if size > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
