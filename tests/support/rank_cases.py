"""What the processes of a test run: ``main(case, rank, size, folder)``.

Each case is a function of rank and size; what it returns is saved in FOLDER for the test to read.
The folder also holds the store that the processes meet in.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import signal
import socket
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.data.distributed import DistributedSampler

import fisherfast as ff
from fisherfast.data import Batch, Data
from fisherfast.estimation import probe
from fisherfast.measurement import run
from fisherfast.parallel import ranks
from fisherfast.problems import GaussianShift, mlp

EXAMPLE = Path(__file__).parents[2] / "examples" / "distributed.py"
N, DIM, BATCH = 1500, 6, 128
WIDE, WIDE_SAMPLES = 300, 150
SCALED = 30  # a scale of so many dimensions needs more than the first 64 lifted features
SETTINGS = {"max_features": 40, "settings": ff.Settings(batch_size=BATCH)}
GROWING = ff.Settings(batch_size=BATCH, grow=True)
MAPS = ff.Settings(batch_size=BATCH, maps=True)
ONE_BATCH = ff.Settings(batch_size=N)
PATIENCE = 120.0  # timeout of the process group in seconds; a test machine may be slow
SHORT = 5.0  # the same where a rank ends or stops


Cases = dict[str, tuple[nn.Module, Any, dict[str, Any]]]
"""Model, data and settings by name."""


def gaussian(parameters: int, dim: int = DIM) -> GaussianShift:
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(dim, dim, generator=generator, dtype=torch.float64) / dim**0.5
    direction = torch.randn(dim, parameters, generator=generator, dtype=torch.float64)
    return GaussianShift(direction, root @ root.T + 0.5 * torch.eye(dim, dtype=torch.float64))


def conditions(parameters: int, n: int = N, dim: int = DIM, paired: bool = False) -> Any:
    world, zero = gaussian(parameters, dim), [0.0] * parameters
    simulator = ff.Simulator(
        world.sample, zero, samples=n, dtheta=0.1, derivative="paired" if paired else "independent"
    )
    x = [next(simulator.read(c, n)).x for c in range(simulator.conditions)]
    return ff.FiniteDifference(x[::2], x[1::2], dtheta=0.1, paired=paired)


def scales() -> tuple[torch.Tensor, torch.Tensor]:
    """A Gaussian scale: every lifted feature adds to what is known of it."""
    x = torch.randn(2, N, SCALED, generator=torch.Generator().manual_seed(3))
    return 0.95 * x[0], 1.05 * x[1]


def scale_and_score() -> tuple[torch.Tensor, torch.Tensor]:
    x = scales()[0] / 0.95
    return x, x.square().sum(1) - SCALED


def images(n: int = 400) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    noise = torch.randn(n, 1, 6, 6, generator=generator)
    shape = torch.linspace(-0.2, 0.2, 36).reshape(1, 6, 6)
    return noise - shape, noise.flip(0) + shape


def net(dim: int = DIM, dtype: torch.dtype = torch.float32) -> nn.Module:
    return mlp([dim, 5, 3], nn.ReLU, seed=0).to(dtype)


def conv_net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 12, 3), nn.ReLU(), nn.Flatten(), nn.Linear(192, 2))


class Heads(nn.Module):
    """Two outputs of a body."""

    def __init__(self) -> None:
        super().__init__()
        self.body = net()

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        mean, spread = self.body(x).split([1, 2], 1)
        return {"mean": mean, "spread": spread.square(), "n": len(x)}


def dealt_cases() -> Cases:
    """Model, data and settings of measurements of data that all ranks have."""
    one, two, wide = gaussian(1), gaussian(2), gaussian(1, WIDE)
    x = images()
    small = {"max_features": 32, "settings": ff.Settings(batch_size=64)}
    growing = {"max_features": SCALED + 128, "settings": GROWING}
    scored = one.scored([0.0], N)
    loader = DataLoader(TensorDataset(scored._x, scored._companion), batch_size=90)
    return {
        "paired": (net(), conditions(1, paired=True), {}),
        "score": (net(), two.scored([0.0, 0.0], N), {}),
        "several outputs": (Heads(), one.pathwise([0.0], N), {"output": "output[mean]"}),
        "memory budget": (net(), conditions(1), {"memory_budget": "36 MB", "settings": ONE_BATCH}),
        "loader": (net(), ff.Score(loader), {}),
        "float64": (net(dtype=torch.float64), conditions(1), {}),
        "grow": (net(SCALED), ff.FiniteDifference(*scales(), dtheta=0.1), growing),
        "grow, score": (net(SCALED), ff.Score(*scale_and_score()), growing),
        "maps": (conv_net(), ff.FiniteDifference(*x, dtheta=0.1), {"settings": MAPS}),
        "wide": (net(WIDE), conditions(1, WIDE_SAMPLES, WIDE), small),
        "wide, pathwise": (net(WIDE), wide.pathwise([0.0], WIDE_SAMPLES), small),
        "wide, score": (net(WIDE), wide.scored([0.0], WIDE_SAMPLES), small),
        "one batch": (net(), one.scored([0.0], N), {"settings": ONE_BATCH}),
    }


def share(rank: int, size: int, n: int) -> slice:
    """Uneven shares: the last rank has about twice as much as the first."""
    ends = [0, *(n * (r + 1) * (r + 2 + size) // (size * (2 * size + 1)) for r in range(size))]
    return slice(ends[rank], ends[rank + 1])


class Batches(Data):
    """The batches of all shares, one after the other, in one process."""

    def __init__(self, like: Data, size: int, batch: int = BATCH) -> None:
        self.source, self.dtheta, self.paired = like.source, like.dtheta, like.paired
        self.parameters, self.conditions = like.parameters, like.conditions
        self.groups = like.groups
        self._like, self._size, self._batch = like, size, batch

    def read(self, condition: int, batch_size: int) -> Iterator[Batch]:
        whole = next(self._like.read(condition, 10**9))
        for rank in range(self._size):
            rows = share(rank, self._size, len(whole))
            x = whole.x[rows].split(self._batch)
            score = whole.score
            scores = [None] * len(x) if score is None else score[rows].split(self._batch)
            yield from (Batch(a, score=b) for a, b in zip(x, scores, strict=True))

    def samples(self, condition: int) -> int | None:
        return self._like.samples(condition)

    def repeats(self, condition: int) -> bool:
        return True

    def pick(self, condition: int, numbers: torch.Tensor) -> Batch | None:
        """As the shares do: those of scores are loaders."""
        return None if self.source == "score" else self._like.pick(condition, numbers)


def grouped(minus: torch.Tensor, plus: torch.Tensor) -> ff.FiniteDifference:
    """Groups of three neighbours, of which some lie on two ranks."""
    groups = torch.arange(len(minus)) // 3
    return ff.FiniteDifference(minus, plus, dtheta=0.1, groups=groups)


def sharded_cases() -> Cases:
    """Measurements of data that are to be cut into shares."""
    minus, plus = conditions(1)._sources
    longer = torch.cat([plus, plus[:77] + 0.01])
    double = net(dtype=torch.float64)
    growing = {"max_features": SCALED + 128, "settings": GROWING}
    return {
        "independent": (double, ff.FiniteDifference(minus, longer, dtheta=0.1), {}),
        "float32": (net(), ff.FiniteDifference(minus, longer, dtheta=0.1), {}),
        "paired": (double, conditions(1, paired=True), {}),
        "groups": (double, grouped(minus, plus), {}),
        "score": (net(), gaussian(1).scored([0.0], N), {}),
        "grow": (net(SCALED, torch.float64), ff.FiniteDifference(*scales(), dtheta=0.1), growing),
        "wide": (net(WIDE, torch.float64), conditions(1, WIDE_SAMPLES, WIDE), {"max_features": 32}),
    }


def share_of(data: Any, rank: int, size: int) -> ff.Shard:
    """The share of a rank, as tensors or as a loader of pairs."""
    if isinstance(data, ff.Score):
        x, score = (t[share(rank, size, len(t))] for t in (data._x, data._companion))
        return ff.Shard(ff.Score(DataLoader(TensorDataset(x, score), batch_size=BATCH)))
    parts = [t[share(rank, size, len(t))] for t in data._sources]
    groups = None
    if data.groups is not None:
        groups = [t[share(rank, size, len(t))] for t in data.groups.numbers]
    return ff.Shard(
        ff.FiniteDifference(
            parts[::2], parts[1::2], dtheta=data.dtheta, paired=data.paired, groups=groups
        )
    )


def numbers_of(flow: ff.FisherFlow) -> dict[str, torch.Tensor]:
    """All that a measurement gives, by layer and name."""
    names = ("J", "stderr", "lower", "lower_stderr", "linear", "naive", "curve_k", "curve_J")
    found = {f"{layer.name} {name}": getattr(layer, name) for layer in flow for name in names}
    for layer in flow:
        found[f"{layer.name} dof"] = torch.tensor([layer.effective_dim, layer.samples])
        found[f"{layer.name} is krylov"] = torch.tensor([float(layer.feature_kind == "krylov")])
    for name, where in flow.maps.items():
        found |= {f"{name} map": where.J, f"{name} map stderr": where.stderr}
    return found


def measured(cases: Cases, **also: Any) -> dict[str, dict[str, torch.Tensor]]:
    """What all of them give, and whether they warned."""
    found = {}
    for name, (model, data, settings) in cases.items():
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            found[name] = numbers_of(ff.fisher_flow(model, data, **(SETTINGS | settings | also)))
        found[name]["warnings"] = torch.tensor([float(len(seen))])
    return found


def agree(rank: int, size: int) -> dict[str, Any]:
    """Every kind of measurement, dealt and in shares."""
    shares = {
        name: (model, share_of(data, rank, size), settings)
        for name, (model, data, settings) in sharded_cases().items()
    }
    return {
        "dealt": measured(dealt_cases(), process_group="world"),
        "shared": measured(shares, process_group="world"),
    }


def streams(data: Any, rank: int, size: int) -> ff.Shard:
    """The share of a rank as streams that do not tell their length."""
    parts = [t[share(rank, size, len(t))] for t in data._sources]
    return ff.Shard(
        ff.FiniteDifference(*(_stream(part) for part in parts), dtheta=0.1, paired=data.paired)
    )


def _stream(x: torch.Tensor) -> Callable[[], Iterator[torch.Tensor]]:
    return lambda: iter(x.split(BATCH))


def said(call: Callable[[], Any]) -> str:
    """The error that a call raises."""
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def measure(model: Any, data: Any, **also: Any) -> ff.FisherFlow:
    """A measurement on all ranks."""
    return ff.fisher_flow(model, data, **(SETTINGS | {"process_group": "world"} | also))


class AtTheEnd(TensorDataset):
    """Samples of which the last one does something when it is read."""

    def __init__(self, x: torch.Tensor, act: Callable[[], None]) -> None:
        super().__init__(x)
        self._act = act

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == len(self) - 1:
            self._act()
        return super().__getitem__(index)[0]


def nothing() -> None:
    """A sample like all others."""


def disk_gone() -> None:
    raise OSError("disk gone")


def errors(rank: int, size: int) -> dict[str, str]:
    """What each rank says when one fails or they disagree; after all of it they still work."""
    last = rank == size - 1
    data, model = conditions(1), net()
    minus, plus = data._sources
    spoilt = plus.clone()
    spoilt[-1, 0] = torch.nan if last else 0.0
    other = plus + 1e-6 * last
    scored = gaussian(1).scored([0.0], N)
    trained = net()
    with torch.no_grad():
        trained.fc1.weight[0, 0] += float(last)

    def pair(a: torch.Tensor, b: Any, dtheta: float = 0.1) -> ff.FiniteDifference:
        return ff.FiniteDifference(a, b, dtheta=dtheta)

    def shard(a: Any, b: Any) -> ff.Shard:
        return ff.Shard(pair(a, b))

    short = minus if rank else minus[:0]
    calls: dict[str, Callable[[], Any]] = {
        "nan": lambda: measure(model, shard(minus, spoilt)),
        "loader": lambda: measure(
            model, shard(minus, AtTheEnd(plus, disk_gone if last else nothing))
        ),
        "settings": lambda: measure(model, data, max_features=40 + last),
        "argument": lambda: measure(model, data, max_features=0 if last else 40),
        "dtheta": lambda: measure(model, pair(minus, plus, 0.1 + 0.1 * last)),
        "source": lambda: measure(model, scored if last else data),
        "shares": lambda: measure(model, ff.Shard(data) if last else data),
        "samples": lambda: measure(model, pair(minus, other)),
        "count": lambda: measure(model, pair(minus, plus[: N - last])),
        "weights": lambda: measure(trained, data),
        "layers": lambda: measure(model, data, layers=["fc1"] if last else ["fc2"]),
        "function": lambda: measure(model, data, layers=lambda name, _: last or name == "fc1"),
        "no model": lambda: (
            ff.fisher_information(data, process_group="world") if last else measure(model, data)
        ),
        "empty": lambda: measure(model, shard(short, minus)),
        "shuffled": lambda: measure(
            model, ff.FiniteDifference(*(DataLoader(x, 32, True) for x in (minus, plus)), dtheta=1)
        ),
        "few": lambda: measure(model, pair(minus[:9], plus[:9])),
        "steps": lambda: meet(f"at point {rank}"),
        "late": lambda: fail_late(model, data, last),
        "fine": lambda: measure(model, data),
    }
    return {name: said(call) for name, call in calls.items()}


def fail_late(model: nn.Module, data: Any, fails: bool) -> None:
    """A measurement that fails after its last pass, on one rank."""
    given = {"side_effect": MemoryError("full")} if fails else {"wraps": run.with_status}
    with mock.patch.object(run, "with_status", **given):
        measure(model, data)


def meet(point: str) -> None:
    """One meeting point, as a measurement has many."""
    with ranks.ranks_of("world") as others:
        others.exchange(point)


class Normalised(nn.Module):
    """A network with buffers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(DIM, 4)
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(self.norm(self.fc(x)))


