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


def decide(
    rule: StoppingRule, history: list[EpochRecord], **asked: float
) -> tuple[int | None, int | None]:
    """(index of the record after which the rule stops, index of the best)."""
    for count in range(1, len(history) + 1):
        verdict = rule.judge(history[:count], **asked)
        if verdict.reason is not None:
            return count - 1, verdict.best
    return None, rule.judge(history, **asked).best


class TestCramerRao:
    """Training error against the least error of an estimate."""

    def test_stops_at_the_first_epoch_at_or_below_the_bound(self):
        """J = 4, so at 0.25, met exactly. Catches a strict comparison, mse / J, sqrt(mse), and a
        crossing at the other side (0.26 is above)."""
        history = by_errors([1.0, 0.3, 0.26, 0.25, 0.2, 0.1])
        assert decide(CramerRao(), history) == (3, 3)

    def test_goes_on_above_the_bound(self):
        """Catches a rule that stops when the error stops falling."""
        assert decide(CramerRao(), by_errors([0.5, 0.3, 0.3, 0.4, 0.3])) == (None, 4)

    def test_patience_counts_epochs_in_succession(self):
        """Patience 2: below the bound for 3 epochs in succession, and the first of them is best.
        Catches forgotten patience (stop at 1), epochs that are merely counted (stop at 5), and the
        last instead of the best."""
        history = by_errors([0.3, 0.2, 0.2, 0.3, 0.2, 0.2, 0.2, 0.1])
        assert decide(CramerRao(), history, patience=2) == (6, 4)

    def test_min_delta_lowers_the_level(self):
        """Stop at 0.9 of 1 / J = 0.225. Catches min_delta in theta^2 (0.15) or ignored (0.24)."""
        assert decide(CramerRao(), by_errors([0.3, 0.24, 0.225, 0.1]), min_delta=0.1) == (2, 2)

    def test_min_epochs_is_an_epoch_number(self):
        """Epochs count from 1 here. Catches an index instead of the number (stop at number 4)."""
        history = by_errors([0.1] * 6, first=1)
        stop, best = decide(CramerRao(min_epochs=3), history)
        assert (history[stop].epoch, history[best].epoch) == (3, 3)

    def test_epochs_before_the_first_measurement_wait(self):
        """J is NaN until it is measured. Catches a stop (or a crash) on NaN."""
        early = [replace(r, input_J=number(NAN)) for r in by_errors([0.01, 0.01])]
        history = early + by_errors([0.3, 0.2], first=2)
        assert CramerRao().judge(early).best is None
        assert decide(CramerRao(), history) == (3, 3)

    def test_prior_lowers_the_level(self):
        """On a range of two standard errors the attainable error is below 0.6 of 1 / J. Catches a
        prior that is not used, and a bound that is raised by it."""
        prior = (-0.5, 0.5)
        level = attainable_error(4.0, prior)
        assert level < 0.15
        history = by_errors([0.25, 1.01 * level, 0.99 * level])
        assert decide(CramerRao(prior=prior), history) == (2, 2)

    @pytest.mark.parametrize(
        ("prior", "expected"),
        [
            ((torch.tensor(-1.0), torch.tensor(1.0)), (-1.0, 1.0)),
            ([np.float32(-1), np.int64(1)], (-1.0, 1.0)),
            ([(-1, 1)], (-1.0, 1.0)),
            (THETA, THETA),
            (THETA.numpy(), THETA),
            (THETA.numpy()[:, None], THETA),
        ],
    )
    def test_forms_of_a_prior(self, prior, expected):
        """Catches ends that are taken for one prior each of two parameters, samples that are taken
        for ranges, and an array that is taken for one."""
        wanted = [attainable_error(4.0, expected)]
        assert CramerRao(prior=prior).least_errors(number(4.0)) == wanted

    def test_counts_of_numpy(self):
        """Catches a count from an array that is refused although `every` takes one."""
        rule = CramerRao(min_epochs=np.int32(3), smoothing=np.int64(2))
        assert decide(rule, by_errors([0.2] * 5), patience=np.int64(1)) == (4, 3)

    def test_information_that_cannot_be_told_from_zero(self):
        """Catches a level from a J of 0.02 +- 0.04, which every error is below."""
        noisy = flow(number(0.02), number(1.0), stderr=0.04).layers[0]
        with pytest.raises(
            ValueError, match="input_J must be 3 errors above zero, got LayerFisher"
        ):
            CramerRao(input_J=[noisy])

    def test_several_J_average_the_errors(self):
        """J = 1 and 4: mean of 1 / J is 0.625. Catches 1 / mean J (0.4), and J of the monitor."""
        rule = CramerRao(input_J=[1.0, 4.0])
        assert rule.least_errors(number(100.0)) == [pytest.approx(0.625)]
        layers = [flow(number(J), number(J))["input"] for J in (1.0, 4.0)]
        assert CramerRao(input_J=layers).least_errors(number(9.0)) == [pytest.approx(0.625)]

    def test_target_scale_is_squared(self):
        """The network learns theta / 2 and the error was not converted: 0.0625 is 0.25 in theta^2.
        Catches the scale itself, its inverse, and a scale that is ignored."""
        history = by_errors([0.13, 0.07, 0.0625])
        assert decide(CramerRao(target_scale=2.0), history) == (2, 2)

    def test_least_error_replaces_J(self):
        """Catches 1 / least_error, and a rule that still waits for a measurement."""
        unmeasured = [replace(r, input_J=number(NAN)) for r in by_errors([0.5, 0.3, 0.2])]
        assert decide(CramerRao(least_error=0.3), unmeasured) == (1, 1)

    def test_smoothing_follows_a_falling_error_without_lag(self):
        """Error 1.5 * 2^-n: a line through the logarithms is exact. Catches a mean of the window,
        which stops one epoch late."""
        falling = by_errors([1.5 * 2.0**-n for n in range(6)], J=8.0)
        assert decide(CramerRao(smoothing=3), falling) == decide(CramerRao(), falling)

    def test_smoothing_passes_over_one_lucky_epoch(self):
        """One of five epochs is below by chance. Catches smoothing that is ignored: it stops at 4;
        the line through 5 ends at exp(-0.6 * 0.36) of the others, 1.21 * 0.81 < 1 too, so 1.4."""
        history = by_errors([0.35, 0.35, 0.35, 0.35, 0.24, 0.35, 0.35])
        assert decide(CramerRao(), history) == (4, 4)
        assert decide(CramerRao(smoothing=5), history)[0] is None

    def test_two_parameters_count_by_their_own_bounds(self):
        """J = [[4, 0], [0, 100]]: levels 4 * 0.3 and 100 * 0.006 have mean 0.9. Catches errors that
        are added before they are divided (0.306 > 0.26), and one J for both."""
        J = torch.diag(torch.tensor([4.0, 100.0], dtype=torch.float64))
        record = EpochRecord(epoch=0, flow=None, train_mse=(0.3, 0.006), val_mse=None, input_J=J)
        assert CramerRao().levels([record]) == [pytest.approx(0.9)]
        assert CramerRao().judge([record]).reason is not None

    def test_correlated_parameters_use_the_inverse(self):
        """J = [[1, 0.6], [0.6, 1]]: each alone could have an error of 1, both unknown 1 / 0.64.
        Catches 1 / J_pp."""
        J = torch.tensor([[1.0, 0.6], [0.6, 1.0]], dtype=torch.float64)
        assert CramerRao().least_errors(J) == [pytest.approx(1 / 0.64)] * 2

    def test_prior_of_two_parameters(self):
        """Pairs, or columns of a tensor. Catches parameters that are mixed up."""
        J = torch.diag(torch.tensor([4.0, 100.0], dtype=torch.float64))
        theta = torch.tensor([[-1.0, 0.0], [0.0, 0.1], [1.0, 0.2]])
        wanted = [attainable_error(4.0, theta[:, 0]), attainable_error(100.0, theta[:, 1])]
        assert CramerRao(prior=theta).least_errors(J) == pytest.approx(wanted)
        pairs = CramerRao(prior=[(-1.0, 1.0), (0.0, 0.2)]).least_errors(J)
        assert pairs == pytest.approx(
            [attainable_error(4.0, (-1.0, 1.0)), attainable_error(100.0, (0.0, 0.2))]
        )

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"min_epochs": -2}, "min_epochs must be at least 0, got -2"),
            ({"min_epochs": 1.5}, "min_epochs must be a whole number, got 1.5"),
            ({"smoothing": 0}, "smoothing must be at least 1, got 0"),
            ({"smoothing": True}, "smoothing must be a whole number, got True"),
            ({"target_scale": 0.0}, "target_scale must be positive and finite, got 0.0"),
            ({"target_scale": "x"}, "target_scale must be a number or one per parameter, got 'x'"),
            ({"target_scale": None}, "target_scale must be a number or one per parameter"),
            ({"least_error": NAN}, "least_error must be positive and finite, got nan"),
            ({"input_J": []}, "input_J must hold the information at least at one theta, got none"),
            ({"input_J": 5.0}, "input_J must be a list of numbers, [P, P] tensors"),
            ({"input_J": ["5"]}, "input_J must be a list of numbers, [P, P] tensors"),
            ({"prior": (1.0, -1.0)}, "prior must be (low, high) with low < high, or a tensor of"),
            ({"prior": 3.0}, "prior must be (low, high) with low < high, or a tensor of theta"),
            ({"prior": "ab"}, "prior must be (low, high) with low < high, or a tensor of theta"),
            ({"prior": [(0, 1), (2, 1)]}, "theta, got (2, 1)"),
            ({"prior": torch.ones(4)}, "prior must hold more than one value of theta, got 1.0"),
            (
                {"least_error": 1.0, "prior": (0.0, 1.0)},
                "least_error must be given without prior and input_J, got both",
            ),
        ],
    )
    def test_bad_settings(self, options, message):
        """Catches settings that are found out in the middle of a training."""
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            CramerRao(**options)

    @pytest.mark.parametrize(
        ("history", "message"),
        [
            (by_errors([-1.3]), "train_mse must be a mean square error.*transmission"),
            (by_errors([0.5, None]), "train_mse must be given.*got None in epoch 1"),
            (by_errors([0.5], J=-0.1), "input_J must be positive definite for rule 'crlb'"),
        ],
    )
    def test_histories_without_a_level(self, history, message):
        """Catches a stop at the first log-likelihood below 0, a rule that silently never stops, and
        a negative bound, which nothing can reach."""
        with pytest.raises(ValueError, match=message):
            CramerRao().judge(history)

    def test_wrong_number_of_parameters(self):
        """Catches broadcasting over parameters."""
        J = torch.eye(2, dtype=torch.float64)
        record = EpochRecord(epoch=0, flow=None, train_mse=(0.3,), val_mse=None, input_J=J)
        with pytest.raises(ValueError, match="train_mse must hold an error for each of the 2"):
            CramerRao().judge([record])
        with pytest.raises(ValueError, match="prior must be given for each of the 2 parameters"):
            CramerRao(prior=(-1.0, 1.0)).least_errors(J)
        both = replace(record, train_mse=(0.3, 0.3))
        with pytest.raises(ValueError, match="target_scale must be one number or 2, got 3"):
            CramerRao(target_scale=[1.0, 1.0, 1.0]).judge([both])


