"""Stopping rules on histories of chosen numbers: which epoch, which weights, in which unit."""

from __future__ import annotations

import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from support.training_histories import by_errors, by_shares, flow, number

import fisherfast as ff
from fisherfast.training.attainable import attainable_error
from fisherfast.training.record import EpochRecord
from fisherfast.training.rules import CramerRao, Transmission
from fisherfast.training.stopping_rule import StoppingRule

NAN = math.nan
THETA = torch.linspace(-1, 1, 300, dtype=torch.float64)
DIAGONAL = torch.diag(torch.tensor([4.0, 100.0], dtype=torch.float64))


def decide(
    rule: StoppingRule, history: list[EpochRecord], **asked: float
) -> tuple[int | None, int | None]:
    """(index of the record after which the rule stops, index of the best)."""
    for count in range(1, len(history) + 1):
        verdict = rule.judge(history[:count], **asked)
        if verdict.reason is not None:
            return count - 1, verdict.best
    return None, rule.judge(history, **asked).best


def unmeasured(errors: list[float]) -> list[EpochRecord]:
    return [replace(record, input_J=number(NAN)) for record in by_errors(errors)]


def of_two(J: torch.Tensor, *errors: float) -> EpochRecord:
    """A record of two parameters."""
    return EpochRecord(epoch=0, flow=None, train_mse=errors, val_mse=None, input_J=J)


PRIOR = (-0.5, 0.5)
LEVEL = attainable_error(4.0, PRIOR)
SLOW = [0.8 + 0.001 * n for n in range(30)]
ZIGZAG = [share + 0.01 * (-1) ** n for n, share in enumerate(SLOW)]
UNTRAINED = [0.05, 0.02, -0.03, 0.01, 0.0, 0.02, 0.01, -0.02]
LUCKY = by_errors([0.35, 0.35, 0.35, 0.35, 0.24, 0.35, 0.35])
FALLING = by_errors([1.5 * 2.0**-n for n in range(6)], J=8.0)
PLATEAU = by_shares([0.1, 0.4, 0.6, 0.8, 0.6, 0.5, 0.55, 0.5, 0.5, 0.5])
LIFTED = by_shares([0.5, 0.8, 0.75, 0.7, 0.7], lifted=[0.0, 0.0, 0.1, 0.0, 0.0])
NEARLY_FLAT = by_shares([0.3, 0.79, 0.8, 0.795, 0.785, 0.781, 0.7, 0.7])
UNRESOLVED = by_shares([300.0, 200.0, 100.0], J=0.02, stderr=0.04)


NUMPY = CramerRao(min_epochs=np.int32(3), smoothing=np.int64(2))


def exact(plateau: int = 5, **options: object) -> Transmission:
    return Transmission(plateau=plateau, tolerance=0.0, **options)


