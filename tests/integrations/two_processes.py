"""Run by two processes at once, as ranks 0 and 1: measure wrapped models, then fit with Lightning.

LOCAL_RANK tells a process its rank; the argument is a folder for results."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import lightning.pytorch as package
import torch
import torch.distributed as dist
from integrations.lightning_case import StopAt, held_out, loader, module_of, rows, trainer_of
from integrations.wrapped_case import DATA, OPTIONS, X, assert_same, hooks, network, plain_flow
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

import fisherfast as ff
from fisherfast.integrations.lightning import FisherCallback

RANK, WORLD = int(os.environ["LOCAL_RANK"]), 2


def check_trained(model: nn.Module) -> None:
    """Forward and backward, before and after a measurement, which must be that of the network."""
    expected = plain_flow()
    model(X[0]).sum().backward()
    before = hooks(model)
    assert_same(ff.fisher_flow(model, DATA, **OPTIONS), expected)
    monitor = ff.FisherMonitor(model, DATA, observe_every=1, **OPTIONS)
    assert_same(monitor.step().flow, expected)
    for _ in range(3):
        model(X[0]).sum().backward()
        monitor.observe(torch.linspace(-1, 1, 400))
    monitor.close()
    assert hooks(model) == before
    assert "output" in monitor.live()


def check_wrapped_models(store: Path) -> None:
    """DDP, and both kinds of FSDP."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=RANK, world_size=WORLD)
    together = nn.parallel.DistributedDataParallel(network())
    check_trained(together)
    if RANK == 0:  # the others are not needed
        ff.fisher_flow(together, DATA, **OPTIONS)
    sharded = network()
    mesh = init_device_mesh("cpu", (WORLD,))
    for part in (sharded.fc1, sharded):
        fully_shard(part, mesh=mesh)
    check_trained(sharded)
    old, device = network(), torch.device("cpu")
    old.fc1 = FullyShardedDataParallel(old.fc1, device_id=device)
    check_trained(FullyShardedDataParallel(old, device_id=device))
    dist.barrier()
    dist.destroy_process_group()


def run_lightning(folder: Path) -> None:
    """Each rank has other data and logs its own errors; then a measurement that they share."""
    shared = {"strategy": "ddp", "devices": WORLD, "num_sanity_val_steps": 0}
    stopping, module, own = StopAt(2), module_of(package), []
    callback = FisherCallback(
        held_out(), train_metric="train_mse", max_features=16, stopping=stopping
    )
    trainer = trainer_of(package, [callback], max_epochs=9, **shared)
    module.on_train_epoch_end = lambda: own.append(float(trainer.callback_metrics["train_mse"]))
    trainer.fit(module, loader())
    result = {
        "rows": rows(callback.monitor),
        "own": own,
        "epochs": trainer.current_epoch,
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]).tolist(),
        "best": torch.cat([w.flatten() for w in stopping.weights.values()]).tolist(),
    }
    options = {"max_features": 16, "settings": ff.Settings(batch_size=500)}
    together = FisherCallback(
        held_out(), train_metric="train_mse", process_group="world", **options
    )
    module = module_of(package)
    trainer_of(package, [together], max_epochs=1, **shared).fit(module, loader())
    result["together"] = rows(together.monitor)
    result["alone"] = ff.fisher_flow(module, held_out(), **options)["output"].value
    (folder / f"rank{RANK}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    check_wrapped_models(Path(sys.argv[1]) / "store")
    run_lightning(Path(sys.argv[1]))
