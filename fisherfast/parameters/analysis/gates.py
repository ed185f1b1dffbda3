"""Units and layers as wholes: the Fisher information about a gate that multiplies all parameters of
one.

With a gate z, at 1, on the parameters w_S of a unit or layer S, the score about z is

    d log p(y | x, w_S z) / dz = sum_{j in S} s_j w_j,     s = d log p(y | x, w) / dw

For a layer that applies its parameters linearly that sum is, unit by unit, sum_t g_t y_t over the
positions t, with y the layer's output and g the gradient there: no per-sample gradient is built.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fisherfast.parameters.backward.columns import Sweep
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layers.embedding import Embedding
from fisherfast.parameters.layers.linear import MatrixRule
from fisherfast.parameters.layout import ParameterLayout

__all__ = ["GateSums"]

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)

WITHOUT_A_NAME = ("weight", "bias", "orig")
"""What does not tell matrices of a module apart; pruning calls what it masks `weight_orig`."""


@dataclass(frozen=True)
class _Unit:
    """Where the parameters of a group of units are: `names` belong to one module, and entry u of
    the axis of units of each of them belongs to unit u."""

    label: str
    layer: str
    names: tuple[str, ...]


class GateSums:
    """Sums over samples and columns of the squared scores about gates.

    A unit is one entry of the leading dimension of a module's weight, with its entry of the bias:
    an output unit of a linear layer, an output channel of a convolution, a channel of a norm, a row
    of an embedding. A layer is a module with all parameters of its own.
    """

    def __init__(self, model: nn.Module, layout: ParameterLayout, *, by_unit: bool) -> None:
        self._by_unit = by_unit
        every = dict(model.named_parameters())
        self._weights = {name: every[name].detach() for name in layout.names}
        self._owners = {name: model.get_submodule(_split(name)[0]) for name in layout.names}
        self._units = _units(layout, self._owners)
        labels = [unit.label if by_unit else unit.layer for unit in self._units]
        self._sums: dict[str, Tensor] = dict.fromkeys(labels, torch.empty(0))
        self._outputs: dict[Rule, Tensor] = {}

    def add(self, sweep: Sweep) -> None:
        """Take one batch in."""
        self._outputs = {}
        sweep.visit(self._take)
        self._outputs = {}

    def result(self, samples: int) -> tuple[dict[str, Tensor], int]:
        """Information about the gates, float64: [units] by name of the units, or [] by layer; and
        how many samples it was averaged over."""
        return {label: total / samples for label, total in self._sums.items()}, samples

    def _take(self, column: int, rule: Rule, x: Tensor, g: Tensor) -> None:
        found = self._scores(rule, x, g)
        if not self._by_unit:
            layers: dict[str, Tensor] = {}
            for unit, scores in found.items():
                total = scores.sum(1)
                layers[unit.layer] = layers[unit.layer] + total if unit.layer in layers else total
            squares = {layer: total.double().square().sum() for layer, total in layers.items()}
        else:
            squares = {unit.label: each.double().square().sum(0) for unit, each in found.items()}
        for label, value in squares.items():
            known = self._sums[label]
            self._sums[label] = known + value if known.numel() else value

    def _scores(self, rule: Rule, x: Tensor, g: Tensor) -> dict[_Unit, Tensor]:
        """The scores about the gates of all units, [n, units]."""
        here = [unit for unit in self._units if set(unit.names) & set(rule.names)]
        if isinstance(rule, MatrixRule):
            if rule not in self._outputs:
                self._outputs[rule] = _output(rule, x)
            shared = g * self._outputs[rule]
            return {here[0]: _summed(shared.movedim(_unit_axis(rule.module), 1))}
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


def _split(name: str) -> tuple[str, str]:
    """Module and attribute of a parameter."""
    module, _, attribute = name.rpartition(".")
    return module, attribute


def _units(layout: ParameterLayout, owners: Mapping[str, nn.Module]) -> list[_Unit]:
    """Groups of units: a weight with the bias of the same name and size, in the same module."""
    groups: dict[tuple[str, str, int], list[str]] = {}
    for name, shape in zip(layout.names, layout.shapes, strict=True):
        layer, attribute = _split(name)
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


def _unit_axis(module: nn.Module) -> int:
    """Of a linear or convolution layer's output."""
    return -1 if isinstance(module, nn.Linear) else 1


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


def _output(rule: MatrixRule, x: Tensor) -> Tensor:
    """What the measured parameters of a linear or convolution layer put out."""
    module = rule.module
    y = type(module).forward(module, x)
    bias = module.bias
    if bias is None:
        return y
    assert isinstance(bias, Tensor)
    shape = [1] * y.dim()
    shape[_unit_axis(module)] = -1
    offset = bias.detach().reshape(shape)
    if "weight" not in rule.attributes:
        return offset.expand_as(y)
    return y if "bias" in rule.attributes else y - offset


def _rows_of_table(rule: Embedding, x: Tensor, g: Tensor, table: Tensor) -> Tensor:
    """Scores of an embedding's rows, [n, rows]; the padding row has none."""
    index = x.reshape(len(x), -1)
    scores = (g.reshape(*index.shape, -1) * table[index]).sum(-1)
    if rule.module.padding_idx is not None:
        scores = scores * (index != rule.module.padding_idx)
    return scores.new_zeros(len(x), len(table)).scatter_add_(1, index, scores)
