"""What the loss would rise by if a parameter, a unit or a layer were set to zero."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fisherfast.model.unwrap import unwrapped
from fisherfast.parameters.analysis.figures import plot_importance
from fisherfast.parameters.analysis.gates import GateSums
from fisherfast.parameters.backward.batches import Data
from fisherfast.parameters.backward.columns import FisherType
from fisherfast.parameters.checks import check_choice, check_model, check_number
from fisherfast.parameters.fisher import fisher as measure
from fisherfast.parameters.fisher import over_data
from fisherfast.parameters.layout import ParameterLayout, Selection
from fisherfast.parameters.likelihoods import Likelihood
from fisherfast.parameters.structures.base import ParameterFisher, check_fisher

if TYPE_CHECKING:
    from matplotlib.axes import Axes

__all__ = ["Importance", "Per", "importance"]

Per = Literal["parameter", "unit", "layer"]

MOST_ROWS = 40
"""Of a printed table; the rest is counted."""


@dataclass(frozen=True, eq=False, repr=False)
class Importance:
    """Importance by name: ``importance["fc1.weight"]`` per parameter, ``importance["fc1"]`` per
    unit or layer. The name of what belongs to the model itself, and to no module in it, is "".

    Attributes:
        per: "parameter", "unit" or "layer".
        values: float64 in nats, the expected rise of the loss. Per parameter one tensor of its
            shape; per unit one [units]; per layer one number [].
        fisher: float64 in the same shapes. Per parameter the diagonal of the Fisher matrix, in
            1 / w^2: importance = fisher w^2 / 2. Per unit and layer the information about a gate
            that multiplies its parameters, without unit: importance = fisher / 2.
        samples: how many it was averaged over.
        fisher_type: "exact", "mc" or "empirical".
    """

    per: Per
    values: dict[str, Tensor]
    fisher: dict[str, Tensor]
    samples: int
    fisher_type: FisherType

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.values:
            raise KeyError(f"name must be one of {list(self.values)[:8]}, got {name!r}")
        return self.values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.values)

    def __len__(self) -> int:
        return len(self.values)

    def __contains__(self, name: object) -> bool:
        return name in self.values

    def least(self, fraction: float) -> dict[str, Tensor]:
        """Masks of the least important ones over the whole network, in the shapes of `values`.

        Args:
            fraction: of all parameters, units or layers; their number is rounded to the nearest,
                and among equals the first are taken.

        Raises:
            ValueError: the fraction is not in [0, 1].
        """
        check_number("fraction", fraction)
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction must lie in [0, 1], got {fraction}")
        flat = torch.cat([value.reshape(-1) for value in self.values.values()])
        chosen = torch.zeros(len(flat), dtype=torch.bool, device=flat.device)
        chosen[flat.argsort(stable=True)[: round(fraction * len(flat))]] = True
        parts = chosen.split([value.numel() for value in self.values.values()])
        return {
            name: part.reshape(value.shape)
            for (name, value), part in zip(self.values.items(), parts, strict=True)
        }

    def __repr__(self) -> str:
        """A table: entries, sum, median and largest importance of each name."""
        rows = [(name or "(model)", *_summary(value)) for name, value in list(self.values.items())][
            :MOST_ROWS
        ]
        width = max([len(row[0]) for row in rows] + [4])
        kind = "" if self.fisher_type == "exact" else f", {self.fisher_type}"
        lines = [
            f"importance per {self.per} in nats ({self.samples} samples{kind})",
            f"{'name':<{width}} {'number':>9} {'sum':>10} {'median':>10} {'largest':>10}",
        ]
        lines += [
            f"{name:<{width}} {number:>9} {total:>10.3g} {median:>10.3g} {largest:>10.3g}"
            for name, number, total, median, largest in rows
        ]
        if len(self.values) > MOST_ROWS:
            lines.append(f"... and {len(self.values) - MOST_ROWS} more")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        """Numbers by name, for JSON."""
        return {
            "per": self.per,
            "samples": self.samples,
            "fisher_type": self.fisher_type,
            "values": {name: value.tolist() for name, value in self.values.items()},
            "fisher": {name: value.tolist() for name, value in self.fisher.items()},
        }

    def plot(self, axes: tuple[Axes, Axes] | None = None) -> tuple[Axes, Axes]:
        """How much each layer holds, and how unequal its members are; see `plot_importance`."""
        return plot_importance(self.values, self.per, axes)


def _summary(value: Tensor) -> tuple[int, float, float, float]:
    if not value.numel():
        return 0, 0.0, float("nan"), float("nan")
    return value.numel(), float(value.sum()), float(value.median()), float(value.max())


def importance(
    model: nn.Module,
    likelihood: Likelihood | None = None,
    data: Data | None = None,
    *,
    per: Per = "parameter",
    fisher: ParameterFisher | None = None,
    fisher_type: FisherType = "exact",
    samples: int = 1,
    parameters: Selection = None,
    batch_size: int = 256,
    seed: int = 0,
    progress: bool = False,
) -> Importance:
    """The rise of the loss -log p(y | x, w), in nats per sample, expected when parameters are set
    to zero, to second order about a trained network:

        parameter i     1/2 F_ii w_i^2
        unit, layer S   1/2 w_S^T F_SS w_S = 1/2 E[(sum_{j in S} s_j w_j)^2],  s = d log p / dw

    The first-order term is zero where training has converged, and the Hessian of the loss is the
    Fisher matrix F where the network fits its labels. Per unit and layer all pairs of parameters
    inside are in the sum, exactly; what two units do together is not, so that removing several may
    cost more or less than the sum of their importances. A rise of several nats is far outside of
    where a second order holds: take the order, not the number.

    A unit is an entry of the leading dimension of a module's weight with that of its bias: an
    output unit of a linear layer, an output channel of a convolution (of a transposed one too), a
    channel of a norm, a row of an embedding, a row of each matrix of a recurrent or attention
    layer. A layer is a module with the parameters of its own. Setting a unit to zero makes its
    *output* zero, before any norm that follows. A norm hides the scale of what it normalises: a
    layer, or a channel that is normalised by itself, has no importance in front of one to any order
    in its scale, and yet it cannot be left out; ask for the norm's own instead.

    Args:
        model: trained, in eval mode, [n, ...] to [n, ...]; left as it is.
        likelihood: p(y | f) of the outputs f.
        data: inputs x [n, ...], or with labels, as `fisher` takes them.
        per: "parameter", "unit" or "layer".
        fisher: a Fisher matrix of the model measured already, in place of likelihood and data; per
            parameter only, of any structure.
        fisher_type, samples, parameters, batch_size, seed, progress: as of `fisher`. A unit or
            layer has those of its parameters that are chosen.

    Returns:
        `Importance`, float64.

    Raises:
        ValueError: an unknown ``per``, neither or both of data and fisher, a fisher of another
            network, and whatever `fisher` raises.

    Cost: that of `fisher` with structure "diag"; per unit and layer one product of each layer's
    outputs and gradients in place of its squared gradients, for layers that apply their parameters
    linearly.

    References: LeCun, Denker, Solla, NIPS 2 (1990), eq. 5 (parameters); Theis et al., "Faster gaze
    prediction with dense networks and Fisher pruning" (2018), eq. 7 (gates on units); Molchanov et
    al., CVPR 2019 (sums over a unit inside the square).

    Example:
        >>> import torch, fisherfast as ff
        >>> from torch import nn
        >>> model, x = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), torch.randn(9, 4)
        >>> found = ff.parameters.importance(model, ff.parameters.Categorical(), x, per="unit")
        >>> found["0"].shape
        torch.Size([8])
        >>> int(found.least(0.25)["0"].sum() + found.least(0.25)["2"].sum())  # of 8 + 3 units
        3
    """
    check_choice("per", per, ("parameter", "unit", "layer"))
    if fisher is not None:
        if likelihood is not None or data is not None:
            raise ValueError("fisher must be given alone, got likelihood or data as well")
        if per != "parameter":
            raise ValueError(
                f'fisher must be left out for per="{per}", got one: units and layers need the sums'
                " inside of each sample; give likelihood and data"
            )
        return _per_parameter(unwrapped(model), fisher)
    if likelihood is None or data is None:
        raise ValueError("likelihood and data must be given, or fisher, got neither")
    settings: dict[str, Any] = {
        "fisher_type": fisher_type,
        "samples": samples,
        "parameters": parameters,
        "batch_size": batch_size,
        "seed": seed,
        "progress": progress,
    }
    if per == "parameter":
        return _per_parameter(unwrapped(model), measure(model, likelihood, data, **settings))

    def make(model: nn.Module, layout: ParameterLayout) -> GateSums:
        return GateSums(model, layout, by_unit=per == "unit")

    gates, seen = over_data(make, model, likelihood, data, **settings)
    halves = {name: value / 2 for name, value in gates.items()}
    return Importance(per, halves, gates, seen, fisher_type)


def _per_parameter(model: nn.Module, fisher: ParameterFisher) -> Importance:
    check_model(model)
    check_fisher(fisher)
    every = dict(model.named_parameters())
    fisher.layout.check_same(ParameterLayout.of(model, list(fisher.layout.names)), "fisher")
    diagonal = fisher.layout.unflatten(fisher.diag())
    values = {
        name: 0.5 * each * every[name].detach().to(each).square() for name, each in diagonal.items()
    }
    return Importance("parameter", values, diagonal, fisher.samples, fisher.fisher_type)
