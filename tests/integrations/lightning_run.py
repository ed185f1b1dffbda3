"""A small training under Lightning, of either name; also run by two processes at once."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fisherfast as ff

DIM = 6
DTHETA = 0.2


def held_out(samples: int = 2000) -> ff.FiniteDifference:
    """Held-out samples of N(theta 1, I) at theta = -0.1 and 0.1: J of the input is 6."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, samples, DIM, generator=generator)
    return ff.FiniteDifference(x[0] - DTHETA / 2, x[1] + DTHETA / 2, DTHETA)


def loader(samples: int = 640, batch: int = 64) -> Any:
    """Training samples, thetas from -1 to 1."""
    generator = torch.Generator().manual_seed(2)
    theta = torch.rand(samples, generator=generator) * 2 - 1
    x = theta[:, None] + torch.randn(samples, DIM, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, theta), batch)


def module_of(package: Any, sync_dist: bool = False) -> Any:
    """A LightningModule of one of the two packages."""

    class Estimator(package.LightningModule):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.net = nn.Sequential(nn.Linear(DIM, 8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 1))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.net(x)

        def training_step(self, batch: Any, index: int) -> torch.Tensor:
            loss = self.error(batch)
            self.log("train_mse", loss, on_step=False, on_epoch=True, sync_dist=sync_dist)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_mse", self.error(batch), sync_dist=sync_dist)

        def error(self, batch: Any) -> torch.Tensor:
            x, theta = batch
            return (self(x)[:, 0] - theta).square().mean()

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.parameters(), 1e-2)

    return Estimator()


def trainer_of(package: Any, callbacks: list[Any], **options: Any) -> Any:
    """A quiet trainer on the CPU."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "accelerator": "cpu",
    }
    return package.Trainer(callbacks=callbacks, **(quiet | options))


class StopAt:
    """A stopping rule that only counts, and gives back the weights of the epoch before."""

    def __init__(self, epoch: int) -> None:
        self.epoch = epoch
        self.asked: list[int] = []
        self.weights: dict[str, torch.Tensor] = {}

    def step(self, monitor: ff.FisherMonitor) -> bool:
        self.asked.append(monitor.history[-1].epoch)
        if monitor.history[-1].epoch >= self.epoch:
            monitor.model.load_state_dict(self.weights)
            return True
        self.weights = {k: v.clone() for k, v in monitor.model.state_dict().items()}
        return False

    def state_dict(self) -> dict[str, Any]:
        return {"asked": list(self.asked), "weights": self.weights}

    def load_state_dict(self, state: Any) -> None:
        self.asked, self.weights = list(state["asked"]), dict(state["weights"])


def rows(monitor: ff.FisherMonitor) -> list[dict[str, Any]]:
    """The history without wall time."""
    return [{k: v for k, v in row.items() if k != "seconds"} for row in monitor.rows()]


def run_distributed(folder: Path) -> None:
    """One rank of two: the environment says which. Each has other data and logs its own errors."""
    import lightning.pytorch as package

    from fisherfast.integrations.lightning import FisherCallback

    warnings.simplefilter("ignore")
    stopping = StopAt(2)
    callback = FisherCallback(
        held_out(), train_metric="train_mse", max_features=16, stopping=stopping
    )
    trainer = trainer_of(
        package, [callback], max_epochs=9, strategy="ddp", devices=2, num_sanity_val_steps=0
    )
    module = module_of(package)
    own = []
    module.on_train_epoch_end = lambda: own.append(float(trainer.callback_metrics["train_mse"]))
    trainer.fit(module, loader())
    result = {
        "rows": rows(callback.monitor),
        "own": own,
        "epochs": trainer.current_epoch,
        "weights": torch.cat([p.detach().flatten() for p in module.parameters()]).tolist(),
        "best": torch.cat([w.flatten() for w in stopping.weights.values()]).tolist(),
    }
    together = FisherCallback(
        held_out(),
        train_metric="train_mse",
        max_features=16,
        settings=ff.Settings(batch_size=500),
        process_group="world",
    )
    module = module_of(package)
    options = {"strategy": "ddp", "devices": 2, "num_sanity_val_steps": 0}
    trainer_of(package, [together], max_epochs=2, **options).fit(module, loader())
    result["together"] = rows(together.monitor)
    alone = ff.fisher_flow(
        module, held_out(), max_features=16, settings=ff.Settings(batch_size=500)
    )
    result["alone"] = alone["output"].value
    (folder / f"rank{trainer.global_rank}.json").write_text(json.dumps(result))


if __name__ == "__main__":
    torch.set_num_threads(1)
    run_distributed(Path(sys.argv[1]))
