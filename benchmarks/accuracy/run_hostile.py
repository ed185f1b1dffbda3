"""Thousands of generated problems with a closed form, each measured and judged (tests/hostile).

    python benchmarks/accuracy/run_hostile.py [--examples 10000] [--processes 2] [--out FILE]
    python benchmarks/accuracy/run_hostile.py --seed 17     one problem: its table and what fails
    python benchmarks/accuracy/run_hostile.py --summary     the stored result in words

The result is written after every few hundred examples; the same command goes on where a run of the
same commit was interrupted.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

sys.path.append(str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from hostile.carried import carried_layers
from hostile.generator import from_seed
from hostile.judge import Verdict, measure, verdict
from hostile.tally import MEANS, Tally

import fisherfast as ff
from benchmarks.harness import ROOT, machine

RESULTS = ROOT / "benchmarks" / "results" / "hostile.json"
EXAMPLES = 10_000
PROCESSES = 2
STORED_EVERY = 250  # examples


def examine(seed: int) -> tuple[int, Verdict]:
    """Judge one problem; for a worker."""
    return seed, verdict(from_seed(seed))


def empty() -> dict[str, Any]:
    """A result without examples; counts are by property."""
    return {
        "machine": machine(),
        "seconds": 0.0,
        "examples": 0,
        "refused": 0,
        "layers that should be resolved": 0,
        "of these resolved": 0,
        "checks": {},
        "expected first failures": {},
        "first failures": {},
        "violations": {},
        "violating seeds": {},
        "kinds": {},
    }


def add(result: dict[str, Any], seed: int, found: Verdict) -> None:
    """Count one verdict."""
    first = found.first
    result["examples"] += 1
    result["refused"] += first.refused
    result["layers that should be resolved"] += first.should_resolve
    result["of these resolved"] += first.resolved
    for check in first.checks:
        _count(result["checks"], check.name)
        _count(result["expected first failures"], check.name, check.chance)
    for check in first.failures:
        _count(result["first failures"], check.name)
    for check in found.violations:
        _count(result["violations"], check.name)
        lines = result["violating seeds"].setdefault(str(seed), [])
        lines.append(f"{check.name}: {check.where}: {check.detail}")
    if first.reading is not None:
        kind = first.reading.kind
        tally = Tally(**result["kinds"].get(kind, {"kind": kind}))
        tally.add(first.reading)
        result["kinds"][kind] = asdict(tally)


def run(examples: int, processes: int, out: Path) -> dict[str, Any]:
    """Examine the seeds from 0 on, after those that are stored already, and store the result."""
    result = _stored(out)
    before, start = result["seconds"], time.perf_counter()
    context = multiprocessing.get_context("spawn")
    with context.Pool(processes, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        seeds = range(result["examples"], examples)
        for seed, found in pool.imap(examine, seeds, chunksize=2):
            add(result, seed, found)
            if result["examples"] % STORED_EVERY == 0 or seed == seeds[-1]:
                result["seconds"] = round(before + time.perf_counter() - start, 1)
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps(result, indent=1) + "\n")
                print(f"{result['examples']} examples, {violating(result)} violate", flush=True)
    return result


def violating(result: dict[str, Any]) -> int:
    """Problems with a violation."""
    return len(result["violating seeds"])


def wrong_kinds(result: dict[str, Any]) -> list[str]:
    """What is wrong with all problems of a kind together."""
    tallies = [Tally(**sums) for sums in result.get("kinds", {}).values()]
    return [f"{tally.kind}: {failure}" for tally in tallies for failure in tally.failures()]


def summary(result: dict[str, Any]) -> str:
    """The result as Markdown."""
    should, resolved = result["layers that should be resolved"], result["of these resolved"]
    share = f"{100 * resolved / should:.1f} %" if should else "-"
    lines = [
        f"{result['examples']} problems, {sum(result['checks'].values())} checks;"
        f" {result['refused']} problems had too few samples and were refused.",
        f"Problems that violate a property again with other noise and four times the samples:"
        f" {violating(result)}. Called resolved: {resolved} of {should} layers whose error is below"
        f" a tenth and whose J lies within two errors of the truth, {share}.",
        "",
        "| property | checks | first failures | expected | violations |",
        "|---|---|---|---|---|",
    ]
    for name, checks in result["checks"].items():
        expected = f"{result['expected first failures'][name]:.1f}"
        first, again = (result[part].get(name, 0) for part in ("first failures", "violations"))
        lines.append(f"| {name} | {checks} | {first} | {expected} | {again} |")
    if result.get("kinds"):
        lines += ["", *_kinds(result)]
    return "\n".join(lines)


def _kinds(result: dict[str, Any]) -> Iterator[str]:
    """A row for each kind of problem, and what is wrong with it."""
    yield "| kind | problems | linear | J | lower | J above | lower above | resolved |"
    yield "|---|---|---|---|---|---|---|---|"
    for _, sums in sorted(result["kinds"].items()):
        tally = Tally(**sums)
        means = (tally.mean(name) for name in MEANS)
        cells = ["-" if math.isnan(mean) else f"{mean:.3f} +- {error:.3f}" for mean, error in means]
        counts = *tally.above.values(), tally.resolved
        cells += [f"{100 * count / tally.count:.1f} %" for count in counts]
        yield f"| {tally.kind} | {tally.count} | {' | '.join(cells)} |"
    yield ""
    yield from wrong_kinds(result) or ["No kind is wrong in the mean."]


def show(seed: int) -> Iterator[str]:
    """One problem, its layers and what fails."""
    problem = from_seed(seed)
    yield repr(problem)
    yield f"I = {problem.information.tolist()}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ff.FisherWarning)
            layers = measure(problem, problem.data(problem.noise()))
    except ValueError as error:
        yield f"ValueError: {error}"
    else:
        for layer, carried in zip(layers, carried_layers(problem), strict=True):
            yield f"{layer}, {layer.status}, {'carried' if carried else 'not carried'}"
    found = verdict(problem)
    for title, checks in ("first", found.first.failures), ("again", found.violations):
        for check in checks:
            yield f"{title}: {check.name}: {check.where}: {check.detail}"


def _stored(out: Path) -> dict[str, Any]:
    """What is stored from this very code, or nothing."""
    new = empty()
    if not out.exists():
        return new
    old = json.loads(out.read_text())
    commit = new["machine"]["commit"]
    same = commit is not None and not commit.endswith("+") and old["machine"]["commit"] == commit
    return old if same else new


def _count(counts: dict[str, Any], name: str, more: float = 1) -> None:
    counts[name] = counts.get(name, 0) + more


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--examples", type=int, default=EXAMPLES)
    parser.add_argument("--processes", type=int, default=PROCESSES)
    parser.add_argument("--out", type=Path, default=RESULTS, help="JSON of the result")
    parser.add_argument("--seed", type=int, help="show one problem instead")
    parser.add_argument("--summary", action="store_true", help="print what is stored instead")
    options = parser.parse_args()
    if options.seed is not None:
        print("\n".join(show(options.seed)))
    elif options.summary:
        print(summary(json.loads(options.out.read_text())))
    else:
        result = run(options.examples, options.processes, options.out)
        print(summary(result))
        sys.exit(violating(result) > 0 or bool(wrong_kinds(result)))


if __name__ == "__main__":
    main()
