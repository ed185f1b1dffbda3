"""Shared by the ops: checks of an input, and registration with ``torch.library``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fisherfast import _native

LIBRARY = torch.library.Library("fisherfast", "DEF")


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


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


def check_device(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    if tensor.device != model.device:
        raise ValueError(
            f"{name} must be on the device of {model_name} ({model.device}), got {tensor.device}"
        )


def check_like(name: str, tensor: Tensor, model_name: str, model: Tensor) -> None:
    if tensor.dtype != model.dtype:
        raise TypeError(
            f"{name} must have the dtype of {model_name} ({dtype_name(model.dtype)}), "
            f"got {dtype_name(tensor.dtype)}"
        )
    check_device(name, tensor, model_name, model)


def check_shape(name: str, tensor: Tensor, symbol: str, shape: list[int]) -> None:
    if list(tensor.shape) != shape:
        raise ValueError(f"{name} must have shape {symbol} = {shape}, got {list(tensor.shape)}")


def check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}")


def check_window(
    dims: int,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
) -> None:
    named = {"kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation}
    for name, numbers in named.items():
        least = 0 if name == "padding" else 1
        if len(numbers) != dims or min(numbers) < least:
            raise ValueError(
                f"{name} must hold {dims} numbers of at least {least}, got {list(numbers)}"
            )


def window_counts(
    sizes: Sequence[int], *window: Sequence[int], ceil_mode: bool = False
) -> list[int]:
    """Numbers of windows along each dimension of x, at least one.

    Args:
        sizes: of x.
        window: kernel, stride, padding and dilation.
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


def register(schema: str, implementation: Callable[..., Any], fake: Callable[..., Any]) -> None:
    """Defines one op with its implementation for CPU and CUDA and its fake implementation."""
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, implementation, device)
    torch.library.register_fake(f"fisherfast::{name}", fake, lib=LIBRARY)
