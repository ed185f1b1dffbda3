"""How many of a network's parameters its data see, against how many there are.

python benchmarks/accuracy/parameter_widths.py measure   a few minutes
python benchmarks/accuracy/parameter_widths.py figure    draw what was measured

Networks with one hidden layer of 2 to 512 units learn a smooth function of two numbers from 128
noisy samples; each width is trained from several seeds. Of the Fisher matrix at the trained
parameters, over the training inputs: rank, effective rank, participation ratio and the local
effective dimension.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherfast as ff

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness

RESULTS = harness.ROOT / "benchmarks" / "results" / "parameters.json"
FIGURE = harness.ROOT / "docs" / "figures" / "parameters_spectrum.png"
PART = "widths"
SAMPLES = 128
WIDTHS = (2, 4, 8, 16, 32, 64, 128, 256, 512)
SEEDS = 5
STEPS = 3000
RATE = 1e-2  # of Adam, falling to zero along a cosine
SIGMA = 0.1  # of the noise: the likelihood that network and Fisher matrix have
ERROR_TICKS = (0.6, 1, 2, 4, 8)
STATISTICS = ("rank", "effective rank", "participation ratio", "effective dimension")


def samples(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Inputs [n, 2], uniform in a square, and a smooth function of them [n, 1] with noise."""
    generator = torch.Generator().manual_seed(seed)
    x = 2 * torch.rand(count, 2, generator=generator) - 1
    clean = torch.sin(3 * x[:, :1]) * torch.cos(2 * x[:, 1:])
    return x, clean + SIGMA * torch.randn(count, 1, generator=generator)


def trained(width: int, seed: int, steps: int) -> tuple[nn.Module, Tensor, dict[str, float]]:
    """A network, the inputs that it has learned from, and its errors in units of sigma^2."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(2, width), nn.Tanh(), nn.Linear(width, 1))
    x, y = samples(SAMPLES, seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        schedule.step()
    new_x, new_y = samples(4000, 10_000 + seed)
    with torch.no_grad():
        errors = {
            "training error": float(nn.functional.mse_loss(model(x), y)) / SIGMA**2,
            "test error": float(nn.functional.mse_loss(model(new_x), new_y)) / SIGMA**2,
        }
    return model.double().eval(), x.double(), errors


def measure_one(width: int, seed: int, steps: int) -> dict[str, float]:
    """The statistics of one network."""
    model, x, errors = trained(width, seed, steps)
    likelihood = ff.parameters.Gaussian(SIGMA**2)
    fisher = ff.parameters.fisher(model, likelihood, x, structure="gram")
    found, dimension = fisher.spectrum(), fisher.effective_dimension(SAMPLES)
    return {
        "width": width,
        "seed": seed,
        "parameters": found.parameters,
        "rank": found.rank,
        "effective rank": found.effective_rank,
        "participation ratio": found.participation_ratio,
        "effective dimension": dimension.value,
        **errors,
    }


def measure(tiny: bool, out: Path) -> None:
    """Train and measure all networks."""
    start = time.perf_counter()
    widths, seeds, steps = (WIDTHS[:3], 2, 50) if tiny else (WIDTHS, SEEDS, STEPS)
    rows = []
    for width in widths:
        for seed in range(seeds):
            rows.append(measure_one(width, seed, steps))
            print(rows[-1], flush=True)
    figures = {"samples": SAMPLES, "sigma": SIGMA, "steps": steps, "networks": rows}
    what = "Spectrum and effective dimension of trained networks against their width."
    harness.store(PART, what, figures, time.perf_counter() - start, out)


def figure(source: Path, target: Path) -> None:
    """The statistics against the number of parameters, and the errors below."""
    from fisherfast.results.plots import BLUE, GREEN, GREY, VERMILION, new_figure, tidy

    networks: list[dict[str, Any]] = json.loads(source.read_text())[PART]["figures"]["networks"]
    sizes = sorted({row["parameters"] for row in networks})

    def line(axes: Any, name: str, color: str) -> None:
        values = [[row[name] for row in networks if row["parameters"] == size] for size in sizes]
        middle = [statistics.median(column) for column in values]
        axes.plot(sizes, middle, "o-", ms=4, color=color, label=name)
        axes.fill_between(sizes, *zip(*map(_ends, values), strict=True), color=color, alpha=0.15)

    canvas = new_figure(6.5, 6.0)
    top, bottom = canvas.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    top.plot(sizes, sizes, "--", color="0.6", lw=1, label="number of parameters")
    top.axhline(SAMPLES, ls=":", color="0.6", lw=1, label="number of samples")
    for name, color in zip(STATISTICS, (GREY, BLUE, GREEN, VERMILION), strict=True):
        line(top, name, color)
    line(bottom, "training error", BLUE)
    line(bottom, "test error", VERMILION)
    bottom.axhline(1, ls=":", color="0.6", lw=1)
    for axes in (top, bottom):
        axes.set_xscale("log")
        axes.set_yscale("log")
        tidy(axes)
        axes.legend(frameon=False, fontsize="small")
    bottom.set_yticks(ERROR_TICKS, [f"{tick:g}" for tick in ERROR_TICKS])
    bottom.minorticks_off()
    top.set_ylabel("directions of the parameters")
    bottom.set_ylabel("mean square error / noise")
    bottom.set_xlabel("parameters of the network")
    target.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(target)


def _ends(values: list[float]) -> tuple[float, float]:
    return min(values), max(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("what", choices=("measure", "figure"))
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON with the results")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="file of the figure")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes, to see that it runs")
    options = parser.parse_args()
    if options.what == "measure":
        measure(options.tiny, options.out)
    else:
        figure(options.out, options.figure)


if __name__ == "__main__":
    main()
