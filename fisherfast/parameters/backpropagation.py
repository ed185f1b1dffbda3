"""One batch forward, and any number of vectors at its outputs backward, layer by layer.

The forward pass leaves a tap behind each layer that has a rule: an identity whose backward pass
sees the gradient at the layer's output. `Backpropagation.visit` sends a vector back and calls a
visitor with (rule, x, g) for each layer, deepest first, while the gradient is there; nothing is
kept unless the visitor keeps it, and the gradients of the weights themselves are never computed.

Which parameters the taps answer for is read off autograd's graph: a parameter is covered when it
enters the graph exactly once, in a layer with a rule. All others (tied weights, layers called
twice, attention's own matrices, parameters used in expressions) get per-sample gradients one by one
(`rows.py`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast.parameters.layer_rules import rule_for
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.rows import per_sample_rows
from fisherfast.parameters.rules import Rows, Rule
from fisherfast.unwrap import as_written

__all__ = ["Backpropagation", "Visitor", "samples_apart"]

Visitor = Callable[[Rule, Tensor, Tensor], None]
"""Called with a rule, its input x [n, ...] and the gradients g [n, ...] at its output."""


@dataclass
class _Call:
    """One call of a layer in the forward pass."""

    rule: Rule
    arrived: Callable[[_Call, Tensor, Tensor], None] | None = None


class _Tap(torch.autograd.Function):
    """The identity. What comes after may overwrite the output in place: the layers that have taps
    do not keep theirs."""

    @staticmethod
    def forward(ctx: Any, output: Tensor, anchor: Tensor, x: Tensor, call: _Call) -> Tensor:
        ctx.call = call
        ctx.save_for_backward(x)  # autograd then tells when it was overwritten
        return output.data

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor, None, None, None]:
        (x,) = ctx.saved_tensors
        if ctx.call.arrived is not None:
            ctx.call.arrived(ctx.call, x, g)
        return g, None, None, None


class Backpropagation:
    """A batch that has gone forward.

    Attributes:
        outputs: f [n, ...], without gradient.
        samples: n.
        layers: how each parameter is measured: "rule" or "rows", by name.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ParameterLayout,
        inputs: Tensor,
        apart: Container[str] | None = None,
    ) -> None:
        """Run the model forward; its mode, parameters, gradients and hooks stay as they are.

        Args:
            model: whose forward pass maps [n, ...] to [n, ...], each sample by itself.
            layout: the parameters measured.
            inputs: x [n, ...].
            apart: parameters in layers that keep the samples apart, from `samples_apart`; None
                trusts every layer.
        """
        self._model, self._layout, self._inputs = model, layout, inputs
        self._apart = layout.names if apart is None else apart
        self.samples = len(inputs)
        self._calls: list[_Call] = []
        self._anchor = torch.zeros((), device=inputs.device, requires_grad=True)
        with _undisturbed(), self._tapped():
            outputs = model(inputs)
        self._check_outputs(outputs)
        self._graph: Tensor = outputs
        self.outputs = outputs.detach()
        self._assign()

    def _check_outputs(self, outputs: Any) -> None:
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"model must return one tensor [n, ...], got {type(outputs).__name__}; wrap it in a"
                " module that returns what the likelihood reads"
            )
        if outputs.dim() < 1 or len(outputs) != self.samples:
            raise ValueError(
                f"model must return one row per sample ({self.samples}), got shape"
                f" {list(outputs.shape)}"
            )

    @contextlib.contextmanager
    def _tapped(self) -> Iterator[None]:
        """Taps behind every layer that has a rule, inside."""
        name_of = {}
        for name, parameter in self._model.named_parameters():
            if name in self._layout.names:
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
                    handles.append(
                        module.register_forward_hook(
                            self._hook(rule), prepend=True, with_kwargs=True
                        )
                    )
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, rule: Rule) -> Callable[..., Tensor | None]:
        def tap(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Tensor | None:
            x = args[0] if args else kwargs.get("input")
            if not isinstance(x, Tensor) or not torch.is_grad_enabled():
                return None
            call = _Call(rule)
            self._calls.append(call)
            return _Tap.apply(output, self._anchor, x.detach(), call)

        return tap

    def _assign(self) -> None:
        """Which parameters are covered by the taps, which need rows."""
        uses = _uses(self._graph)
        tapped = Counter(name for call in self._calls for name in call.rule.names)
        parameters = dict(self._model.named_parameters())
        covered = {
            name
            for name in self._layout.names
            if tapped[name] == 1 and uses[id(parameters[name])] == 1 and name in self._apart
        }
        # a layer is measured as a whole, or not by its tap at all
        self._calls = [call for call in self._calls if covered.issuperset(call.rule.names)]
        whole = {name for call in self._calls for name in call.rule.names}
        self._rows = tuple(name for name in self._layout.names if name not in whole)
        self.layers = {name: "rule" if name in whole else "rows" for name in self._layout.names}

    def look(self, vector: Tensor, arrived: Callable[[_Call, Tensor, Tensor], None]) -> None:
        """Send one vector back, and call `arrived` with each tapped call, its x and its g."""
        self._send(vector, arrived, last=False)

    def _send(
        self, vector: Tensor, arrived: Callable[[_Call, Tensor, Tensor], None], *, last: bool
    ) -> None:
        if not self._calls:
            return
        for call in self._calls:
            call.arrived = arrived
        try:
            with _undisturbed():
                torch.autograd.grad(
                    self._graph,
                    [self._anchor],
                    vector.to(self._graph.dtype),
                    retain_graph=not last,
                    allow_unused=True,
                )
        finally:
            for call in self._calls:  # in a circle nothing would be freed before the collector runs
                call.arrived = None

    def visit(self, vector: Tensor, visitor: Visitor, *, last: bool = False) -> None:
        """Send one vector [n, ...] at the outputs back and show every layer's gradients.

        Args:
            vector: what multiplies the outputs, in their shape.
            visitor: called with (rule, x, g) for each layer.
            last: nothing is sent back afterwards, so that autograd may drop its graph on the way.
        """

        def arrived(call: _Call, x: Tensor, g: Tensor) -> None:
            with torch.no_grad():
                visitor(call.rule, self._by_sample(x), self._by_sample(g))

        self._send(vector, arrived, last=last)
        if self._rows:
            rows = Rows(self._rows, [self._shape(name) for name in self._rows])
            with _undisturbed():
                g = per_sample_rows(self._model, self._rows, self._inputs, vector)
            with torch.no_grad():
                visitor(rows, self._inputs, g)

    def _by_sample(self, rows: Tensor) -> Tensor:
        """[n, ...]: rows that were folded into the batch (windows, time steps) become positions."""
        if len(rows) == self.samples:
            return rows
        return rows.reshape(self.samples, -1, *rows.shape[1:])

    def _shape(self, name: str) -> torch.Size:
        return self._layout.shapes[self._layout.names.index(name)]


EXAMINED = 3
"""Samples that `samples_apart` looks at: one that is alone in the batch, and one on each side."""


def samples_apart(model: nn.Module, layout: ParameterLayout, inputs: Tensor) -> frozenset[str]:
    """Parameters in layers whose rows are those of one sample after another.

    A layer may see [time, n, d], or windows of all samples mixed: its rows are then nobody's, and
    its parameters are measured sample by sample. Seen from the gradients of single samples.

    Raises:
        ValueError: the output of a sample depends on the others, or on chance.

    Cost: two forward passes and a backward pass of three samples.
    """
    few = inputs[[i % len(inputs) for i in range(EXAMINED)]]
    trial = Backpropagation(model, layout, few)
    with _undisturbed(), torch.no_grad():
        alone = model(few[1:2])
    _check_apart(trial.outputs[1:2], alone)
    apart: set[str] = set()

    def look(call: _Call, x: Tensor, g: Tensor) -> None:
        fold, rest = divmod(len(g), EXAMINED)
        if rest or len(x) != len(g) or (fold != 1 and not call.rule.folds):
            return
        others = g.reshape(EXAMINED, fold, -1)[[0, 2]]
        if not bool(others.any()):
            apart.update(call.rule.names)

    only_one = torch.zeros_like(trial.outputs)
    only_one[1] = torch.linspace(0.5, 1.5, only_one[1].numel()).reshape(only_one[1].shape)
    trial.look(only_one, look)
    return frozenset(apart)


def _check_apart(among_others: Tensor, alone: Tensor) -> None:
    """Raise ValueError unless a sample's outputs are the same alone as in a batch."""
    scale = among_others.abs().max()
    rounding = 100 * torch.finfo(among_others.dtype).eps ** 0.5  # of sums in another order
    if among_others.shape != alone.shape or bool(
        (among_others - alone).abs().max() > rounding * scale
    ):
        raise ValueError(
            "model must treat every sample by itself and always alike: the output of a sample"
            " changed when it was alone in its batch; is it in training mode (batch norm, dropout)?"
            " Call model.eval()"
        )


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """Gradients on, whatever the caller's modes; autocast off: the Fisher matrix is that of the
    parameters in the precision they have."""
    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autocast("cpu", enabled=False),
        torch.autocast("cuda", enabled=False),
        as_written(),
    ):
        yield


def _uses(outputs: Tensor) -> Counter[int]:
    """How often each parameter (by id) enters the graph of the outputs."""
    uses: Counter[int] = Counter()
    seen, waiting = set(), [outputs.grad_fn]
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        for follower, _ in node.next_functions:
            variable = getattr(follower, "variable", None)
            if variable is not None:
                uses[id(variable)] += 1
            elif follower is not None:
                waiting.append(follower)
    return uses
