"""The judge of generated problems finds planted faults, and finds none where there are none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hostile import judge
from hostile.generator import Layer, Problem, from_seed

import fisherfast as ff
from fisherfast.data.dealing import Dealing

EASY = Problem(
    seed=3,
    source="pathwise",
    dtype="float64",
    dim=6,
    parameters=2,
    samples=1000,
    condition=4.0,
    spectrum="spread",
    rotated=True,
    direction="any",
    correlation=0.3,
    units=1.0,
    offset=1.0,
    step=1.0,
    layers=(Layer("random", 3.0, 1.0, True),),
    features=128,
    twin="permutation",
)


def planted(monkeypatch, layer: str, changed):
    """Judge `EASY` with the result of one layer changed."""
    measure = judge.measure

    def wrong(problem, data):
        return [changed(x) if x.name in (layer, "output") else x for x in measure(problem, data)]

    monkeypatch.setattr(judge, "measure", wrong)
    return {check.name for check in judge.verdict(EASY).violations}


def scaled(by: float, *names: str):
    return lambda layer: dataclasses.replace(
        layer, **{name: getattr(layer, name) * by for name in names}
    )


@pytest.mark.parametrize("twin", ["unit", "permutation"])
@pytest.mark.parametrize("source", ["pathwise", "score", "paired", "independent"])
def test_an_easy_problem_has_no_violation(source, twin):
    """Catches a judge that no library could satisfy."""
    problem = dataclasses.replace(EASY, source=source, step=0.2, twin=twin)
    assert judge.verdict(problem).violations == []


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (scaled(1.3, "J"), "J above"),
        (scaled(0.7, "J"), "J below"),
        (scaled(1.3, "linear"), "linear above"),
        (scaled(0.7, "linear"), "linear below"),
        (scaled(1.3, "lower"), "lower above"),
        (scaled(0.9, "linear"), "invariance"),
        (scaled(2.0, "stderr"), "error covariance"),
        (scaled(float("nan"), "J"), "finite"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_planted_faults_are_found(monkeypatch, change, found):
    """Catches a property that is not checked, or whose bound is too wide to fail."""
    assert found in planted(monkeypatch, "0", change)


def test_missing_information_of_one_direction_is_found(monkeypatch):
    """Catches a judge of the diagonal alone: the sum of J along the axes stays, the smallest
    principal axis loses."""
    truth = EASY.information
    unit = np.sqrt(np.diag(truth))
    correlation = truth / np.outer(unit, unit)
    sign = np.sign(correlation[0, 1])
    lost = 0.4 * np.array([[0.0, sign], [sign, 0.0]]) * np.outer(unit, unit)

    def change(layer):
        return dataclasses.replace(layer, J=layer.J + torch.from_numpy(lost))

    assert {"J above", "J below"} <= planted(monkeypatch, "0", change)


def test_an_exception_is_a_violation_at_once(monkeypatch):
    """Catches a measurement that is lost, and judged as if it had not been made."""

    def raising(problem, data):
        raise ValueError("covariance must be positive definite")

    monkeypatch.setattr(judge, "measure", raising)
    assert [check.name for check in judge.verdict(EASY).violations][:1] == ["measured"]


def test_a_refusal_is_right_for_few_samples_alone(monkeypatch):
    """Catches a library that refuses what it could measure."""

    def refusing(problem, data):
        raise ValueError("needs at least 200 samples, got 20")

    monkeypatch.setattr(judge, "measure", refusing)
    few = dataclasses.replace(EASY, samples=20)
    assert judge.judge(few).refused
    assert judge.judge(few).failures == []
    assert [check.name for check in judge.judge(EASY).failures] == ["measured"]


def test_another_unit_and_another_order_must_give_the_same(monkeypatch):
    """Catches twins that are not compared: the second measurement of each pair is changed."""
    for twin, names in (
        ("unit", {"unit of J", "unit of linear"}),
        ("permutation", {"permutation"}),
    ):
        with monkeypatch.context() as patch:
            measure, calls = judge.measure, []

            def second_wrong(problem, data, measure=measure, calls=calls):
                calls.append(data)
                layers = measure(problem, data)
                if len(calls) % 2:
                    return layers
                return [scaled(1.02, "J", "linear")(layer) for layer in layers]

            patch.setattr(judge, "measure", second_wrong)
            problem = dataclasses.replace(EASY, twin=twin)
            assert {check.name for check in judge.verdict(problem).violations} == names


def test_a_resolved_layer_far_from_the_truth_is_found(monkeypatch):
    """Catches a status that is not judged: J is 0.9 of I with an error of a thousandth."""

    def change(layer):
        wrong = scaled(0.9, "J")(layer)
        small = scaled(0.001, "error_covariance")(wrong)
        return _Called(small, "resolved")

    assert "resolved" in planted(monkeypatch, "0", change)


class _Called:
    """A layer with another status."""

    def __init__(self, layer: ff.LayerFisher, status: str) -> None:
        self._layer, self.status = layer, status

    def __getattr__(self, name: str):
        return getattr(self._layer, name)


def test_layers_that_should_be_resolved_are_counted(monkeypatch):
    """Catches a share of resolved layers of which the rest was never counted."""
    measure = judge.measure

    def noisy(problem, data):
        return [_Called(layer, "noisy") for layer in measure(problem, data)]

    monkeypatch.setattr(judge, "measure", noisy)
    counted = [judge.judge(dataclasses.replace(EASY, seed=seed)) for seed in range(5)]
    assert sum(found.should_resolve for found in counted) > 0
    assert sum(found.resolved for found in counted) == 0


def test_carried_layers_are_those_of_a_moderate_condition():
    """Catches a judge that asks of float32 what only float64 carries, and one that asks nothing."""
    hard = dataclasses.replace(EASY, condition=1e6, layers=(Layer("random", 1e4, 0.0, True),))
    assert judge.carried_layers(EASY) == [True, True]
    assert judge.carried_layers(dataclasses.replace(EASY, dtype="float32")) == [True, True]
    assert judge.carried_layers(dataclasses.replace(hard, dtype="float32"))[0]
    assert not judge.carried_layers(dataclasses.replace(hard, dtype="float32"))[1]
    carried = [judge.carried_layers(from_seed(seed)) for seed in range(200)]
    assert 0.7 < np.mean([good for layers in carried for good in layers]) < 0.95


def test_permutations_stay_in_their_folds():
    """Catches an order that is not a permutation, or leaves its fold."""
    for n in (100, 1601):
        order = judge.within_folds(n)
        assert sorted(order) == list(range(n))
        folds = (Dealing.of(n, judge.FOLDS).cells_from(0, n) % judge.FOLDS).numpy()
        np.testing.assert_array_equal(folds[order], folds)
        assert (order != np.arange(n)).mean() > 0.5
