"""The parameters that are measured, and the place of each in a vector of all of them."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fisherfast._fields import Count, read, wrong
from fisherfast._validation import check_same_network
from fisherfast.model.unwrap import check_model

SHAPES = dict[str, tuple[Count, ...]]
"""Shapes by name, in states."""

SHOWN = 8
"""Most names in an error message."""

Selection = None | str | Sequence[str] | Callable[[str], bool]
"""Parameters by name: None for all that require grad, a regular expression, names, a function."""


@dataclass(frozen=True)
class ParameterLayout:
    """Names and shapes of the parameters, in the order of ``model.named_parameters()``.

    A vector over parameters has P entries: each parameter flattened row by row, one after another.
    """

    names: tuple[str, ...]
    shapes: tuple[torch.Size, ...]

    @classmethod
    def of(cls, model: nn.Module, selection: Selection = None) -> ParameterLayout:
        """The chosen parameters of a model; a shared (tied) one counts once, by its first name.

        Raises:
            TypeError: the model is not a module, the selection of a wrong type, or a parameter
                complex.
            ValueError: nothing is chosen, a name is unknown, or a chosen parameter does not require
                grad, or has no shape yet.
        """
        check_model(model)
        every = dict(model.named_parameters())
        chosen = _chosen(every, selection)
        if not chosen:
            reason = "has no parameters" if not every else "has none that requires grad"
            if selection is not None:
                reason = f"has none that {selection!r} chooses; it has {some_of(every)}"
            raise ValueError(f"parameters must choose at least one of the model, which {reason}")
        for name in chosen:
            _check_parameter(name, every[name])
        frozen = [name for name in chosen if not every[name].requires_grad]
        if frozen:
            raise ValueError(
                f"parameters must require grad, got {frozen[0]!r} that does not; call"
                " requires_grad_() on it or leave it out by parameters="
            )
        return cls(tuple(chosen), tuple(every[name].shape for name in chosen))

    @property
    def size(self) -> int:
        """P, numbers in all parameters."""
        return sum(shape.numel() for shape in self.shapes)

    def slices(self) -> dict[str, slice]:
        """The place of each parameter in a vector of P numbers."""
        found, start = {}, 0
        for name, shape in zip(self.names, self.shapes, strict=True):
            found[name] = slice(start, start + shape.numel())
            start += shape.numel()
        return found

    def flatten(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """One vector [P] of one tensor per parameter.

        Raises:
            TypeError: a value that is not a tensor.
            ValueError: a parameter is missing, or of another shape.
        """
        rows = []
        for name, shape in zip(self.names, self.shapes, strict=True):
            if name not in tensors:
                raise ValueError(f"tensors must hold every parameter, got none for {name!r}")
            tensor = tensors[name]
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
            if tensor.shape != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(tensor.shape)}")
            rows.append(tensor.reshape(-1))
        return torch.cat(rows)

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Views of a vector [..., P], one [..., *shape] per parameter.

        Raises:
            ValueError: the last dimension is not P.
        """
        if vector.dim() < 1 or vector.shape[-1] != self.size:
            raise ValueError(
                f"vector must have P = {self.size} entries, got shape {list(vector.shape)}"
            )
        return {
            name: vector[..., where].reshape((*vector.shape[:-1], *shape))
            for (name, where), shape in zip(self.slices().items(), self.shapes, strict=True)
        }

    def state_dict(self) -> dict[str, list[int]]:
        """Shapes by name."""
        return {name: list(shape) for name, shape in zip(self.names, self.shapes, strict=True)}

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Sequence[int]]) -> ParameterLayout:
        """The layout whose `state_dict` this is. Raises ValueError for anything else."""
        shapes = read(SHAPES, state, "layout")
        if not shapes:
            raise wrong("layout", "hold at least one parameter", state)
        return cls(tuple(shapes), tuple(map(torch.Size, shapes.values())))

    def check_same(self, other: ParameterLayout, what: str) -> None:
        """Raise ValueError, naming the first difference, unless the other layout is this one."""
        check_same_network(what, self.state_dict(), other.state_dict())
        if self.names != other.names:
            raise ValueError(f"{what} must have its parameters in the same order")


def module_of(name: str) -> str:
    """The name of the module that a parameter belongs to; "" is the model itself."""
    return name.rpartition(".")[0]


def _check_parameter(name: str, parameter: nn.Parameter) -> None:
    if isinstance(parameter, nn.parameter.UninitializedParameter):
        raise ValueError(
            f"parameters must have a shape, got {name!r} of a lazy module; call the model once"
        )
    if parameter.is_inference():
        raise ValueError(
            f"parameters must not be made in inference mode, got {name!r}, which has no gradients;"
            " load its numbers into a model that is made outside"
        )
    if parameter.is_complex():
        raise TypeError(f"parameters must be real, got {name!r} of {parameter.dtype}")


def _chosen(every: Mapping[str, nn.Parameter], selection: Selection) -> list[str]:
    if selection is None:
        return [name for name, parameter in every.items() if parameter.requires_grad]
    if isinstance(selection, str):
        try:
            return [name for name in every if re.search(selection, name)]
        except re.error as error:
            raise ValueError(
                f"parameters must be a regular expression, got {selection!r}: {error}"
            ) from error
    if callable(selection):
        return [name for name in every if selection(name)]
    if isinstance(selection, bytes) or not isinstance(selection, Iterable):
        raise TypeError(f"parameters must be names, a pattern or a function, got {selection!r}")
    wanted: list[Any] = list(selection)
    for name in wanted:
        if not isinstance(name, str):
            raise TypeError(f"parameters must be names, a pattern or a function, got {name!r}")
        if name not in every:
            raise ValueError(
                f"parameters must be of the model, got {name!r}; it has {some_of(every)}"
            )
    return [name for name in every if name in wanted]


def some_of(every: Iterable[str]) -> str:
    """The first few of some names, for an error message."""
    names = list(every)
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
