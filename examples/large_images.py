"""Where a photograph lies, how it is turned, how far it is out of focus: 512 x 512 camera pictures,
a convolutional network that reads the four numbers, and what every layer knows of them.

    python examples/large_images.py                      under six minutes on two cores
    python examples/large_images.py --photo mine.jpg --out pictures

theta = (x, y, rotation, defocus): pixels, pixels, degrees, and the standard deviation of the blur
in pixels. A sample is the photograph, moved, turned and blurred, with the noise of a camera: light
arrives as electrons whose variance is their mean (shot noise), read-out adds its own,

    electrons = mean(theta) + sqrt(mean(theta) + read_out^2) * epsilon,      epsilon ~ N(0, 1)

The counting of electrons is thus replaced by a Gaussian of the same mean and variance, so that the
derivative of each sample exists: d mean + d sqrt(variance) * epsilon. What linear readouts of a
picture can know is the same for both, the sum over pixels of (d mean)^2 / variance, which is
printed beside what is measured.

Nothing of the size of all samples is held: pictures are drawn again at every pass from the number
of the sample, and `memory_budget` bounds what the measurement takes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import resource
import time
import warnings
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

import fisherfast as ff

NAMES = ("x", "y", "rotation", "defocus")
UNITS = ("px", "px", "deg", "px")

TURN = 2.0
"""Largest rotation, in degrees."""

DEFOCUS = (1.2, 5.0)
"""Range of the blur, in pixels: below 1.2 a picture is too sharp for linear interpolation."""

BLURS = 7
"""Blurred copies of the photograph between which defocus is interpolated, to 2e-3 of the light."""

LIGHT, GROUND, READ_OUT = 16.0, 4.0, 4.0
"""Electrons of a white pixel beyond those of a black one, which has GROUND, and the standard
deviation of the read-out noise."""

LEVEL = GROUND + LIGHT / 2
"""Electrons of a grey pixel; the network is given pictures about it, in units of its noise."""

MARGIN = 16
"""The photograph reaches beyond the picture by this part of it, on each side."""

MAPPED = ("relu2", "relu3")
"""Layers whose information is drawn onto the picture."""

EFFORT = {"samples": (256, 1024), "epochs": (8, 24), "max_features": (16, 64)}
"""Default and full size: pictures of the flow, epochs, and four features for each Krylov vector of
a wide layer, which is a pass over the pictures. The noise of neighbouring pixels is independent,
so four vectors already hold what sixteen do."""

WATCHED = 64
"""Pictures that the monitor measures the output on, and the input once."""

TESTED = 256
"""Pictures that the error of the network is measured on."""

SMALLEST = 64
"""Of the size: the network shrinks a picture to 1 / 64 of it."""

MAP_BLOCK = 8
"""Pixels of a side over which the exact information is summed in its map."""

MAP_TOP = 0.995
"""Share of the places that a map tells apart: a few outliers would leave all others dark."""

DIMMED = 0.55
"""Brightness of the picture below a map."""

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Of the parameters, told apart with every common colour vision (Okabe and Ito, 2008)."""

STAR_STEP = 0.15
"""Distance of the errors of two parameters in the figure of the bounds."""

TICKS = (0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100)
"""Of the same figure."""

TRAVEL = 64
"""It moves by this part of the picture at most, in each direction: 8 pixels of 512."""


