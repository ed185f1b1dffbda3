"""Exact derivatives through networks, and the fused dual ops, against the best of torch.

    python benchmarks/speed/dual.py [--tiny] [--out benchmarks/results/cpu.json] [part ...]

jvp: ff.jvp beside the plain forward pass, a loop over torch.autograd.forward_ad and torch.func.vmap
of jvp, these also channels last where a network convolves; all with the same threads. Results are
compared with forward mode in float64. The fused attention of torch has no forward derivative, so
its ways take the plain one; its forward pass takes the fused one. dual_memory: peak memory of a
ResNet-18. dual_ops: the kernels alone, against torch and the bandwidth of a copy.
"""

from __future__ import annotations

import contextlib
import copy
import ctypes
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import fisherfast as ff

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness
from benchmarks.harness import OURS, TINY, Clock, Comparison, Contender, Effort
from benchmarks.speed import dual_memory
from benchmarks.speed.dual_ways import OpCase, Result, op_cases
from benchmarks.speed.limits import copied_bytes, copy_contenders, kept_memory, share_of_copy
from benchmarks.speed.networks import built

PLAIN = "plain"  # family of what computes no tangents
MEMMOVE = "memmove"  # the copy of the C library
LAYOUTS = {"": torch.contiguous_format, ", channels last": torch.channels_last}
# Of the largest entry, in float32. Measured: at most 1e-6, but 1.0e-4 in one sample where the input
# of one ReLU, 2e-8 of their mean, has the other sign in float32. Which of the ways that meets, ours
# or torch's, is chance: a bound below it leaves right ones out.
JVP_TOLERANCE = 1e-3
OP_TOLERANCE = 1e-5  # measured: at most 3e-7

JVP_EFFORT = Effort(turns=9, turn_seconds=0.0, case_seconds=8.0, least_turns=5)
OP_EFFORT = Effort(turns=9, turn_seconds=0.0, case_seconds=3.0, least_turns=5)

MEMORY_SIZES = {"samples": 8, "size": 224, "width": 64, "directions": 4}
TINY_MEMORY = {"samples": 2, "size": 32, "width": 8, "directions": 2}
DIRECTIONS = 4
# Four times the cache of the machine at hand, input and output together.
MAPS = (1 + DIRECTIONS, 16, 32, 80, 80)
ROWS = (1 + DIRECTIONS, 8192, 384)
SCORES = (1 + DIRECTIONS, 16384, 197)
TINY_OPS = ((3, 2, 4, 8, 8), (3, 5, 16), (3, 5, 7))


@dataclass(frozen=True)
class NetworkCase:
    """A network of `networks`, its input, the number of directions."""

    name: str
    shape: tuple[int, ...]
    directions: int
    convolutional: bool = True
    sizes: dict[str, int] = field(default_factory=dict)


CASES = (
    *(NetworkCase("small CNN", (16, 1, 128, 128), directions) for directions in (1, 2, 4, 8)),
    NetworkCase("ResNet-18", (4, 3, 224, 224), DIRECTIONS),
    NetworkCase("ViT", (8, 3, 224, 224), DIRECTIONS, convolutional=False),
)
TINY_CASES = (
    NetworkCase("small CNN", (2, 1, 16, 16), 2, sizes={"width": 4}),
    NetworkCase("ResNet-18", (1, 3, 32, 32), 1, sizes={"width": 4}),
    NetworkCase("ViT", (1, 3, 32, 32), 2, False, {"image": 32, "width": 12, "depth": 1}),
)


# --- networks ------------------------------------------------------------------------------------


@contextlib.contextmanager
def differentiable() -> Iterator[None]:
    """No graph, and the attention that has a forward derivative."""
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), warnings.catch_warnings():
        # PyTorch compiles its decompositions at the first use of forward mode
        warnings.filterwarnings("ignore", category=DeprecationWarning)
        yield


