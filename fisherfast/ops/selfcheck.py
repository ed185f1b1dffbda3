"""The self-check of ``python -m fisherfast check``: every op against its reference.

Every op runs on every available device in every dtype and is compared with its float64 reference
on the same input. `run_selfcheck` returns a report, and prints it only to a stream that is given.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TextIO

import torch
from torch import Tensor

from fisherfast import _native, ops
from fisherfast._version import __version__
from fisherfast.ops import reference, reference_dual

# Bounds on the relative error. Measured: at most 4e-7 in float32 and 1.2e-15 in float64, for every
# op; the rest is for other machines. A wrong kernel is off by far more.
TOLERANCES = {torch.float32: 1e-5, torch.float64: 2e-14}


@dataclass(frozen=True)
class CheckRow:
    """One comparison of an op with its reference; errors are relative to the largest result."""

    op: str
    device: str
    dtype: str
    error: float
    tolerance: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """Whether the op ran and its error is within the tolerance (a NaN is not)."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class SelfCheckReport:
    """Facts about the build, and one row for each comparison."""

    facts: dict[str, str]
    rows: list[CheckRow]

    @property
    def passed(self) -> bool:
        """Whether every row passed."""
        return all(row.passed for row in self.rows)


def run_selfcheck(stream: TextIO | None = None) -> SelfCheckReport:
    """Compares every op with its reference, on every available device and dtype.

    Args:
        stream: where to write the report as text, for instance ``sys.stdout``; None writes nothing.

    Returns:
        The facts and the rows; an op that raises is a row with error NaN and the message as note.

    Cost: well under a second on the CPU; the first use of a CUDA device adds its start.
    """
    rows = [
        _check(op, compare, device, dtype)
        for device in _devices()
        for dtype in (torch.float32, torch.float64)
        for op, compare in _COMPARISONS.items()
    ]
    report = SelfCheckReport(_facts(), rows)
    if stream is not None:
        stream.write(format_report(report) + "\n")
    return report


def format_report(report: SelfCheckReport) -> str:
    """The report as text: the facts, a table of the rows, and the verdict."""
    width = max(len(name) for name in report.facts)
    lines = [f"{name:<{width}}  {value}" for name, value in report.facts.items()]
    lines += ["", f"{'op':<17}{'device':<10}{'dtype':<10}{'error':>10}{'tolerance':>11}  result"]
    for row in report.rows:
        result = "ok" if row.passed else "FAILED"
        note = f" ({row.note})" if row.note else ""
        lines.append(
            f"{row.op:<17}{row.device:<10}{row.dtype:<10}{row.error:>10.1e}{row.tolerance:>11.1e}"
            f"  {result}{note}"
        )
    failed = sum(not row.passed for row in report.rows)
    verdict = f"{failed} of {len(report.rows)} checks failed" if failed else "all checks passed"
    return "\n".join([*lines, "", verdict])


def _facts() -> dict[str, str]:
    build = _native.build_info()
    facts = {
        "fisherfast": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "platform": platform.platform(),
        "threads": str(torch.get_num_threads()),
    }
    if not build:
        return facts | {"native core": f"not used: {_native.DISABLE_VARIABLE}=1 is set"}
    facts |= {
        "native core": f"{build['version']}, {build['compiler']}, {build['simd']}",
        "CUDA kernels": (
            f"nvcc {build['nvcc']}, architectures {build['cuda_architectures']}"
            if build["cuda"]
            else "not compiled: nvcc was not found, or FISHERFAST_CUDA=OFF was set, at build time"
        ),
        "CUDA devices": _cuda_devices(),
    }
    return facts


def _cuda_devices() -> str:
    if not torch.cuda.is_available():
        return "none that torch can use"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return ", ".join(names)


def _devices() -> list[torch.device]:
    cuda = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    return [torch.device("cpu"), *(cuda if torch.cuda.is_available() else [])]


def _check(
    op: str,
    compare: Callable[[torch.device, torch.dtype], float],
    device: torch.device,
    dtype: torch.dtype,
) -> CheckRow:
    note = ""
    try:
        error = compare(device, dtype)
    except Exception as caught:  # a report must name every failure, whatever its type
        error, note = float("nan"), f"{type(caught).__name__}: {caught}"
    tolerance = TOLERANCES[dtype]
    return CheckRow(op, str(device), str(dtype).removeprefix("torch."), error, tolerance, note)


def _fisher_solve_error(device: torch.device, dtype: torch.dtype) -> float:
    systems, dim, params = 37, 33, 2
    samples = _normal(device, dtype, systems, dim, 3 * dim)
    cov = samples @ samples.mT / (3 * dim)
    deriv = _normal(device, dtype, systems, dim, params)
    ridge = 2.0**-13  # the same number in float32 and float64
    got = ops.fisher_solve_details(cov, deriv, ridge=ridge, inverse_rows=True, solution=True)
    truth = reference.fisher_solve(cov.double(), deriv.double(), ridge, True, True)
    return _largest_error(got, truth)


def _moments_error(device: torch.device, dtype: torch.dtype) -> float:
    rows, dim, groups = 3001, 17, 3
    x = _normal(device, dtype, rows, dim)
    group = torch.arange(rows, device=device) % groups
    pilot = _normal(device, dtype, dim)
    got = ops.moments(x, group, groups, pilot=pilot)
    # The difference x - pilot is rounded to the dtype on both sides: it is part of the definition.
    return _largest_error(got, reference.moments(x - pilot, group, groups))