class Scene:
    """The mean picture at any theta.

    Args:
        photo: file of a picture.
        size: height and width of the samples, in pixels.
    """

    def __init__(self, photo: str | Path, size: int) -> None:
        self.size = size
        margin = size // MARGIN + 4
        self.levels = blurred(square(photo, size + 2 * margin))
        self.knots = torch.linspace(*DEFOCUS, BLURS)
        axis = torch.arange(size) - (size - 1) / 2
        self.down, self.along = axis[:, None], axis[None, :]
        centre, half = sum(DEFOCUS) / 2, (DEFOCUS[1] - DEFOCUS[0]) / 2
        self.centre = torch.tensor([0.0, 0.0, 0.0, centre])
        self.reach = torch.tensor([size / TRAVEL, size / TRAVEL, TURN, half])

    def mean(self, theta: Tensor) -> Tensor:
        """Electrons [H, W] at theta [4], differentiable in forward mode."""
        canvas = GROUND + LIGHT * torch.tensordot(self._mixture(theta[3]), self.levels, 1)
        (row, over), (column, across) = self._places(theta)
        rows, columns = row + over, column + across
        edge = canvas.shape[0] - 2
        top = rows.detach().floor().clamp(0, edge)
        left = columns.detach().floor().clamp(0, edge)
        first = (top * canvas.shape[1] + left).long()
        lower, right = rows - top, columns - left
        pixels = canvas.flatten()
        up = pixels[first] * (1 - right) + pixels[first + 1] * right
        first = first + canvas.shape[1]
        down = pixels[first] * (1 - right) + pixels[first + 1] * right
        return up * (1 - lower) + down * lower

    def means(self, thetas: Tensor) -> Tensor:
        """The same for thetas [n, 4] without derivatives, faster: [n, 1, H, W]."""
        mixture = torch.stack([self._mixture(theta[3]) for theta in thetas])
        canvas = GROUND + LIGHT * (mixture @ self.levels.flatten(1))
        canvas = canvas.unflatten(1, (1, *self.levels.shape[1:]))
        grid = canvas.new_empty(len(thetas), self.size, self.size, 2)
        unit = 2 / (self.levels.shape[-1] - 1)  # grid_sample counts from -1 to 1
        for theta, cells in zip(thetas, grid, strict=True):
            for axis, (down, along) in enumerate(reversed(self._places(theta))):
                torch.add(down * unit - 1, along * unit, out=cells[..., axis])
        return nn.functional.grid_sample(canvas, grid, align_corners=True)

    def tangents(self, theta: Tensor) -> tuple[Tensor, Tensor]:
        """The mean [H, W] at theta and its exact derivatives [4, H, W]."""
        duals = []
        for direction in torch.eye(len(theta)):
            with warnings.catch_warnings(), forward_ad.dual_level():
                # torch compiles its decompositions at the first use of forward mode, and warns
                warnings.filterwarnings("ignore", category=DeprecationWarning, module=r"torch\.")
                dual = self.mean(forward_ad.make_dual(theta, direction))
                duals.append(forward_ad.unpack_dual(dual))
        return duals[0].primal, torch.stack([dual.tangent for dual in duals])

    def _places(self, theta: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Row and column of the photograph that each pixel looks at, each as a sum of a part down
        the picture [H, 1] and one along it [1, W]: it is turned about its centre, then moved."""
        angle = theta[2] * (math.pi / 180)
        cosine, sine = torch.cos(angle), torch.sin(angle)
        along, down = self.along - theta[0], self.down - theta[1]
        middle = (self.levels.shape[-1] - 1) / 2
        return [(down * cosine + middle, -along * sine), (down * sine + middle, along * cosine)]

    def _mixture(self, defocus: Tensor) -> Tensor:
        """Weights of the blurred copies: the polynomial through all of them (Lagrange)."""
        weights = []
        for i, knot in enumerate(self.knots):
            others = torch.cat([self.knots[:i], self.knots[i + 1 :]])
            weights.append(((defocus - others) / (knot - others)).prod())
        return torch.stack(weights)


def square(photo: str | Path, size: int) -> Tensor:
    """The middle of a picture file [size, size], grey, from 0 to 1."""
    height, width = ff.problems.scene_from_file(photo, shape=(size, size)).shape
    scale = (size + 1) / min(height, width)
    shape = (math.ceil(height * scale), math.ceil(width * scale))
    scene = torch.from_numpy(ff.problems.scene_from_file(photo, shape=shape)).float()
    top, left = (scene.shape[0] - size) // 2, (scene.shape[1] - size) // 2
    return scene[top : top + size, left : left + size]


def blurred(picture: Tensor) -> Tensor:
    """A picture [H, W] at each of the blurs, by Fourier transform: [BLURS, H, W]."""
    height, width = picture.shape
    rows = 2 * math.pi * torch.fft.fftfreq(height)[:, None]
    columns = 2 * math.pi * torch.fft.rfftfreq(width)
    spectrum = torch.fft.rfft2(picture)
    widths = torch.linspace(*DEFOCUS, BLURS)[:, None, None]
    lowered = spectrum * torch.exp(-(rows**2 + columns**2) * widths**2 / 2)
    return torch.fft.irfft2(lowered, s=(height, width))


def exposed(mean: Tensor, noise: Tensor) -> Tensor:
    """Samples of a mean picture and standard normal noise, in units of the noise of a grey
    pixel."""
    electrons = torch.addcmul(mean, noise, (mean + READ_OUT**2).sqrt())
    return electrons.sub_(LEVEL).div_((LEVEL + READ_OUT**2) ** 0.5)


class Pictures(torch.utils.data.Dataset):
    """Samples at theta with their derivatives, each drawn from its number: x [1, H, W], dx
    [4, 1, H, W].

    Args:
        scene: the mean picture.
        theta: [4].
        samples: their number.
        seed: of the noise.
    """

    def __init__(self, scene: Scene, theta: Tensor, samples: int, seed: int) -> None:
        self.mean, self.tangents = scene.tangents(theta)
        self.samples, self.seed = samples, seed
        moved = self.tangents[:, None] / (LEVEL + READ_OUT**2) ** 0.5
        self.moved, self.widened = moved, moved / (2 * (self.mean + READ_OUT**2).sqrt())

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, number: int) -> tuple[Tensor, Tensor]:
        if number >= self.samples:
            raise IndexError(number)
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        noise = torch.randn(self.mean.shape, generator=generator)
        return exposed(self.mean, noise)[None], torch.addcmul(self.moved, self.widened, noise)

    def information(self) -> tuple[Tensor, Tensor]:
        """What all pixels know of theta [4, 4] in closed form: of linear readouts, and of all."""
        variance = (self.mean + READ_OUT**2).double().flatten()
        change = self.tangents.double().flatten(1)
        linear = (change / variance) @ change.T
        return linear, linear + (change / variance**2) @ change.T / 2

    def information_by_pixel(self) -> Tensor:
        """The terms of the linear sum, for each parameter alone: [4, H, W]."""
        return self.tangents.double().square() / (self.mean + READ_OUT**2)


class Rescale(nn.Module):
    """From numbers of order one to theta."""

    def __init__(self, scene: Scene) -> None:
        super().__init__()
        self.register_buffer("centre", scene.centre)
        self.register_buffer("reach", scene.reach)

    def forward(self, x: Tensor) -> Tensor:
        return self.centre + self.reach * x


def network(scene: Scene) -> nn.Module:
    """Five convolutions and two linear layers: 150 000 parameters for 512 x 512 pixels."""
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    channels = (1, 8, 16, 24, 32, 32)
    width = scene.size
    for i, (before, after) in enumerate(itertools.pairwise(channels), start=1):
        if i == 1:  # a stem that shrinks the picture at once: all behind it is cheap
            layers["conv1"], width = nn.Conv2d(before, after, 8, stride=4, padding=2), width // 4
        else:
            layers[f"conv{i}"] = nn.Conv2d(before, after, 3, stride=2, padding=1)
            width = (width + 1) // 2
        layers[f"relu{i}"] = nn.ReLU()
    layers["flat"] = nn.Flatten()
    layers["hidden"] = nn.Linear(channels[-1] * width**2, 64)
    layers["relu6"] = nn.ReLU()
    layers["last"] = nn.Linear(64, len(NAMES))
    layers["theta"] = Rescale(scene)
    return nn.Sequential(layers)


@dataclass
class Training:
    """What a training run leaves behind.

    Attributes:
        errors: RMS error [epochs, 4] of each epoch over the range of theta, in the units of theta.
        images: pictures trained on.
        seconds: of training alone.
        monitored: seconds of the monitor.
        rows: its history.
    """

    errors: list[list[float]] = field(default_factory=list)
    images: int = 0
    seconds: float = 0.0
    monitored: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)

    @property
    def overhead(self) -> float:
        """Seconds of the monitor per second of training."""
        return self.monitored / self.seconds


def train(
    model: nn.Module, scene: Scene, options: argparse.Namespace, monitor: ff.FisherMonitor | None
) -> Training:
    """Every picture is new: theta anywhere in its range, noise of its own."""
    generator = torch.Generator().manual_seed(options.seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=options.lr)
    steps = options.epochs * (options.images // options.batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, options.lr, total_steps=steps)
    run = Training()
    for epoch in range(options.epochs):
        start = time.perf_counter()
        squares = torch.zeros(len(NAMES))
        for _ in range(options.images // options.batch):
            inside = 2 * torch.rand(options.batch, len(NAMES), generator=generator) - 1
            thetas = scene.centre + scene.reach * inside
            means = scene.means(thetas)
            noise = torch.randn(means.shape, generator=generator)
            errors = (model(exposed(means, noise)) - thetas) / scene.reach
            optimizer.zero_grad()
            errors.square().mean().backward()
            optimizer.step()
            schedule.step()
            squares += errors.detach().square().mean(0)
        mse = squares / (options.images // options.batch) * scene.reach**2
        run.images += options.images // options.batch * options.batch
        run.errors.append(mse.sqrt().tolist())
        run.seconds += time.perf_counter() - start
        start = time.perf_counter()
        if monitor is not None:
            monitor.step(epoch=epoch, train_mse=mse)
        run.monitored += time.perf_counter() - start
        print(f"epoch {epoch + 1}: RMS error {in_units(run.errors[-1])}", flush=True)
    run.rows = [] if monitor is None else monitor.rows()
    return run


def errors_at(model: nn.Module, pictures: Pictures, theta: Tensor) -> tuple[Tensor, Tensor]:
    """RMS error and bias [4] of the network on pictures at one theta."""
    loader = torch.utils.data.DataLoader(pictures, batch_size=16)
    model.eval()
    with torch.no_grad():
        off = torch.cat([model(x) - theta for x, _ in loader])
    return off.square().mean(0).sqrt(), off.mean(0)


def measure(
    model: nn.Module, pictures: Pictures, options: argparse.Namespace
) -> tuple[ff.FisherFlow, float]:
    """The flow through all layers, with maps of two of them; its seconds."""
    start = time.perf_counter()
    flow = ff.fisher_flow(
        model,
        ff.Pathwise(pictures, parameters=len(NAMES)),
        layers=lambda name, module: name != "last",  # the output is the same in other units
        max_features=options.max_features,
        settings=ff.Settings(maps=MAPPED),
        memory_budget=options.memory_budget,
    )
    return flow, time.perf_counter() - start


def in_units(values: Sequence[float] | Tensor) -> str:
    """One number per parameter, with its unit."""
    return ", ".join(
        f"{name} {float(value):.4f} {unit}"
        for name, value, unit in zip(NAMES, values, UNITS, strict=True)
    )


def table(flow: ff.FisherFlow, exact: Tensor) -> str:
    """What each layer knows of each parameter when the others are unknown too, as a share of what
    all pixels know, with standard errors."""
    known = torch.linalg.inv(exact).diagonal().reciprocal()
    header = f"{'layer':8s}{'activations':>12s}  " + "".join(f"{name:>18s}" for name in NAMES)
    lines = [header, "-" * len(header)]
    for layer in flow:
        cells = []
        for p, total in enumerate(known):
            one = layer.marginal(p)
            share, error = one.value / total, float(one.stderr) / total
            cells.append(f"{share:9.4f} +- {error:.4f}")
        lines.append(f"{layer.name:8s}{layer.dim:12d}  " + "".join(f"{c:>18s}" for c in cells))
    return "\n".join(lines)


def draw(out: Path, scene: Scene, pictures: Pictures, flow: ff.FisherFlow, rms: Tensor) -> None:
    """The figures: what a sample looks like, where the information sits, and what becomes of it."""
    from fisherfast.results.plots import new_figure

    exact = torch.linalg.inv(pictures.information()[0]).diagonal().sqrt()
    figure = new_figure(11.0, 3.1)
    draw_samples(figure.subplots(1, 4), scene, pictures)
    figure.savefig(out / "samples.png")
    layers = [name for name in MAPPED if name in flow.maps]
    figure = new_figure(11.0, 2.75 * (1 + len(layers)))
    axes = figure.subplots(1 + len(layers), len(NAMES))
    draw_maps(axes[0], pictures, pooled(pictures.information_by_pixel()), "all pixels, exact")
    for row, name in zip(axes[1:], layers, strict=True):
        draw_maps(row, pictures, of_layer(flow, name), name)
    for ax, name in zip(axes[0], NAMES, strict=True):
        ax.set_title(name)
    figure.savefig(out / "maps.png")
    figure = new_figure(8.0, 4.2)
    draw_bounds(figure.subplots(), flow, exact, rms)
    figure.savefig(out / "bounds.png")
    figure = new_figure(11.0, 5.8)
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    axes = top.subplots(1, 1 + len(NAMES))
    draw_samples(axes[:1], scene, pictures, ["a sample"])
    draw_maps(axes[1:], pictures, of_layer(flow, layers[0]), "")
    for ax, name in zip(axes[1:], NAMES, strict=True):
        ax.set_title(f"{name}, {layers[0]}")
    draw_bounds(bottom.subplots(), flow, exact, rms)
    figure.savefig(out / "overview.png", dpi=110)


SHOWN = ("centre, no noise", "one end of every range", "the other end", "a sample")


def draw_samples(
    axes: Any, scene: Scene, pictures: Pictures, titles: Sequence[str] = SHOWN
) -> None:
    """Without noise in the middle of the range, two ends of it, and a sample."""
    low, high = scene.centre - scene.reach, scene.centre + scene.reach
    shown = {
        "centre, no noise": pictures.mean,
        "one end of every range": scene.mean(low),
        "the other end": scene.mean(high),
        "a sample": pictures[0][0][0] * (LEVEL + READ_OUT**2) ** 0.5 + LEVEL,
    }
    for ax, title in zip(axes, titles, strict=True):
        wide = 3 * READ_OUT if title == "a sample" else 0
        ax.imshow(shown[title].numpy(), cmap="gray", vmin=GROUND - wide, vmax=GROUND + LIGHT + wide)
        ax.set_title(title)
        ax.set_axis_off()


def pooled(maps: Tensor) -> Tensor:
    """Sums over blocks of pixels, MAP_BLOCK of them on a side: [4, h, w]."""
    return nn.functional.avg_pool2d(maps[None], MAP_BLOCK)[0] * MAP_BLOCK**2


def of_layer(flow: ff.FisherFlow, name: str) -> Tensor:
    """Information of the channels at each position about each parameter alone: [4, h, w]."""
    return flow.map(name).J.diagonal(dim1=-2, dim2=-1).permute(2, 0, 1)


def draw_maps(axes: Any, pictures: Pictures, maps: Tensor, title: str) -> None:
    """One map per parameter over the picture, each in its own unit: dark where nothing is known."""
    side = pictures.mean.shape[0]
    extent = (-0.5, side - 0.5, side - 0.5, -0.5)
    for ax, values in zip(axes, maps.clamp_min(0), strict=True):
        share = (values / values.flatten().quantile(MAP_TOP)).clamp_max(1).sqrt().numpy()
        white = (GROUND + LIGHT) / DIMMED
        ax.imshow(pictures.mean.numpy(), cmap="gray", extent=extent, vmin=GROUND, vmax=white)
        ax.imshow(share, cmap="inferno", alpha=share, extent=extent, vmin=0, vmax=1)
        ax.set_xticks([])
        ax.set_yticks([])
    axes[0].set_ylabel(title)


def draw_bounds(ax: Any, flow: ff.FisherFlow, exact: Tensor, rms: Tensor) -> None:
    """The Cramer-Rao bound of each layer in units of that of all pixels, and the network's error in
    the same unit."""
    places = range(len(flow))
    for p, (name, color) in enumerate(zip(NAMES, COLORS, strict=True)):
        bound, low, high = [], [], []
        for layer in flow:
            one = layer.marginal(p)
            information = max(one.value, 0.0)
            error = float(one.stderr)
            bound.append(deviation(information) / float(exact[p]))
            low.append(deviation(information + error) / float(exact[p]))
            high.append(deviation(max(information - error, information / 4)) / float(exact[p]))
        ax.fill_between(places, low, high, color=color, alpha=0.2, linewidth=0)
        ax.plot(places, bound, "o-", color=color, markersize=4, label=name)
        ax.plot(
            len(flow) + (p - 1.5) * STAR_STEP,
            float(rms[p] / exact[p]),
            "*",
            color=color,
            markersize=11,
        )
    ax.set_yscale("log")
    ax.minorticks_off()
    limits = ax.get_ylim()
    ax.set_yticks(TICKS, [f"{tick:g}" for tick in TICKS])
    ax.set_ylim(limits)
    ax.axhline(1, color="#767676", linewidth=0.8, linestyle="--")
    ax.axvline(len(flow) - 0.5, color="#767676", linewidth=0.8)
    ax.set_xticks([*places, len(flow)])
    ax.set_xticklabels([*flow.names, "RMS error"], rotation=45, ha="right")
    ax.set_ylabel("CRLB / CRLB of all pixels")
    ax.legend(
        frameon=False, title="Cramer-Rao bound of a layer; stars: RMS error of the network", ncols=2
    )


def deviation(information: float) -> float:
    """1 / sqrt(J), infinite without information."""
    return information**-0.5 if information > 0 else math.inf


def peak_bytes() -> int:
    """Highest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--photo", type=Path, help="picture file; matplotlib brings one")
    add("--out", type=Path, default=Path("large-images"), help="folder for figures and result.json")
    add("--size", type=int, default=512, help="pixels of a side, a multiple of 64")
    add("--samples", type=int, default=None, help="pictures that the flow is measured on")
    add("--epochs", type=int, default=None)
    add("--images", type=int, default=2048, help="pictures of an epoch")
    add("--batch", type=int, default=32, help="pictures of a training step")
    add("--lr", type=float, default=2e-3, help="largest learning rate")
    add("--seed", type=int, default=0)
    add(
        "--every",
        type=int,
        default=4,
        help="epochs from one measurement of the monitor to the next",
    )
    add("--max-features", type=int, default=None, help="features a layer; 4 make a Krylov vector")
    add("--memory-budget", default="1.5 GB", help="of the measurement")
    add("--no-monitor", action="store_true", help="train without the monitor")
    add("--full", action="store_true", help="more of everything: half an hour")
    add("--json", type=Path, help="write the result here too")
    options = parser.parse_args(given)
    if options.size < SMALLEST or options.size % SMALLEST:
        parser.error(f"--size must be a multiple of {SMALLEST}, got {options.size}")
    for name, (default, full) in EFFORT.items():
        if getattr(options, name) is None:
            setattr(options, name, full if options.full else default)
    if options.photo is None:
        from matplotlib import cbook

        options.photo = cbook.get_sample_data("grace_hopper.jpg", asfileobj=False)
    return options


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, measure, draw; returns what is written to result.json."""
    begin = time.perf_counter()
    options = arguments(given)
    torch.manual_seed(options.seed)
    scene = Scene(options.photo, options.size)
    theta = scene.centre
    model = network(scene)
    monitor = None
    if not options.no_monitor:
        watched = ff.Pathwise(
            Pictures(scene, theta, WATCHED, options.seed + 1), parameters=len(NAMES)
        )
        monitor = ff.FisherMonitor(
            model,
            watched,
            every=options.every,
            layers=["output"],
            max_features=2 * len(NAMES),
            keep=0,
            memory_budget=options.memory_budget,
        )
    run = train(model, scene, options, monitor)
    pictures = Pictures(scene, theta, options.samples, options.seed + 2)
    flow, seconds = measure(model, pictures, options)
    exact, everything = pictures.information()
    rms, bias = errors_at(model, Pictures(scene, theta, TESTED, options.seed + 3), theta)
    options.out.mkdir(parents=True, exist_ok=True)
    flow.save(options.out / "flow.npz")
    draw(options.out, scene, pictures, flow, rms)
    result = {
        "size": options.size,
        "names": NAMES,
        "units": UNITS,
        "theta": theta.tolist(),
        "closed_form": {"linear": exact.tolist(), "all": everything.tolist()},
        "crlb_input": flow["input"].crlb.tolist(),
        "crlb_closed_form": torch.linalg.inv(exact).diagonal().sqrt().tolist(),
        "crlb_output": flow["output"].crlb.tolist(),
        "rms_error": rms.tolist(),
        "bias": bias.tolist(),
        "layers": {layer.name: layer_row(layer) for layer in flow},
        "training": asdict(run),
        "images_per_second": run.images / run.seconds,
        "images_per_second_monitored": run.images / (run.seconds + run.monitored),
        "monitor_overhead": run.overhead,
        "flow_seconds": seconds,
        "samples": options.samples,
        "memory_budget": options.memory_budget,
        "threads": torch.get_num_threads(),
        "seconds": time.perf_counter() - begin,
        "peak_bytes": peak_bytes(),
    }
    text = json.dumps(result, indent=1)
    for path in [options.out / "result.json", *([options.json] if options.json else [])]:
        path.write_text(text + "\n", encoding="utf-8")
    report(result, flow, exact, options)
    return result


def layer_row(layer: ff.LayerFisher) -> dict[str, Any]:
    """What is kept of a layer."""
    return {
        "activations": layer.dim,
        "J": layer.J.tolist(),
        "stderr": layer.stderr.tolist(),
        "lower": layer.lower.tolist(),
        "lower_stderr": layer.lower_stderr.tolist(),
        "crlb": layer.crlb.tolist(),
    }


def report(
    result: dict[str, Any], flow: ff.FisherFlow, exact: Tensor, options: argparse.Namespace
) -> None:
    """Print what a reader wants to know."""
    print("\nInformation about each parameter beside the others, as a share of that in all pixels")
    print(table(flow, exact))
    print("\nSmallest standard deviation of an unbiased estimate (Cramer-Rao), at the centre")
    print(f"  all pixels, closed form  {in_units(result['crlb_closed_form'])}")
    print(f"  all pixels, measured     {in_units(result['crlb_input'])}")
    print(f"  output of the network    {in_units(result['crlb_output'])}")
    print(f"  RMS error of the network {in_units(result['rms_error'])}")
    print(f"  of this its bias         {in_units(result['bias'])}")
    print(
        f"\nTraining {result['images_per_second']:.0f} images/s, with the monitor"
        f" {result['images_per_second_monitored']:.0f} images/s"
        f" ({100 * result['monitor_overhead']:.1f} % of the training)"
    )
    print(
        f"Flow through {len(flow)} layers on {options.samples} pictures:"
        f" {result['flow_seconds']:.0f} s within {options.memory_budget}"
    )
    print(
        f"All in all {result['seconds']:.0f} s on {result['threads']} threads, peak memory"
        f" {result['peak_bytes'] / 1e9:.2f} GB; figures in {options.out}"
    )


if __name__ == "__main__":
    main()
