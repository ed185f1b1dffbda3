"""The self-check of ``python -m fisherfast check``: every op against its reference.

Every op runs on every available device in every dtype and is compared with its float64 reference
on the same input. `run_selfcheck` returns a report, and prints it only to a stream that is given.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TextIO

import torch
from torch import Tensor

from fisherfast import _native
from fisherfast._version import __version__
from fisherfast.ops import reference, reference_dual
from fisherfast.ops._common import dtype_name

# Bounds on the relative error. Measured: at most 7e-7 in float32 and 2e-15 in float64, for every
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
        _check(op, arguments, device, dtype)
        for device in _devices()
        for dtype in TOLERANCES
        for op, arguments in calls(device, dtype).items()
    ]
    report = SelfCheckReport(_facts(), rows)
    if stream is not None:
        stream.write(format_report(report) + "\n")
    return report


def format_report(report: SelfCheckReport) -> str:
    """The report as text: the facts, a table of the rows, and the verdict."""
    width = max(len(name) for name in report.facts)
    lines = [f"{name:<{width}}  {value}" for name, value in report.facts.items()]
    lines += ["", f"{'op':<23}{'device':<10}{'dtype':<10}{'error':>10}{'tolerance':>11}  result"]
    for row in report.rows:
        result = "ok" if row.passed else "FAILED"
        note = f" ({row.note})" if row.note else ""
        lines.append(
            f"{row.op:<23}{row.device:<10}{row.dtype:<10}{row.error:>10.1e}{row.tolerance:>11.1e}"
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
    op: str, arguments: list[tuple[Any, ...]], device: torch.device, dtype: torch.dtype
) -> CheckRow:
    note = ""
    try:
        error = largest_error(op, arguments)
    except Exception as caught:  # a report must name every failure, whatever its type
        error, note = float("nan"), f"{type(caught).__name__}: {caught}"
    return CheckRow(op, str(device), dtype_name(dtype), error, TOLERANCES[dtype], note)


def largest_error(op: str, arguments: list[tuple[Any, ...]]) -> float:
    """Largest error of an op relative to its float64 reference, max |got - truth| / max |truth|
    of each result; NaN when one is NaN.

    Args:
        op: name of the op, which is that of its reference too.
        arguments: of every call, by position; both take the same.
    """
    module = reference_dual if op.startswith("dual_") else reference
    errors = []
    for call in arguments:
        wide = tuple(_as_double(argument) for argument in call)
        expected = _results(getattr(module, op), op, wide)
        for result, truth in zip(results_of(op, call), expected, strict=True):
            scale = truth.double().abs().max().clamp(min=torch.finfo(torch.float64).tiny)
            errors.append((result.double() - truth.double()).abs().max() / scale)
    return torch.stack(errors).max().item()


def results_of(op: str, call: tuple[Any, ...]) -> Sequence[Tensor]:
    """The results of an op for its arguments by position, which are not changed."""
    return _results(getattr(torch.ops.fisherfast, op).default, op, call)


def _results(function: Callable[..., Any], op: str, call: tuple[Any, ...]) -> Sequence[Tensor]:
    if op.endswith("_"):  # it adds to its first two arguments
        accumulators = [accumulator.clone() for accumulator in call[:2]]
        function(*accumulators, *call[2:])
        return accumulators
    results = function(*call)
    return [results] if isinstance(results, Tensor) else results


def _as_double(argument: Any) -> Any:
    is_real = isinstance(argument, Tensor) and argument.is_floating_point()
    return argument.double() if is_real else argument


def calls(device: torch.device, dtype: torch.dtype) -> dict[str, list[tuple[Any, ...]]]:
    """Arguments for every op; its numbers are the same in float32 and float64."""

    def normal(*shape: int) -> Tensor:
        """The same numbers at every call, without the global random state."""
        generator = torch.Generator().manual_seed(sum(shape))
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(device, dtype)

    def last(x: Tensor) -> Tensor:
        """Every slice with its channels next to each other."""
        return x.movedim(-3, -1).contiguous().movedim(-1, -3)

    first = Tensor.contiguous
    samples, deriv, ridge = normal(37, 33, 99), normal(37, 33, 2), 2.0**-13
    rows, fold = normal(3001, 17), torch.arange(3001, device=device) % 3
    image, outputs = normal(5, 6, 21, 17), normal(5, 34, 10, 19)
    squares = ([3, 2], [2, 1], [0, 2], [1, 2], 2)
    inputs, at_outputs = normal(5, 37, 19), normal(5, 3, 37, 11)
    others = (normal(4, 70, 19), normal(4, 2, 70, 11))
    sums, cross = torch.zeros(4, 50).to(device).double(), torch.zeros(2, 50, 50).to(device).double()
    weight, offsets = normal(33, 17) / 4, torch.tensor([0, 700, 1500, 1500, 3001], device=device)
    kinds = {"relu": [], "elu": [1.0, 1.0, 1.0], "gelu": [], "tanh": [], "softplus": [1.0, 20.0]}
    channels, buffer, pooled = (normal(5), normal(5)), normal(6, 37, 45), normal(6, 3, 9, 15, 37)
    window = ([3, 2], [2, 2], [1, 0], [1, 1], False)
    return {
        "fisher_solve": [(samples @ samples.mT / 99, deriv, ridge, True, True)],
        "fisher_solve_backward": [(normal(37, 2, 2), deriv, ridge)],
        "moments": [(rows, fold, 3, normal(17))],
        "spatial_moments": [(order(image), normal(6, 21, 17)) for order in (first, last)],
        "patch_moments": [
            (image, [3, 2], [2, 2], [1, 1], [1, 1], 2),
            (last(image), [3, 3], [1, 1], [0, 2], [2, 2], 1),
        ],
        "lift_moments_": [(sums, cross, rows, weight, normal(33), normal(33), offsets, 0.75, 3)],
        "gradient_gram": [(inputs, at_outputs, *right) for right in ((None, None), others)],
        "gradient_squares": [(order(image), order(outputs), *squares) for order in (first, last)],
        "dual_activation": [
            (order(normal(3, 2, 5, 411)), kind, numbers, *channels, None, 2)
            for order in (first, last)
            for kind, numbers in kinds.items()
        ],
        "dual_norm": [(3 + normal(6, 70, 45), normal(30), normal(30), 2.0**-10, 2, 3, True)],
        "dual_softmax": [(buffer, dim, log) for dim in (1, 2) for log in (False, True)],
        "dual_pool": [(order(pooled), *window) for order in (first, last)],
    }
