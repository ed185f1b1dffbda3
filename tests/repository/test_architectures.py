"""The comparison of other people's networks says what is wrong, too slow, or not installed."""

from __future__ import annotations

import json
import time

import torch
from support.scripts import run_script
from torch import nn

from benchmarks.peers import architecture_zoo as zoo
from benchmarks.peers import architectures


def _calls(function) -> zoo.Architecture:
    def calls(net, x):
        return function(net(x))

    return zoo.Architecture("timm", lambda: zoo.Calls(nn.Linear(4, 3), calls), (4,))


CASES = {
    "right": _calls(torch.tanh),
    "refused": _calls(lambda x: torch.special.zeta(x.abs() + 2, x.abs() + 1)),
    "slow": _calls(lambda x: time.sleep(0.1) or x),
}


def test_rows_say_what_happened(monkeypatch):
    """Catches a refusal that ends the run, a limit that does not hold, and a library that is left
    out in silence."""
    monkeypatch.setattr(zoo, "ARCHITECTURES", CASES)
    monkeypatch.setattr(zoo, "PACKAGES", {"timm": "torch", "another": "no_such_module"})
    right = architectures.measured("right", 60)
    assert right["error"] < 1e-7
    assert right["error in float32"] < 1e-5
    assert (right["layers"], right["layers without a number"]) == (3, 0)
    refused = architectures.measured("refused", 60)
    assert "zeta" in refused["derivative_errors failed"]
    assert "zeta" in refused["flow failed"]
    assert architectures.measured("slow", 0.2)["flow failed"] == "not within 0 s"
    assert zoo.missing() == ["another"]


def test_stored_architectures():
    """Catches a stored run that leaves one out, or says of less than forty that they were equal."""
    stored = json.loads(architectures.RESULTS.read_text())
    rows = stored["architectures"]
    assert set(rows) == set(zoo.ARCHITECTURES)
    assert len(rows) == 40
    assert not stored["skipped"]
    assert run_script("benchmarks/peers/architectures.py", "--table").count("\n") == 11
