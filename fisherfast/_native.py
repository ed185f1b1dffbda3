"""Load the native module ``_C`` once and call its kernels.

Each kernel exists per device and dtype, named ``<op>_<device>_<dtype>``. It takes the fields of its
argument struct by name, after the number of threads (CPU) or the device index and the stream
(CUDA), which are looked up at every call and never stored.

Environment:
    FISHERFAST_DISABLE_NATIVE: ``1`` runs every op in plain PyTorch; read when fisherfast is
        imported. Without it a missing or stale ``_C`` is an error: a silent fall-back would be a
        silent loss of speed.
    FISHERFAST_SIMD: ``baseline``, ``avx2`` or ``avx512``, the instruction set of the CPU kernels;
        read when fisherfast is imported. Without it the widest that the processor runs is used.
"""

from __future__ import annotations

import importlib
import os
from types import ModuleType
from typing import Any

import torch

from fisherfast._version import __version__

DISABLE_VARIABLE = "FISHERFAST_DISABLE_NATIVE"
SIMD_VARIABLE = "FISHERFAST_SIMD"
DTYPE_NAMES = {torch.float32: "float32", torch.float64: "float64"}

_REBUILD = (
    "Run `pip install .` (or `pip install -e .`, or `python setup.py build_ext --inplace`) in the "
    f"source directory, or set {DISABLE_VARIABLE}=1 to run every op in plain PyTorch."
)


def load() -> ModuleType | None:
    """Import ``fisherfast._C``.

    Returns:
        The module, or None when ``FISHERFAST_DISABLE_NATIVE=1``.

    Raises:
        RuntimeError: the module is missing, cannot be loaded, or belongs to another version, or
            ``FISHERFAST_SIMD`` is not an instruction set of this processor.
    """
    if os.environ.get(DISABLE_VARIABLE, "0") == "1":
        return None
    try:
        module = importlib.import_module("fisherfast._C")
    except ImportError as error:
        raise RuntimeError(
            f"fisherfast._C must be built before use, got {type(error).__name__}: {error}. "
            f"{_REBUILD}"
        ) from error
    built = getattr(module, "__version__", "unknown")
    if built != __version__:
        raise RuntimeError(
            f"fisherfast._C must be of version {__version__}, got {built}: a stale build. "
            f"{_REBUILD}"
        )
    _choose_simd(module)
    module.borrow_threads()  # torch is imported, so its thread pool exists
    return module


def _choose_simd(module: ModuleType) -> None:
    name = os.environ.get(SIMD_VARIABLE)
    if name is None:
        return
    try:
        module.use_simd(name)
    except ValueError as error:
        raise RuntimeError(str(error).replace("the instruction set", SIMD_VARIABLE)) from error


_C: Any = load()

CUDA_COMPILED: bool = _C is not None and bool(_C.build_info()["cuda"])


def serves(tensor: torch.Tensor) -> bool:
    """Return whether there are native kernels for the device of ``tensor``."""
    return CUDA_COMPILED if tensor.is_cuda else _C is not None


def build_info() -> dict[str, Any]:
    """Describe the build: version, compiler, cuda, nvcc, cuda_architectures; the instruction set in
    use, simd, and those available, simd_available (the widest last); and which thread pool the
    kernels use."""
    return {} if _C is None else dict(_C.build_info())


def call(op: str, like: torch.Tensor, /, **fields: Any) -> None:
    """Run the kernel of ``op`` for the device and dtype of ``like``.

    Args:
        op: name of the op.
        like: the tensor that decides device and dtype.
        fields: the fields of the op's argument struct (csrc/ops) by name: tensors or None for
            pointers, numbers, and sequences of numbers. On CUDA ``workspace=None`` becomes scratch
            memory of the size that the op needs.
    """
    dtype = DTYPE_NAMES[like.dtype]
    addresses = {
        name: value.data_ptr() if isinstance(value, torch.Tensor) else value
        for name, value in fields.items()
    }
    kernel = getattr(_C, f"{op}_{like.device.type}_{dtype}")
    if not like.is_cuda:
        kernel(torch.get_num_threads(), **addresses)
        return
    if "workspace" in fields:
        size: int = getattr(_C, f"{op}_workspace_{dtype}")(**addresses)
        workspace = torch.empty(size, dtype=torch.uint8, device=like.device)
        addresses["workspace"] = workspace.data_ptr()
    kernel(like.device.index, torch.cuda.current_stream(like.device).cuda_stream, **addresses)


def fisher_solve_fits(like: torch.Tensor, dim: int, params: int, inverse_rows: bool) -> bool:
    """Return whether one system fits into the shared memory of a block; always true on the CPU."""
    if not like.is_cuda:
        return True
    shared_bytes = getattr(_C, f"fisher_solve_shared_bytes_{DTYPE_NAMES[like.dtype]}")
    needed: int = shared_bytes(dim, params, inverse_rows)
    return needed <= _C.shared_bytes_limit(like.device.index)
