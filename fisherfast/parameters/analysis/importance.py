"""The rise of the loss expected when a parameter, a unit or a layer is set to zero.

For units and layers it follows from the Fisher information about a gate that multiplies all
parameters of one. With a gate z, at 1, on the parameters w_S of a unit or layer S, the score about
z is

    d log p(y | x, w_S z) / dz = sum_{j in S} s_j w_j,     s = d log p(y | x, w) / dw

For a layer that applies its parameters linearly that sum is, unit by unit, sum_t g_t y_t over the
positions t, with y the layer's output and g the gradient there: no per-sample gradient is built.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from fisherfast.parameters.analysis.figures import plot_importance
from fisherfast.parameters.backward.columns import FisherType, Source, Sweep
from fisherfast.parameters.checks import check_number
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layers.embedding import Embedding
from fisherfast.parameters.layers.linear import MatrixRule
from fisherfast.parameters.layout import ParameterLayout, module_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes

Per = Literal["parameter", "unit", "layer"]

MOST_ROWS = 40
"""Rows of a printed table; the rest is counted."""


@dataclass(frozen=True, eq=False, repr=False)
class Importance:
    """Importance by name: ``importance["fc1.weight"]`` per parameter, ``importance["fc1"]`` per
    unit or layer. Parameters of the model itself, of no module in it, have the name "".

    It is the rise of the loss -log p(y | x, w), in nats per sample, expected when parameters are
    set to zero, to second order about a trained network:

        parameter i     1/2 F_ii w_i^2
        unit, layer S   1/2 w_S^T F_SS w_S = 1/2 E[(sum_{j in S} s_j w_j)^2],  s = d log p / dw

    The first-order term is zero where training has converged, and the Hessian of the loss is the
    Fisher matrix F where the network fits its labels. Per unit and layer all pairs of parameters
    inside are in the sum, exactly; the joint effect of two units is not, so that removing several
    may cost more or less than the sum of their importances. A rise of several nats is far outside
    the range of a second order: take the order, not the number.

    A unit is an entry of the leading dimension of a module's weight with that of its bias: an
    output unit of a linear layer, an output channel of a convolution (a transposed one too), a
    channel of a norm, a row of an embedding, a row of each matrix of a recurrent or attention
    layer. A layer is a module with the parameters of its own. Both have those of their parameters
    that F is measured for. Setting a unit to zero makes its *output* zero, before any norm that
    follows. A norm hides the scale of what it normalises: a layer, or a channel that is normalised
    by itself, has no importance before one to any order in its scale, and yet the network needs it;
    ask for the norm's own instead.

    Attributes:
        per: "parameter", "unit" or "layer".
        values: float64 in nats, the expected rise of the loss. Per parameter one tensor of its
            shape; per unit one [units]; per layer one number [].
        fisher: float64 in the same shapes. Per parameter the diagonal of the Fisher matrix, in
            1 / w^2: importance = fisher w^2 / 2. Per unit and layer the information about a gate
            that multiplies its parameters, without unit: importance = fisher / 2.
        samples: how many it was averaged over.
        fisher_type: "exact", "mc" or "empirical".

    References: LeCun, Denker, Solla, NIPS 2 (1990), eq. 5 (parameters); Theis et al., "Faster gaze
    prediction with dense networks and Fisher pruning" (2018), eq. 7 (gates on units); Molchanov et
    al., CVPR 2019 (sums over a unit inside the square).
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
        """Importance of each layer, and how unequal its members are; see `plot_importance`."""
        return plot_importance(self.values, self.per, axes)


def _summary(value: Tensor) -> tuple[int, float, float, float]:
    if not value.numel():
        return 0, 0.0, float("nan"), float("nan")
    return value.numel(), float(value.sum()), float(value.median()), float(value.max())


def importance(source: Source, per: Per, diagonal: Tensor, samples: int) -> Importance:
    """Importance of what a Fisher matrix was measured from, see `ParameterFisher.importance`.

    Args:
        source: network and data.
        per: "parameter", "unit" or "layer".
        diagonal: of the matrix, [P].
        samples: n.
    """
    source.check_unchanged()
    if per == "parameter":
        every = dict(source.model.named_parameters())
        fisher = source.layout.unflatten(diagonal)
        values = {
            name: 0.5 * each * every[name].detach().to(each).square()
            for name, each in fisher.items()
        }
    else:
        gates = _GateSums(source.model, source.layout, by_unit=per == "unit")
        source.read_again(gates.add, samples)
        fisher = {label: total / samples for label, total in gates.sums.items()}
        values = {name: value / 2 for name, value in fisher.items()}
    return Importance(per, values, fisher, samples, source.fisher_type)


TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

WITHOUT_A_NAME = ("weight", "bias", "orig")
"""Parts of a name that do not distinguish the matrices of a module; pruning renames a masked weight
`weight_orig`."""


