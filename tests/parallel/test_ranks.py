"""Many processes give what one does, and none hangs when another fails: gloo on this machine."""

from __future__ import annotations

import json
import multiprocessing
import runpy
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from support import rank_cases

AGREEMENT = 1e-8  # relative to the largest number of its kind: 4e-14 was seen, and 4e-9 where a
# convolution has more outputs than inputs: its covariance has a condition of 1e8
SHARES_OF_FLOAT32 = 1e-4  # batches that are cut elsewhere: other float32 products; 4e-6 was seen
PRODUCTS_OF_FLOAT32 = 1e-3  # and float64 ones where the pilot of a share asks for them: 9e-5 was
# seen in the curve of lifted features, 2e-7 in J


SECONDS = 240.0  # that the processes of a test may take
LATE = 6  # timeouts of the process group that two measurements may take to fail: 2 were seen


@dataclass
class Process:
    """What became of one rank."""

    code: int | None
    errors: str
    result: Any


def run_ranks(case: str, size: int, folder: Path, *, without: int | None = None) -> list[Process]:
    """Run a case on so many processes of this machine; one of them need not end by itself."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["fisherfast", "torch._dynamo"])  # imported once for all ranks
    given = [(case, rank, size, folder) for rank in range(size)]
    children = [context.Process(target=rank_cases.main, args=one) for one in given]
    deadline = time.monotonic() + SECONDS
    try:
        for child in children:
            child.start()
        for rank, child in enumerate(children):
            if rank != without:
                child.join(max(deadline - time.monotonic(), 0.0))
                assert child.exitcode is not None, f"rank {rank} takes too long"
    finally:
        for child in children:
            if child.is_alive():
                child.kill()
                child.join()
    found = []
    for rank, child in enumerate(children):
        saved = folder / f"{rank}.pt"
        result = torch.load(saved) if saved.exists() else None
        found.append(Process(child.exitcode, (folder / f"{rank}.txt").read_text(), result))
    return found


def results_of(processes: list[Process], quiet: bool = True) -> list[Any]:
    """What they have returned; none may have failed or said anything."""
    for rank, process in enumerate(processes):
        assert process.code == 0, f"rank {rank}: {process.errors}"
        assert not (quiet and process.errors), f"rank {rank}: {process.errors}"
    return [process.result for process in processes]


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Largest difference of any number, relative to the largest of its kind."""
    assert list(found) == list(expected)
    assert all(a.shape == b.shape for a, b in zip(found.values(), expected.values(), strict=True))
    return max(
        float((found[name] - value).abs().max() / value.abs().max().clamp_min(1e-30))
        for name, value in expected.items()
        if value.numel()
    )


def alone_in_shares(size: int) -> dict[str, Any]:
    cases = {
        name: (model, rank_cases.Batches(data, size), settings)
        for name, (model, data, settings) in rank_cases.sharded_cases().items()
    }
    return rank_cases.measured(cases)


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> list[dict[str, Any]]:
    """What three ranks have found, one case after the other in the same processes."""
    return results_of(run_ranks("three", 3, tmp_path_factory.mktemp("three")))


@pytest.mark.slow
def test_ranks_measure_what_one_process_does(three):
    """Catches folds and halves that begin anew on a rank, samples counted twice or by nobody, sums
    or counts that are not added up, or added up again in a later pass, pilots that differ, and
    ranks whose bits differ."""
    alone = rank_cases.measured(rank_cases.dealt_cases())
    for name in ("grow", "grow, score"):  # the measurements compared take many passes
        assert int(alone[name]["input curve_k"][-1]) > rank_cases.SCALED + 64
    for name in ("wide", "wide, pathwise", "wide, score"):
        assert float(alone[name]["input is krylov"]) == 1
    assert float(alone["float64"]["input is krylov"]) == 0
    for kind, cases in {"dealt": alone, "shared": alone_in_shares(3)}.items():
        for name, numbers in cases.items():
            bound = PRODUCTS_OF_FLOAT32 if (kind, name) == ("shared", "float32") else AGREEMENT
            same, *others = (found["agree"][kind][name] for found in three)
            for key in numbers:
                one = difference({key: same[key]}, {key: numbers[key]})
                assert one < bound, f"{kind} {name}: {key}"
            for other in others:
                assert float(other["warnings"]) == 0
                del other["warnings"]
                assert all(torch.equal(value, same[key]) for key, value in other.items())