def by_loop(model: nn.Module, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """torch.autograd.forward_ad, one direction after the other."""
    tangents = []
    with differentiable():
        for direction in dx:
            with forward_ad.dual_level():
                output = forward_ad.unpack_dual(model(forward_ad.make_dual(x, direction)))
                tangents.append(output.tangent)
    return output.primal, torch.stack(tangents)


def by_vmap(model: nn.Module, x: Tensor, dx: Tensor) -> tuple[Tensor, Tensor]:
    """torch.func.jvp, all directions at once."""
    with differentiable():
        return torch.func.vmap(
            lambda direction: torch.func.jvp(model, (x,), (direction,)), out_dims=(None, 0)
        )(dx)


def plain_forward(model: nn.Module, x: Tensor) -> tuple[Tensor, None]:
    """The output alone."""
    with torch.no_grad():
        return model(x), None


def network_contenders(
    model: nn.Module, x: Tensor, dx: Tensor, convolutional: bool
) -> list[Contender]:
    """Ours, torch's ways and the plain forward pass, in every layout that makes sense."""
    contenders = []
    for suffix, layout in LAYOUTS.items():
        if suffix and not convolutional:
            continue
        laid = copy.deepcopy(model).to(memory_format=layout)
        batch = x.contiguous(memory_format=layout)
        directions = dx.flatten(0, 1).contiguous(memory_format=layout).view_as(dx)
        arguments = laid, batch, directions
        contenders += [
            # a family each: neither may drop out for being slower than the other
            Contender(
                PLAIN + suffix, lambda a=arguments: plain_forward(*a[:2]), family=PLAIN + suffix
            ),
            Contender(OURS + suffix, lambda a=arguments: ff.jvp(*a), family=""),
            Contender("loop of forward_ad" + suffix, lambda a=arguments: by_loop(*a)),
            Contender("vmap of jvp" + suffix, lambda a=arguments: by_vmap(*a)),
        ]
    return contenders


def error_of_pair(got: tuple[Tensor, Tensor | None], truth: tuple[Tensor, Tensor]) -> float:
    """The larger of the relative errors of output and tangents, where there are some."""
    errors = [
        harness.relative_error(a, b) for a, b in zip(got, truth, strict=True) if a is not None
    ]
    return max(errors)


def measure_network(case: NetworkCase, effort: Effort) -> dict[str, Any]:
    """One network: times, ratios, and the number of forward passes that ours takes."""
    generator = torch.Generator().manual_seed(case.directions)
    model = built(case.name, **case.sizes)
    x = torch.randn(case.shape, generator=generator)
    dx = torch.randn(case.directions, *case.shape, generator=generator)
    truth = by_loop(copy.deepcopy(model).double(), x.double(), dx.double())
    comparison = harness.compare(
        network_contenders(model, x, dx, case.convolutional),
        lambda got: error_of_pair(got, truth),
        JVP_TOLERANCE,
        effort,
    )
    return {
        "network": case.name,
        "shape": list(case.shape),
        "P": case.directions,
        **comparison.as_dict(),
        "passes / (1 + P)": passes(comparison.seconds, case.directions),
        "ratio by layout": ratios(comparison),
    }


def ratios(comparison: Comparison) -> dict[str, float]:
    """Seconds of the fastest way of torch, in any layout, over those of ours in each."""
    best = comparison.seconds[comparison.against()[harness.TORCH]["best"]]
    times = {layout_of(s): comparison.seconds.get(OURS + s) for s in LAYOUTS}
    return {layout: best / time for layout, time in times.items() if time is not None}


def layout_of(suffix: str) -> str:
    """The name of a layout in the results."""
    return suffix.removeprefix(", ") or "contiguous"


def passes(seconds: dict[str, float], directions: int) -> dict[str, float]:
    """Time of ours over 1 + P plain forward passes: in the same layout, by layout, and with
    contiguous ours over the faster of the plain ones."""
    result = {}
    for suffix in LAYOUTS:
        if OURS + suffix in seconds and PLAIN + suffix in seconds:
            share = seconds[OURS + suffix] / seconds[PLAIN + suffix] / (1 + directions)
            result[layout_of(suffix)] = share
    fastest = min(time for name, time in seconds.items() if name.startswith(PLAIN))
    return result | {"of the fastest": seconds[OURS] / fastest / (1 + directions)}


def run_networks(cases: Iterable[NetworkCase], effort: Effort) -> list[dict[str, Any]]:
    """Every network."""
    rows = []
    for case in cases:
        row = measure_network(case, effort)
        rows.append(row)
        print(network_line(row), flush=True)
    return rows


def network_line(row: dict[str, Any]) -> str:
    """One network for the eye."""
    best = row["against"][harness.TORCH]
    share = "  ".join(f"{name} {value:.2f}" for name, value in row["passes / (1 + P)"].items())
    return (
        f"jvp {row['network']:<10} P={row['P']} {1e3 * row['seconds'][OURS]:9.1f} ms  "
        f"{best['ratio']:.2f} x {best['best']}  forward passes / (1 + P): {share}" + left_out(row)
    )


def left_out(row: dict[str, Any]) -> str:
    """Who was left out and why: a ratio to the best of torch is one to the best of the others."""
    return "".join(f"\n  left out: {name}, {why}" for name, why in row["left out"].items())


# --- memory --------------------------------------------------------------------------------------


def run_memory(samples: int, size: int, width: int, directions: int) -> list[dict[str, Any]]:
    """Peak memory of each way over that of the plain forward pass, and over 1 + P of them."""
    arguments = samples, size, width, directions
    extra = {way: dual_memory.extra_bytes(way, *arguments) for way in dual_memory.WAYS}
    forward = extra.pop("plain")
    row = {
        "network": dual_memory.NETWORK,
        "shape": [samples, dual_memory.CHANNELS, size, size],
        "P": directions,
        "plain forward, bytes": forward,
        "bytes": extra,
        # a plain pass that needs nothing beyond what is there, as tiny ones may, has no ratio
        "passes / (1 + P)": {
            way: peak / forward / (1 + directions) if forward else None
            for way, peak in extra.items()
        },
    }
    print("peak memory", row, flush=True)
    return [row]


# --- ops -----------------------------------------------------------------------------------------


def error_of_result(got: Result, truth: Tensor) -> float:
    """Relative error of a dual buffer, or of its primal and its tangents."""
    if isinstance(got, Tensor):
        got = got[0], got[1:]
    return error_of_pair(got, (truth[0], truth[1:]))


def measure_op(
    case: OpCase,
    effort: Effort,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> dict[str, Any]:
    """One op: times, ratios, share of the bandwidth of a copy of the same bytes."""
    generator = torch.Generator(device).manual_seed(len(case.shape))
    x = torch.randn(case.shape, generator=generator, device=device)
    truth = case.formula(x.double())
    moved = x.nbytes + truth.numel() * x.element_size()

    def without_tangents() -> None:
        case.plain(x.flatten(0, 1))  # 1 + P plain ops in one; not checked: these are no tangents

    with torch.no_grad():
        comparison = harness.compare(
            [
                Contender(OURS, lambda: case.ours(x), family=""),
                Contender(PLAIN, without_tangents, family=PLAIN),
                *(Contender(name, lambda f=way: f(x)) for name, way in case.ways().items()),
                *copy_contenders(moved, device),
                *memmove_contenders(moved, device),
            ],
            lambda got: error_of_result(got, truth),
            OP_TOLERANCE,
            effort,
            clock,
        )
    return {
        "op": case.name,
        "shape": list(case.shape),
        **comparison.as_dict(),
        "limits": limits_of(comparison, moved),
    }


def memmove_contenders(working_set: int, device: torch.device | str) -> list[Contender]:
    """A copy by the C library on one thread, on the CPU alone; sizes as for `copy_contenders`."""
    if torch.device(device).type != "cpu":
        return []
    source = torch.ones(copied_bytes(working_set) // 2, dtype=torch.uint8)
    target = torch.zeros_like(source)

    def call() -> None:
        ctypes.memmove(target.data_ptr(), source.data_ptr(), len(source))

    return [Contender(MEMMOVE, call, family="")]


def limits_of(comparison: Comparison, moved: int) -> dict[str, float]:
    """Share of the bandwidth of torch's copy, and of whichever copy is the fastest.

    The second is the stricter one. Both may exceed 1: a kernel that writes past the caches spares
    the reading of what it overwrites, so a copy that does not is no limit for it.
    """
    limits = share_of_copy(comparison.seconds[OURS], moved, comparison, moved)
    if MEMMOVE not in comparison.seconds:
        return limits | {"share of the fastest copy": limits["share of copy"]}
    by_memmove = copied_bytes(moved) / comparison.seconds[MEMMOVE] / 1e9
    fastest = max(limits["copy GB/s"], by_memmove)
    return limits | {
        "memmove GB/s": by_memmove,
        "share of the fastest copy": limits["GB/s"] / fastest,
    }


def run_ops(
    cases: Sequence[OpCase],
    effort: Effort,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Every op."""
    rows = []
    for case in cases:
        row = measure_op(case, effort, device, clock)
        rows.append(row)
        print(op_line(row), flush=True)
    return rows


def op_line(row: dict[str, Any]) -> str:
    """One op for the eye."""
    rivals = "  ".join(f"{r['ratio']:.2f} x {r['best']}" for r in row["against"].values())
    return (
        f"dual {row['op']:<20}{1e3 * row['seconds'][OURS]:9.3f} ms  {rivals}"
        f"  {row['limits']['share of copy']:.0%} of a copy,"
        f" {row['limits']['share of the fastest copy']:.0%} of the fastest" + left_out(row)
    )


# --- parts ---------------------------------------------------------------------------------------


def jvp(tiny: bool) -> list[dict[str, Any]]:
    """ff.jvp of three networks, float32, against forward mode of torch and plain forward passes."""
    return run_networks(TINY_CASES, TINY) if tiny else run_networks(CASES, JVP_EFFORT)


def memory(tiny: bool) -> list[dict[str, Any]]:
    """Peak memory of ff.jvp and ff.propagate on ResNet-18 beside that of the forward pass."""
    return run_memory(**(TINY_MEMORY if tiny else MEMORY_SIZES))


def dual_ops(tiny: bool) -> list[dict[str, Any]]:
    """The fused dual ops, float32, against torch: seconds, ratios, share of a copy's bandwidth.
    Freed memory is kept by the process, as else the kernel's zeroing of pages is what is timed."""
    cases = op_cases(*(TINY_OPS if tiny else (MAPS, ROWS, SCORES)))
    with kept_memory():
        return run_ops(cases, TINY if tiny else OP_EFFORT)


PARTS: dict[str, Callable[[bool], Any]] = {
    "jvp": jvp,
    "dual_memory": memory,
    "dual_ops": dual_ops,
}

if __name__ == "__main__":
    harness.main(__doc__, PARTS)
