"""The self-check passes here, reports failures, and prints only to a stream that is given."""

import io

import torch

from fisherfast import ops
from fisherfast.ops import reference, selfcheck


def test_passes_and_leaves_the_random_state_alone(capsys):
    """Silent without a stream. Catches an op that is left out."""
    state, stream = torch.get_rng_state(), io.StringIO()
    report = selfcheck.run_selfcheck(stream)
    assert report.passed
    devices = 1 + (torch.cuda.device_count() if torch.cuda.is_available() else 0)
    checked = {row.op for row in report.rows}
    others = {"FisherSolve", "fisher_solve_details"}  # the same kernel
    assert checked == set(ops.__all__) - others
    assert len(report.rows) == len(checked) * 2 * devices
    assert stream.getvalue() == selfcheck.format_report(report) + "\n"
    assert "all checks passed" in stream.getvalue()
    assert {"fisherfast", "torch", "native core", "CUDA kernels"} <= report.facts.keys()
    assert capsys.readouterr() == ("", "")
    assert torch.equal(torch.get_rng_state(), state)


def test_a_wrong_and_a_raising_op_fail(monkeypatch):
    def wrong(*args, **kwargs):
        sums, cross = spatial_moments(*args, **kwargs)
        return sums * 1.001, cross

    def raising(*args, **kwargs):
        raise RuntimeError("no kernel image")

    spatial_moments = reference.spatial_moments
    monkeypatch.setattr(reference, "spatial_moments", wrong)
    monkeypatch.setattr(reference, "moments", raising)
    report = selfcheck.run_selfcheck()
    assert not report.passed
    assert {row.op for row in report.rows if not row.passed} == {"spatial_moments", "moments"}
    text = selfcheck.format_report(report)
    assert "FAILED (RuntimeError: no kernel image)" in text
    each = len(report.rows) // len({row.op for row in report.rows})
    assert f"{2 * each} of {len(report.rows)} checks failed" in text
