"""Run a model on dual tensors: `jvp`, `propagate` and `coverage`, inside `propagation`."""

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
from fisherfast.data.inputs import Inputs, Samples, call, dx_of, is_floating
from fisherfast.data.sources import check_dense, check_entries
from fisherfast.dual import memory
from fisherfast.dual.coverage import Coverage
from fisherfast.dual.dispatch import RECORD, overloads, plain
from fisherfast.dual.errors import (
    RUNNING,
    autograd_call,
    failed_layer,
    no_derivative,
    setting,
    warn_of_randomness,
)
from fisherfast.dual.rules.writing import LIKE_FACTORIES
from fisherfast.dual.tensor import DualTensor, check_tangents, is_differentiable
from fisherfast.model.graph import survey
from fisherfast.model.hooks import Forward, map_tensors
from fisherfast.model.isolation import evaluation, forgetting, holds
from fisherfast.model.paths import follow
from fisherfast.model.sites import CUTS, Layers, select
from fisherfast.model.unwrap import check_model

SEED = 0
"""Seed of the random numbers that a model may draw in eval mode."""

SURVEY_SAMPLES = 4
"""Samples of the passes that list the layers: few, so that these need little memory."""

FACTORIES = frozenset(
    overloads(
        *LIKE_FACTORIES,
        *("zeros", "ones", "full", "empty.memory_format", "empty_strided"),
        *("rand", "randn", "eye", "eye.m", "linspace", "clone"),
    )
)


class _Factories(TorchDispatchMode):
    """Make the tensors that a model creates inside its forward pass dual, so that values with
    tangents can be written into them."""

    def __init__(self, directions: int) -> None:
        super().__init__()
        self._directions = directions

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = plain(func, args, kwargs)
        if not any(issubclass(kind, DualTensor) for kind in types):
            warn_of_randomness(func, args, kwargs)
        if func in FACTORIES and is_differentiable(result) and not isinstance(result, DualTensor):
            return DualTensor.constant(result, self._directions)
        return result


@contextmanager
def propagation(
    model: nn.Module | None, directions: int, record: Coverage | None = None
) -> Iterator[None]:
    """Let dual tensors with P = directions tangents pass through a model inside the block.

    Operations are intercepted below autograd, where a linear layer or an attention is still one
    operation. No graph is recorded.

    Args:
        model: names the layers in errors and warnings.
        directions: P.
        record: counts the operations. With a record, an operation that fails has zero tangents,
            and an error of the model ends the block without being raised.

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
        setting(RUNNING, model),
        setting(RECORD, record),
        memory.reusing(),
        _Factories(directions),
        contextlib.nullcontext() if model is None else forgetting(model, DualTensor),
    ):
        try:
            yield
        except Exception as error:
            function = autograd_call(error)
            if record is not None:
                reason = f"{type(error).__name__}: {error}".splitlines()[0]
                record.stop(function or reason, failed_layer(error))
            elif function is None:
                raise
            else:
                reason = "none: no graph is recorded here"
                raise no_derivative(function, reason, failed_layer(error)) from error


def jvp(model: nn.Module, x: Any, dx: Any) -> tuple[Any, Any]:
    r"""Compute the output of a model and its exact derivatives along P directions, per sample.

    .. math:: y_i = f(x_i), \qquad dy_{p i} = \frac{\partial f}{\partial x}(x_i) \, dx_{p i}

    This takes one forward pass of a batch 1 + P times as large; no graph is recorded. The model
    runs in eval mode; its parameters, buffers, mode and hooks and the random state are restored
    afterwards, also after an error.

    Args:
        model: any module that maps a batch [n, ...] to tensors, or to tuples, lists, dicts or
            objects of them.
        x: [n, ...] of floating dtype (or integers, for an embedding: all tangents are then zero);
            several inputs in a tuple (``model(*x)``) or dict (``model(**x)``), of any dtype.
        dx: [P, n, ...], dtype and device of x: derivative of each sample along P directions. Of
            several inputs a tuple or dict as x is; None, or a key left out, for an entry that does
            not move or that holds integers.

    Returns:
        y: what the model returns for x, without gradients.
        dy: the same structure, each tensor [P, *shape of y]; zero where y does not depend on x, and
            for integers.

    Raises:
        ValueError: dx has another shape or device.
        TypeError: model is not a module, x is not a tensor (or a tuple or dict of tensors) or is
            complex, dx has another dtype or is not given as x is, or the model returns an object
            that hides its tensors.
        DerivativeError: an operation has no derivative, or the model calls `torch.autograd` (names
            the layer).

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
        output = call(model, batch)
        output = map_tensors(output, lambda place, tensor: _compact(tensor))
    return _structure(output, _primal), _structure(output, lambda t: _tangents(t, directions))