@pytest.mark.slow
def test_groups_come_and_go(three):
    """Catches ranks outside of the group that must take part, a group that is made where there is
    one for the host, at every measurement, or with another timeout, and one that is never let go
    of; samples of a sampler counted by its Dataset, streams of unknown length that are counted
    twice or not at all, a probe that each rank has trained on samples of its own, and what a
    destroyed group leaves behind."""
    found = [result["groups"] for result in three]
    alone = found[1]["alone"]
    assert "must contain this process" in found[1]["error"]
    for rank in (0, 2):
        assert difference(found[rank]["some"], alone) < AGREEMENT
        assert difference(found[rank]["devices"], alone) < AGREEMENT
        assert found[rank]["groups made"] == 1  # for the devices, at the first measurement
        assert found[rank]["timeout"] == rank_cases.PATIENCE
    for result in found:
        assert result["groups left"] == 0
        assert difference(result["without"], alone) < AGREEMENT
        assert difference(result["again"], alone) < AGREEMENT
        assert result["sampled"] == 2 * rank_cases.N
        assert all(map(torch.equal, result["probed"].values(), found[0]["probed"].values()))
        expected = found[1]["probed alone"]
        assert bool(result["probed"]["kind"])
        # training makes more of a rounding than 1e-10: a tenth of the error at most
        off = (result["probed"]["J"] - expected["J"]).abs()
        assert float(off) < 0.1 * float(expected["stderr"])
        streamed = result["streams"]["fc1 J"] - alone["fc1 J"]
        assert float(streamed.abs()) < float(alone["fc1 stderr"])
        assert float(result["streams"]["fc1 dof"][1]) == 2 * rank_cases.N
        assert all(map(torch.equal, result["streams"].values(), found[0]["streams"].values()))


@pytest.mark.slow
def test_the_example_prints_the_same_on_any_number_of_processes(three, capsys):
    """Catches an example that needs torchrun, or that prints once per process."""
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(str(rank_cases.EXAMPLE), run_name="__main__")
    expected = capsys.readouterr().out
    assert expected.count("J per unit of θ²") == 2
    assert [found["groups"]["example"] for found in three] == [expected, "", ""]


SAME = "must be the same on all ranks, got"

PARAMETER = f"ValueError: parameter fc1.weight {SAME} [5, 6] float32 (checksum"
NAN = "NotFiniteError: activations of layer 'input' must be finite, got NaN or infinity in batch 11"

# how the message of the rank that fails begins
OWN_ERRORS = {
    "nan": NAN,
    "loader": "OSError: disk gone",
    "argument": "ValueError: max_features must be at least 1, got 0",
    "empty": "ValueError: minus must yield at least one sample, got an empty source",
    "late": "MemoryError: full",
}
# and that of both where they differ, or fail alike
COMMON_ERRORS = {
    "settings": f"ValueError: max_features {SAME} 40 on rank 0; 41 on rank 1",
    "dtheta": f"ValueError: dtheta {SAME} [0.1] on rank 0; [0.2] on rank 1",
    "source": f"ValueError: source {SAME} independent on rank 0; score on rank 1",
    "shares": f"ValueError: data {SAME} the same data for all ranks on rank 0; each rank's own sh",
    "samples": f"ValueError: first samples of 'plus' {SAME} checksum",
    "count": f"ValueError: samples per condition {SAME} [1500, 1500] on rank 0; [1500, 1499] on ",
    "weights": PARAMETER,
    "layers": f"ValueError: layers {SAME} ['fc2'] on rank 0; ['fc1'] on rank 1",
    "function": f"ValueError: list of layers {SAME} ['input', 'fc1', 'output'] on rank 0",
    "no model": f"ValueError: model {SAME} Sequential on rank 0; none on rank 1",
    "shuffled": "ValueError: data must come in the same order at every pass to be dealt",
    "few": "ValueError: layer 'input' must see at least 32 samples per condition",
    "steps": "ValueError: all ranks must take the same steps, got: rank 0 is at point 0; rank 1 is",
    "fine": "no error",
}