DECISIONS = {
    # J = 4, so at 0.25, met exactly: catches a strict comparison, mse / J, sqrt(mse), and a
    # crossing at the other side (0.26 is above)
    "at the bound": (CramerRao(), by_errors([1.0, 0.3, 0.26, 0.25, 0.2, 0.1]), (3, 3)),
    # a rule that stops when the error stops falling
    "above the bound": (CramerRao(), by_errors([0.5, 0.3, 0.3, 0.4, 0.3]), (None, 4)),
    # below the bound for 3 epochs in succession, the first of them is best: forgotten patience
    # (stop at 0), epochs that are merely counted (3), the last instead of the best
    "patience": (CramerRao(), by_errors([0.2, 0.2, 0.3, 0.2, 0.2, 0.2]), (5, 3), {"patience": 2}),
    # stop at 0.9 of 1 / J = 0.225: min_delta in theta^2 (0.15) or ignored (0.24)
    "min_delta": (CramerRao(), by_errors([0.3, 0.24, 0.225, 0.1]), (2, 2), {"min_delta": 0.1}),
    # epochs count from 1 here: an index instead of the number (stop at number 4)
    "min_epochs": (CramerRao(min_epochs=3), by_errors([0.1] * 6, first=1), (2, 2)),
    # J is NaN until it is measured: a stop (or a crash) on NaN
    # a NaN error that counts as below the bound
    "not finite": (CramerRao(), by_errors([0.5, NAN, 0.3, 0.2]), (3, 3)),
    "unmeasured": (CramerRao(), unmeasured([0.01, 0.01]), (None, None)),
    "measured": (CramerRao(), unmeasured([0.01] * 2) + by_errors([0.3, 0.2]), (3, 3)),
    # a prior that is not used, and a bound that is raised by it
    "prior": (CramerRao(prior=PRIOR), by_errors([0.25, 1.01 * LEVEL, 0.99 * LEVEL]), (2, 2)),
    # the network learns theta / 2 and the error was not converted: 0.0625 is 0.25 in theta^2;
    # the scale itself, its inverse, and a scale that is ignored
    "target_scale": (CramerRao(target_scale=2.0), by_errors([0.13, 0.07, 0.0625]), (2, 2)),
    # 1 / least_error, and a rule that still waits for a measurement
    "least_error": (CramerRao(least_error=0.3), unmeasured([0.5, 0.3, 0.2]), (1, 1)),
    # a line through the logarithms of 2^-n is exact: a mean of the window, one epoch late
    "no smoothing of a fall": (CramerRao(), FALLING, (4, 4)),
    "smoothing of a fall": (CramerRao(smoothing=3), FALLING, (4, 4)),
    # one of five epochs is below by chance: smoothing that is ignored
    "one lucky epoch": (CramerRao(), LUCKY, (4, 4)),
    "smoothing": (CramerRao(smoothing=5), LUCKY, (None, 6)),
    # counts from an array, refused although `every` takes one
    "numpy": (NUMPY, by_errors([0.2] * 5), (4, 3), {"patience": np.int64(1)}),
    # the largest is at 3, so the stop at 3 + plateau + patience: a forgotten plateau (4) or
    # patience (6), and a rise above the previous epoch instead of the largest
    "plateau": (exact(3), PLATEAU, (6, 3)),
    "plateau and patience": (exact(3), PLATEAU, (8, 3), {"patience": 2}),
    "plateau of 5": (exact(), PLATEAU, (8, 3)),
    # a counter that is not reset by a new largest share
    "a later rise": (exact(3), by_shares([0.5, 0.6, 0.5, 0.5, 0.7] + [0.6] * 4), (7, 4)),
    # within 2 % of 0.8 is 0.784: the first of the plateau, an absolute tolerance (0.78), the last
    "tolerance": (Transmission(), NEARLY_FLAT, (7, 4)),
    # a stop at small rises without min_delta
    "rising": (Transmission(), by_shares([0.5 + 0.001 * n for n in range(20)]), (None, 19)),
    # min_delta is in errors of the difference: a rise of 0.001 an epoch without noise is one, under
    # noise of 0.01 none in five epochs. Catches the error of one share (far larger: neither would
    # be a rise), min_delta as a share (both would), and as ignored
    "min_delta, smooth": (exact(), by_shares(SLOW, stderr=0.2), (None, 29), {"min_delta": 3.0}),
    "min_delta, noisy": (exact(), by_shares(ZIGZAG, stderr=0.2), (7, 6), {"min_delta": 3.0}),
    # every second epoch is measured: a plateau of epochs without a measurement, NaN as the largest
    "every second": (exact(3), by_shares([0.5, NAN, 0.8] + [NAN, 0.6] * 3), (8, 2)),
    "never": (Transmission(), by_shares([NAN]), (None, None)),
    # shares of an untrained network are noise, 0.05 +- 0.05: a stop before anything was learned
    "untrained": (Transmission(), by_shares(UNTRAINED, stderr=0.2), (None, 0)),
    "resolved": (Transmission(), by_shares(UNTRAINED, stderr=0.001), (5, 0)),
    # a best epoch that is looked for after min_epochs only
    "best before": (exact(2, min_epochs=9), by_shares([0.5, 0.8] + [0.6] * 12), (9, 1)),
    # the lift adds 0.1 at epoch 2 only: an `information` that is ignored
    "linear": (exact(9), LIFTED, (None, 1)),
    "lifted": (exact(9, information="J"), LIFTED, (None, 2)),
    # J_input = 0.02 +- 0.04: shares of 317 that fall made the rule stop; then it is resolved
    "unresolved": (Transmission(plateau=1), UNRESOLVED, (None, None)),
    "resolved later": (Transmission(plateau=1), [*UNRESOLVED, *by_shares([0.5, 0.6])], (None, 4)),
}


def test_smoothing_keeps_an_exponential_fall():
    """To the last digit: catches a line that is not fitted about the middle of its window."""
    history = list(FALLING)
    smooth, raw = CramerRao(smoothing=3).levels(history), CramerRao().levels(history)
    assert smooth == pytest.approx(raw, rel=1e-12)


@pytest.mark.parametrize("case", DECISIONS)
def test_when_a_rule_stops_and_what_is_best(case):
    """The comment beside each case says what it catches."""
    rule, history, expected, *asked = DECISIONS[case]
    assert decide(rule, history, **dict(*asked)) == expected