def propagate(
    model: nn.Module, x: Any, dx: Any, *, layers: Layers = "auto"
) -> dict[str, tuple[Tensor, Tensor]]:
    """Compute the activations of every layer and their exact derivatives along P directions.

    Args:
        model: as for `jvp`.
        x, dx: as for `jvp`.
        layers: as for `fisher_flow`.

    Returns:
        Name of the layer -> (activations [n, ...], tangents [P, n, ...]), in execution order,
        with "input" and "output". The input is the floating entries of x side by side, [n, d], if
        there are several.

    Raises:
        As for `jvp`; ValueError for an unknown layer (lists the nearest names).

    Cost: as for `jvp`, and the memory of the activations. Two more plain forward passes, on at
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
        first = _inputs(x)[:SURVEY_SAMPLES]
        with _explained(model, batch, directions):
            sites = survey(model, first)
            if isinstance(layers, str) and layers == CUTS:
                follow(model, first, sites)
            sites = select(sites, layers, model)
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
def _explained(model: nn.Module, batch: Samples, directions: int) -> Iterator[None]:
    """Run a model that failed again under `propagation`, whose errors name the operation and the
    layer."""
    try:
        yield
    except RuntimeError:
        with propagation(model, directions):
            call(model, batch)
        raise


def coverage(model: nn.Module, x: Any, dx: Any = None) -> Coverage:
    """List the operations of a model that have a rule, need PyTorch's forward mode, or fail.

    Args:
        model: as for `jvp`.
        x: as for `jvp`.
        dx: as for `jvp`, or None for one random direction.

    Returns:
        `Coverage`: counts by operation and by how it was differentiated; prints as a table.

    Raises:
        ValueError, TypeError: x or dx as for `jvp`. What fails inside the model is reported, not
            raised: operations without a derivative, and the error that stopped it.

    Cost: as for `jvp`, with P = 1 if dx is None; a few samples are enough.

    Example:
        >>> import torch, fisherfast as ff
        >>> report = ff.dual.coverage(torch.nn.Linear(3, 2), torch.zeros(5, 3))
        >>> report.share, list(report.rules)
        (1.0, ['linear.default'])
    """
    check_model(model)
    if dx is None:
        dx = _random_direction(_inputs(x))
    record = Coverage()
    batch, directions = _packed(x, dx)
    with evaluation(model, SEED), propagation(model, directions, record):
        _check_model(model)
        call(model, batch)
    return record


def _random_direction(x: Samples) -> Any:
    """Draw one tangent of each floating entry of x, of a single tensor of any dtype."""
    generator = torch.Generator(device=x.device).manual_seed(SEED)

    def drawn(entry: Tensor) -> Tensor:
        dx = torch.randn((1, *entry.shape), generator=generator, device=entry.device)
        return dx.to(entry.dtype) if entry.is_floating_point() else dx

    if isinstance(x, Tensor):
        return drawn(x)
    directions = {
        key: drawn(entry) if is_floating(entry) else None for key, entry in x.entries.items()
    }
    return directions if x.named else tuple(directions.values())


def _inputs(x: Any) -> Any:
    """Return a tuple or dict as `Inputs`, with its entries checked; anything else as it is."""
    if not isinstance(x, tuple | Mapping):
        return x
    return check_entries(Inputs.of(x), "x", check_dense)


def _packed(x: Any, dx: Any) -> tuple[Samples, int]:
    """Return the input of the model and P: dual tensors in place of floating entries, and the
    integers, whose tangents are zero, as they are."""
    if isinstance(x, tuple) and isinstance(dx, tuple) and len(x) == len(dx) == 1:
        x, dx = x[0], dx[0]
    x = _inputs(x)
    if isinstance(x, Inputs):
        parts = dx_of(x, dx)
        counts = {len(part) for part in parts.values()}
        if len(counts) > 1:
            raise ValueError(f"dx must hold P tangents of each entry, got {sorted(counts)}")
        for key, part in parts.items():
            check_tangents(x.entries[key], part, f"x[{key!r}]", f"dx[{key!r}]")
        several = x.clone()
        for key, part in parts.items():
            several.entries[key] = DualTensor.pack(several.entries[key], part)
        return several, counts.pop()
    integers = isinstance(x, Tensor) and not (x.is_floating_point() or x.is_complex())
    if not integers:
        batch = DualTensor.pack(x, dx)
        return batch, batch.directions
    check_tangents(x.to(dx.dtype), dx)
    warnings.warn(
        f"x has dtype {x.dtype}: integers have no derivative, so all tangents are zero; measure"
        " their information with a Score",
        FisherWarning,
        stacklevel=3,
    )
    return x.clone(), len(dx)


def _check_model(model: Any) -> None:
    check_model(model)
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if is_lazy(tensor):
            raise ValueError(
                f"model must have initialised parameters, got {name!r} without a shape: run the"
                " model once on samples like x"
            )


def _structure(output: Any, change: Any) -> Any:
    """Apply a change to the tensors of a nested output, keeping its structure."""
    changed = map_tensors(output, lambda place, tensor: change(tensor))
    _check_structure(changed)
    return changed


def _check_structure(output: Any) -> None:
    """Raise if a dual tensor could be left inside an object of another class."""
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
    """Copy a result that would keep the memory of a larger stack alive."""
    if not isinstance(tensor, DualTensor):
        return tensor
    with _disable_current_modes():
        return DualTensor(memory.compact(tensor.stack))


def _primal(tensor: Tensor) -> Tensor:
    return tensor.primal if isinstance(tensor, DualTensor) else tensor.detach().clone()


def _tangents(tensor: Tensor, directions: int) -> Tensor:
    if isinstance(tensor, DualTensor):
        return tensor.tangents
    dtype = tensor.dtype if is_differentiable(tensor) else torch.get_default_dtype()
    return torch.zeros((directions, *tensor.shape), dtype=dtype, device=tensor.device)