@pytest.fixture(scope="module")
def together(tmp_path_factory) -> list[dict[str, Any]]:
    """What two ranks have found, one case after the other in the same processes."""
    return results_of(run_ranks("together", 2, tmp_path_factory.mktemp("together")))


def test_every_rank_hears_of_an_error(together):
    """Catches a rank that waits for one that has failed, an error without the rank that it is of,
    ranks that measure something else each and say nothing, and a group that an error breaks: all
    of these follow each other in the same processes."""
    first, last = (found["errors"] for found in together)
    assert set(first) == set(OWN_ERRORS | COMMON_ERRORS)
    for name, message in OWN_ERRORS.items():
        rank = 0 if name == "empty" else 1
        failed, other = (first, last) if name == "empty" else (last, first)
        assert failed[name].startswith(message), name
        assert other[name] == f"OtherRankError: rank {rank} failed: {failed[name]}", name
    for name, message in COMMON_ERRORS.items():
        assert last[name].startswith(message), name
        assert first[name] == last[name], name


@pytest.mark.slow
def test_a_rank_that_is_late_stops_or_ends_leaves_an_error(tmp_path):
    """Catches a hang: no measurement may take much longer than the timeout of its process group.
    First rank 1 takes part too late, then rank 2 stops in the middle of a measurement, at last
    rank 0 is killed in one: with it goes the store that all have met in. Those that are left
    measure twice: the second time the group is known to be broken."""
    first, second, third = run_ranks("ending", 3, tmp_path, without=2)
    assert first.code == third.code == -signal.SIGKILL
    assert second.code == 0, second.errors  # torch says that the store is gone
    for found, cases in (
        (first.result, ["late", "stop"]),
        (second.result, ["late", "stop", "kill"]),
    ):
        assert list(found) == cases
        for case, (said, seconds) in found.items():
            for message in said:
                assert message.startswith("OtherRankError: the other ranks could not be reached")
                assert "init_process_group(timeout=...)" in message
            assert seconds < LATE * rank_cases.SHORT, case


def test_a_model_in_training_is_measured_as_rank_0_has_it(together):
    """Catches forward passes of DistributedDataParallel, which wait for each other, a mix of the
    statistics of several ranks, and buffers that are not put back; and process_group=None that is
    collective: rank 0 alone measures at the end."""
    first, last = (found["training"] for found in together)
    assert difference(first["found"], first["expected"]) < AGREEMENT
    assert difference(last["found"], first["expected"]) < AGREEMENT
    assert first["untouched"]
    assert last["untouched"]
    assert first["names"] == ["input", "fc", "output"]  # "norm" is an affine copy


def test_a_monitor_on_all_ranks_keeps_one_history(together):
    """Catches errors that are not averaged (ranks would stop at different epochs), a file or a
    warning on each rank, and a NaN on all ranks that ends the training or the group."""
    expected = rank_cases.monitored(0, 2, group=None)
    for rank, result in enumerate(together):
        found = result["monitored"]
        assert torch.equal(found["measured"], torch.tensor([True, True, False, True]))
        assert torch.equal(found["train_mse"], expected["train_mse"])
        assert int(found["files"]) == (rank == 0)
        for name, bound in (("J", AGREEMENT), ("training", SHARES_OF_FLOAT32)):
            assert difference({name: found[name]}, {name: expected[name]}) < bound
            assert torch.equal(found[name], together[0]["monitored"][name])
        if rank:
            assert int(found["warnings"]) == 0


ROOT = Path(__file__).resolve().parents[2]


def test_the_documentation_has_the_figures_that_were_measured():
    """Catches a table that was not brought up to date with its JSON."""
    stored = json.loads((ROOT / "benchmarks" / "results" / "training.json").read_text())
    runs = stored["distributed"]["figures"]["relative difference of J, largest of all layers"]
    text = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    differences = [one for kinds in runs.values() for one in kinds.items()]
    for how, label in (("dealt", "dealt"), ("shares", "shares, batches cut elsewhere")):
        row = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
        for dtype, cell in zip(("float64", "float32"), row.split("|")[2:4], strict=True):
            worst = max(v for k, v in differences if k.startswith(how) and k.endswith(dtype))
            assert f"{worst:.0g}" == cell.strip()
