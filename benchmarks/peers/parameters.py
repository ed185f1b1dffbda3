"""The Fisher matrix of a network's parameters, against other libraries and the best of torch.

    python benchmarks/peers/parameters.py [--tiny] [--out FILE] [part ...]

peers: the same numbers as nngeometry, curvlinops and BackPACK in float64 after the conventions of
`libraries`, and where theirs are others. diagonal: time of the diagonal on residual networks
for images of 3 x 32 x 32. diagonal_memory: its peak memory beside that of a training step.

Install the other libraries by `peers.txt`; `diagonal` and `diagonal_memory` run without them, and
say so. Drawn labels ("mc") are given to the rivals for nothing: those that fisherfast draws in its
time.
"""

from __future__ import annotations

import copy
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fisherfast as ff

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks import harness
from benchmarks.harness import OURS, TINY, Contender, Effort
from benchmarks.peers import differences, libraries, networks, ways
from benchmarks.peers import memory as parameter_memory
from benchmarks.peers.libraries import Case

RESULTS = harness.ROOT / "benchmarks" / "results" / "parameters.json"
LAYOUTS = {"": torch.contiguous_format, ", channels last": torch.channels_last}
STEP, LIMIT = "training step", "forward and backward"
WHOLE = "vmap(grad), whole batch"
CLASSES = 10
# Float64, of each entry (see `entrywise_error`). Measured: at most 1.6e-14.
EXACT_TOLERANCE = 1e-12
# Float32, of the largest entry of each parameter. Measured: at most 3e-6; a ReLU whose input has
# the other sign in float32 than in float64 is a larger error, of ours as of the rivals.
TOLERANCE = 1e-3
TRIALS = 2  # of every setting of a rival, before the best takes part
CHUNKS = {"empirical": (4, 8, 16, 32), "exact": (1, 2, 4, 8)}


@dataclass(frozen=True)
class Speed:
    """A residual network, and what is measured on it."""

    name: str
    fisher_type: str
    width: int
    stages: int
    blocks: int
    samples: int = 64

    def case(self) -> Case:
        """With its data, float32."""
        model = networks.drawn(
            lambda: networks.residual(self.width, self.stages, self.blocks, CLASSES)
        )
        shape = (networks.CHANNELS, networks.SIZE, networks.SIZE)
        return Case(model, "categorical", *networks.data(shape, CLASSES, self.samples))


# The exact one of the wide networks takes minutes a call by some of the rivals.
SPEEDS = (
    *(Speed("ResNet-14, width 16", t, 16, 3, 2) for t in ("empirical", "mc", "exact")),
    *(Speed("ResNet-18, width 32", t, 32, 4, 2) for t in ("empirical", "mc")),
    Speed("ResNet-18", "empirical", 64, 4, 2),
)
# Not narrower: torch 2.13 overruns its memory in the backward pass of channels-last convolutions of
# fewer than 8 channels on CPUs without AVX-512 (abort, or no end).
TINY_SPEEDS = tuple(Speed("tiny", t, 8, 2, 1, samples=6) for t in ("empirical", "mc", "exact"))
EFFORT = Effort(turns=11, turn_seconds=0.0, case_seconds=60.0, least_turns=5)

MEMORY = (
    {"samples": 64, "width": 16, "stages": 3, "blocks": 2},
    {"samples": 64, "width": 32, "stages": 4, "blocks": 2},
    {"samples": 64, "width": 64, "stages": 4, "blocks": 2},
)
TINY_MEMORY = ({"samples": 6, "width": 8, "stages": 2, "blocks": 1},)
TINY_WAYS = ("step, SGD", "fisherfast, mc", "vmap of all")


# --- numbers -------------------------------------------------------------------------------------


def cases() -> Iterator[tuple[str, Case]]:
    """The small networks in float64, with labels of classes and with targets."""
    for name, (build, shape) in networks.NETWORKS.items():
        model = networks.drawn(build, torch.float64)
        x, y = networks.data(shape, 4, 7, torch.float64)
        yield name, Case(model, "categorical", x, y)
        generator = torch.Generator().manual_seed(2)
        targets = torch.randn(7, 4, generator=generator, dtype=torch.float64)
        yield name, Case(model, "gaussian", x, targets)


