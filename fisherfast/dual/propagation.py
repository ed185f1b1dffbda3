"""A model on dual tensors: `propagation` prepares the ground, `jvp` and `propagate` use it."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from fisherfast._errors import FisherWarning
from fisherfast.dual import memory
from fisherfast.dual.coverage import Coverage
from fisherfast.dual.dispatch import overloads, recording
from fisherfast.dual.errors import running, warn_of_randomness
from fisherfast.dual.rules.writing import LIKE_FACTORIES
from fisherfast.dual.tensor import DualTensor, check_tangents
from fisherfast.model.graph import survey
from fisherfast.model.hooks import Forward, map_tensors
from fisherfast.model.isolation import evaluation, forgetting, holds
from fisherfast.model.sites import Layers, select

__all__ = ["coverage", "jvp", "propagate", "propagation"]

SEED = 0
"""Of the random numbers that a model may draw in eval mode."""

SURVEY_SAMPLES = 4
"""Samples that list the layers: few, for these passes are to take no memory that counts."""

FACTORIES = frozenset(
    overloads(
        "zeros",
        "ones",
        "full",
        "empty.memory_format",
        "empty_strided",
        "rand",
        "randn",
        "eye",
        "eye.m",
        "linspace",
    )
) | frozenset(LIKE_FACTORIES)


class _Factories(TorchDispatchMode):
    """What a model makes inside its forward pass has room for tangents: it may be written into."""

    def __init__(self, directions: int) -> None:
        super().__init__()
        self._directions = directions

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if not any(issubclass(kind, DualTensor) for kind in types):
            warn_of_randomness(func, args, kwargs)
        if (
            func in FACTORIES
            and isinstance(result, Tensor)
            and not isinstance(result, DualTensor)
            and result.is_floating_point()
        ):
            return DualTensor.constant(result, self._directions)
        return result


@contextmanager
def propagation(
    model: nn.Module | None, directions: int, record: Coverage | None = None
) -> Iterator[None]:
    """Dual tensors with P = directions tangents go through a model inside.

    Below autograd, so that the operations a model calls arrive whole (a linear layer, an attention)
    and not in pieces; without a graph.

    Args:
        model: names the layers in errors and warnings.
        directions: P.
        record: counts the operations; with one, an operation that fails has zero tangents.

    Example:
        >>> import torch, fisherfast as ff
        >>> x = ff.dual.DualTensor.pack(torch.tensor([3.0]), torch.ones(1, 1))
        >>> with ff.dual.propagation(None, 1):
        ...     y = x**2
        >>> y.primal.item(), y.tangents.item()
        (9.0, 6.0)
    """
    with (
        torch.no_grad(),
        torch._C._AutoDispatchBelowAutograd(),
        running(model),
        recording(record),
        memory.reusing(),
        _Factories(directions),
        contextlib.nullcontext() if model is None else forgetting(model, DualTensor),
    ):
        yield


def jvp(model: nn.Module, x: Tensor, dx: Tensor) -> tuple[Any, Any]:
    r"""Output of a model and its exact derivatives along P directions, sample by sample.

    .. math:: y_i = f(x_i), \qquad dy_{p i} = \frac{\partial f}{\partial x}(x_i) \, dx_{p i}

    One forward pass of 1 + P width; no graph is recorded. The model runs in eval mode; parameters,
    buffers, mode, hooks and random state are afterwards as they were, also after an error.

    Args:
        model: any module that maps a batch [n, ...] to tensors, tuples, lists or dicts of them.
        x: [n, ...] of floating dtype (or integers, for an embedding: all tangents are then zero).
        dx: [P, n, ...], dtype and device of x: derivative of each sample along P directions.

    Returns:
        y: what the model returns for x, without gradients.
        dy: the same structure, each tensor [P, *shape of y]; zero where y does not depend on x, and
            for integers.

    Raises:
        ValueError: dx of another shape or device.
        TypeError: model is no module, x no tensor or complex, dx of another dtype, or an output of
            another class.
        DerivativeError: an operation without derivative, with its layer.

    Warns:
        FisherWarning: integer x, or a layer that draws random numbers in eval mode.

    Cost: about 1 + P forward passes of time and memory, less for non-linear layers.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
        >>> y, dy = ff.jvp(model, torch.zeros(5, 3), torch.ones(1, 5, 3))
        >>> y.shape, dy.shape
        (torch.Size([5, 2]), torch.Size([1, 5, 2]))
    """
    _check_model(model)
    batch, directions = _packed(x, dx)
    with evaluation(model, SEED), propagation(model, directions):
        output = model(batch)
        output = map_tensors(output, lambda place, tensor: _compact(tensor))
    return _structure(output, _primal), _structure(output, lambda t: _tangents(t, directions))


def propagate(
    model: nn.Module, x: Tensor, dx: Tensor, layers: Layers = "auto"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Activations of every layer and their exact derivatives along P directions.

    Args:
        model: as for `jvp`.
        x: [n, ...].
        dx: [P, n, ...].
        layers: as for `fisher_flow`.

    Returns:
        Name of the layer -> (activations [n, ...], tangents [P, n, ...]), in execution order,
        with "input" and "output".

    Raises:
        As for `jvp`; ValueError for an unknown layer (names the nearest).

    Cost: as for `jvp`, and the activations that are kept. Two plain forward passes more, on at
        most 4 samples, list the layers.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Tanh())
        >>> acts = ff.propagate(model, torch.zeros(5, 3), torch.ones(1, 5, 3))
        >>> list(acts), acts["0"][1].shape
        (['input', '0', 'output'], torch.Size([1, 5, 2]))
    """
    _check_model(model)
    batch, directions = _packed(x, dx)
    kept: dict[str, Tensor] = {}
    with evaluation(model, SEED):
        first = x[:SURVEY_SAMPLES]
        with _explained(model, batch, directions):
            sites = select(survey(model, first), layers, model)
        names = {site.event: site.name for site in sites}

        def keep(event: str, kind: str, module: nn.Module | None, output: Tensor) -> None:
            if event in names:
                kept[names[event]] = output.clone()

        with Forward(model, keep, sites) as forward, propagation(model, directions):
            forward.run(batch)
    return {
        site.name: (_primal(kept[site.name]), _tangents(kept[site.name], directions))
        for site in sites
    }


