"""`DualTensor`: a batch and its P tangents in one buffer, which looks to a model like the batch.

A dual tensor has the shape, strides, dtype and device of its primal [n, ...], and holds a stack
[1 + P, n, ...] with the primal first. Every operation of the model, however it is called, reaches
`__torch_dispatch__`, and `fisherfast.dual.dispatch` applies its derivative rule. No graph is
recorded.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import _disable_current_modes

from fisherfast import ops
from fisherfast.dual import memory
from fisherfast.dual.errors import no_derivative
from fisherfast.ops import reference_dual
from fisherfast.ops._dual_common import is_dense

Affine = tuple[Tensor, Tensor]
"""Scale and shift [C] of an eval-mode batch norm, over dimension 1 of the batch."""

CHANNEL_DIM = 2
"""Channel dimension of a stack [1 + P, n, C, ...]."""

KERNEL_DTYPES = (torch.float32, torch.float64)
"""Dtypes of the fused kernels; half precision uses their references."""


class Memory:
    """The storage that a dual tensor and its views share.

    Attributes:
        constant: created by a factory inside the model and not yet written with a dual tensor: its
            tangents are known to be zero.
        read_only: the operation ("detach", "conj") whose result shares the memory of x in PyTorch
            but is a copy here: a write into it would not change x.
        waiting: dual tensors that have yet to read this storage (a batch norm deferred until the
            activation after it) and must do so before it is overwritten.
    """

    __slots__ = ("constant", "read_only", "waiting")

    def __init__(self, *, constant: bool = False, read_only: str = "") -> None:
        self.constant = constant
        self.read_only = read_only
        self.waiting: list[weakref.ref[DualTensor]] = []


class DualTensor(torch.Tensor):
    """A primal [n, ...] and its P tangents, which pass through a model together.

    Create one with `pack`. Inside `fisherfast.dual.propagation` it passes through a model like any
    batch; outside, operations on it work too, except a few that need the fused kernels.

    Attributes:
        primal: [n, ...], a view of the stack.
        tangents: [P, n, ...], a view of the stack.
        stack: [1 + P, n, ...].
    """

    _stack: Tensor
    _pending: Affine | None
    _is_whole: bool
    memory: Memory
    apply_rule: ClassVar[Callable[[OpOverload, tuple[Any, ...], dict[str, Any]], Any]]
    """Apply the rule of an operation; set by `fisherfast.dual.dispatch`."""

    # Libraries such as opt_einsum choose the functions for an array by the module of its class
    __module__ = "torch"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, stack: Tensor, memory: Memory | None = None) -> DualTensor:
        """Wrap a stack [1 + P, n, ...] without a copy."""
        strides = stack.stride()[1:]
        if memory is None and _channels_last(stack):
            _, channels, height, width = stack.shape[1:]
            strides = (channels * height * width, height * width, width, 1)
        dual: DualTensor = torch.Tensor._make_wrapper_subclass(
            cls,
            stack.shape[1:],
            strides=strides,
            dtype=stack.dtype,
            device=stack.device,
        )
        dual._stack = stack
        dual._pending = None
        dual._is_whole = memory is None
        dual.memory = Memory() if memory is None else memory
        return dual

    @classmethod
    def pack(cls, primal: Tensor, tangents: Tensor) -> DualTensor:
        """Copy a primal [n, ...] and tangents [P, n, ...] into one buffer.

        Raises:
            ValueError: tangents of another shape or on another device.
            TypeError: another dtype, or one that has no derivative.
        """
        check_tangents(primal, tangents)
        with torch.no_grad():
            return cls(torch.cat([primal.detach()[None], tangents.detach()]))

    @classmethod
    def constant(cls, primal: Tensor, directions: int) -> DualTensor:
        """Make a dual tensor of a primal [n, ...] with P = directions tangents of zero."""
        stack = primal.new_zeros((1 + directions, *primal.shape))
        stack[0] = primal
        return cls(stack, Memory(constant=True))

    @classmethod
    def awaiting(cls, source: DualTensor, scale: Tensor, shift: Tensor) -> DualTensor:
        """Make scale_c x + shift_c, computed when it is read or by the activation that follows."""
        dual = cls(source.stack)
        dual._pending = (scale, shift)
        source.memory.waiting.append(weakref.ref(dual))
        return dual

    @property
    def stack(self) -> Tensor:
        """[1 + P, n, ...], the primal first."""
        if self._pending is not None:
            with _disable_current_modes():  # a hook may read it during a forward pass
                self.settle(apply_activation(self._stack, "identity", affine=self._pending))
        return self._stack

    def laid_out(self) -> Tensor:
        """Return the stack with its memory in the order of its dimensions, to make views of it.

        A convolution stores its result channels-last, because that is faster, while the model sees
        an ordinary tensor.
        A view of that memory would be a copy where the model expects shared memory, or share memory
        where it expects a copy, and later in-place writes would go wrong.
        """
        stack = self.stack
        if self._is_whole and _channels_last(stack):
            self.settle(stack.contiguous())
        return self._stack

    def pending(self) -> tuple[Tensor, Affine | None]:
        """The stack, and the scale and shift that are still to be applied to it."""
        return self._stack, self._pending

    def settle(self, stack: Tensor) -> None:
        """Set the stack once its deferred values are computed."""
        self._stack, self._pending = stack, None

    def before_writing(self) -> Tensor:
        """Return the stack after all deferred readers of its present content have read it."""
        if self.memory.read_only:
            raise no_derivative(
                self.memory.read_only,
                "a write into its result, x.detach(), x.data or x.conj(): write into a clone of it",
            )
        stack = self.stack
        self.memory.constant = False
        waiting, self.memory.waiting = self.memory.waiting, []
        for reference in waiting:
            dual = reference()
            if dual is not None:
                _ = dual.stack
        return stack

    @property
    def primal(self) -> Tensor:
        """[n, ...]."""
        return self.stack[0]

    @property
    def tangents(self) -> Tensor:
        """[P, n, ...]."""
        return self.stack[1:]

    @property
    def directions(self) -> int:
        """P."""
        return len(self._stack) - 1

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"DualTensor(primal={list(self.shape)}, P={self.directions}, dtype={self.dtype})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: OpOverload,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return cls.apply_rule(func, args, kwargs or {})


def is_differentiable(value: Any) -> bool:
    """Return whether a value could have tangents: a real or complex floating tensor."""
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _channels_last(stack: Tensor) -> bool:
    """Return whether a stack [1 + P, n, C, H, W] is stored channels-last."""
    if stack.dim() != len("pnCHW") or stack.is_contiguous():
        return False
    return stack.movedim(2, 4).is_contiguous()


def check_tangents(x: Tensor, dx: Tensor, x_name: str = "x", dx_name: str = "dx") -> None:
    """Raise unless x [n, ...] has a real floating dtype and dx [P, n, ...] matches it."""
    for name, tensor in ((x_name, x), (dx_name, dx)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if x.is_complex():
        raise TypeError(
            f"x must have a floating dtype, got {x.dtype}: give real and imaginary part as two"
            " channels"
        )
    if not x.is_floating_point():
        raise TypeError(
            f"x must have a floating dtype, got {x.dtype}: integers have no derivative (a network"
            " may create integers inside; their tangents are zero)"
        )
    if dx.dtype != x.dtype:
        raise TypeError(f"{dx_name} must have the dtype of {x_name} ({x.dtype}), got {dx.dtype}")
    if dx.device != x.device:
        raise ValueError(f"{dx_name} must be on the device of x ({x.device}), got {dx.device}")
    if dx.dim() != x.dim() + 1 or dx.shape[1:] != x.shape:
        raise ValueError(
            f"{dx_name} must have shape [P, *x.shape] with x.shape = {list(x.shape)},"
            f" got {list(dx.shape)}"
        )


def _room_like(stack: Tensor) -> Tensor | None:
    """Return reused memory with the layout of a stack, or None where reuse does not pay."""
    if stack.nbytes < memory.SMALL_BYTES or not is_dense(stack):
        return None
    strides = (stack[0].numel(), *stack.stride()[1:])
    return memory.empty(stack.shape, strides, stack.dtype, stack.device)


def apply_activation(
    stack: Tensor,
    kind: str,
    *parameters: float,
    slope: Tensor | None = None,
    affine: Affine | None = None,
) -> Tensor:
    """Apply an activation to a stack of any floating dtype."""
    scale, shift = affine or (None, None)
    if stack.dtype in KERNEL_DTYPES:
        return ops.dual_activation(
            stack,
            kind,
            *parameters,
            scale=scale,
            shift=shift,
            slope=slope,
            channel_dim=CHANNEL_DIM,
            out=_room_like(stack),
        )
    return reference_dual.dual_activation(stack, kind, parameters, scale, shift, slope, CHANNEL_DIM)


def apply_softmax(stack: Tensor, dim: int, *, log: bool = False) -> Tensor:
    """Apply softmax or log-softmax to a stack of any floating dtype, along dimension dim >= 1."""
    if stack.dtype in KERNEL_DTYPES:
        return ops.dual_softmax(stack, dim, log=log)
    return reference_dual.dual_softmax(stack, dim, log)