@dataclass(frozen=True)
class _Unit:
    """Where the parameters of a group of units are: `names` belong to one module, and entry u of
    the axis of units of each of them belongs to unit u."""

    label: str
    layer: str
    names: tuple[str, ...]


class _GateSums:
    """Sums over samples and columns of the squared scores about gates.

    A unit is one entry of the leading dimension of a module's weight, with its entry of the bias:
    an output unit of a linear layer, an output channel of a convolution, a channel of a norm, a row
    of an embedding. A layer is a module with all parameters of its own.

    Attributes:
        sums: float64, [units] by name of the units, or [] by layer.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, *, by_unit: bool) -> None:
        self._by_unit = by_unit
        every = dict(model.named_parameters())
        self._weights = {name: every[name].detach() for name in layout.names}
        self._owners = {name: model.get_submodule(module_of(name)) for name in layout.names}
        self._units = _units(layout, self._owners)
        labels = [unit.label if by_unit else unit.layer for unit in self._units]
        self.sums: dict[str, Any] = dict.fromkeys(labels, 0.0)
        self._outputs: dict[Rule, Tensor] = {}

    def add(self, sweep: Sweep) -> None:
        """Add one batch."""
        self._outputs = {}
        sweep.visit(self._take)
        self._outputs = {}

    def _take(self, column: int, rule: Rule, x: Tensor, g: Tensor) -> None:
        gates: dict[str, Any] = defaultdict(float)
        for unit, scores in self._scores(rule, x, g).items():
            if self._by_unit:
                gates[unit.label] = scores
            else:
                gates[unit.layer] += scores.sum(1)
        for label, scores in gates.items():
            self.sums[label] += scores.double().square().sum(0)

    def _scores(self, rule: Rule, x: Tensor, g: Tensor) -> dict[_Unit, Tensor]:
        """The scores about the gates of all units, [n, units]."""
        here = [unit for unit in self._units if set(unit.names) & set(rule.names)]
        if isinstance(rule, MatrixRule):
            if rule not in self._outputs:
                own = [self._weights[name].to(x.dtype) for name in rule.names]
                self._outputs[rule] = rule.applied(x, own)
            shared = g * self._outputs[rule]
            axis = -1 if isinstance(rule.module, nn.Linear) else 1
            return {here[0]: _summed(shared.movedim(axis, 1))}
        if isinstance(rule, Embedding):
            return {here[0]: _rows_of_table(rule, x, g, self._weights[rule.names[0]])}
        gradients = dict(zip(rule.names, rule.gradients(x, g), strict=True))
        return {
            unit: torch.stack(
                [
                    _summed(_units_first(self._owners[name], gradients[name] * self._weights[name]))
                    for name in unit.names
                    if name in gradients  # a bias that is never used comes by itself
                ]
            ).sum(0)
            for unit in here
        }


def _units(layout: ParameterLayout, owners: Mapping[str, nn.Module]) -> list[_Unit]:
    """Groups of units: a weight with the bias of the same name and size, in the same module."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        layer, attribute = module_of(name), name.rpartition(".")[2]
        count = _units_first(owners[name], torch.empty(1, *shape, device="meta")).shape[1]
        rest = "_".join(part for part in attribute.split("_") if part not in WITHOUT_A_NAME)
        groups.setdefault((layer, rest, count), []).append(name)
    found: list[_Unit] = []
    for (layer, rest, _), names in groups.items():
        label = f"{layer}.{rest}".strip(".")
        if any(unit.label == label for unit in found):
            label = names[0]
        found.append(_Unit(label, layer, tuple(names)))
    return found


def _summed(scores: Tensor) -> Tensor:
    """[n, units] of [n, units, ...]."""
    return scores.reshape(*scores.shape[:2], -1).sum(2)


def _units_first(module: nn.Module, rows: Tensor) -> Tensor:
    """[n, units, ...] of [n, *shape]."""
    if rows.dim() == 1:
        return rows[:, None]
    if isinstance(module, TRANSPOSED) and rows.dim() > 2:  # weight [inputs, outputs / groups, ...]
        grouped = rows.reshape(len(rows), module.groups, -1, *rows.shape[2:]).transpose(2, 3)
        return grouped.flatten(1, 2)
    return rows


def _rows_of_table(rule: Embedding, x: Tensor, g: Tensor, table: Tensor) -> Tensor:
    """Scores of an embedding's rows, [n, rows]; the padding row has none."""
    index = x.reshape(len(x), -1)
    scores = (g.reshape(*index.shape, -1) * table[index]).sum(-1)
    if rule.module.padding_idx is not None:
        scores = scores * (index != rule.module.padding_idx)
    return scores.new_zeros(len(x), len(table)).scatter_add_(1, index, scores)
