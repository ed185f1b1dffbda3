"""`log_to_tensorboard` writes a record as scalars and the run so far as figures."""

from __future__ import annotations

from typing import Any, Protocol

from fisherfast.integrations.scalars import scalars
from fisherfast.results.plots import plot_flows
from fisherfast.training import EpochRecord, FisherMonitor
from fisherfast.training.plots import measured_flows


class Writer(Protocol):
    """The methods of a `SummaryWriter` that are used."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int) -> Any: ...
    def add_figure(self, tag: str, figure: Any, global_step: int) -> Any: ...


def log_to_tensorboard(
    writer: Writer,
    source: EpochRecord | FisherMonitor,
    prefix: str = "fisher",
    *,
    figures: bool = True,
) -> None:
    """Write the results of a monitor after an epoch, with the epoch as step.

    Scalars are J and J / J_input of each layer ("fisher/J/fc1", "fisher/fraction/fc1"), errors in
    units of the Cramer-Rao bound ("fisher/train_level", "fisher/val_level"), "fisher/transmission",
    "fisher/overfitting" and the live trend ("fisher/live/fc1"); unknown values are left out.
    Figures are "fisher/training" (`FisherMonitor.plot`) and "fisher/flow", J / J_input
    against the layers with a line per epoch (twelve at most).

    Args:
        writer: a `torch.utils.tensorboard.SummaryWriter`, that of tensorboardX, or any object with
            their `add_scalar` and `add_figure`.
        source: a monitor, for the scalars of its last record and figures of all of them; or one
            record, for its scalars alone.
        prefix: of all tags; "" for none.
        figures: draw them (needs matplotlib).

    Raises:
        TypeError: source is neither a monitor nor a record, or the writer lacks a method.
        ValueError: the monitor has no record yet.
        ImportError: figures without matplotlib.

    Cost: a few milliseconds for scalars, under a second for figures.

    Example:
        >>> import torch, fisherfast as ff
        >>> from fisherfast.integrations.tensorboard import log_to_tensorboard
        >>> class Printer:
        ...     def add_scalar(self, tag, scalar_value, global_step):
        ...         print(global_step, tag)
        >>> x = torch.randn(2, 1000, 4)
        >>> data = ff.FiniteDifference(x[0] - 0.1, x[1] + 0.1, dtheta=0.2)
        >>> record = ff.FisherMonitor(torch.nn.Linear(4, 1), data).step(epoch=7)
        >>> log_to_tensorboard(Printer(), record)
        7 fisher/transmission
        7 fisher/J/input
        7 fisher/fraction/input
        7 fisher/J/output
        7 fisher/fraction/output
    """
    record = _last(source)
    drawn = figures and isinstance(source, FisherMonitor)
    for method in ("add_scalar", "add_figure")[: 1 + drawn]:
        if not callable(getattr(writer, method, None)):
            hint = "; or pass figures=False" if method == "add_figure" else ""
            raise TypeError(
                f"writer must have a method {method}, as a SummaryWriter, got"
                f" {type(writer).__name__}{hint}"
            )
    path = f"{prefix}/" if prefix else ""
    for name, value in scalars(record).items():
        writer.add_scalar(f"{path}{name}", value, global_step=record.epoch)
    if drawn and isinstance(source, FisherMonitor):
        for name, figure in _figures(source).items():
            writer.add_figure(f"{path}{name}", figure, global_step=record.epoch)


def _last(source: Any) -> EpochRecord:
    if isinstance(source, EpochRecord):
        return source
    if not isinstance(source, FisherMonitor):
        raise TypeError(
            f"source must be a FisherMonitor or an EpochRecord, got {type(source).__name__}"
        )
    if not source.history:
        raise ValueError("source must hold a record, got a monitor before its first step")
    return source.history[-1]


def _figures(monitor: FisherMonitor) -> dict[str, Any]:
    """Draw errors and transmission over epochs, and the flow of each epoch over layers."""
    figures = {"training": monitor.plot().figure}
    flows = measured_flows(monitor.history)
    if flows:
        figures["flow"] = plot_flows(flows, fraction=True, title="epoch").figure
    return figures
