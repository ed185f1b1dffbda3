"""The published numbers, typed a second time: catches a digit that was changed."""

from __future__ import annotations

import published

from fisherfast.problems import GaussianScale


def test_lift_curve():
    """Catches a published value that was changed, and a problem whose truth is another one."""
    assert published.LIFT_CURVE == {0: 4.4, 100: 63.4, 200: 77.2, 400: 90.3, 800: 95.6, 1300: 97.7}
    truth = GaussianScale(published.LIFT_DIM).fisher(published.LIFT_THETA).item()
    assert truth == published.LIFT_FISHER == 100
    assert published.LIFT_STEP == 0.1


def test_flows():
    """Catches a published value that was changed or slipped into another layer or epoch."""
    gaussian = """0 .327 .157 .053 .014 .001; 1 .654 .564 .519 .503 .481;
        5 .919 .920 .909 .904 .885; 15 .996 1.008 1.007 1.007 .976"""
    lognormal = """0 .981 .910 .755 .582 .034; 2 .971 .949 .911 .872 .808;
        -1 .988 .992 .991 .987 .969"""
    imaging = "-2 .770 .131 .018 .004 .003; -1 .981 .854 .835 .824 .822"
    for text, values in (
        (gaussian, published.GAUSSIAN_FLOW),
        (lognormal, published.LOGNORMAL_FLOW),
        (imaging, published.IMAGING_FLOW),
    ):
        rows = [row.split() for row in text.split(";")]
        assert values == {int(epoch): tuple(map(float, row)) for epoch, *row in rows}
    assert (published.FIRST, published.LAST) == (-2, -1)


def test_early_stopping():
    """Catches another network or another bound than the published ones."""
    assert published.STOPPING_WIDTHS == (256, 1000, 500, 300, 50, 1)
    assert (published.STOPPING_EXCESS, published.STOPPING_RISE) == (0.03, 1 / 3)