@contextmanager
def _explained(model: nn.Module, batch: Tensor, directions: int) -> Iterator[None]:
    """A model that fails on plain samples fails on dual ones, with an error that says where."""
    try:
        yield
    except RuntimeError:
        with propagation(model, directions):
            model(batch)
        raise


def coverage(model: nn.Module, x: Tensor, dx: Tensor | None = None) -> Coverage:
    """Which operations of a model have a rule, which need PyTorch's forward mode, which fail.

    Args:
        model: as for `jvp`.
        x: [n, ...].
        dx: [P, n, ...], or None for one random direction.

    Returns:
        `Coverage`: counts by operation and by how it was served; prints as a table.

    Raises:
        ValueError, TypeError: as for `jvp`. An operation that fails is reported, not raised.

    Cost: as for `jvp`, with P = 1 where dx is None: a few samples suffice.

    Example:
        >>> import torch, fisherfast as ff
        >>> report = ff.dual.coverage(torch.nn.Linear(3, 2), torch.zeros(5, 3))
        >>> report.share, list(report.rules)
        (1.0, ['linear.default'])
    """
    _check_model(model)
    if dx is None:
        generator = torch.Generator(device=x.device).manual_seed(SEED)
        dx = torch.randn((1, *x.shape), generator=generator, device=x.device)
        dx = dx.to(x.dtype) if x.is_floating_point() else dx
    record = Coverage()
    batch, directions = _packed(x, dx)
    with evaluation(model, SEED), propagation(model, directions, record):
        model(batch)
    return record


def _packed(x: Tensor, dx: Tensor) -> tuple[Tensor, int]:
    """What goes into the model, and P: a dual tensor, or counts alone, whose tangents are zero."""
    counts = isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex())
    if not counts:
        batch = DualTensor.pack(x, dx)
        return batch, batch.directions
    check_tangents(x.to(dx.dtype), dx)
    warnings.warn(
        f"x has dtype {x.dtype}: numbers that only count have no derivative, all tangents are zero;"
        " a Score tells what they know",
        FisherWarning,
        stacklevel=3,
    )
    return x.clone(), len(dx)


def _check_model(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"model must have initialised parameters, got {name!r} without a shape: run the"
                " model once on samples like x"
            )


def _structure(output: Any, change: Any) -> Any:
    """The tensors of a nested output changed; the structure stays."""
    changed = map_tensors(output, lambda place, tensor: change(tensor))
    _check_structure(changed)
    return changed


def _check_structure(output: Any) -> None:
    """Nothing dual is left, hidden in an object of another class."""
    if isinstance(output, Mapping):
        output = list(output.values())
    if isinstance(output, list | tuple):
        for item in output:
            _check_structure(item)
    elif holds(getattr(output, "__dict__", None), DualTensor):
        raise TypeError(
            "model must return tensors, or tuples, lists or dicts of them, got"
            f" {type(output).__name__}"
        )


def _compact(tensor: Tensor) -> Tensor:
    """A result that does not keep the memory of a larger stack alive."""
    if not isinstance(tensor, DualTensor):
        return tensor
    with _disable_current_modes():
        return DualTensor(memory.compact(tensor.stack))


def _primal(tensor: Tensor) -> Tensor:
    return tensor.primal if isinstance(tensor, DualTensor) else tensor.detach().clone()


def _tangents(tensor: Tensor, directions: int) -> Tensor:
    if isinstance(tensor, DualTensor):
        return tensor.tangents
    dtype = tensor.dtype if tensor.is_floating_point() else torch.get_default_dtype()
    return torch.zeros((directions, *tensor.shape), dtype=dtype, device=tensor.device)
