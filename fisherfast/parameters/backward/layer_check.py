"""Checks, on a few samples alone, of which layers' rules give the gradients of single samples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fisherfast.data.inputs import Samples, tensors_of
from fisherfast.parameters.backward.backpropagation import Apart, Backpropagation
from fisherfast.parameters.backward.per_sample import (
    NOT_VECTORISED,
    alone,
    forward,
    one_by_one,
    swapping,
    vectorised,
)
from fisherfast.parameters.backward.taps import undisturbed
from fisherfast.parameters.checks import untouched
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layout import ParameterLayout

EXAMINED = 3
"""Samples tried alone: the first, one that differs from it, and one that is neither."""

OUTPUTS_ALIKE = 100
"""Outputs of a sample alone and in a batch agree to so many square roots of their dtype's rounding,
1.5e-6 in float64 and 0.03 in float32: sums in another order, amplified by the layers."""

GRADIENTS_ALIKE = 10
"""The same for gradients; those that disagree are measured in another way."""

LARGEST_DIFFERENCE = 0.3
"""The same for half precision: those of another sample differ by about their size."""


ABOVE_NOISE = 10
"""Factor by which a change of the outputs must exceed their own noise."""


def check_one_alone(model: nn.Module, inputs: Samples, outputs: Tensor) -> None:
    """Raise ValueError if a sample's outputs alone differ from those in its batch.

    `samples_apart` compares batches of three; a network may mix the samples of larger ones only.

    Cost: a forward pass of one sample.
    """
    one = (_others(inputs) or [0])[-1]
    with untouched(model), undisturbed(model), torch.no_grad():
        _check_apart(outputs[one : one + 1], forward(model, inputs[one : one + 1]))


def _others(inputs: Samples) -> list[int]:
    """The samples that differ from the first."""
    entries = tensors_of(inputs)
    flat = [entry.reshape(len(entry), entry[:1].numel()) for entry in entries]
    differs = torch.stack([(rows != rows[:1]).any(1) for rows in flat]).any(0)
    return differs.nonzero().flatten().tolist()


def _different(inputs: Samples) -> tuple[Samples, bool]:
    """A few samples, not all equal if possible; True if they differ, or if there is only one."""
    others = _others(inputs)
    if not others:
        return inputs[[i % len(inputs) for i in range(EXAMINED)]], len(inputs) == 1
    second = others[0]
    third = next((i for i in (*others[1:], *range(1, len(inputs))) if i != second), 0)
    return inputs[[0, second, third]], True


def samples_apart(model: nn.Module, layout: ParameterLayout, inputs: Samples) -> Apart:
    """Find the layers whose rules give the gradients of single samples, by trying a few alone.

    A layer may see [time, n, d], or windows that mix the samples: its rows then belong to no single
    sample. A hook, or a forward method of its own, may change it. Where a rule's gradients differ
    from those of autograd for a sample alone, the parameters are measured one by one.

    Raises:
        ValueError: the output of a sample depends on the others, on chance, or on parameters that
            autograd does not see.

    Cost: three or four passes forward and back of three samples, and the memory of a gradient.
    """
    few, shown = _different(inputs)
    trial = Backpropagation(model, layout, few)
    f = trial.outputs
    spread = torch.linspace(0.5, 1.5, f.numel(), dtype=f.dtype, device=f.device)
    vector = (spread * (1 - 2 * (torch.arange(f.numel(), device=f.device) % 2))).reshape(f.shape)
    _check_seen(model, trial)
    wrong, silent = _wrong_rules(model, layout, trial, vector)
    folds = {
        name: call.rows // EXAMINED
        for call in trial.calls
        for name in call.rule.names
        if not wrong.intersection(call.rule.names)
    }
    rest = [name for name in layout.names if name not in trial.unused and name not in folds]
    vectorised = not rest or _can_vectorise(model, trial, rest, vector)
    return Apart(folds, vectorised, shown and not silent)


def _wrong_rules(
    model: nn.Module, layout: ParameterLayout, trial: Backpropagation, vector: Tensor
) -> tuple[set[str], set[str]]:
    """Parameters whose rule does not give the gradients of the samples alone, and those whose
    gradients are all zero, which proves nothing."""
    found: list[tuple[Rule, Tensor, Tensor]] = []
    trial.send(vector, lambda *arrived: found.append(arrived), last=False)
    wrong = {name for call in trial.calls for name in call.rule.names}
    wrong -= {name for rule, _, _ in found for name in rule.names}  # no gradient, or x is gone
    wrong |= _reordered(model, layout, trial, vector, found)
    names = [name for rule, _, _ in found for name in rule.names]
    silent = set(names)
    for sample in range(EXAMINED):
        part = slice(sample, sample + 1)
        with undisturbed(model):
            output, gradients = alone(model, names, trial.inputs[part], vector[part])
        _check_apart(trial.outputs[part], output)
        truth = dict(zip(names, gradients, strict=True))
        for rule, x, g in found:
            expected = [truth[name] for name in rule.names]
            if any(bool(each.any()) for each in expected):
                silent.difference_update(rule.names)
            try:
                rows = [row[0] for row in rule.gradients(x[part], g[part])]
            except NOT_VECTORISED:  # not an input that the rule can read
                wrong.update(rule.names)
                continue
            if not _alike(rows, expected, GRADIENTS_ALIKE):
                wrong.update(rule.names)
    return wrong, silent


def _reordered(
    model: nn.Module,
    layout: ParameterLayout,
    trial: Backpropagation,
    vector: Tensor,
    found: Sequence[tuple[Rule, Tensor, Tensor]],
) -> set[str]:
    """Parameters of layers that see the samples in an order of the network's own (sorted by length,
    say): reversing the samples does not reverse that order."""
    back = Backpropagation(model, layout, trial.inputs.flip(0))
    seen: dict[tuple[str, ...], tuple[Tensor, Tensor]] = {}
    back.send(vector.flip(0), lambda rule, x, g: seen.update({rule.names: (x, g)}), last=True)
    turned: set[str] = set()
    for rule, x, g in found:
        other = seen.get(rule.names)
        if other is None or not all(
            _same_rows(here, there.flip(0)) for here, there in zip((x, g), other, strict=True)
        ):
            turned.update(rule.names)
    return turned


def _same_rows(here: Tensor, there: Tensor) -> bool:
    if not here.is_floating_point():
        return torch.equal(here, there)
    return _alike([there], [here], GRADIENTS_ALIKE)


def _can_vectorise(
    model: nn.Module, trial: Backpropagation, names: Sequence[str], vector: Tensor
) -> bool:
    """True if torch.func gives the gradients of the samples alone."""
    with undisturbed(model):
        try:
            rows = vectorised(model, names, trial.inputs, vector)
        except NOT_VECTORISED:
            return False
        return all(
            _alike([row], [expected], GRADIENTS_ALIKE)
            for row, expected in zip(
                rows, one_by_one(model, names, trial.inputs, vector), strict=True
            )
        )


def _alike(rows: Sequence[Tensor], expected: Sequence[Tensor], roots: int) -> bool:
    """True if all are equal but for rounding, relative to the largest number among them."""
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
        return  # the likelihood raises the error
    if not _alike([among_others], [alone], OUTPUTS_ALIKE):
        raise ValueError(
            "model must treat every sample by itself and always alike: the output of a sample"
            " changed when it was alone in its batch; is it in training mode (batch norm, dropout)?"
            " Call model.eval()"
        )


def _check_seen(model: nn.Module, trial: Backpropagation) -> None:
    """Raise ValueError where parameters change the outputs outside autograd."""
    if not trial.unused:
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
            output = forward(model, trial.inputs, values).detach()
        return float((output - trial.outputs).abs().max())

    noise = change(())  # 0, but for sums whose order is left to the device
    if not change(trial.unused) > ABOVE_NOISE * noise:
        return
    hidden = [name for name in trial.unused if change((name,)) > ABOVE_NOISE * noise]
    raise ValueError(
        f"parameters must reach the outputs through autograd, got {(hidden or trial.unused)[0]!r}"
        " that changes them unseen (no_grad, detach, .data, a checkpoint with use_reentrant=True);"
        " leave it out by parameters="
    )