class TestTransmission:
    """J_output / J_input that stops rising."""

    def test_stops_at_a_plateau(self):
        """The largest is at 3, so the stop at 3 + plateau + patience. Catches a forgotten plateau
        (4) or patience (6), and a rise above the previous epoch instead of the largest."""
        history = by_shares([0.1, 0.4, 0.6, 0.8, 0.6, 0.5, 0.55, 0.5, 0.5, 0.5])
        assert decide(Transmission(plateau=3, tolerance=0.0), history) == (6, 3)
        assert decide(Transmission(plateau=3, tolerance=0.0), history, patience=2) == (8, 3)
        assert decide(Transmission(tolerance=0.0), history) == (8, 3)

    def test_a_later_rise_begins_anew(self):
        """Catches a counter that is not reset by a new largest share."""
        history = by_shares([0.5, 0.6, 0.5, 0.5, 0.7, 0.6, 0.6, 0.6, 0.6])
        assert decide(Transmission(plateau=3, tolerance=0.0), history) == (7, 4)

    def test_best_is_the_last_of_the_plateau(self):
        """Within 2 % of 0.8 is 0.784. Catches the first of the plateau, an absolute tolerance (0.78
        is within 0.02 of 0.8), and the last epoch of all."""
        history = by_shares([0.3, 0.79, 0.8, 0.795, 0.785, 0.781, 0.7, 0.7])
        assert decide(Transmission(plateau=5, tolerance=0.02), history) == (7, 4)

    def test_goes_on_while_it_rises(self):
        """Catches a stop at small rises without min_delta."""
        history = by_shares([0.5 + 0.001 * n for n in range(20)])
        assert decide(Transmission(), history) == (None, 19)

    def test_min_delta_counts_in_errors_of_the_difference(self):
        """A rise of 0.001 an epoch under noise of 0.01 is no rise in five epochs; without noise it
        is one. Catches min_delta in units of the standard error of one share (far larger: neither
        would be a rise), as a share (both would), and as ignored."""
        slow = [0.8 + 0.001 * n for n in range(30)]
        noisy = [s + 0.01 * (-1) ** n for n, s in enumerate(slow)]
        rule = Transmission(tolerance=0.0)
        assert decide(rule, by_shares(slow, stderr=0.2), min_delta=3.0)[0] is None
        assert decide(rule, by_shares(noisy, stderr=0.2), min_delta=3.0)[0] is not None

    def test_noise_is_that_of_a_difference(self):
        """Independent noise of 0.01 on a parabola: sqrt(2) * 0.01 in the mean of 200 windows. The
        median of 7 absolute values scatters by 40 %, the mean over windows (10 apart, independent)
        by 3 %: 4 sigma bounds. Catches first differences (the slope would count), a missing sqrt(2)
        or sqrt(20)."""
        generator = torch.Generator().manual_seed(0)
        steps = torch.arange(10.0, dtype=torch.float64)
        found = []
        for _ in range(200):
            noise = 0.01 * torch.randn(10, generator=generator, dtype=torch.float64)
            curve = 0.8 + 0.2 * steps - 0.01 * steps**2
            found.append(Transmission().noise((curve + noise).tolist()))
        mean = sum(found) / len(found)
        assert 0.85 < mean / (math.sqrt(2) * 0.01) < 1.15

    def test_unmeasured_epochs_are_passed_over(self):
        """Every second epoch is measured. Catches a plateau of epochs without a
        measurement, and NaN as the largest."""
        history = by_shares([0.5, NAN, 0.8, NAN, 0.6, NAN, 0.6, NAN, 0.6, NAN])
        assert decide(Transmission(plateau=3, tolerance=0.0), history) == (8, 2)
        assert Transmission().judge(by_shares([NAN])).best is None

    def test_noise_before_the_training_has_begun(self):
        """Shares of an untrained network are noise, 0.05 +- 0.05: no plateau. Catches a stop before
        anything was learned."""
        untrained = [0.05, 0.02, -0.03, 0.01, 0.0, 0.02, 0.01, -0.02]
        history = by_shares(untrained, stderr=0.2)
        assert decide(Transmission(), history)[0] is None
        assert decide(Transmission(), by_shares(untrained, stderr=0.001))[0] == 5

    def test_min_epochs_delays_the_stop_alone(self):
        """Catches a best epoch that is looked for after min_epochs only."""
        history = by_shares([0.5, 0.8] + [0.6] * 12)
        assert decide(Transmission(plateau=2, min_epochs=9), history) == (9, 1)

    def test_linear_or_lifted_information(self):
        """The lift adds 0.1 at epoch 2 only. Catches an `information` that is ignored."""
        history = by_shares([0.5, 0.8, 0.75, 0.7, 0.7], lifted=[0.0, 0.0, 0.1, 0.0, 0.0])
        linear = Transmission(tolerance=0.0, plateau=9)
        lifted = Transmission(tolerance=0.0, plateau=9, information="J")
        assert linear.judge(history).best == 1
        assert lifted.judge(history).best == 2

    def test_share_of_two_parameters(self):
        """tr(J_input^-1 J_output) / 2 with correlated parameters, and does not depend on their
        unit. Catches a ratio of traces or of determinants, and elementwise division."""
        J_in = torch.tensor([[2.0, 0.5], [0.5, 1.0]], dtype=torch.float64)
        J_out = torch.tensor([[1.0, 0.4], [0.4, 0.3]], dtype=torch.float64)
        wanted = float((J_in.inverse() @ J_out).trace()) / 2
        unit = torch.diag(torch.tensor([1.0, 1000.0], dtype=torch.float64))
        for scale in (torch.eye(2, dtype=torch.float64), unit):
            record = EpochRecord(
                epoch=0,
                flow=flow(scale @ J_in @ scale, scale @ J_out @ scale),
                train_mse=None,
                val_mse=None,
                input_J=scale @ J_in @ scale,
            )
            assert Transmission().shares([record]) == [pytest.approx(wanted, rel=1e-9)]

    def test_an_input_that_cannot_be_told_from_zero_has_no_share(self):
        """J_input = 0.02 +- 0.04: shares of 317 that fall made the rule stop. Catches a division by
        it, in epochs before and after one with a resolved input."""
        history = by_shares([300.0, 200.0, 100.0], J=0.02, stderr=0.04)
        rule = Transmission(plateau=1)
        assert all(math.isnan(share) for share in rule.shares(history))
        assert decide(rule, history) == (None, None)
        assert math.isnan(history[0].transmission)
        assert math.isnan(history[0].transmission_error)
        resolved = by_shares([0.5, 0.6], J=4.0)
        assert decide(rule, [*history, *resolved]) == (None, 4)

    def test_a_head_that_was_named(self):
        """`output=` of the measurement. Catches a rule that reads the whole output all the same."""
        joint = flow(number(4.0), number(3.0))
        head = replace(joint.layers[1], name="output[mean]", J=number(1.0), linear=number(1.0))
        for output, share in ((None, 0.75), ("output[mean]", 0.25)):
            measured = ff.FisherFlow((*joint.layers, head), {"output": output})
            record = EpochRecord(0, measured, None, None, number(4.0))
            assert Transmission().shares([record]) == [pytest.approx(share)]
            assert record.transmission == pytest.approx(share)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"information": "lower"}, 'information must be "linear" or "J", got \'lower\''),
            ({"tolerance": 1.0}, "tolerance must be at least 0 and below 1, got 1.0"),
            ({"tolerance": -0.1}, "tolerance must be at least 0 and below 1, got -0.1"),
            ({"plateau": 0}, "plateau must be at least 1, got 0"),
        ],
    )
    def test_bad_settings(self, options, message):
        """Catches settings that are found out in the middle of a training."""
        with pytest.raises(ValueError, match=message):
            Transmission(**options)


