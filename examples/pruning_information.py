"""Where both Fisher informations meet: which weights may go before the output forgets theta?

    python examples/pruning_information.py               under two minutes on two cores
    python examples/pruning_information.py --out pruning --networks camera

Two networks learn to read theta: the position of an object in noisy camera images (convolutions),
and the location of a log-normal distribution (dense layers). Each is then made smaller, without any
training afterwards, in three ways: single weights become zero, whole units go, weights get fewer
bits. What goes first is decided by

    importance   the Fisher information of the network's own parameters,
                 1/2 F_ii w_i^2 = expected rise of -log p(y | x, w) in nats if w_i becomes zero
    magnitude    |w_i|, over all weights at once or with the same share in each layer
    chance       several draws

and what is left is judged by the other one, the information about theta in the activations:
J_output / J_input of `ff.fisher_flow`, on samples and with a lift that are the same for all.

The two are not the same question. F knows every change of the outputs; J does not mind changes
that an affine map of the output undoes, and is measured at one theta, F over the range of theta.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherfast as ff
from fisherfast.problems import LogNormal, Problem, default_camera, mlp

FEATURES = 32
"""Of each layer's dictionary: the outputs are single numbers."""

LEFT = (0.8, 0.6, 0.4, 0.3, 0.2, 0.14, 0.1, 0.07, 0.05)
"""Shares of weights, or of units, that are kept."""

BITS = (5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0)
"""Bits of a weight, on average over the network."""

LARGEST_BITS = 8
KEPT = 0.95
"""A network is called intact while its output holds this share of what it held."""

FISHER_SAMPLES = 4000
"""Training samples that F is averaged over."""

MIXING_SEED = 5  # condition number 10: random ones are often too near singular to be learned
BATCH, LEARNING_RATE = 128, 3e-3
SHOWN = 0.2  # share of the weights that is left where all layers are shown
IMPORTANCE, MAGNITUDE, CHANCE = "importance", "magnitude", "chance"
EACH_LAYER, EVEN = ", each layer", "the same for all"
UNCORRELATED = "importance, sum of weights"
BITS_SHOWN = (4.0, 3.0, 2.0)

Scores = dict[str, Tensor]
"""How much each weight or unit counts, by the name of its parameter or layer."""

Row = dict[str, float]
"""One point of a curve."""


@dataclass(frozen=True)
class Effort:
    """How much is trained, measured and tried.

    Attributes:
        training: samples at each of the positions of theta.
        epochs: over them.
        samples: that J is measured on.
        draws: of what goes by chance.
        left, bits: the points of the curves.
    """

    training: int = 4000
    epochs: int = 5
    samples: int = 10_000
    draws: int = 3
    left: tuple[float, ...] = LEFT
    bits: tuple[float, ...] = BITS


QUICK = Effort(1000, 4, 3000, 2, left=(0.6, 0.2, 0.05), bits=(4.0, 2.0))


@dataclass(frozen=True)
class Task:
    """What a network reads.

    Attributes:
        problem: draws the samples.
        values: the positions of theta that it is trained at.
        build: seed -> network, from normalised samples to estimates [n, 1].
    """

    problem: Problem
    values: Tensor
    build: Callable[[int], nn.Module]