@pytest.mark.parametrize(
    ("make", "one", "other"),
    [
        (CramerRao, by_errors([0.5, 0.4, 0.3]), by_errors([0.5, 0.2, 0.2])),
        (lambda: exact(1), by_shares([0.3, 0.4, 0.5]), by_shares([0.3, 0.2, 0.1])),
    ],
    ids=["crlb", "transmission"],
)
def test_one_rule_judges_many_histories(make, one, other):
    """A rule keeps what it has computed of a history that grows. Catches values of another history
    of the same length, and of one that was cut."""
    rule = make()
    assert make().judge(one) != make().judge(other)
    for history in (one, other, one[:1], other[:2], one, other):
        assert rule.judge(history) == make().judge(history)


# --- the level of the training error --------------------------------------------------------------

BOTH = torch.tensor([[-1.0, 0.0], [0.0, 0.1], [1.0, 0.2]])
CORRELATED = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
LAYERS = [flow(number(J), number(J))["input"] for J in (1.0, 4.0)]


def attainable(*priors: object) -> list[float]:
    return [attainable_error(J, prior) for J, prior in zip((4.0, 100.0), priors, strict=False)]


@pytest.mark.parametrize(
    ("options", "J", "expected"),
    [
        # forms of a prior: ends taken for one prior each of two parameters, samples for ranges, an
        # array for one; of two parameters, priors that are mixed up
        ({"prior": (torch.tensor(-1.0), torch.tensor(1.0))}, number(4.0), attainable((-1, 1))),
        ({"prior": [np.float32(-1), np.int64(1)]}, number(4.0), attainable((-1, 1))),
        ({"prior": [(-1, 1)]}, number(4.0), attainable((-1, 1))),
        ({"prior": THETA}, number(4.0), attainable(THETA)),
        ({"prior": THETA.numpy()[:, None]}, number(4.0), attainable(THETA)),
        ({"prior": BOTH}, DIAGONAL, attainable(*BOTH.T)),
        ({"prior": [(-1, 1), (0, 0.2)]}, DIAGONAL, attainable((-1, 1), (0, 0.2))),
        # J = 1 and 4, mean of 1 / J: catches 1 / mean J (0.4), and J of the monitor
        ({"input_J": [1.0, 4.0]}, number(100.0), [0.625]),
        ({"input_J": LAYERS}, number(9.0), [0.625]),
        # each alone could have an error of 1, both unknown 1 / 0.64: catches 1 / J_pp
        ({}, CORRELATED, [1 / 0.64] * 2),
    ],
)
def test_least_errors(options, J, expected):
    assert CramerRao(**options).least_errors(J) == pytest.approx(expected)


def test_two_parameters_count_by_their_own_bounds():
    """J = [[4, 0], [0, 100]]: levels 4 * 0.3 and 100 * 0.006 have mean 0.9. Catches errors that
    are added before they are divided (0.306 > 0.26), and one J for both."""
    record = of_two(DIAGONAL, 0.3, 0.006)
    assert CramerRao().levels([record]) == [pytest.approx(0.9)]
    assert CramerRao().judge([record]).reason is not None


# --- the share of the information ----------------------------------------------------------------


def test_noise_is_that_of_a_difference():
    """Independent noise of 0.01 on a parabola: sqrt(2) * 0.01 in the mean of 200 windows. The
    median of 7 absolute values scatters by 40 %, the mean over windows (10 apart, independent)
    by 3 %: 4 sigma bounds. Catches first differences (the slope would count), a missing sqrt(2)
    or sqrt(20)."""
    generator = torch.Generator().manual_seed(0)
    steps = torch.arange(10.0, dtype=torch.float64)
    noise = 0.01 * torch.randn(200, 10, generator=generator, dtype=torch.float64)
    curves = 0.8 + 0.2 * steps - 0.01 * steps**2 + noise
    found = [Transmission().noise(curve.tolist()) for curve in curves]
    assert 0.85 < sum(found) / len(found) / (math.sqrt(2) * 0.01) < 1.15


def test_share_of_two_parameters():
    """tr(J_input^-1 J_output) / 2 with correlated parameters, and does not depend on their
    unit. Catches a ratio of traces or of determinants, and elementwise division."""
    J_in = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
    J_out = torch.tensor([[1.0, 0.4], [0.4, 0.3]], dtype=torch.float64)
    wanted = float((J_in.inverse() @ J_out).trace()) / 2
    for units in (1.0, 1.0), (1.0, 1000.0):
        unit = torch.tensor(units, dtype=torch.float64).diag()
        measured = flow(unit @ J_in @ unit, unit @ J_out @ unit)
        record = EpochRecord(0, measured, None, None, measured["input"].J)
        assert Transmission().shares([record]) == [pytest.approx(wanted, rel=1e-9)]