@pytest.mark.parametrize(
    ("make", "one", "other"),
    [
        (CramerRao, by_errors([0.5, 0.4, 0.3]), by_errors([0.5, 0.2, 0.2])),
        (
            lambda: Transmission(plateau=1, tolerance=0.0),
            by_shares([0.3, 0.4, 0.5]),
            by_shares([0.3, 0.2, 0.1]),
        ),
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


def test_rules_by_name():
    """Catches a rule that the public class does not know."""
    from fisherfast.training.rules import RULES

    assert set(RULES) == {"crlb", "transmission"}
    for name, rule in RULES.items():
        assert isinstance(ff.FisherEarlyStopping(name).rule, rule)


def test_a_growing_history_is_read_once(monkeypatch):
    """Catches values of all records computed anew after each epoch, and those of another history
    that are taken for them."""
    history, read, share = by_shares([0.1, 0.2, 0.3, 0.4]), [], Transmission._share
    monkeypatch.setattr(Transmission, "_share", lambda *args: read.append(0) or share(*args))
    rule = Transmission()
    grown = [rule.shares(history[:count]) for count in range(1, 5)]
    assert len(read) == len(history)
    assert grown == [grown[-1][:count] for count in range(1, 5)]
    other = by_shares([0.5, 0.6])
    assert rule.shares(other) == Transmission().shares(other)
