"""A small training under Lightning, of either name."""

from __future__ import annotations

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


def loader(samples: int = 320, batch: int = 64) -> Any:
    """Training samples, thetas from -1 to 1."""
    generator = torch.Generator().manual_seed(2)
    theta = torch.rand(samples, generator=generator) * 2 - 1
    x = theta[:, None] + torch.randn(samples, DIM, generator=generator)
    return torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, theta), batch)


def module_of(package: Any) -> Any:
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
            self.log("train_mse", loss, on_step=False, on_epoch=True)
            return loss

        def validation_step(self, batch: Any, index: int) -> None:
            self.log("val_mse", self.error(batch))

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
