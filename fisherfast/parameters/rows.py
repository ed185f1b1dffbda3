"""Per-sample gradients of parameters that no layer rule answers for: slower, and always right."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

__all__ = ["per_sample_rows"]


def per_sample_rows(
    model: nn.Module, names: Sequence[str], inputs: Tensor, vector: Tensor
) -> Tensor:
    """d <vector_i, f(x_i)> / d parameters for every sample alone.

    Args:
        model: whose forward pass maps [n, ...] to [n, ...].
        names: of the parameters.
        inputs: x [n, ...].
        vector: [n, ...], one row for each output.

    Returns:
        [n, p], the parameters side by side.

    Raises:
        RuntimeError: the outputs have no gradient for a sample alone.

    Cost: one forward and backward pass over the batch, vectorised by torch.func where the model
    allows, otherwise sample by sample.
    """
    try:
        return _vectorised(model, names, inputs, vector)
    except (RuntimeError, ValueError, TypeError, NotImplementedError):
        return _one_by_one(model, names, inputs, vector)


def _vectorised(model: nn.Module, names: Sequence[str], inputs: Tensor, vector: Tensor) -> Tensor:
    fixed = {name: value.detach() for name, value in model.named_parameters()}
    fixed |= {name: value.detach() for name, value in model.named_buffers()}
    moving = tuple(fixed.pop(name) for name in names)

    def rows(x: Tensor, r: Tensor) -> Tensor:
        def output(*values: Tensor) -> Tensor:
            merged = fixed | dict(zip(names, values, strict=True))
            return torch.func.functional_call(model, merged, (x[None],))[0]

        pull_back = torch.func.vjp(output, *moving)[1]
        return torch.cat([part.flatten() for part in pull_back(r)])

    return torch.func.vmap(rows)(inputs, vector)


def _one_by_one(model: nn.Module, names: Sequence[str], inputs: Tensor, vector: Tensor) -> Tensor:
    parameters = dict(model.named_parameters())
    moving = [parameters[name] for name in names]
    found = []
    for sample in range(len(inputs)):
        output = model(inputs[sample : sample + 1])
        parts = torch.autograd.grad(
            output, moving, vector[sample : sample + 1], allow_unused=True, materialize_grads=True
        )
        found.append(torch.cat([part.flatten() for part in parts]))
    return torch.stack(found)