def camera_network(seed: int) -> nn.Module:
    """Two convolutions and two dense layers, from images [n, 18, 24]."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        layers = OrderedDict(
            channel=nn.Unflatten(1, (1, 18)),
            conv1=nn.Conv2d(1, 8, 5, stride=2, padding=2),
            relu1=nn.ReLU(),
            conv2=nn.Conv2d(8, 16, 3, stride=2, padding=1),
            relu2=nn.ReLU(),
            flatten=nn.Flatten(),
            fc3=nn.Linear(16 * 5 * 6, 64),
            relu3=nn.ReLU(),
            fc4=nn.Linear(64, 1),
        )
        return nn.Sequential(layers)


TASKS: dict[str, Callable[[], Task]] = {
    "camera": lambda: Task(default_camera(), torch.linspace(-1.8, 1.8, 13), camera_network),
    "lognormal": lambda: Task(
        LogNormal.random(seed=MIXING_SEED),
        torch.linspace(-3, 3, 21),
        lambda seed: mlp((10, 128, 64, 32, 1), seed=seed),
    ),
}


@dataclass(frozen=True)
class Reader:
    """A trained network with what it is judged by.

    Attributes:
        network: as it came out of training.
        x, theta: training samples and labels [n, 1]; what F is measured on.
        test_x, test_theta: fresh ones.
        data: samples at theta = 0 with their score; what J is measured on.
        variance: of the errors on the training samples, sigma^2 of the likelihood.
    """

    network: nn.Module
    x: Tensor
    theta: Tensor
    test_x: Tensor
    test_theta: Tensor
    data: ff.Score
    variance: float


def labelled(task: Task, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Samples at every position of theta, and their theta [n, 1]."""
    samples = [task.problem.sample(float(value), count, generator) for value in task.values]
    return torch.cat(samples), task.values.float().repeat_interleave(count)[:, None]