def ours(case: Case, structure: str, fisher_type: str, **settings: Any) -> Tensor:
    """[P, P], or [P] of the diagonal."""
    found = ff.parameters.fisher(
        case.model,
        case.likelihood(),
        (case.x, case.y),
        structure=structure,
        fisher_type=fisher_type,
        **settings,
    )
    return found.diag() if structure == "diag" else found.to_dense()


def rivals(case: Case, fisher_type: str) -> Iterator[tuple[str, str, dict[str, Any], Tensor]]:
    """(their name, structure of ours, its settings, their matrix in our convention)."""
    for name, structure in (("PMatDense", "full"), ("PMatBlockDiag", "block")):
        found = libraries.nngeometry_dense(case, name, fisher_type)
        yield f"nngeometry {name}", structure, {}, found
    yield (
        "nngeometry PMatDiag",
        "diag",
        {},
        libraries.nngeometry_diag(case, fisher_type),
    )
    operator = {"exact": "GGN", "empirical": "EF"}[fisher_type]
    yield (
        f"curvlinops {operator}",
        "full",
        {},
        libraries.curvlinops_dense(case, fisher_type),
    )
    if case.kind == "categorical":
        yield "BackPACK", "diag", {}, libraries.BackPack(case, fisher_type)()
    norms = any(isinstance(m, ways.NORMS) for m in case.model.modules())
    if not norms:
        yield (
            "nngeometry PMatKFAC",
            "kfac",
            {"sharing": "expand"},
            libraries.nngeometry_dense(case, "PMatKFAC", fisher_type),
        )
        for sharing in ("expand", "reduce"):
            yield (
                f"curvlinops KFAC {sharing}",
                "kfac",
                {"sharing": sharing},
                libraries.curvlinops_kfac(case, fisher_type, sharing),
            )


def same_numbers() -> list[dict[str, Any]]:
    """Relative errors of ours against each library, all asserted to be rounding."""
    rows = []
    for network, case in cases():
        for fisher_type in ("exact", "empirical"):
            for name, structure, settings, theirs in rivals(case, fisher_type):
                rows.append(_row(network, case, fisher_type, name, structure, settings, theirs))
        if case.kind == "categorical":
            labelled = Case(case.model, case.kind, case.x, libraries.curvlinops_labels(case))
            theirs = libraries.curvlinops_dense(case, "mc")
            rows.append(
                _row(network, labelled, "empirical", "curvlinops FisherMC", "full", {}, theirs)
            )
    return rows


def entrywise_error(got: Tensor, truth: Tensor) -> float:
    """The largest error of any entry: of a diagonal relative to itself, of a matrix to the root of
    the two entries of the diagonal that bound it. Where that is zero, both must be zero."""
    diagonal = truth if truth.dim() == 1 else truth.diag()
    scale = diagonal if truth.dim() == 1 else (diagonal[:, None] * diagonal).sqrt()
    error = (got - truth).abs()
    nothing = scale == 0
    if bool(error[nothing].any()):
        return float("inf")
    return float((error[~nothing] / scale[~nothing]).max())


def _row(
    network: str,
    case: Case,
    fisher_type: str,
    name: str,
    structure: str,
    settings: dict[str, Any],
    theirs: Tensor,
) -> dict[str, Any]:
    error = entrywise_error(ours(case, structure, fisher_type, **settings), theirs)
    if not error < EXACT_TOLERANCE:
        raise AssertionError(f"{structure} must equal {name} on {network}, got an error {error}")
    facts = {"network": network, "likelihood": case.kind, "fisher_type": fisher_type}
    return facts | {"peer": name, "structure": structure, **settings, "error": error}


# --- time ----------------------------------------------------------------------------------------


def in_layout(case: Case, layout: torch.memory_format) -> Case:
    """A copy in a memory format."""
    model = copy.deepcopy(case.model).to(memory_format=layout)
    return Case(model, case.kind, case.x.contiguous(memory_format=layout), case.y)


