"""Calls of native kernels, recorded as text and bytes for the C++ drivers of the tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from fisherfast import _native

ALIGNMENT = 64  # bytes; the driver's arrays keep their distance to such an address


def memory(tensor: Tensor) -> Tensor:
    """Views the elements that a tensor spans in memory, gaps included, in one dimension."""
    if tensor.numel() == 0:
        return tensor.flatten()
    last = sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((last + 1,), (1,))


def request(op: str, dtype: torch.dtype, fields: dict[str, object], **settings: object) -> bytes:
    """A case for kernel_case.h; a setting is a value or a tuple of values, None is left out."""
    lines = [f"op {op}\ndtype {str(dtype).removeprefix('torch.')}\n".encode()]
    for name, value in settings.items():
        if value is not None:
            lines.append(f"{name} {_words(value)}\n".encode())
    sent: dict[int, str] = {}
    for name, value in fields.items():
        if not isinstance(value, Tensor):
            if value is not None:
                lines.append(f"number {name} {_words(value)}\n".encode())
        elif value.numel() == 0:
            continue  # its address is null, as in fisherfast
        elif value.data_ptr() in sent:
            lines.append(f"alias {name} {sent[value.data_ptr()]}\n".encode())
        else:
            sent[value.data_ptr()] = name
            data = memory(value).numpy().tobytes()
            offset = value.storage_offset() * value.element_size() % ALIGNMENT
            lines.append(f"array {name} {len(data)} {offset}\n".encode() + data)
    return b"".join([*lines, b"end\n"])


def _words(value: object) -> str:
    values = value if isinstance(value, (tuple, list)) else (value,)
    return " ".join(str(int(v) if isinstance(v, bool) else v) for v in values)


@contextmanager
def kernels_called_by(call: Callable[..., None]) -> Iterator[None]:
    """Replaces the kernels by call(op, like, **fields) within the block; results start as NaN."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_native, "call", call)
        patch.setattr(_native, "serves", lambda tensor: True)
        torch.use_deterministic_algorithms(True)  # torch.empty then fills what it returns
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(False)