def trained(task: Task, effort: Effort, seed: int) -> Reader:
    """A network that has learned to read theta by least squares."""
    generator = torch.Generator().manual_seed(seed)
    x, theta = labelled(task, effort.training, generator)
    order = torch.randperm(len(x), generator=generator)
    x, theta = x[order], theta[order]
    mean, std = x.mean(0), x.std(0)
    x = (x - mean) / std
    network = task.build(seed)
    steps = effort.epochs * (len(x) // BATCH)
    optimizer = torch.optim.Adam(network.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps)
    for _ in range(effort.epochs):
        for batch in torch.randperm(len(x), generator=generator).split(BATCH)[: len(x) // BATCH]:
            loss = (network(x[batch]) - theta[batch]).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    network.eval()
    test_x, test_theta = labelled(task, effort.training // 4, generator)
    held_out = task.problem.sample(0.0, effort.samples, generator)
    with torch.no_grad():
        variance = float((network(x) - theta).square().mean())
    return Reader(
        network,
        x,
        theta,
        (test_x - mean) / std,
        test_theta,
        ff.Score((held_out - mean) / std, task.problem.score(held_out, 0.0)),
        variance,
    )


class Meter:
    """Measures smaller versions of one network; samples and lift are the same for all.

    Attributes:
        fisher: the diagonal of the Fisher matrix of the whole network's parameters, by name.
    """

    def __init__(self, reader: Reader) -> None:
        self.reader = reader
        self.network = copy.deepcopy(reader.network)
        self.monitor = ff.FisherMonitor(
            self.network, reader.data, layers=["output"], max_features=FEATURES
        )
        self.likelihood = ff.parameters.Gaussian(variance=reader.variance)
        found = ff.parameters.fisher(
            reader.network, self.likelihood, reader.x[:FISHER_SAMPLES], structure="diag"
        )
        self.fisher = found.layout.unflatten(found.diag())
        self.whole = {name: w.detach() for name, w in reader.network.named_parameters()}
        with torch.no_grad():
            self.estimates = reader.network(reader.test_x)

    def __call__(self, parameters: dict[str, Tensor]) -> dict[str, float]:
        """What the network with these parameters knows of theta, and how far off it is.

        Returns:
            transmission, transmission_error: J_output / J_input.
            level: mean square error on fresh samples over sigma^2 of the whole network.
            nats: expected log-likelihood ratio of the whole network's p(y | x) to this one's.
            predicted: the same from the diagonal of F, 1/2 sum_i F_ii (change of w_i)^2.
        """
        self.network.load_state_dict(parameters)
        record = self.monitor.step()
        reader = self.reader
        with torch.no_grad():
            estimates = self.network(reader.test_x)
        apart = (estimates - self.estimates).square().mean()
        error = (estimates - reader.test_theta).square().mean()
        changes = (
            (parameters[name] - w) ** 2 * self.fisher[name] for name, w in self.whole.items()
        )
        return {
            "transmission": record.transmission,
            "transmission_error": record.transmission_error,
            "level": float(error) / reader.variance,
            "nats": float(apart) / (2 * reader.variance),
            "predicted": sum(float(change.sum()) / 2 for change in changes),
        }


# --- what may go ---------------------------------------------------------------------------------


def weights_of(network: nn.Module) -> dict[str, Tensor]:
    """The weights, without biases."""
    return {name: w.detach() for name, w in network.named_parameters() if w.dim() > 1}


def weight_scores(meter: Meter) -> dict[str, Scores]:
    """How much each weight counts, in each way but chance."""
    weights = weights_of(meter.reader.network)
    return both_scopes(
        {name: meter.fisher[name] * w**2 / 2 for name, w in weights.items()},
        {name: w.abs() for name, w in weights.items()},
    )


def unit_scores(meter: Meter) -> dict[str, Scores]:
    """The same for each hidden unit with its bias, by layer: importance with all correlations
    inside of a unit, and without, as the sum over its weights."""
    reader, whole = meter.reader, meter.whole
    joint = ff.parameters.fisher(
        reader.network, meter.likelihood, reader.x[:FISHER_SAMPLES]
    ).importance(per="unit")
    importance, magnitude, apart = {}, {}, {}
    for name in list(weights_of(reader.network))[:-1]:
        layer = name.removesuffix(".weight")
        rows = torch.cat([whole[name].flatten(1), whole[f"{layer}.bias"][:, None]], 1)
        fisher = torch.cat(
            [meter.fisher[name].flatten(1), meter.fisher[f"{layer}.bias"][:, None]], 1
        )
        importance[layer], magnitude[layer] = joint[layer], rows.norm(dim=1)
        apart[layer] = (fisher * rows**2 / 2).sum(1)
    return {**both_scopes(importance, magnitude), UNCORRELATED: apart}


def both_scopes(importance: Scores, magnitude: Scores) -> dict[str, Scores]:
    """Each compared over the whole network, and within each layer alone."""
    found = {IMPORTANCE: importance, MAGNITUDE: magnitude}
    for way, scores in list(found.items()):
        found[way + EACH_LAYER] = {name: ranks(s) for name, s in scores.items()}
    return found


def ranks(scores: Tensor) -> Tensor:
    """The share of the layer that counts less, 0 to 1."""
    return scores.flatten().argsort().argsort().reshape(scores.shape) / scores.numel()


def by_chance(scores: Scores, draw: int) -> Scores:
    """Random numbers in the place of scores."""
    generator = torch.Generator().manual_seed(draw)
    return {name: torch.rand(s.shape, generator=generator) for name, s in scores.items()}


def keeping(scores: Scores, left: float) -> dict[str, Tensor]:
    """Masks of the share `left` that counts most, over all layers."""
    flat = torch.cat([s.flatten().double() for s in scores.values()])
    threshold = flat.sort(descending=True).values[max(1, round(left * len(flat))) - 1]
    return {name: s >= threshold for name, s in scores.items()}


def without_weights(network: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with zeros for the weights outside of the masks."""
    state = network.state_dict()
    return {name: w * masks[name] if name in masks else w for name, w in state.items()}


def without_units(network: nn.Module, masks: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with zeros for all that makes a unit outside of the masks."""
    state = network.state_dict()
    for layer, mask in masks.items():
        for name in (f"{layer}.weight", f"{layer}.bias"):
            state[name] = state[name] * mask.reshape(-1, *[1] * (state[name].dim() - 1))
    return state


# --- fewer bits ----------------------------------------------------------------------------------


def rounded(w: Tensor, bits: int) -> Tensor:
    """Each row of w [M, ...] at 2^bits evenly spaced levels between its extremes +-max |w|."""
    if bits == 0:
        return torch.zeros_like(w)
    largest = w.flatten(1).abs().amax(1).clamp_min(torch.finfo(w.dtype).tiny)
    step = (2 * largest / 2**bits).reshape(-1, *[1] * (w.dim() - 1))
    bound = 2 ** (bits - 1)
    return ((w / step).floor().clamp(-bound, bound - 1) + 0.5) * step


def coarser(network: nn.Module, bits: dict[str, Tensor]) -> dict[str, Tensor]:
    """The parameters with every row of every layer at its own number of bits."""
    state = network.state_dict()
    for name, numbers in bits.items():
        versions = torch.stack([rounded(state[name], b) for b in range(LARGEST_BITS + 1)])
        state[name] = versions[numbers, torch.arange(len(numbers))]
    return state


def allotted(
    weights: dict[str, Tensor], curvature: dict[str, Tensor], bits: float
) -> dict[str, Tensor]:
    """Bits of each row, `bits` a weight on average, with the least sum of curvature error^2 / 2.

    Each row takes the number that minimises its own cost plus a price for each bit; the price at
    which the bits are used up is found by bisection.
    """
    levels = range(LARGEST_BITS + 1)
    costs = {
        name: torch.stack(
            [(curvature[name] * (rounded(w, b) - w) ** 2 / 2).flatten(1).sum(1) for b in levels]
        )
        for name, w in weights.items()
    }
    sizes = {name: w[0].numel() for name, w in weights.items()}
    total = bits * sum(w.numel() for w in weights.values())

    def chosen(price: float) -> dict[str, Tensor]:
        tariff = price * torch.arange(LARGEST_BITS + 1.0, dtype=torch.float64)[:, None]
        return {name: (cost + tariff * sizes[name]).argmin(0) for name, cost in costs.items()}

    low, high = -80.0, 40.0  # logarithms of the price
    for _ in range(60):
        middle = (low + high) / 2
        used = sum(int(b.sum()) * sizes[name] for name, b in chosen(2.0**middle).items())
        low, high = (middle, high) if used > total else (low, middle)
    return chosen(2.0**high)


# --- curves --------------------------------------------------------------------------------------


def pruned(
    meter: Meter,
    scores: dict[str, Scores],
    without: Callable[[nn.Module, dict[str, Tensor]], dict[str, Tensor]],
    effort: Effort,
) -> dict[str, list[Row]]:
    """One curve for each way, one for the mean of the draws by chance."""
    network = meter.reader.network

    def row(chosen: Scores, left: float) -> Row:
        return {"left": left, **meter(without(network, keeping(chosen, left)))}

    curves = {way: [row(s, left) for left in effort.left] for way, s in scores.items()}
    first = scores[IMPORTANCE]
    curves[CHANCE] = [
        averaged([row(by_chance(first, draw), left) for draw in range(effort.draws)])
        for left in effort.left
    ]
    return curves


def averaged(rows: list[Row]) -> Row:
    """Means over draws; the error is the larger one of that of a measurement and that of the
    mean."""
    columns = {
        key: torch.tensor([row[key] for row in rows], dtype=torch.float64) for key in rows[0]
    }
    found = {key: float(column.mean()) for key, column in columns.items()}
    scatter = float(columns["transmission"].std()) / len(rows) ** 0.5
    return found | {"transmission_error": max(found["transmission_error"], scatter)}


def quantised(meter: Meter, effort: Effort) -> dict[str, list[Row]]:
    """One curve for each way to share out the bits."""
    weights = weights_of(meter.reader.network)
    same = {name: torch.ones_like(w) for name, w in weights.items()}
    curves: dict[str, list[Row]] = {}
    for way, curvature in ((IMPORTANCE, meter.fisher), (MAGNITUDE, same)):
        curves[way] = [
            {
                "bits": bits,
                **meter(coarser(meter.reader.network, allotted(weights, curvature, bits))),
            }
            for bits in effort.bits
        ]
    whole = [bits for bits in effort.bits if bits == int(bits)]
    curves[EVEN] = [
        {
            "bits": bits,
            **meter(
                coarser(
                    meter.reader.network,
                    {name: torch.full((len(w),), int(bits)) for name, w in weights.items()},
                )
            ),
        }
        for bits in whole
    ]
    return curves


def layer_by_layer(meter: Meter) -> dict[str, Any]:
    """Every layer's J / J_input of the whole network and of those with a share of its weights."""
    reader, scores = meter.reader, weight_scores(meter)
    versions = {"whole": reader.network.state_dict()}
    for way, chosen in (
        (IMPORTANCE, scores[IMPORTANCE]),
        (MAGNITUDE, scores[MAGNITUDE]),
        (CHANCE, by_chance(scores[IMPORTANCE], 0)),
    ):
        versions[way] = without_weights(reader.network, keeping(chosen, SHOWN))
    found = {}
    for way, state in versions.items():
        meter.network.load_state_dict(state)
        flow = ff.fisher_flow(meter.network, reader.data, max_features=4 * FEATURES)
        top = flow["input"].value
        found[way] = {
            layer.name: [layer.value / top, float(layer.stderr) / top] for layer in flow.layers
        }
    return found


def study(task: Task, effort: Effort, seed: int) -> dict[str, Any]:
    """All that is measured of one network."""
    meter = Meter(trained(task, effort, seed))
    return {
        "weights in all": sum(w.numel() for w in weights_of(meter.reader.network).values()),
        "sigma^2 J": meter.reader.variance * task.problem.fisher(0.0).item(),
        "whole": meter(meter.reader.network.state_dict()),
        "weights": pruned(meter, weight_scores(meter), without_weights, effort),
        "units": pruned(meter, unit_scores(meter), without_units, effort),
        "bits": quantised(meter, effort),
        "layers": layer_by_layer(meter),
    }


# --- table and figure ----------------------------------------------------------------------------


def intact(curve: list[Row], axis: str, whole: float) -> float | None:
    """The smallest size down to which the output always holds `KEPT` of what it held."""
    found = None
    for row in curve:
        if row["transmission"] < KEPT * whole:
            break
        found = row[axis]
    return found


def table(runs: Sequence[dict[str, Any]]) -> str:
    """The smallest intact network of each way, one number for each run, as docs/parameters.md shows
    it."""
    ways = list(next(iter(runs[0].values()))["units"])
    lines = ["| network | left of | " + " | ".join(ways) + " |", "|---|---|" + "---|" * len(ways)]
    for network, first in runs[0].items():
        for kind in ("weights", "units"):
            cells = [
                smallest(runs, network, kind, way) if way in first[kind] else "" for way in ways
            ]
            lines.append(f"| {network} | {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def smallest(runs: Sequence[dict[str, Any]], network: str, kind: str, way: str) -> str:
    """The smallest intact network of each run, in per cent."""
    found = []
    for run in runs:
        left = intact(run[network][kind][way], "left", run[network]["whole"]["transmission"])
        found.append("all" if left is None else f"{left:.0%}")
    return ", ".join(found)


def bits_table(figures: dict[str, Any]) -> str:
    """What fewer bits leave, as docs/parameters.md shows it."""
    lines = [
        "| network | bits | shared out by | J_output / J_input | error | nats |",
        "|---" * 6 + "|",
    ]
    for network, found in figures.items():
        for way, curve in found["bits"].items():
            lines += [
                f"| {network} | {row['bits']:g} | {way} | {row['transmission']:.3f} ±"
                f" {row['transmission_error']:.3f} | {row['level']:.2f} | {row['nats']:.2g} |"
                for row in curve
                if row["bits"] in BITS_SHOWN
            ]
    return "\n".join(lines)


def draw(figures: dict[str, Any], path: Path) -> None:
    """A row for each network: weights, units, bits, and the layers of one size."""
    from fisherfast.results.plots import DPI, new_figure

    canvas = new_figure(13.0, 3.2 * len(figures))
    grid = canvas.subplots(len(figures), 4, squeeze=False)
    for axes, (network, found) in zip(grid, figures.items(), strict=True):
        for ax, kind in zip(axes, ("weights", "units", "bits"), strict=False):
            draw_curves(ax, found, kind)
        draw_layers(axes[3], found["layers"])
        axes[0].set_ylabel(f"{network}: J_output / J_input")
    known = {}
    for ax in grid.flat:
        known |= {text: line for line, text in zip(*ax.get_legend_handles_labels(), strict=True)}
    canvas.legend(known.values(), known, loc="outside upper center", ncols=4, frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    canvas.savefig(path, dpi=DPI)


def styles() -> dict[str, tuple[str, str]]:
    """Colour and line of each way."""
    from fisherfast.results.plots import BLUE, GREEN, GREY, VERMILION

    lines = {IMPORTANCE: (BLUE, "-"), MAGNITUDE: (VERMILION, "-")}
    lines |= {way + EACH_LAYER: (colour, ":") for way, (colour, _) in lines.items()}
    lines[UNCORRELATED] = (BLUE, "--")
    return lines | {CHANCE: (GREY, "-"), EVEN: (GREEN, "-"), "whole": ("black", "-")}


def draw_curves(ax: Any, found: dict[str, Any], kind: str) -> None:
    """J_output / J_input against what is left, with the whole network's and its error."""
    axis = "bits" if kind == "bits" else "left"
    whole, error = found["whole"]["transmission"], found["whole"]["transmission_error"]
    ax.axhspan(whole - error, whole + error, color="0.9")
    for way, curve in found[kind].items():
        colour, line = styles()[way]
        at, value, bar = (
            [row[key] for row in curve] for key in (axis, "transmission", "transmission_error")
        )
        ax.errorbar(at, value, bar, color=colour, ls=line, marker=".", lw=1.2, label=way)
    ax.set_xscale("log")
    ax.invert_xaxis()
    ticks = [2, 3, 5] if kind == "bits" else [0.05, 0.1, 0.2, 0.5]
    ax.set_xticks(ticks, [f"{tick:g}" if kind == "bits" else f"{tick:.0%}" for tick in ticks])
    ax.minorticks_off()
    ax.set_ylim(bottom=0)
    ax.set_xlabel("bits a weight" if kind == "bits" else f"{kind} left")
    ax.spines[["top", "right"]].set_visible(False)


def draw_layers(ax: Any, layers: dict[str, Any]) -> None:
    """J / J_input of every layer."""
    for way, rows in layers.items():
        value, bar = zip(*rows.values(), strict=True)
        ax.errorbar(
            range(len(rows)), value, bar, color=styles()[way][0], marker=".", lw=1.2, label=way
        )
    ax.set_xticks(range(len(rows)), list(rows), rotation=45, ha="right", fontsize="x-small")
    ax.set_ylim(bottom=0)
    ax.set_xlabel(f"layer, {SHOWN:.0%} of the weights left")
    ax.spines[["top", "right"]].set_visible(False)


def main(given: Sequence[str] | None = None) -> dict[str, Any]:
    """Train, make smaller, measure, draw; returns what is written to result.json."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("pruning"), help="folder for the files")
    parser.add_argument("--networks", nargs="*", choices=list(TASKS), default=list(TASKS))
    parser.add_argument("--seed", type=int, default=0, help="of weights and samples")
    parser.add_argument("--quick", action="store_true", help="fewer samples and points")
    options = parser.parse_args(given)
    effort = QUICK if options.quick else Effort()
    figures = {}
    for name in options.networks:
        begin = time.perf_counter()
        figures[name] = study(TASKS[name](), effort, options.seed)
        print(f"{name}: {time.perf_counter() - begin:.0f} s", flush=True)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "result.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    draw(figures, options.out / "pruning.png")
    print(f"Smallest networks whose output holds {KEPT:.0%} of what it held\n\n{table([figures])}")
    print(f"\nFewer bits\n\n{bits_table(figures)}")
    return figures


if __name__ == "__main__":
    main()