def with_drawn_labels(case: Case) -> Case:
    """The labels that fisherfast draws with its default seed."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        labels = case.likelihood().draw(case.model(case.x), 1, generator)[0]
    return Case(case.model, case.kind, case.x, labels)


def settings_of_rivals(case: Case, exact: bool) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Every setting of every rival, by family."""
    kind = "exact" if exact else "empirical"
    families: dict[str, dict[str, Callable[[], Tensor]]] = {}
    for suffix, layout in LAYOUTS.items():

        def add(
            family: str,
            setting: str,
            way: Callable[..., Tensor],
            *arguments: Any,
            suffix: str = suffix,
            layout: torch.memory_format = layout,
        ) -> None:
            own = in_layout(case, layout)  # each its own copy: some leave hooks behind
            families.setdefault(family, {})[setting + suffix] = lambda: way(own, *arguments)

        for chunk in CHUNKS[kind]:
            add("vmap(grad)", f"chunks of {chunk}", _vmap, exact, chunk)
        add(WHOLE, "", _vmap, exact, sys.maxsize)
        add("hooks", "patches", _hooks, exact, ways.by_patches)
        add("hooks", "convolutions", _hooks, exact, ways.by_grouped_convolution)
        if "nngeometry" not in libraries.missing():
            add("nngeometry", "patches", libraries.nngeometry_diag, kind)
            convolutions = libraries.nngeometry_diag_by_convolution
            add("nngeometry", "convolutions", convolutions, kind)
        if "backpack" not in libraries.missing():
            by_backpack = libraries.BackPack(in_layout(case, layout), kind)
            families.setdefault("BackPACK", {})[suffix] = by_backpack
    return families


def _vmap(case: Case, exact: bool, chunk: int) -> Tensor:
    return ways.by_vmap(case.model, case.x, case.y, exact, chunk)


def _hooks(case: Case, exact: bool, gradients: Callable[..., Tensor]) -> Tensor:
    return ways.by_hooks(case.model, case.x, case.y, exact, gradients)


def fastest(
    settings: dict[str, Callable[[], Tensor]],
) -> tuple[str | None, dict[str, float | str]]:
    """The setting that was the fastest in a trial, and seconds or the error of each."""
    trials: dict[str, float | str] = {}
    for name, way in settings.items():
        try:
            times = []
            for _ in range(TRIALS):
                start = time.perf_counter()
                way()
                times.append(time.perf_counter() - start)
            trials[name] = min(times)
        except Exception as raised:  # a library that cannot do a layout is left out with its reason
            trials[name] = f"{type(raised).__name__}: {str(raised)[:120]}"
    right = {name: seconds for name, seconds in trials.items() if isinstance(seconds, float)}
    return (min(right, key=right.__getitem__) if right else None), trials


def errors_by_parameter(model: nn.Module, truth: Tensor) -> Callable[[Tensor], float]:
    """The largest relative error of the parameters, each against its own largest entry."""
    sizes = [parameter.numel() for parameter in model.parameters()]
    parts = truth.split(sizes)

    def error_of(got: Tensor) -> float:
        return max(
            harness.relative_error(a, b)
            for a, b in zip(got.double().split(sizes), parts, strict=True)
        )

    return error_of


def measure(speed: Speed, effort: Effort) -> dict[str, Any]:
    """One network and one type: the best setting of each rival, then all in turns."""
    case = speed.case()
    exact = speed.fisher_type == "exact"
    rival_case = with_drawn_labels(case) if speed.fisher_type == "mc" else case
    double = Case(copy.deepcopy(case.model).double(), case.kind, case.x.double(), rival_case.y)
    truth = _vmap(double, exact, 1 if exact else 4)

    contenders, trials = [], {}
    for suffix, layout in LAYOUTS.items():
        own = in_layout(case, layout)
        contenders += [
            Contender(OURS + suffix, lambda c=own: ours(c, "diag", speed.fisher_type), family=""),
            Contender(STEP + suffix, lambda c=own: step(c), family=STEP + suffix),
            Contender(LIMIT + suffix, lambda c=own: limit(c, exact), family=LIMIT + suffix),
        ]
    for family, settings in settings_of_rivals(rival_case, exact).items():
        best, trials[family] = fastest(settings)
        if best is not None:
            contenders.append(Contender(f"{family} {best}".strip(), settings[best], family=family))
    comparison = harness.compare(
        contenders, errors_by_parameter(case.model, truth), TOLERANCE, effort
    )
    return {
        "network": speed.name,
        "fisher_type": speed.fisher_type,
        "samples": speed.samples,
        "P": sum(parameter.numel() for parameter in case.model.parameters()),
        **comparison.as_dict(),
        "trials": trials,
        "not installed": libraries.missing(),
    }