def training(rank: int, size: int) -> dict[str, Any]:
    """A model in the midst of distributed training: wrapped, statistics of each rank's batches."""
    data = conditions(1)
    model = Normalised()
    wrapped = nn.parallel.DistributedDataParallel(model)
    with torch.no_grad():
        model.norm.running_mean += rank
        model.norm.num_batches_tracked += 2**60 + rank
    kept = {name: value.clone() for name, value in model.state_dict().items()}
    flow = measure(wrapped, data)
    grads = [parameter.requires_grad for parameter in model.parameters()]
    same = all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
    expected = ff.fisher_flow(wrapped, data, **SETTINGS) if rank == 0 else None  # not collective
    dist.barrier()
    return {
        "found": numbers_of(flow),
        "expected": expected and numbers_of(expected),
        "untouched": same and model.training and all(grads),
        "names": flow.names,
    }


def monitored(rank: int, size: int, group: str | None = "world") -> dict[str, Any]:
    """A monitor on all ranks: errors that differ by rank, and an epoch whose weights are NaN."""
    model, data, training = net(), conditions(1), conditions(1, n=300)
    folder = tempfile.mkdtemp()
    monitor = ff.FisherMonitor(
        model,
        data,
        max_features=40,
        settings=ff.Settings(batch_size=BATCH),
        training_data=ff.Shard(training) if group else ff.Shard(_repeated(training, size)),
        process_group=group,
        path=f"{folder}/{rank}.csv",
    )
    weights = next(model.parameters())
    for epoch in range(4):
        with torch.no_grad():
            value = weights.clone()
            weights.mul_(1.1 if epoch != 2 else float("nan"))
        mean = 1.0 + epoch + (rank if group else (size - 1) / 2)
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always")
            monitor.step(train_mse=mean)
        with torch.no_grad():
            weights.copy_(value * 1.1)
    rows = [record.row() for record in monitor.history]
    J = [torch.zeros(1, 1) if r.flow is None else r.flow["output"].J for r in monitor.history]
    flows = [record.training_flow for record in monitor.history]
    return {
        "J": torch.stack(J),
        "training": torch.stack([f["output"].J for f in flows if f is not None]),
        "measured": torch.tensor([record.flow is not None for record in monitor.history]),
        "train_mse": torch.tensor([row["train_mse"] for row in rows], dtype=torch.float64),
        "files": torch.tensor(len(os.listdir(folder))),
        "warnings": torch.tensor(len(heard)),
    }


