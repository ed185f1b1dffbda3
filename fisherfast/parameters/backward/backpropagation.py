"""One batch forward, and any number of vectors at its outputs backward, layer by layer.

The forward pass puts a tap after each layer that has a rule (`taps.py`). `Backpropagation.visit`
sends a vector back and calls a visitor with (rule, x, g) for each layer, deepest first, while the
gradient is in memory; only the visitor keeps anything, and the gradients of the weights themselves
are not computed.

A tap measures a parameter that enters autograd's graph exactly once, in a layer with a rule that
gives the gradients of single samples for a few of them (`layer_check.py`). All others (tied
weights, layers called twice, attention's own matrices, parameters used in expressions) get
per-sample gradients one by one (`per_sample.py`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast.data.inputs import Samples, joined, mapped
from fisherfast.model.default_device import on_host
from fisherfast.parameters.backward.per_sample import (
    NOT_VECTORISED,
    forward,
    one_by_one,
    vectorised,
)
from fisherfast.parameters.backward.taps import Call, parameter_uses, tap, undisturbed
from fisherfast.parameters.layers.base import Rows, Rule
from fisherfast.parameters.layers.linear import MatrixRule
from fisherfast.parameters.layers.registry import rule_for
from fisherfast.parameters.layout import ParameterLayout

Visitor = Callable[[Rule, Tensor, Tensor], None]
"""Called with a rule, its input x [n, ...] and the gradients g [n, ...] at its output."""


@dataclass(frozen=True)
class Apart:
    """How the layers of a network treat the samples of a batch, from `samples_apart`.

    Attributes:
        folds: rows per sample in the layer of each parameter that keeps the samples apart.
        vectorised: True if torch.func gives the gradients that autograd gives.
        shown: True if the samples tried differ and their gradients are not zero.
    """

    folds: Mapping[str, int] = field(default_factory=dict)
    vectorised: bool = True
    shown: bool = True


class Backpropagation:
    """A completed forward pass, ready for backward.

    Attributes:
        inputs: x [n, ...].
        outputs: f [n, ...], without gradient.
        samples: n.
        calls: of layers that are measured by their rule.
        unused: parameters that do not enter the graph.
        layers: how each parameter is measured: "rule", "rows", or "unused", by name.
        matrices_without_tap: parameters of linear and convolution layers that are measured by rows.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ParameterLayout,
        inputs: Samples,
        apart: Apart | None = None,
    ) -> None:
        """Run the model forward; its mode, parameters, gradients and hooks stay as they are.

        Args:
            model: whose forward pass maps [n, ...] to [n, ...], each sample by itself.
            layout: the parameters measured.
            inputs: x [n, ...].
            apart: from `samples_apart`; None trusts every layer.
        """
        self._model, self._layout, self._apart = model, layout, apart
        self._shape = dict(zip(layout.names, layout.shapes, strict=True))
        self.samples = len(inputs)
        self.calls: list[Call] = []
        with undisturbed(model):
            # a tensor made under inference_mode has no gradients anywhere
            self.inputs = mapped(inputs, lambda x: x.clone() if x.is_inference() else x.detach())
            self._anchor = torch.zeros((), device=inputs.device, requires_grad=True)
            with self._tapped():
                outputs = forward(model, self.inputs)
        self._check_outputs(outputs)
        self._graph: Tensor | None = outputs
        self.outputs = outputs.detach()
        self._assign(parameter_uses(outputs))

    def _check_outputs(self, outputs: Any) -> None:
        if not isinstance(outputs, Tensor):
            raise TypeError(
                "model must return one floating tensor [n, ...], alone or in an object, got"
                f" {type(outputs).__name__}; wrap it in a module that returns what the likelihood"
                " reads"
            )
        if not outputs.is_floating_point():
            raise TypeError(f"outputs of the model must be real and floating, got {outputs.dtype}")
        if outputs.dim() < 1 or len(outputs) != self.samples:
            raise ValueError(
                f"model must return one row per sample ({self.samples}), got shape"
                f" {list(outputs.shape)}"
            )
        if self.samples and not outputs.numel():
            raise ValueError(
                f"model must return at least one number per sample, got shape {list(outputs.shape)}"
            )

    @contextlib.contextmanager
    def _tapped(self) -> Iterator[None]:
        """A context with taps after every layer that has a rule."""
        name_of = {}
        for name, parameter in self._model.named_parameters():
            if name in self._shape:
                name_of[id(parameter)] = name
        handles = []
        try:
            for module in self._model.modules():
                own = {
                    attribute: name_of[id(parameter)]
                    for attribute, parameter in module._parameters.items()
                    if parameter is not None and id(parameter) in name_of
                }
                rule = rule_for(module, own) if own else None
                if rule is not None:
                    handles.append(tap(module, rule, self._anchor, self.calls.append))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _assign(self, uses: Counter[int]) -> None:
        """Assign each parameter: measured by a tap, by rows, or not used."""
        tapped = Counter(name for call in self.calls for name in call.rule.names)
        parameters = dict(self._model.named_parameters())
        use = {name: uses[id(parameters[name])] for name in self._layout.names}
        matrices = [call.rule for call in self.calls if isinstance(call.rule, MatrixRule)]
        # a layer is measured as a whole, or not by its tap at all
        self.calls = [
            call
            for call in self.calls
            if all(tapped[name] == use[name] == 1 for name in call.rule.names)
            and self._keeps_apart(call)
        ]
        whole = {name for call in self.calls for name in call.rule.names}
        self._rows = tuple(name for name in use if use[name] and name not in whole)
        in_matrices = {name for rule in matrices for name in rule.names}
        self.matrices_without_tap = tuple(name for name in self._rows if name in in_matrices)
        self.unused = tuple(name for name in use if not use[name])
        self.layers = {
            name: "rule" if name in whole else "rows" if use[name] else "unused" for name in use
        }

    def _keeps_apart(self, call: Call) -> bool:
        """True if the rows of this call are those of one sample after another."""
        fold, rest = divmod(call.rows, self.samples)
        if rest or fold < 1 or (fold > 1 and not call.rule.folds):
            return False
        if self._apart is None:
            return True
        return all(self._apart.folds.get(name) == fold for name in call.rule.names)

    def visit(self, vector: Tensor, visitor: Visitor, *, last: bool = False) -> None:
        """Send one vector [n, ...] at the outputs back; give every layer's gradients to a visitor.

        Args:
            vector: what multiplies the outputs, in their shape.
            visitor: called with (rule, x, g) for each layer.
            last: no other vector follows, so that autograd may free its graph.
        """
        vector = vector.to(self.outputs.dtype)
        left = {name for call in self.calls for name in call.rule.names}.union(self._rows)

        def arrived(rule: Rule, x: Tensor, g: Tensor) -> None:
            left.difference_update(rule.names)
            with torch.no_grad(), on_host():
                visitor(rule, x, g)

        self.send(vector, arrived, last=last)
        names = tuple(name for name in self._layout.names if name in left)
        if names:
            self._show(names, self._per_sample(names, vector), visitor)
        if self.unused:
            size = sum(self._shape[name].numel() for name in self.unused)
            self._show(self.unused, vector.new_zeros(1, 1).expand(len(vector), size), visitor)

    def send(self, vector: Tensor, visitor: Visitor, *, last: bool) -> None:
        """Send one vector back to the layers that are measured by their rule."""

        def arrived(call: Call, x: Tensor, g: Tensor) -> None:
            visitor(call.rule, self._by_sample(x), self._by_sample(g))

        if not self.calls:
            return
        if self._graph is None:
            raise RuntimeError("last must be set for the last vector only, got one after it")
        for call in self.calls:
            call.arrived, call.last = arrived, last
        try:
            with undisturbed(self._model):
                torch.autograd.grad(
                    self._graph, [self._anchor], vector, retain_graph=not last, allow_unused=True
                )
        finally:
            for call in self.calls:
                call.arrived = None  # break the reference cycle
        if last:
            self._graph = None

    def _per_sample(self, names: Sequence[str], vector: Tensor) -> Tensor:
        with undisturbed(self._model):
            if self._apart is None or self._apart.vectorised:
                with contextlib.suppress(*NOT_VECTORISED):
                    return vectorised(self._model, names, self.inputs, vector)
            return one_by_one(self._model, names, self.inputs, vector)

    def _show(self, names: Sequence[str], gradients: Tensor, visitor: Visitor) -> None:
        with torch.no_grad():
            rule = Rows(names, [self._shape[name] for name in names])
            visitor(rule, joined(self.inputs), gradients)

    def _by_sample(self, rows: Tensor) -> Tensor:
        """[n, ...]: rows that were folded into the batch (windows, time steps) become positions."""
        if len(rows) == self.samples:
            return rows
        return rows.reshape(self.samples, -1, *rows.shape[1:])
