"""Wrapped models, and a fit of Lightning, in two processes at once."""

from __future__ import annotations

import json
import socket

import pytest
from support.scripts import ROOT, run_ranks

pytest.importorskip("lightning", reason="Lightning is not installed")


@pytest.mark.slow
def test_two_processes_measure_stop_and_restore_together(tmp_path):
    """Of DDP and FSDP, catches a measurement that waits for other processes, of a shard in place of
    the parameters, or that leaves the model unable to train on. Of Lightning, a rank without
    history, with errors of its own share alone, or with other weights; then the same with a
    measurement that they share, which must be that of one process (float64 sums of the same
    batches: 1e-10). Bounded by a timeout."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = ROOT / "tests" / "integrations" / "two_processes.py"
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run_ranks(script, tmp_path, **common, WORLD_SIZE="2", NODE_RANK="0")
    first, second = (json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(2))
    assert len(first["rows"]) == 3
    assert str(first["rows"]) == str(second["rows"])
    assert first["epochs"] == second["epochs"] == 3
    assert first["own"] != second["own"]
    for row, a, b in zip(first["rows"], first["own"], second["own"], strict=True):
        assert row["train_mse"] == pytest.approx((a + b) / 2, rel=1e-6)
    assert first["weights"] == second["weights"] == first["best"]
    assert len(first["together"]) == 1
    assert str(first["together"]) == str(second["together"])
    shared = first["together"][-1]["J/output"]
    assert shared == pytest.approx(first["alone"], rel=1e-10)