def _repeated(data: Any, size: int) -> Any:
    """The samples of all shares, where every rank has the same."""
    x = [torch.cat([next(data.read(c, 10**6)).x] * size) for c in range(2)]
    return ff.FiniteDifference(*x, dtheta=0.1)


def probed(**also: Any) -> dict[str, torch.Tensor]:
    """A measurement with a probe."""
    x = scale_and_score()[0][:800]
    data = ff.Score(x[:, :4].contiguous(), x[:, :4].square().sum(1) - 4)
    with mock.patch.multiple(probe, WIDTH=16, STEPS=300, LEAST_STEPS=100):  # trained in a second
        info = ff.fisher_information(data, **(SETTINGS | {"probe": "network"} | also))
    return {"J": info.J, "stderr": info.stderr, "kind": torch.tensor(info.feature_kind == "probe")}


def some_ranks(rank: int, model: nn.Module, data: Data) -> dict[str, Any]:
    """Two of three ranks, with a backend for the host and with one for devices alone."""
    dist.Backend.register_backend("devices", _for_devices, devices=["cuda"])
    some = dist.new_group([0, 2])
    of_devices = dist.new_group([0, 2], timedelta(seconds=PATIENCE), backend="devices")
    if rank == 1:
        return {"error": said(lambda: measure(model, data, process_group=some))}
    known = len(dist.distributed_c10d._world.pg_map)
    found: dict[str, Any] = {"some": numbers_of(measure(model, data, process_group=some))}
    found["devices"] = numbers_of(measure(model, data, process_group=of_devices))
    measure(model, data, process_group=of_devices)
    found["groups made"] = len(dist.distributed_c10d._world.pg_map) - known
    host = ranks.find_ranks(of_devices)._group
    found["timeout"] = host._get_backend(torch.device("cpu")).options._timeout.seconds
    return found