def test_share_of_a_head_that_was_named_and_of_an_input_within_its_error():
    """`output=` of the measurement. Catches a rule that reads the whole output all the same, and a
    division by an input that cannot be told from zero."""
    joint = flow(number(4.0), number(3.0))
    head = replace(joint.layers[1], name="output[mean]", J=number(1.0), linear=number(1.0))
    for output, share in ((None, 0.75), ("output[mean]", 0.25)):
        measured = ff.FisherFlow((*joint.layers, head), {"output": output})
        record = EpochRecord(0, measured, None, None, number(4.0))
        assert Transmission().shares([record]) == [pytest.approx(share)]
        assert record.transmission == pytest.approx(share)
    assert all(map(math.isnan, Transmission().shares(UNRESOLVED)))
    assert math.isnan(UNRESOLVED[0].transmission)
    assert math.isnan(UNRESOLVED[0].transmission_error)


# --- what is refused ------------------------------------------------------------------------------

NOISY = flow(number(0.02), number(1.0), stderr=0.04).layers[0]  # below its level is every error
RANGE = "prior must be (low, high) with low < high, or a tensor of"


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (CramerRao, {"min_epochs": -2}, "min_epochs must be at least 0, got -2"),
        (CramerRao, {"min_epochs": 1.5}, "min_epochs must be a whole number, got 1.5"),
        (CramerRao, {"smoothing": 0}, "smoothing must be at least 1, got 0"),
        (CramerRao, {"smoothing": True}, "smoothing must be a whole number, got True"),
        (CramerRao, {"target_scale": 0.0}, "target_scale must be positive and finite, got 0.0"),
        (CramerRao, {"target_scale": "x"}, "target_scale must be a number or one per parameter"),
        (CramerRao, {"target_scale": None}, "target_scale must be a number or one per parameter"),
        (CramerRao, {"least_error": NAN}, "least_error must be positive and finite, got nan"),
        (CramerRao, {"input_J": []}, "input_J must hold the information at least at one theta"),
        (CramerRao, {"input_J": 5.0}, "input_J must be a list of numbers, [P, P] tensors"),
        (CramerRao, {"input_J": ["5"]}, "input_J must be a list of numbers, [P, P] tensors"),
        (CramerRao, {"input_J": [NOISY]}, "input_J must be 3 errors above zero, got LayerFisher"),
        (CramerRao, {"prior": (1.0, -1.0)}, RANGE),
        (CramerRao, {"prior": 3.0}, RANGE),
        (CramerRao, {"prior": "ab"}, RANGE),
        (CramerRao, {"prior": [(0, 1), (2, 1)]}, "theta, got (2, 1)"),
        (CramerRao, {"prior": torch.ones(4)}, "prior must hold more than one value of theta"),
        (CramerRao, {"least_error": 1.0, "prior": (0, 1)}, "without prior and input_J, got both"),
        (Transmission, {"information": "lower"}, 'information must be "linear" or "J", got'),
        (Transmission, {"tolerance": 1.0}, "tolerance must be at least 0 and below 1, got 1.0"),
        (Transmission, {"tolerance": -0.1}, "tolerance must be at least 0 and below 1, got -0.1"),
        (Transmission, {"plateau": 0}, "plateau must be at least 1, got 0"),
    ],
)
def test_bad_settings(rule, options, message):
    """Catches settings that are found out in the middle of a training."""
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        rule(**options)


@pytest.mark.parametrize(
    ("options", "history", "message"),
    [
        ({}, by_errors([-1.3]), "train_mse must be a mean square error.*transmission"),
        ({}, by_errors([0.5, None]), "train_mse must be given.*got None in epoch 1"),
        ({}, by_errors([0.5], J=-0.1), "input_J must be positive definite for rule 'crlb'"),
        ({}, [of_two(DIAGONAL, 0.3)], "train_mse must hold an error for each of the 2"),
        ({"prior": (-1, 1)}, [of_two(DIAGONAL, 0.3, 0.3)], "prior must be given for each of the 2"),
        ({"target_scale": [1, 1, 1]}, [of_two(DIAGONAL, 0.3, 0.3)], "must be one number or 2, got"),
    ],
)
def test_histories_without_a_level(options, history, message):
    """Catches a stop at the first log-likelihood below 0, a rule that silently never stops, a
    negative bound, which nothing can reach, and broadcasting over parameters."""
    with pytest.raises(ValueError, match=message):
        CramerRao(**options).judge(history)
