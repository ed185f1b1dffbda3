"""`FisherCallback`: a monitor, and optionally a stopping rule, inside a Lightning trainer."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import sys
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from fisherfast._errors import FisherWarning
from fisherfast._fields import read_fields
from fisherfast.data import Data
from fisherfast.integrations.scalars import scalars
from fisherfast.model.unwrap import unwrapped
from fisherfast.training import EpochRecord, FisherMonitor

PACKAGES = ("lightning.pytorch", "pytorch_lightning")
"""Names of the same library; a trainer accepts only callbacks of its own package."""

STATE = {"monitor": object, "stopping": object, "val_mse": list[float] | None}

SHARDED = frozenset({"FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy"})
"""Strategies under which no process has the whole model."""


class Stopping(Protocol):
    """The methods of a `FisherEarlyStopping` that the callback uses."""

    def step(self, monitor: FisherMonitor) -> bool: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any]) -> None: ...


def _bases() -> tuple[type, ...]:
    """Return `Callback` of each imported Lightning package, or else of each installed one."""
    names = [name for name in PACKAGES if name in sys.modules]
    if not names:
        names = [name for name in PACKAGES if importlib.util.find_spec(name.partition(".")[0])]
    return tuple(importlib.import_module(name).Callback for name in names)


_BASES = _bases()
_Callback: Any = type("_Callback", _BASES, {})


class FisherCallback(_Callback):  # type: ignore[misc]
    """Measure the network after each training epoch, log the results, and stop the training.

    Works with ``lightning.pytorch`` and ``pytorch_lightning``, whichever is imported first (both if
    both are imported before this module).

    With several processes (DDP) rank 0 measures while the others wait for its record, so that all
    of them have the same history, stop together and restore the same weights. With a
    ``process_group`` among the options all of them measure together. Errors are averaged over
    processes.

    A resumed run has the history of an uninterrupted one if its checkpoints are written at the end
    of training epochs, ``ModelCheckpoint(save_on_train_epoch_end=True)``.

    Args:
        data: held-out samples at theta, as for `FisherMonitor`.
        every: epochs from one measurement to the next.
        train_metric: name of a logged mean square error on training samples, in the square of the
            targets' unit (``self.log("train_mse", mse, on_step=False, on_epoch=True)`` in
            `training_step`), or None. For several parameters a list of P names.
        val_metric: the same on validation samples; unknown in epochs without validation.
        network: name of the submodule to measure, as in ``named_modules()``; None for the
            LightningModule itself, whose `forward` must then take a batch of samples.
        stopping: a `FisherEarlyStopping`, or another object with its `step`, `state_dict` and
            `load_state_dict`. A trainer with its own `min_epochs` is refused: pass them to the
            stopping rule.
        theta: function that takes a batch of the loader and returns its parameters [n] or [n, P];
            the live trend is then updated with `FisherMonitor.observe`.
        prefix: of logged names: "fisher/transmission", "fisher/train_level", "fisher/J/fc1", ...
            (see `integrations.scalars`).
        options: of `FisherMonitor`: layers, max_features, training_data, target_scale, path, ...

    Attributes:
        monitor: the `FisherMonitor`, from the start of the fit on; None before.

    Raises:
        ImportError: Lightning is not installed.
        ValueError: at the start of the fit: an unknown network, a strategy that shards the model,
            an option out of range, a trainer that would continue after the stop. After an epoch: a
            metric that is not logged.

    Warns:
        FisherWarning: as `FisherMonitor.step`; a resumed run cannot record the epoch that its
            checkpoint was written in.

    Cost: as `FisherMonitor`; with several processes one broadcast of a record per epoch.

    Example:
        >>> from fisherfast.integrations.lightning import FisherCallback  # doctest: +SKIP
        >>> callback = FisherCallback(data, train_metric="train_mse")  # doctest: +SKIP
        >>> lightning.pytorch.Trainer(callbacks=[callback]).fit(module, loader)  # doctest: +SKIP
        >>> callback.monitor.history[-1].transmission  # doctest: +SKIP
        0.93
    """

    def __init__(
        self,
        data: Data,
        *,
        every: int = 1,
        train_metric: str | list[str] | None = None,
        val_metric: str | list[str] | None = None,
        network: str | None = None,
        stopping: Stopping | None = None,
        theta: Callable[[Any], torch.Tensor] | None = None,
        prefix: str = "fisher",
        **options: Any,
    ) -> None:
        if not _BASES:
            raise ImportError("FisherCallback needs Lightning: pip install 'fisherfast[lightning]'")
        super().__init__()
        self.monitor: FisherMonitor | None = None
        self.stopping = stopping
        self._data = data
        self._every = every
        self._train_metric = _names(train_metric)
        self._val_metric = _names(val_metric)
        self._network = network
        self._theta = theta
        self._prefix = f"{prefix}/" if prefix else ""
        self._options = options
        self._val_mse: list[float] | None = None
        self._trained = False
        self._resume: dict[str, Any] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Create the monitor, or continue with that of the last fit or of a checkpoint."""
        strategy = type(trainer.strategy).__name__
        if strategy in SHARDED:
            raise ValueError(
                "strategy must keep the whole model on every process, got"
                f" {strategy}: call a FisherMonitor in your own loop, on all processes"
            )
        if self.stopping is not None and ((trainer.min_epochs or 0) > 1 or trainer.min_steps):
            raise ValueError(
                "min_epochs must be given to the stopping rule, which restores weights when it"
                f" stops, got Trainer(min_epochs={trainer.min_epochs},"
                f" min_steps={trainer.min_steps})"
            )
        model = self._measured(pl_module)
        if self.monitor is None or self.monitor.model is not unwrapped(model):
            self.monitor = FisherMonitor(model, self._data, every=self._every, **self._options)
        if self._resume is not None:
            self.monitor.load_state_dict(self._resume["monitor"])
            if self.stopping is not None and self._resume["stopping"] is not None:
                self.stopping.load_state_dict(self._resume["stopping"])
            self._val_mse = self._resume["val_mse"]
            self._resume = None
        self._trained = False

    def on_train_epoch_start(self, trainer: Any, pl_module: Any) -> None:
        """Discard the errors of the last epoch."""
        self._val_mse = None
        self._trained = False

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the live trend, if theta is known."""
        self._trained = True
        if self._theta is not None and self.monitor is not None and self._measures(trainer):
            self.monitor.observe(self._theta(batch))

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        """Read the validation error of this epoch, which is available only now."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._val_mse = _errors(trainer, "val_metric", self._val_metric)

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, log, and stop the training if the rule says so."""
        monitor = self.monitor
        if monitor is None:
            return
        if self._train_metric and not self._trained:
            warnings.warn(
                f"epoch {trainer.current_epoch} is not in the history: its checkpoint was written"
                " at a validation, and Lightning keeps no training metrics of such an epoch; use"
                " ModelCheckpoint(save_on_train_epoch_end=True)",
                FisherWarning,
                stacklevel=2,
            )
            return
        train_mse = _errors(trainer, "train_metric", self._train_metric)
        record = self._record(trainer, monitor, train_mse)
        if record is None:
            return
        logged = {f"{self._prefix}{name}": value for name, value in scalars(record).items()}
        pl_module.log_dict(logged, sync_dist=trainer.world_size > 1)
        if self.stopping is not None:
            trainer.should_stop = self.stopping.step(monitor) or trainer.should_stop

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Remove all hooks, also after an error."""
        if self.monitor is not None:
            self.monitor.close()

    def state_dict(self) -> dict[str, Any]:
        """Return the states of monitor and stopping rule for Lightning's checkpoints."""
        if self.monitor is None:
            return self._resume or {}
        return {
            "monitor": self.monitor.state_dict(),
            "stopping": None if self.stopping is None else self.stopping.state_dict(),
            "val_mse": self._val_mse,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Store the states until the start of the fit, when the network exists.

        Raises:
            ValueError: it is not the result of `state_dict`; the states inside are checked later.
        """
        optional = ("stopping", "val_mse")
        found = read_fields(STATE, state_dict, "state", optional=optional) if state_dict else None
        self._resume = found

    def _measured(self, pl_module: nn.Module) -> nn.Module:
        if self._network is None:
            return pl_module
        modules = dict(pl_module.named_modules())
        if self._network not in modules:
            raise ValueError(
                f"network must name a submodule, got {self._network!r};"
                f" there are: {', '.join(name for name in modules if name)}"
            )
        return modules[self._network]

    def _measures(self, trainer: Any) -> bool:
        """Return whether this process takes part in measurements."""
        return trainer.is_global_zero or self._options.get("process_group") is not None

    def _record(
        self, trainer: Any, monitor: FisherMonitor, train_mse: list[float] | None
    ) -> EpochRecord | None:
        """Return the record that all processes use: if only rank 0 measures, its record."""

        def step() -> EpochRecord | None:
            epoch = trainer.current_epoch
            with _autocast(trainer):
                return monitor.step(epoch=epoch, train_mse=train_mse, val_mse=self._val_mse)

        if trainer.world_size == 1 or self._options.get("process_group") is not None:
            return step()
        if trainer.is_global_zero:
            try:
                record = step()
            except Exception as error:  # the other ranks wait for a message
                trainer.strategy.broadcast(f"{type(error).__name__}: {error}")
                raise
            trainer.strategy.broadcast(None if record is None else record.state_dict())
            return record
        state = trainer.strategy.broadcast(None)
        if isinstance(state, str):
            raise RuntimeError(f"rank 0 failed in its measurement: {state}")
        if state is None:
            return None
        record = EpochRecord.from_state_dict(state)
        monitor.adopt(record)
        return record


def _names(metric: str | list[str] | None) -> list[str]:
    if metric is None:
        return []
    return [metric] if isinstance(metric, str) else list(metric)


def _errors(trainer: Any, argument: str, names: list[str]) -> list[float] | None:
    """Return logged metrics, averaged over the processes."""
    if not names:
        return None
    logged = trainer.callback_metrics
    values = []
    for name in names:
        if name not in logged:
            raise ValueError(
                f"{argument} must name a metric that is logged before the epoch ends, got {name!r};"
                f" logged are: {', '.join(logged) or 'none'}. Log it in training_step or"
                " validation_step: self.log(name, value, on_step=False, on_epoch=True)"
            )
        value = logged[name].detach().clone()  # reduced in place
        values.append(float(trainer.strategy.reduce(value, reduce_op="mean")))
    return values


def _autocast(trainer: Any) -> contextlib.AbstractContextManager[Any]:
    """Return the context the network trains in: autocast for mixed precision."""
    plugin = trainer.precision_plugin
    context = getattr(plugin, "autocast_context_manager", contextlib.nullcontext)
    return context()
