"""Wrapped models, and a fit of Lightning, in two processes at once."""

from __future__ import annotations

import json
import socket

import pytest
from support.scripts import ROOT, run_ranks

pytest.importorskip("lightning", reason="Lightning is not installed")


@pytest.mark.slow
def test_two_processes_measure_stop_and_restore_together(tmp_path):
    """With DDP and FSDP, catches a measurement that waits for the other process, that sees a shard
    instead of all parameters, or after which the model cannot be trained further. With Lightning,
    catches a rank that has no history, that averages errors over its own share only, or that ends
    with other weights. A measurement shared by both must equal that of one process (float64 sums of
    the same batches: 1e-10). A timeout bounds the test."""
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
