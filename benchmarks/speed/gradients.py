"""gradient_squares against the best of torch, and its share of the machine's limits.

    python benchmarks/speed/gradients.py [--tiny] [--out benchmarks/results/cpu.json]

Layers of a network like ResNet on images of 32 x 32, batch 64, in float32: n M C kh kw Ho Wo /
groups multiply-adds; the least that could be moved are x, g and the results.
Torch's ways hold patches or the gradients of all samples.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from fisherfast import ops
from fisherfast.ops import reference

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness
from benchmarks.harness import OURS, TINY, Clock, Contender, Effort
from benchmarks.speed.limits import GEMM_SIZES, copy_contenders, gemm_speed, shares
from benchmarks.speed.moments import line

# Of the largest entry. Measured: 1e-6 for torch, 4e-7 for ours.
TOLERANCE = 1e-5


@dataclass(frozen=True)
class Layer:
    """A convolution of square images."""

    samples: int
    inputs: int
    outputs: int
    size: int
    kernel: int = 1
    stride: int = 1
    groups: int = 1

    @property
    def out(self) -> int:
        """Positions along an edge; windows are centred."""
        return (self.size + 2 * (self.kernel // 2) - self.kernel) // self.stride + 1

    @property
    def work(self) -> int:
        """Multiply-adds."""
        patch = self.inputs // self.groups * self.kernel**2
        return self.samples * self.outputs * patch * self.out**2

    @property
    def settings(self) -> dict[str, Any]:
        """Of `ops.gradient_squares`."""
        return {
            "stride": (self.stride, self.stride),
            "padding": (self.kernel // 2, self.kernel // 2),
            "groups": self.groups,
        }

    def draw(self, device: torch.device | str) -> tuple[Tensor, Tensor]:
        """x and g."""
        generator = torch.Generator(device).manual_seed(self.inputs)
        shapes = (
            (self.samples, self.inputs, self.size, self.size),
            (self.samples, self.outputs, self.out, self.out),
        )
        x, g = (torch.randn(shape, generator=generator, device=device) for shape in shapes)
        return x, g


CASES = {
    "first layer": Layer(64, 3, 16, 32, 3),
    "16 channels": Layer(64, 16, 16, 32, 3),
    "32 channels, strided": Layer(64, 16, 32, 32, 3, 2),
    "64 channels": Layer(64, 64, 64, 8, 3),
    "128 channels": Layer(64, 128, 128, 4, 3),
    "128 channels, 1 x 1": Layer(64, 64, 128, 16, 1, 2),
    "64 channels, depthwise": Layer(64, 64, 64, 16, 3, 1, 64),
    "256 channels": Layer(64, 256, 256, 8, 3),
}
TINY_CASES = {"tiny": Layer(3, 2, 5, 4, 3), "tiny, groups": Layer(3, 4, 6, 5, 3, 2, 2)}


def ways(layer: Layer, x: Tensor, g: Tensor) -> dict[str, Callable[[], Tensor]]:
    """What torch offers."""
    settings = layer.settings
    kernel = (layer.kernel, layer.kernel)
    shape = (layer.outputs, layer.inputs // layer.groups, *kernel)

    def patches() -> Tensor:
        unfolded = F.unfold(x, kernel, padding=settings["padding"], stride=settings["stride"])
        return unfolded.unflatten(1, (layer.groups, -1))

    rows = g.flatten(2).unflatten(1, (layer.groups, -1))

    def unfold_matmul() -> Tensor:
        return (rows @ patches().mT).square().sum(0).reshape(shape)

    def unfold_einsum() -> Tensor:
        return torch.einsum("nGmt,nGdt->nGmd", rows, patches()).square().sum(0).reshape(shape)

    def one(image: Tensor, gradient: Tensor) -> Tensor:
        def output(weight: Tensor) -> Tensor:
            return F.conv2d(image[None], weight, **settings)[0]

        weight = torch.zeros(shape, dtype=image.dtype, device=image.device)
        return torch.func.vjp(output, weight)[1](gradient)[0]

    def vmap() -> Tensor:
        return torch.func.vmap(one)(x, g).square().sum(0)

    return {
        "unfold + matmul": unfold_matmul,
        "unfold + einsum": unfold_einsum,
        "vmap of vjp": vmap,
    }


def measure(
    layer: Layer,
    gemm: float,
    effort: Effort,
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> dict[str, Any]:
    """One layer: times, ratio, limits."""
    x, g = layer.draw(device)
    settings, kernel = layer.settings, (layer.kernel, layer.kernel)
    arguments = (settings["stride"], settings["padding"], (1, 1), layer.groups)
    truth = reference.gradient_squares(x, g, kernel, *arguments)
    ours = Contender(OURS, lambda: ops.gradient_squares(x, g, kernel, **settings), family="")
    others = [Contender(name, way) for name, way in ways(layer, x, g).items()]
    if x.device.type == "cpu":
        others = harness.on_one_thread_too(others)
    moved = x.nbytes + g.nbytes + truth.nbytes
    comparison = harness.compare(
        [ours, *others, *copy_contenders(moved, device)],
        lambda got: harness.relative_error(got, truth),
        TOLERANCE,
        effort,
        clock,
    )
    limits = shares(comparison.seconds[OURS], moved, layer.work, comparison, moved, gemm)
    return {"layer": vars(layer), **comparison.as_dict(), "limits": limits}


def run(
    cases: dict[str, Layer],
    effort: Effort,
    gemm_sizes: Sequence[int],
    device: torch.device | str = "cpu",
    clock: Clock | None = None,
) -> list[dict[str, Any]]:
    """Every layer."""
    gemm = gemm_speed(torch.float32, device, tuple(gemm_sizes), clock or harness.wall_clock)
    results = []
    for name, layer in cases.items():
        row = {"name": name, **measure(layer, gemm, effort, device, clock)}
        results.append(row)
        print(line(f"gradient_squares {name}", row), flush=True)
    return results


def gradient_squares(tiny: bool) -> list[dict[str, Any]]:
    """gradient_squares of the layers of a small ResNet against torch: seconds, ratio, limits."""
    return run(TINY_CASES, TINY, (64,)) if tiny else run(CASES, Effort(), GEMM_SIZES)


if __name__ == "__main__":
    harness.main(__doc__, {"gradient_squares": gradient_squares})