def example(rank: int, size: int, port: int) -> str:
    """What the example prints in an environment such as torchrun makes."""
    given = {"RANK": rank, "WORLD_SIZE": size, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    environment = {name: str(value) for name, value in given.items()}
    printed = io.StringIO()
    with mock.patch.dict(os.environ, environment), contextlib.redirect_stdout(printed):
        runpy.run_path(str(EXAMPLE), run_name="__main__")
    return printed.getvalue()


def groups(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Some of the ranks, one alone, all, and all again after the group was destroyed."""
    data, model = conditions(1), net()
    found = some_ranks(rank, model, data)
    if rank == 1:  # this process alone, in a group that waits for it at the barrier
        found["alone"] = numbers_of(ff.fisher_flow(model, data, **SETTINGS))
        found["probed alone"] = probed()
    dist.barrier()
    loaders = [
        DataLoader(x, BATCH, sampler=DistributedSampler(TensorDataset(x), shuffle=False))
        for x in data._sources
    ]
    sampled = measure(model, ff.Shard(ff.FiniteDifference(*loaders, dtheta=0.1)))
    found["sampled"] = sampled["fc1"].samples
    found["probed"] = probed(process_group="world")
    found["streams"] = numbers_of(measure(model, streams(data, rank, size)))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = [free.getsockname()[1]]
    dist.broadcast_object_list(port)
    dist.destroy_process_group()
    found["groups left"] = len(ranks._ON_HOST)
    found["example"] = example(rank, size, port[0])
    found["without"] = numbers_of(measure(model, data))
    again = f"file://{folder / 'again'}"
    dist.init_process_group("gloo", init_method=again, rank=rank, world_size=size)
    found["again"] = numbers_of(measure(model, data))
    return found


def _for_devices(store: Any, rank: int, size: int, timeout: timedelta) -> Any:
    """A backend that, like NCCL, is there for tensors of devices alone."""
    return dist.ProcessGroupGloo(store, rank, size, timeout)


def attempt(group: Any, act: Callable[[], None] = nothing, times: int = 2) -> tuple[Any, float]:
    """What a measurement of a group says at each try, and how long all of them take in seconds."""
    minus, plus = conditions(1)._sources
    shard = ff.Shard(ff.FiniteDifference(minus, AtTheEnd(plus, act), dtheta=0.1))
    begin = time.monotonic()
    found = [said(lambda: measure(net(), shard, process_group=group)) for _ in range(times)]
    return found, time.monotonic() - begin


def ending(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """Rank 1 comes too late, then rank 2 stops, then rank 0 is killed."""
    short = timedelta(seconds=SHORT)
    two, three, last = (dist.new_group(members, short) for members in ([0, 1], [0, 1, 2], [0, 1]))
    patient = dist.new_group([0, 1], timedelta(seconds=PATIENCE))
    found = {}
    if rank < 2:
        time.sleep(1.5 * SHORT * rank)
        found["late"] = attempt(two, times=1)
    dist.barrier()
    found["stop"] = attempt(
        three, lambda: os.kill(os.getpid(), signal.SIGSTOP) if rank == 2 else None
    )
    dist.barrier(group=patient)
    torch.save(found, folder / f"{rank}.pt")
    found["kill"] = attempt(
        last, lambda: os.kill(os.getpid(), signal.SIGKILL) if rank == 0 else None
    )
    return found


def together(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """One after the other in the same processes."""
    return {case.__name__: case(rank, size) for case in (errors, training, monitored)}


def three(rank: int, size: int, folder: Path) -> dict[str, Any]:
    """The same of the cases that take long."""
    return {"agree": agree(rank, size), "groups": groups(rank, size, folder)}


def main(case: str, rank: int, size: int, folder: Path) -> None:
    errors = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(errors, sys.stderr.fileno())
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    join(rank, size, folder)
    torch.save(CASES[case](rank, size, folder), folder / f"{rank}.pt")
    dist.destroy_process_group()  # gloo's threads abort a process that ends while they run


def join(rank: int, size: int, folder: Path) -> None:
    """Meet at a server that rank 0 keeps, as in real use: it ends with rank 0."""
    told = folder / "port"
    if rank == 0:
        store = dist.TCPStore("127.0.0.1", 0, size, is_master=True, wait_for_workers=False)
        (folder / "new").write_text(str(store.port))
        (folder / "new").rename(told)
    else:
        while not told.exists():
            time.sleep(0.02)
        store = dist.TCPStore("127.0.0.1", int(told.read_text()), size, is_master=False)
    store.set(f"started {rank}", "")
    store.wait([f"started {other}" for other in range(size)])
    dist.init_process_group(
        "gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=PATIENCE)
    )


CASES = {case.__name__: case for case in (together, three, ending)}
