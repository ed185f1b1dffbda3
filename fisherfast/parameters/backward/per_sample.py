"""Per-sample gradients of parameters without a layer rule: slower, and always right."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from fisherfast.data.inputs import Samples, arguments, tensors_of
from fisherfast.model.hooks import only_output
from fisherfast.model.isolation import forgetting
from fisherfast.parameters.layout import some_of

CHUNK_BYTES = 2**26
"""Bytes of per-sample gradients at a time, 64 MiB."""

NOT_VECTORISED = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, AssertionError)
"""Errors of models under torch.func: a branch on a value, an operation without a rule, a check of
their own (NotImplementedError is a RuntimeError)."""

SLOW_BATCHING = "There is a performance drop because we have not yet implemented the batching rule"
"""Torch's warning that an operation runs sample by sample, as wanted here."""


def forward(model: nn.Module, x: Samples, values: Mapping[str, Tensor] | None = None) -> Any:
    """Run a model on samples, with other values of some parameters; of an output with a single
    floating tensor [n, ...], such as an object with logits, that tensor.

    The samples are copied, so that in-place layers cannot modify the user's data."""
    args, kwargs = arguments(x.clone())
    if values is None:
        output = model(*args, **kwargs)
    else:
        output = torch.func.functional_call(model, dict(values), args, kwargs)
    return output if isinstance(output, Tensor) else only_output(output, len(x))


def vectorised(model: nn.Module, names: Sequence[str], inputs: Samples, vector: Tensor) -> Tensor:
    """d <vector_i, f(x_i)> / d parameters for every sample alone, by torch.func.

    Args:
        model: whose forward pass maps [n, ...] to [n, ...].
        names: of the parameters.
        inputs: x [n, ...].
        vector: [n, ...], one row for each output.

    Returns:
        [n, p], the parameters side by side.

    Raises:
        Exception: any error of a model that cannot be vectorised.

    Cost: one forward and backward pass over the batch.
    """
    fixed = {name: value.detach() for name, value in model.named_parameters()}
    fixed |= {name: value.detach() for name, value in model.named_buffers()}
    moving = tuple(fixed.pop(name) for name in names)

    def rows(x: list[Tensor], r: Tensor) -> Tensor:
        entries = [entry[None] for entry in x]
        sample = entries[0] if isinstance(inputs, Tensor) else inputs.replaced(entries)

        def output(*values: Tensor) -> Tensor:
            merged = fixed | dict(zip(names, values, strict=True))
            found: Tensor = forward(model, sample, merged)[0]
            return found

        pull_back = torch.func.vjp(output, *moving)[1]
        return torch.cat([part.flatten() for part in pull_back(r)])

    size = sum(value.numel() for value in moving)
    few = max(1, CHUNK_BYTES // max(1, size * vector.element_size()))
    found = vector.new_empty(len(inputs), size)
    with _batching(), swapping(model):
        for start in range(0, len(inputs), few):
            part = slice(start, start + few)
            x = tensors_of(inputs[part])
            found[part] = torch.func.vmap(rows)(x, vector[part]).detach()
    return found


@contextlib.contextmanager
def swapping(model: nn.Module) -> Iterator[None]:
    """Around `torch.func.functional_call`: what modules keep of the parameters that were put in is
    forgotten afterwards.

    Recurrent layers keep a list of their weights, which torch would leave as it was in the call.
    """
    recurrent = [module for module in model.modules() if isinstance(module, nn.RNNBase)]
    kept = [(module._flat_weights, module._flat_weight_refs) for module in recurrent]
    handles = [module.register_forward_pre_hook(_relist) for module in recurrent]
    try:
        with forgetting(model):
            yield
    finally:
        for handle in handles:
            handle.remove()
        for module, (weights, references) in zip(recurrent, kept, strict=True):
            module._flat_weights, module._flat_weight_refs = weights, references


def _relist(module: nn.Module, args: object) -> None:
    """A recurrent layer takes its weights from its attributes."""
    assert isinstance(module, nn.RNNBase)
    module._flat_weights = [getattr(module, name, None) for name in module._flat_weights_names]


@contextlib.contextmanager
def _batching() -> Iterator[None]:
    """Use attention that can be vectorised; silence the warning of operations that cannot."""
    with warnings.catch_warnings(), sdpa_kernel(SDPBackend.MATH):
        warnings.filterwarnings("ignore", message=SLOW_BATCHING)
        yield


def one_by_one(model: nn.Module, names: Sequence[str], inputs: Samples, vector: Tensor) -> Tensor:
    """The same as `vectorised`, by one forward and backward pass for each sample."""
    found = []
    for sample in range(len(inputs)):
        part = slice(sample, sample + 1)
        gradients = alone(model, names, inputs[part], vector[part])[1]
        found.append(torch.cat([gradient.flatten() for gradient in gradients]))
    return torch.stack(found)


def alone(
    model: nn.Module, names: Sequence[str], x: Samples, vector: Tensor
) -> tuple[Tensor, list[Tensor]]:
    """f(x) [1, ...] of one sample, and d <vector, f(x)> / d parameters.

    Hooks on a parameter, which are there for its training, do not change them.

    Raises:
        RuntimeError: autograd has no such gradients.
    """
    every = dict(model.named_parameters())
    hooked = {
        name: every[name].detach().requires_grad_() for name in names if every[name]._backward_hooks
    }
    if hooked:
        with swapping(model):
            output = forward(model, x, hooked)
    else:
        output = forward(model, x)
    moving = [hooked.get(name, every[name]) for name in names]
    if output.shape != vector.shape:
        return output.detach(), []
    if not output.requires_grad or not moving:
        return output.detach(), [torch.zeros_like(value) for value in moving]
    try:
        parts = torch.autograd.grad(
            output, moving, vector, allow_unused=True, materialize_grads=True
        )
    except RuntimeError as error:
        raise RuntimeError(
            f"parameters must have gradients for a sample alone, got an error for {some_of(names)};"
            f" leave them out by parameters=. Autograd says: {error}"
        ) from error
    return output.detach(), [part.to_dense() if part.is_sparse else part for part in parts]
