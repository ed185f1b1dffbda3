"""Shared by the ops: checks of an input, and registration with ``torch.library``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fisherfast import _native

LIBRARY = torch.library.Library("fisherfast", "DEF")

Op = tuple[Any, Callable[[], Any]]
"""Returned by an op after it has checked its arguments: the results, not yet filled, and `run`,
which fills them with the kernel, or with the reference if there is none, and returns them."""


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()


def with_unit_column_stride(x: Tensor) -> Tensor:
    return x if x.shape[1] <= 1 or x.stride(1) == 1 else x.contiguous()


def check_tensors(**inputs: Tensor | None) -> None:
    for name, tensor in inputs.items():
        if tensor is not None and not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")


def check_no_grad(op: str, **inputs: Tensor | None) -> None:
    check_tensors(**inputs)
    for name, tensor in inputs.items():
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                f"{name} must not require grad, got requires_grad=True: {op} has no backward; "
                f"pass {name}.detach() or call it under torch.no_grad()"
            )


def check_real(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in _native.DTYPE_NAMES:
        raise TypeError(f"{name} must be float32 or float64, got {dtype_name(tensor.dtype)}")


def check_input(name: str, tensor: Tensor, symbol: str) -> None:
    """Checks the dtype, and that there are as many dimensions as in a symbol such as "[n, d]"."""
    check_real(name, tensor)
    if tensor.dim() != symbol.count(",") + 1:
        raise ValueError(f"{name} must have shape {symbol}, got {list(tensor.shape)}")


def check_device(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    if tensor.device != model.device:
        raise ValueError(
            f"{name} must be on the device of {model_name} ({model.device}), got {tensor.device}"
        )


def check_shape(name: str, tensor: Tensor, symbol: str, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {symbol} = {shape}, got {list(tensor.shape)}")


def check_like(
    name: str,
    tensor: Tensor | None,
    model_name: str,
    model: Tensor,
    symbol: str = "",
    shape: list[int] | None = None,
) -> None:
    """Checks dtype and device of a tensor that is given, and its shape where one is stated."""
    if tensor is None:
        return
    if tensor.dtype != model.dtype:
        raise TypeError(
            f"{name} must have the dtype of {model_name} ({dtype_name(model.dtype)}), "
            f"got {dtype_name(tensor.dtype)}"
        )
    check_device(name, tensor, model_name, model)
    if shape is not None:
        check_shape(name, tensor, symbol, shape)


def check_index(
    name: str, tensor: Tensor, model_name: str, model: Tensor, symbol: str, shape: list[int]
) -> None:
    if tensor.dtype != torch.int64:
        raise TypeError(f"{name} must be int64, got {dtype_name(tensor.dtype)}")
    check_device(name, tensor, model_name, model)
    check_shape(name, tensor, symbol, shape)


def check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_groups(groups: int, **channels: int) -> None:
    """Checks that a number of groups divides the channels of each tensor."""
    check_at_least("groups", groups, 1)
    for name, count in channels.items():
        if count % groups:
            raise ValueError(
                f"channels of {name} must be a multiple of groups = {groups}, got {count}"
            )


class Window(NamedTuple):
    """Windows over an input, with one number for each dimension."""

    kernel: Sequence[int]
    stride: Sequence[int]
    padding: Sequence[int]
    dilation: Sequence[int]


def check_window(dims: int, window: Window) -> None:
    for name, numbers in window._asdict().items():
        least = 0 if name == "padding" else 1
        if len(numbers) != dims or min(numbers) < least:
            raise ValueError(
                f"{name} must hold {dims} numbers of at least {least}, got {list(numbers)}"
            )


def window_counts(sizes: Sequence[int], window: Window, *, ceil_mode: bool = False) -> list[int]:
    """Numbers of windows along each dimension of x, at least one.

    Args:
        sizes: of x.
        window: as many dimensions.
        ceil_mode: PyTorch's rule: the last window begins inside the input or its left padding.
    """
    counts = []
    for size, kernel, stride, padding, dilation in zip(sizes, *window, strict=True):
        reach = size + 2 * padding - dilation * (kernel - 1) - 1
        count = (reach + (stride - 1 if ceil_mode else 0)) // stride + 1
        if ceil_mode and (count - 1) * stride >= size + padding:
            count -= 1
        counts.append(count)
    if min(counts) < 1:
        raise ValueError(f"x must hold at least one window, got {list(sizes)} numbers")
    return counts


def register(schema: str) -> Callable[[Callable[..., Op]], None]:
    """Defines one op for CPU and CUDA, and its fake implementation, which stops before `run`."""
    name = schema.partition("(")[0]

    def define(op: Callable[..., Op]) -> None:
        LIBRARY.define(schema)
        for device in ("CPU", "CUDA"):
            LIBRARY.impl(name, lambda *arguments: op(*arguments)[1](), device)
        torch.library.register_fake(
            f"fisherfast::{name}", lambda *arguments: op(*arguments)[0], lib=LIBRARY
        )

    return define
