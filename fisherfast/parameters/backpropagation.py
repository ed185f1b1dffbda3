"""One batch forward, and any number of vectors at its outputs backward, layer by layer.

The forward pass leaves a tap behind each layer that has a rule (`tapping.py`). `Backpropagation
.visit` sends a vector back and calls a visitor with (rule, x, g) for each layer, deepest first,
while the gradient is there; nothing is kept unless the visitor keeps it, and the gradients of the
weights themselves are never computed.

Which parameters the taps answer for is read off autograd's graph: a parameter is covered when it
enters the graph exactly once, in a layer with a rule, and when that rule has given the gradients of
single samples for a few of them (`samples_apart`). All others (tied weights, layers called twice,
attention's own matrices, parameters used in expressions) get per-sample gradients one by one
(`rows.py`).
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast.parameters.layer_rules import MatrixRule, rule_for
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.rows import alone, one_by_one, swapping, vectorised
from fisherfast.parameters.rules import Rows, Rule
from fisherfast.parameters.tapping import Call, parameter_uses, tap, undisturbed

__all__ = ["Apart", "Backpropagation", "Visitor", "samples_apart"]

Visitor = Callable[[Rule, Tensor, Tensor], None]
"""Called with a rule, its input x [n, ...] and the gradients g [n, ...] at its output."""


@dataclass(frozen=True)
class Apart:
    """What is known of the samples in a network; see `samples_apart`.

    Attributes:
        folds: rows per sample in the layer of each parameter that keeps the samples apart.
        vectorised: whether torch.func gives the gradients that autograd gives.
    """

    folds: Mapping[str, int] = field(default_factory=dict)
    vectorised: bool = True


class Backpropagation:
    """A batch that has gone forward.

    Attributes:
        outputs: f [n, ...], without gradient.
        samples: n.
        layers: how each parameter is measured: "rule", "rows", or "unused", by name.
        matrices_without_tap: parameters of linear and convolution layers that are measured by rows.
    """

    def __init__(
        self,
        model: nn.Module,
        layout: ParameterLayout,
        inputs: Tensor,
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
        self._calls: list[Call] = []
        with undisturbed(model):
            # one made under inference_mode has no gradients, wherever it is used
            self._inputs = inputs.clone() if inputs.is_inference() else inputs.detach()
            self._anchor = torch.zeros((), device=inputs.device, requires_grad=True)
            with self._tapped():
                outputs = model(self._inputs)
        self._check_outputs(outputs)
        self._graph: Tensor | None = outputs
        self.outputs = outputs.detach()
        self._assign(parameter_uses(outputs))

    def _check_outputs(self, outputs: Any) -> None:
        if not isinstance(outputs, Tensor):
            raise TypeError(
                f"model must return one tensor [n, ...], got {type(outputs).__name__}; wrap it in a"
                " module that returns what the likelihood reads"
            )
        if not outputs.is_floating_point():
            raise TypeError(f"outputs of the model must be real and floating, got {outputs.dtype}")
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
                    handles.append(tap(module, rule, self._anchor, self._calls.append))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _assign(self, uses: Counter[int]) -> None:
        """Which parameters are covered by the taps, which need rows, which are not used."""
        tapped = Counter(name for call in self._calls for name in call.rule.names)
        parameters = dict(self._model.named_parameters())
        use = {name: uses[id(parameters[name])] for name in self._layout.names}
        matrices = [call.rule for call in self._calls if isinstance(call.rule, MatrixRule)]
        # a layer is measured as a whole, or not by its tap at all
        self._calls = [
            call
            for call in self._calls
            if all(tapped[name] == use[name] == 1 for name in call.rule.names)
            and self._keeps_apart(call)
        ]
        whole = {name for call in self._calls for name in call.rule.names}
        self._rows = tuple(name for name in use if use[name] and name not in whole)
        in_matrices = {name for rule in matrices for name in rule.names}
        self.matrices_without_tap = tuple(name for name in self._rows if name in in_matrices)
        self._unused = tuple(name for name in use if not use[name])
        self.layers = {
            name: "rule" if name in whole else "rows" if use[name] else "unused" for name in use
        }

    def _keeps_apart(self, call: Call) -> bool:
        """Whether the rows of this call are those of one sample after another."""
        fold, rest = divmod(call.rows, self.samples)
        if rest or fold < 1 or (fold > 1 and not call.rule.folds):
            return False
        if self._apart is None:
            return True
        return all(self._apart.folds.get(name) == fold for name in call.rule.names)

    def visit(self, vector: Tensor, visitor: Visitor, *, last: bool = False) -> None:
        """Send one vector [n, ...] at the outputs back and show every layer's gradients.

        Args:
            vector: what multiplies the outputs, in their shape.
            visitor: called with (rule, x, g) for each layer.
            last: nothing is sent back afterwards, so that autograd may drop its graph on the way.
        """
        vector = vector.to(self.outputs.dtype)
        missing = {id(call): call.rule.names for call in self._calls}

        def arrived(call: Call, x: Tensor, g: Tensor) -> None:
            missing.pop(id(call))
            with torch.no_grad():
                visitor(call.rule, self._by_sample(x), self._by_sample(g))

        self._send(vector, arrived, last=last)
        left = {name for names in missing.values() for name in names}.union(self._rows)
        names = tuple(name for name in self._layout.names if name in left)
        if names:
            self._show(names, self._per_sample(names, vector), visitor)
        if self._unused:
            size = sum(self._shape[name].numel() for name in self._unused)
            self._show(self._unused, vector.new_zeros(1, 1).expand(len(vector), size), visitor)

    def _send(
        self, vector: Tensor, arrived: Callable[[Call, Tensor, Tensor], None], *, last: bool
    ) -> None:
        if not self._calls:
            return
        if self._graph is None:
            raise RuntimeError("last must be set for the last vector only, got one after it")
        for call in self._calls:
            call.arrived, call.last = arrived, last
        try:
            with undisturbed(self._model):
                torch.autograd.grad(
                    self._graph, [self._anchor], vector, retain_graph=not last, allow_unused=True
                )
        finally:
            for call in self._calls:
                call.arrived = None  # or the batch would hold itself
        if last:
            self._graph = None

    def _per_sample(self, names: Sequence[str], vector: Tensor) -> Tensor:
        with undisturbed(self._model):
            if self._apart is None or self._apart.vectorised:
                with contextlib.suppress(*NOT_VECTORISED):
                    return vectorised(self._model, names, self._inputs, vector)
            return one_by_one(self._model, names, self._inputs, vector)

    def _show(self, names: Sequence[str], gradients: Tensor, visitor: Visitor) -> None:
        with torch.no_grad():
            visitor(Rows(names, [self._shape[name] for name in names]), self._inputs, gradients)

    def _by_sample(self, rows: Tensor) -> Tensor:
        """[n, ...]: rows that were folded into the batch (windows, time steps) become positions."""
        if len(rows) == self.samples:
            return rows
        return rows.reshape(self.samples, -1, *rows.shape[1:])


NOT_VECTORISED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
"""What models raise under torch.func: a branch on a value, an operation without a rule, a check of
their own (NotImplementedError is a RuntimeError)."""

EXAMINED = 3
"""Samples that `samples_apart` looks at: one, one that may be alike, and one that is neither first
nor last."""

OUTPUTS_ALIKE = 100
"""Outputs of a sample alone and in a batch agree to so many square roots of their dtype's rounding,
1.5e-6 in float64 and 0.03 in float32: sums in another order, amplified by the layers."""

GRADIENTS_ALIKE = 10
"""The same for gradients, which are only measured in another way where they do not agree."""

LARGEST_DIFFERENCE = 0.3
"""The same for half precision: those of another sample differ by about their size."""


ABOVE_NOISE = 10
"""A change of the outputs is one when it is so many times what they change by themselves."""


def samples_apart(model: nn.Module, layout: ParameterLayout, inputs: Tensor) -> Apart:
    """Which layers' rules give the gradients of single samples, by trying a few samples alone.

    A layer may see [time, n, d], or windows of all samples mixed: its rows are then nobody's. It
    may be changed by a hook, or by a forward method of its own. Where a rule's gradients are not
    those that autograd gives for a sample alone, the parameters are measured one by one.

    Raises:
        ValueError: the output of a sample depends on the others, or on chance, or on parameters
            that autograd does not see.

    Cost: two or three passes forward and back of three samples, and the memory of a gradient.
    """
    few = inputs[[i % len(inputs) for i in range(EXAMINED)]]
    trial = Backpropagation(model, layout, few)
    f = trial.outputs
    spread = torch.linspace(0.5, 1.5, f.numel(), dtype=f.dtype, device=f.device)
    vector = (spread * (1 - 2 * (torch.arange(f.numel(), device=f.device) % 2))).reshape(f.shape)
    _check_seen(model, trial)
    wrong = _misled(model, trial, vector)
    folds = {
        name: call.rows // EXAMINED
        for call in trial._calls
        for name in call.rule.names
        if not wrong.intersection(call.rule.names)
    }
    rest = [name for name in layout.names if trial.layers[name] != "unused" and name not in folds]
    return Apart(folds, not rest or _can_vectorise(model, trial, rest, vector))


def _misled(model: nn.Module, trial: Backpropagation, vector: Tensor) -> set[str]:
    """Parameters whose rule does not give the gradients of the samples alone."""
    found: list[tuple[Rule, Tensor, Tensor]] = []

    def keep(call: Call, x: Tensor, g: Tensor) -> None:
        found.append((call.rule, trial._by_sample(x), trial._by_sample(g)))

    trial._send(vector, keep, last=False)
    wrong = {name for call in trial._calls for name in call.rule.names}
    wrong -= {name for rule, _, _ in found for name in rule.names}  # no gradient, or x is gone
    names = [name for rule, _, _ in found for name in rule.names]
    for sample in range(EXAMINED):
        part = slice(sample, sample + 1)
        with undisturbed(model):
            output, gradients = alone(model, names, trial._inputs[part], vector[part])
        _check_apart(trial.outputs[part], output)
        truth = dict(zip(names, gradients, strict=True))
        for rule, x, g in found:
            expected = [truth[name] for name in rule.names]
            try:
                rows = [row[0] for row in rule.gradients(x[part], g[part])]
            except NOT_VECTORISED:  # it is not the input that the rule knows
                wrong.update(rule.names)
                continue
            if not _alike(rows, expected, GRADIENTS_ALIKE):
                wrong.update(rule.names)
    return wrong


def _can_vectorise(
    model: nn.Module, trial: Backpropagation, names: Sequence[str], vector: Tensor
) -> bool:
    """Whether torch.func gives the gradients of the samples alone."""
    with undisturbed(model):
        try:
            rows = vectorised(model, names, trial._inputs, vector)
        except NOT_VECTORISED:
            return False
        return all(
            _alike([row], [expected], GRADIENTS_ALIKE)
            for row, expected in zip(
                rows, one_by_one(model, names, trial._inputs, vector), strict=True
            )
        )


def _alike(rows: Sequence[Tensor], expected: Sequence[Tensor], roots: int) -> bool:
    """Whether all are the same but for rounding, relative to the largest number among them."""
    pairs = [pair for pair in zip(rows, expected, strict=True) if pair[1].numel()]
    if any(row.shape != truth.shape for row, truth in pairs):
        return False
    if not pairs:
        return True
    largest = max(float((row - truth).abs().max()) for row, truth in pairs)
    scale = max(float(truth.abs().max()) for _, truth in pairs)
    rounding = roots * torch.finfo(expected[0].dtype).eps ** 0.5
    return largest <= min(rounding, LARGEST_DIFFERENCE) * scale


def _check_apart(among_others: Tensor, alone: Tensor) -> None:
    """Raise ValueError unless a sample's outputs are the same alone as in a batch."""
    if not bool(among_others.isfinite().all()):
        return  # the likelihood says so
    if not _alike([among_others], [alone], OUTPUTS_ALIKE):
        raise ValueError(
            "model must treat every sample by itself and always alike: the output of a sample"
            " changed when it was alone in its batch; is it in training mode (batch norm, dropout)?"
            " Call model.eval()"
        )


def _check_seen(model: nn.Module, trial: Backpropagation) -> None:
    """Raise ValueError where parameters change the outputs and autograd does not know."""
    if not trial._unused:
        return
    generator = torch.Generator("cpu").manual_seed(0)
    parameters = dict(model.named_parameters())

    def moved(name: str) -> Tensor:
        value = parameters[name].detach()
        noise = torch.rand(value.shape, generator=generator, device="cpu").to(value)
        return value + (0.5 + noise) * (value.abs().mean() if value.numel() else 1.0)

    def change(names: Sequence[str]) -> float:
        values = {name: moved(name) for name in names}
        with undisturbed(model), swapping(model):
            output = torch.func.functional_call(model, values, (trial._inputs,)).detach()
        return float((output - trial.outputs).abs().max())

    noise = change(())  # 0, but for sums whose order is left to the device
    if not change(trial._unused) > ABOVE_NOISE * noise:
        return
    hidden = [name for name in trial._unused if change((name,)) > ABOVE_NOISE * noise]
    raise ValueError(
        f"parameters must reach the outputs through autograd, got {(hidden or trial._unused)[0]!r}"
        " that changes them unseen (no_grad, detach, .data, a checkpoint with use_reentrant=True);"
        " leave it out by parameters="
    )