def _gradient_squares_error(device: torch.device, dtype: torch.dtype) -> float:
    x, g = _normal(device, dtype, 5, 6, 21, 17), _normal(device, dtype, 5, 34, 10, 19)
    numbers = ([3, 2], [2, 1], [0, 2], [1, 2])
    settings = dict(zip(("stride", "padding", "dilation"), numbers[1:], strict=True))
    layouts = (x, x.contiguous(memory_format=torch.channels_last))
    got = [ops.gradient_squares(one, g, numbers[0], groups=2, **settings) for one in layouts]
    truth = reference.gradient_squares(x.double(), g.double(), *numbers, 2)
    return _largest_error(got, [truth, truth])


def _lift_error(device: torch.device, dtype: torch.dtype) -> float:
    rows, dim, groups, first = 3001, 33, 16, 5
    projected = _normal(device, dtype, rows, dim)
    bias, pilot = _normal(device, dtype, dim), _normal(device, dtype, dim)
    slope = 0.75  # the same number in float32 and float64
    got = ops.lift(projected, bias, pilot, slope=slope, num_groups=groups, first=first)
    inputs = (projected.double(), bias.double(), pilot.double())
    return _largest_error(got, reference.lift(*inputs, slope, groups, first))


def _dual_activation_error(device: torch.device, dtype: torch.dtype) -> float:
    kinds = {"relu": (), "elu": (1.0, 1.0, 1.0), "gelu": (), "tanh": (), "softplus": (1.0, 20.0)}
    x = _normal(device, dtype, 3, 2, 5, 411)
    scale, shift = _normal(device, dtype, 5), _normal(device, dtype, 5)
    doubles = (scale.double(), shift.double())
    got = [ops.dual_activation(x, k, *p, scale=scale, shift=shift) for k, p in kinds.items()]
    truth = [
        reference_dual.dual_activation(x.double(), kind, parameters, *doubles)
        for kind, parameters in kinds.items()
    ]
    return _largest_error(got, truth)


def _dual_norm_error(device: torch.device, dtype: torch.dtype) -> float:
    x = 3 + _normal(device, dtype, 6, 70, 45)
    weight, bias = _normal(device, dtype, 30), _normal(device, dtype, 30)
    eps, groups, inner = 2.0**-10, 2, 3  # eps is the same number in float32 and float64
    got = ops.dual_norm(x, weight, bias, eps=eps, groups=groups, inner=inner)
    inputs = (x.double(), weight.double(), bias.double())
    return _largest_error([got], [reference_dual.dual_norm(*inputs, eps, groups, inner)])


def _dual_softmax_error(device: torch.device, dtype: torch.dtype) -> float:
    x = _normal(device, dtype, 6, 37, 45)
    cases = [(dim, log) for dim in (1, 2) for log in (False, True)]
    got = [ops.dual_softmax(x, dim, log=log) for dim, log in cases]
    return _largest_error(got, [reference_dual.dual_softmax(x.double(), *case) for case in cases])


def _dual_pool_error(device: torch.device, dtype: torch.dtype) -> float:
    x = _normal(device, dtype, 6, 3, 9, 15, 37)
    window = ([3, 2], [2, 2], [1, 0], [1, 1])
    layouts = (x, x.movedim(2, -1).contiguous().movedim(-1, 2))
    truth = reference_dual.dual_pool(x.double(), *window)
    return _largest_error([ops.dual_pool(one, *window) for one in layouts], [truth, truth])


def _gradient_gram_error(device: torch.device, dtype: torch.dtype) -> float:
    a, b = _normal(device, dtype, 5, 37, 19), _normal(device, dtype, 5, 3, 37, 11)
    other_a, other_b = _normal(device, dtype, 4, 70, 19), _normal(device, dtype, 4, 2, 70, 11)
    got = [ops.gradient_gram(a, b), ops.gradient_gram(a, b, other_a, other_b)]
    wide = [tensor.double() for tensor in (a, b, other_a, other_b)]
    truth = [reference.gradient_gram(*wide[:2], *wide[:2]), reference.gradient_gram(*wide)]
    return _largest_error(got, truth)


def _patch_moments_error(device: torch.device, dtype: torch.dtype) -> float:
    x = _normal(device, dtype, 4, 6, 13, 11)
    geometries = (
        ((3, 2), (2, 2), (1, 1), (1, 1), 2),
        ((3, 3), (1, 1), (0, 2), (2, 2), 1),
    )
    got: list[Tensor] = []
    truth: list[Tensor] = []
    for kernel, stride, padding, dilation, groups in geometries:
        got += ops.patch_moments(
            x, kernel, stride=stride, padding=padding, dilation=dilation, groups=groups
        )
        truth += reference.patch_moments(x, kernel, stride, padding, dilation, groups)
    return _largest_error(got, truth)


_COMPARISONS: dict[str, Callable[[torch.device, torch.dtype], float]] = {
    "fisher_solve": _fisher_solve_error,
    "gradient_squares": _gradient_squares_error,
    "moments": _moments_error,
    "lift": _lift_error,
    "dual_activation": _dual_activation_error,
    "dual_norm": _dual_norm_error,
    "dual_softmax": _dual_softmax_error,
    "dual_pool": _dual_pool_error,
    "gradient_gram": _gradient_gram_error,
    "patch_moments": _patch_moments_error,
}


def _normal(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Draw normal numbers, the same at every call, without the global random state."""
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)


def _largest_error(got: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """Largest over the results of max |got - expected| / max |expected|; NaN when one is NaN."""
    errors = []
    for result, truth in zip(got, expected, strict=True):
        scale = truth.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
        errors.append((result.double() - truth.double()).abs().max() / scale)
    return torch.stack(errors).max().item()