def step(case: Case) -> None:
    """Forward, backward to all parameters, and SGD that changes nothing; in eval mode, so that the
    network stays as it is."""
    parameters = case.parameters()
    loss = nn.functional.cross_entropy(case.model(case.x), case.y)
    gradients = torch.autograd.grad(loss, parameters)
    with torch.no_grad():
        torch._foreach_add_(parameters, list(gradients), alpha=0.0)


def limit(case: Case, exact: bool) -> None:
    """Forward, and backward to the activations alone, once or for every class: what no diagonal
    through torch's autograd can do without."""
    x = case.x.detach().requires_grad_()
    fixed = {name: value.detach() for name, value in case.model.named_parameters()}
    f = torch.func.functional_call(case.model, fixed, (x,))
    sent = list(ways.columns(f.detach(), case.y, exact))
    for number, vector in enumerate(sent):
        torch.autograd.grad(f, [x], vector, retain_graph=number + 1 < len(sent))


def line(row: dict[str, Any]) -> str:
    """One measurement for the eye."""
    ratios = "  ".join(f"{r['ratio']:.2f} x {r['best']}" for r in row["against"].values())
    left_out = "".join(f"\n  left out: {name}, {why}" for name, why in row["left out"].items())
    return (
        f"diagonal {row['network']} {row['fisher_type']}: {row['seconds'][OURS]:.3f} s  {ratios}"
        + left_out
    )


# --- parts ---------------------------------------------------------------------------------------


def peers(tiny: bool) -> dict[str, Any]:
    """The same numbers as nngeometry, curvlinops and BackPACK, float64, and where theirs differ."""
    if libraries.missing():
        raise ModuleNotFoundError(
            f"{', '.join(libraries.missing())} must be installed:"
            " pip install --no-deps -r benchmarks/peers/peers.txt"
        )
    return {
        "same": same_numbers(),
        "different": differences.rows(),
        "squared mean gradient": differences.batch_loop(),
    }


def diagonal(tiny: bool) -> list[dict[str, Any]]:
    """The diagonal on residual networks, batch 64, float32: seconds, and ratios to rivals."""
    rows = []
    for speed in TINY_SPEEDS if tiny else SPEEDS:
        rows.append(measure(speed, TINY if tiny else EFFORT))
        print(line(rows[-1]), flush=True)
    return rows


def memory(tiny: bool) -> list[dict[str, Any]]:
    """Peak memory of the diagonal over that of one training step, each in its own process."""
    rows = []
    ways = list(TINY_WAYS if tiny else parameter_memory.WAYS)
    if not tiny and not libraries.missing():
        ways += parameter_memory.PEERS
    for sizes in TINY_MEMORY if tiny else MEMORY:
        found = {way: parameter_memory.extra_bytes(way, **sizes) for way in ways}
        over_step = {way: peak / max(1, found["step, SGD"]) for way, peak in found.items()}
        rows.append({**sizes, "bytes": found, "over a step of SGD": over_step})
        print("diagonal memory", sizes, {k: round(v, 2) for k, v in over_step.items()}, flush=True)
    return rows


PARTS: dict[str, Callable[[bool], Any]] = {
    "peers": peers,
    "diagonal": diagonal,
    "diagonal_memory": memory,
}

if __name__ == "__main__":
    harness.main(__doc__, PARTS, results=RESULTS)
