"""Many processes against one: how far J is off, what is sent, and how long that takes.

All processes run on this machine and share its cores: seconds tell what adding up costs, not how a
measurement scales.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fisherfast as ff
from fisherfast.estimation.fold_moments import FoldMoments
from fisherfast.parallel.ranks import Ranks, ranks_of
from fisherfast.problems import GaussianShift, gaussian_network

sys.path.append(str(Path(__file__).resolve().parents[2]))

from benchmarks.harness import ROOT, main

RESULTS = Path(ROOT) / "benchmarks" / "results" / "training.json"

SIZES = (1, 2, 3)
DTHETA = 0.03
BATCH = 2000  # no share is a whole number of these: batches are cut elsewhere than in one process
PATIENCE = 120.0  # timeout of the process group in seconds
REPEATS = 40
FEATURES = 512
Measured = dict[str, dict[str, torch.Tensor]]


def distributed(tiny: bool) -> dict[str, Any]:
    """J on 1, 2 and 3 ranks relative to one process without a group; bytes and seconds of a sum."""
    with tempfile.TemporaryDirectory() as folder:
        runs = {size: _run(size, tiny, Path(folder)) for size in SIZES}
    alone = _measure(0, 1, tiny, None)
    differences = {
        str(size): {
            name: max(_difference(found[name], alone[name]) for found in ranks["measured"])
            for name in alone
        }
        for size, ranks in runs.items()
    }
    sent = 8 * sum(part.numel() for part in FoldMoments(FEATURES, 2).shared_sums())
    return {
        "relative difference of J, largest of all layers": differences,
        "same bits on all ranks": {str(size): ranks["same"] for size, ranks in runs.items()},
        "features": FEATURES,
        "bytes of a layer": sent,
        "layers": 6,
        "seconds to add up all layers, 2 ranks": runs[2]["adding"],
        "seconds to meet, 2 ranks": runs[2]["meeting"],
        "repeats": REPEATS,
    }


def _run(size: int, tiny: bool, folder: Path) -> dict[str, Any]:
    """What so many processes find; all of them have the same numbers, or the same bits too."""
    command = [sys.executable, __file__, "--rank"]
    children = [
        subprocess.Popen([*command, str(rank), str(size), str(int(tiny)), str(folder)])
        for rank in range(size)
    ]
    try:
        codes = [child.wait(20 * PATIENCE) for child in children]
    finally:
        for child in children:
            child.kill()
    if any(codes):
        raise RuntimeError(f"all ranks must end well, got {codes}")
    found = [torch.load(folder / f"{size}-{rank}.pt") for rank in range(size)]
    first = found[0]["measured"]
    same = all(
        torch.equal(J, first[name][layer])
        for other in found[1:]
        for name, layers in other["measured"].items()
        for layer, J in layers.items()
    )
    return found[0] | {"measured": [each["measured"] for each in found], "same": same}


def _rank(rank: int, size: int, tiny: bool, folder: Path) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{folder}/store{size}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=PATIENCE),
    )
    found: dict[str, Any] = {"measured": _measure(rank, size, tiny, "world")}
    with ranks_of("world") as ranks:
        if ranks is not None:
            found |= _time(ranks)
    torch.save(found, folder / f"{size}-{rank}.pt")
    dist.destroy_process_group()


def _time(ranks: Ranks) -> dict[str, dict[str, float]]:
    """Seconds to add up six layers, and to meet without adding anything. The shortest are those of
    a rank that waits for nobody: of an idle machine."""
    layers = [FoldMoments(FEATURES, 2) for _ in range(6)]
    adding, meeting = [], []
    for _ in range(REPEATS):
        start = time.perf_counter()
        for layer in layers:
            ranks.add_up(layer.shared_sums())
        adding.append(time.perf_counter() - start)
        start = time.perf_counter()
        ranks.exchange("meeting")
        meeting.append(time.perf_counter() - start)
    return {
        name: {"shortest": min(seconds), "median": statistics.median(seconds)}
        for name, seconds in (("adding", adding), ("meeting", meeting))
    }


def _measure(rank: int, size: int, tiny: bool, group: str | None) -> Measured:
    """J of each layer of the Gaussian task's network, in each way to share the work."""
    count = 1500 if tiny else 10_000
    problem = GaussianShift(torch.ones(256))
    model = gaussian_network(seed=0)
    settings: dict[str, Any] = {"settings": ff.Settings(batch_size=BATCH), "process_group": group}
    settings |= {"max_features": 300 if tiny else FEATURES}
    minus, plus = problem.finite_difference(0.0, DTHETA, count)._sources
    few = [x[: 200 if tiny else 100] for x in (minus, plus)]  # compressed: fewer than dimensions

    def share(*conditions: torch.Tensor) -> ff.Shard:
        parts = (x.tensor_split(size)[rank] for x in conditions)
        return ff.Shard(ff.FiniteDifference(*parts, dtheta=DTHETA))

    def measure(model: torch.nn.Module, data: Any, **also: Any) -> dict[str, torch.Tensor]:
        flow = ff.fisher_flow(model, data, **(settings | also))
        return {layer.name: layer.J for layer in flow}

    whole = ff.FiniteDifference(minus, plus, dtheta=DTHETA)
    wide = ff.FiniteDifference(*few, dtheta=DTHETA)
    compressed = {"max_features": 64, "settings": ff.Settings(batch_size=25)}
    found = {
        "dealt, float32": measure(model, whole),
        "shares, float32": measure(model, share(minus, plus)),
        "dealt, compressed, float32": measure(model, wide, **compressed),
    }
    model = model.double()
    return found | {
        "dealt, float64": measure(model, whole),
        "shares, float64": measure(model, share(minus, plus)),
        "shares, compressed, float64": measure(model, share(*few), **compressed),
    }


def _difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest relative difference over the layers."""
    return max(float((found[name] / J - 1).abs().max()) for name, J in expected.items())


if __name__ == "__main__":
    if sys.argv[1:2] == ["--rank"]:
        rank, size, tiny, folder = sys.argv[2:]
        _rank(int(rank), int(size), bool(int(tiny)), Path(folder))
    else:
        main(__doc__ or "", {"distributed": distributed}, results=RESULTS)
