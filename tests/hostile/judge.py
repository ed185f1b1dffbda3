"""What must hold for a measurement of a generated problem, and the second try for what fails.

theta is counted in units of 1 / sqrt(I_pp) here, I the linear information, so that one tolerance
serves all parameters.

Each measurement is judged by its own errors, and those of one distribution together by their mean
(`Reading`, `Tally`). Where errors are known to be wrong (no fourth moment, units that fire a few
times) only `lower`, the status and the means are judged.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from hostile.carried import carried_layers
from hostile.generator import FOLDS, RAW_ONLY, Problem
from hostile.tally import BEYOND, SHORT, Reading
from scipy import stats

import fisherfast as ff
from fisherfast.data.dealing import Dealing

SIGMAS = 4.0
RESOLVED_SIGMAS = 5.0  # a layer that is called resolved must not be farther from the truth

# A violation must fail again with other noise and this many times the samples.
MORE = 4

# These are violations the first time: an exception, a result that is not a number.
NEVER = ("measured", "finite")

# What may be missing from J beside its error.
MISSING = SHORT
# Rounding that no error states; that of float32 tangents and sums at the largest conditions that
# are judged stays below it.
ROUNDING = 0.002

# Problems whose J is known well before anything is measured: means are taken over these.
PRECISE = 20  # samples for each activation, of a source without the noise of a difference

# Conditions need this many samples beside one per activation; with fewer a refusal is right, and
# what is measured is compressed and judged from above alone.
SPARE_SAMPLES = 40

# The same samples through an invertible layer, and in another order within the folds: rounding,
# amplified as above, and little beside the error, which has the noise of the samples in it.
INVARIANT = MISSING
REORDERED = 0.005
SHARE_OF_ERROR = 0.05
# The tails of other noise are known from the samples that are kept, which are others in another
# order: as much as an error.
SHARE_OF_ERROR_OF_TAILS = 1.0
# What differs by rounding in float64 alone; units are powers of two.
ROUNDED = 1e-6
UNIT_POWERS = 20

TRUE_ERROR = 0.1  # a layer whose error is below a tenth
NEAR_ERRORS = 2.0  # and whose J is within two of them should be resolved

ONE_SIDED = float(stats.t.sf(SIGMAS, FOLDS - 1))
RESOLVED_CHANCE = 2 * float(stats.t.sf(RESOLVED_SIGMAS, FOLDS - 1))


@dataclass(frozen=True)
class Check:
    """One property of one layer in one direction.

    Attributes:
        name: of the property.
        where: layer and direction.
        passed: whether it holds.
        chance: that it fails where the library is right, by Student's t of F - 1 degrees.
        detail: the numbers.
    """

    name: str
    where: str
    passed: bool
    chance: float = 0.0
    detail: str = ""


@dataclass
class Judgement:
    """All checks of one measurement.

    Attributes:
        checks: made.
        refused: the library asked for more samples, rightly.
        should_resolve: layers whose J is known well and right.
        resolved: those of them that are called so.
    """

    checks: list[Check] = field(default_factory=list)
    refused: bool = False
    should_resolve: int = 0
    resolved: int = 0
    reading: Reading | None = None

    @property
    def failures(self) -> list[Check]:
        return [check for check in self.checks if not check.passed]


@dataclass(frozen=True)
class Verdict:
    """A first judgement, and the failures that came back on fresh noise with `MORE` samples or that
    no noise excuses."""

    first: Judgement
    violations: list[Check]


def verdict(problem: Problem) -> Verdict:
    """Judge a problem, and again what fails."""
    first = judge(problem)
    if not first.failures:
        return Verdict(first, [])
    failed = {(check.name, check.where) for check in first.failures if check.name not in NEVER}
    second = judge(problem, attempt=1, more=MORE)
    again = [check for check in second.failures if (check.name, check.where) in failed]
    lost = [check for check in first.failures if check.name in NEVER]
    return Verdict(first, lost + again)


def judge(problem: Problem, *, attempt: int = 0, more: int = 1) -> Judgement:
    """Measure a problem and its twin, and check everything that must hold."""
    enough = problem.independent_samples(more) >= problem.dim + SPARE_SAMPLES
    noise = problem.noise(attempt, more=more)
    try:
        with warnings.catch_warnings(record=True) as heard:
            warnings.simplefilter("always", ff.FisherWarning)
            layers = measure(problem, problem.data(noise))
            if problem.unsaid:
                return Judgement([Check("measured", "all", True), *warned(layers, heard)])
            twins = measure(problem, twin_of(problem, noise, attempt, more))
    except Exception as error:  # whatever is raised is judged
        asks = isinstance(error, ValueError) and re.search(r"\d+ samples", str(error))
        right = bool(asks) and not enough
        check = Check("measured", "all", right, detail=f"{type(error).__name__}: {error}")
        return Judgement([check], refused=right)
    result = Judgement([Check("measured", "all", True)])
    carried = carried_layers(problem)
    for layer, arithmetic in zip(layers, carried, strict=True):
        judged = JudgedLayer(problem, layer, whole=enough and arithmetic and not layer.compressed)
        result.checks += judged.checks(arithmetic)
        result.reading = judged.reading(more) if judged.whole else None
        if problem.usual and judged.should_resolve:
            result.should_resolve += 1
            result.resolved += layer.status == "resolved"
    result.checks += invariance(problem, layers, carried, enough)
    compare = other_unit if problem.twin == "unit" else other_order
    result.checks += compare(problem, layers, twins, carried)
    return result


def warned(layers: list[ff.LayerFisher], heard: list[warnings.WarningMessage]) -> Iterator[Check]:
    """Dependence that the library was not told of: it warns, and calls no layer resolved."""
    said = any("depend on each other" in str(warning.message) for warning in heard)
    yield Check("dependence", "all", said, detail="no warning")
    for layer in layers:
        detail = f"{layer}, {layer.status}"
        yield Check("dependence", layer.name, layer.status != "resolved", detail=detail)


def twin_of(problem: Problem, noise: list, attempt: int, more: int) -> ff.FiniteDifference:
    """The same samples in units of their own, or in another order within their folds."""
    if problem.twin == "unit":
        return problem.data(noise, other_units(problem))
    return problem.data(problem.noise(attempt, more=more, order=within_folds))


def other_units(problem: Problem) -> np.ndarray:
    """Of each theta [P], powers of two."""
    rng = np.random.default_rng(problem.seed)
    return 2.0 ** rng.integers(-UNIT_POWERS, UNIT_POWERS + 1, problem.parameters)


def measure(problem: Problem, data: ff.FiniteDifference) -> list[ff.LayerFisher]:
    """The input and each layer, under the names of the model."""
    if not problem.layers:
        return [ff.fisher_information(data, max_features=problem.features)]
    flow = ff.fisher_flow(problem.model(), data, max_features=problem.features)
    return [flow[name] for name in problem.names]


def within_folds(n: int) -> np.ndarray:
    """A permutation of n samples that leaves each in its fold: the only place that knows how the
    library deals samples to folds."""
    fold = (Dealing.of(n, FOLDS).cells_from(0, n) % FOLDS).numpy()
    rng = np.random.default_rng(n)
    order = np.empty(n, dtype=np.int64)
    for number in range(FOLDS):
        members = np.flatnonzero(fold == number)
        order[members] = rng.permutation(members)
    return order


class JudgedLayer:
    """One layer beside the truth, in the units of this module."""

    def __init__(self, problem: Problem, layer: ff.LayerFisher, *, whole: bool) -> None:
        self.layer, self.whole = layer, whole
        self.problem = problem
        self.unit = 1 / np.sqrt(np.diag(problem.linear))
        self.J, self.linear, self.lower = (
            self._scaled(m) for m in (layer.J, layer.linear, layer.lower)
        )
        self.linear_error, self.lower_error = (
            self._scaled(m).diagonal() for m in (layer.linear_stderr, layer.lower_stderr)
        )
        linear = self._scaled(problem.linear)
        directions = np.eye(problem.parameters)
        if problem.parameters > 1:  # the axes, and the principal axes of the truth
            directions = np.concatenate([directions, np.linalg.eigh(linear)[1].T])
        self.directions = directions
        score = problem.source == "score" and layer.name == "input"
        most = problem.score_covariance if score else problem.information
        least = problem.score_covariance if score else problem.least
        self.linear_truth = _quadratic(directions, linear)
        self.linear_least = _quadratic(directions, self._scaled(problem.least))
        self.truth, self.least = (
            np.full(len(directions), np.inf)
            if np.isinf(matrix).any()
            else _quadratic(directions, self._scaled(matrix))
            for matrix in (most, least)
        )
        # no error bar serves where the fourth moment is infinite, none from below a rare event
        self.above = problem.noises.fourth
        self.below = self.whole and problem.noises.firing is None
        self.errors = self._errors()

    @property
    def values(self) -> np.ndarray:
        """J in each direction."""
        return _quadratic(self.directions, self.J)

    @property
    def should_resolve(self) -> bool:
        """The error is below a tenth of I in every direction, and J within two errors of it."""
        known = self.errors < TRUE_ERROR * self.truth
        near = np.abs(self.values - self.truth) < NEAR_ERRORS * self.errors
        return bool(self.whole and (known & near).all())

    def checks(self, arithmetic: bool) -> list[Check]:
        """All of this layer alone; `arithmetic`: the dtype carries its condition."""
        finite = np.isfinite(self.J).all() and np.isfinite(self.errors).all()
        # beyond the dtype a layer may be left out, when it says so
        said = not arithmetic and bool(self.layer.notes) and self.layer.status != "resolved"
        checks = [Check("finite", self.layer.name, bool(finite or said), detail=str(self.layer))]
        if not finite:
            return checks
        checks.append(self._covariance_check())
        if not arithmetic:
            return checks
        linear, lower = self.linear.diagonal(), self.lower.diagonal()
        P = len(self.unit)
        if self.above:
            between = self.least, self.truth
            checks += self._bounds("J", self.values, self.errors, *between)
            between = self.linear_least, self.linear_truth
            checks += self._bounds("linear", linear, self.linear_error, *between)
            above = self._not_above(lower, SIGMAS * self.lower_error, self.truth[:P])
            checks += self._each("lower above", above, lower, self.lower_error, self.truth)
        if self.layer.status == "resolved":
            margin = RESOLVED_SIGMAS * self.errors
            right = self._not_above(self.values, margin, self.truth)
            share = 1.0 if self.problem.usual else 1 - MISSING
            right &= self.values >= share * self.least - margin - ROUNDING
            more = self.values, self.errors, self.truth, RESOLVED_CHANCE
            checks += self._each("resolved", right, *more)
        return checks

    def reading(self, more: int) -> Reading:
        """The first parameter, for `Tally`."""
        problem, n = self.problem, self.problem.independent_samples(more)
        truth = self.truth[0] if np.isfinite(self.truth[0]) else np.nan
        J, lower, linear = self.values[0], self.lower[0, 0], self.linear[0, 0]
        allowed = (1 + BEYOND) * truth
        return Reading(
            _described(problem),
            {
                "linear": float(linear / self.linear_least[0]),
                "J": float(J / truth),
                "lower": float(lower / truth),
            },
            {
                "J": float((J - allowed) / max(self.errors[0], ROUNDED)),
                "lower": float((lower - allowed) / max(self.lower_error[0], ROUNDED)),
            },
            precise=problem.source != "independent" and n >= PRECISE * problem.dim,
            resolved=self.layer.status == "resolved",
        )

    def _not_above(self, values: np.ndarray, margin: np.ndarray, truth: np.ndarray) -> np.ndarray:
        allowed = ROUNDING if self.problem.usual else ROUNDING + BEYOND * truth
        return values <= truth + margin + allowed

    def _covariance_check(self) -> Check:
        """A covariance whose variances are the squares of the standard errors."""
        rows, columns = np.tril_indices(len(self.unit))
        scale = self.unit[rows] * self.unit[columns]
        covariance = self.layer.error_covariance.numpy() * np.outer(scale, scale)
        stated = (self.layer.stderr.numpy()[rows, columns] * scale) ** 2
        spectrum = np.linalg.eigvalsh(covariance)
        agree = np.allclose(covariance.diagonal(), stated, rtol=ROUNDED, atol=0)
        agree = agree and spectrum[0] >= -ROUNDED * spectrum[-1]
        detail = f"variances {covariance.diagonal()} for {stated}, eigenvalues {spectrum}"
        return Check("error covariance", self.layer.name, bool(agree), detail=detail)

    def _bounds(
        self,
        name: str,
        values: np.ndarray,
        errors: np.ndarray,
        least: np.ndarray,
        most: np.ndarray,
    ) -> Iterator[Check]:
        P = len(values)
        above = self._not_above(values, SIGMAS * errors, most[:P])
        yield from self._each(f"{name} above", above, values, errors, most)
        if self.below:
            below = values >= (1 - MISSING) * least[:P] - SIGMAS * errors - ROUNDING
            yield from self._each(f"{name} below", below, values, errors, least)

    def _each(
        self,
        name: str,
        passed: np.ndarray,
        values: np.ndarray,
        errors: np.ndarray,
        bounds: np.ndarray,
        chance: float = ONE_SIDED,
    ) -> list[Check]:
        return [
            Check(
                name,
                f"{self.layer.name}[{index}]",
                bool(good),
                chance,
                f"{value:.4f} +- {error:.4f}, truth {truth:.4f}, {self.layer.status}",
            )
            for index, (good, value, error, truth) in enumerate(
                zip(passed, values, errors, bounds[: len(values)], strict=True)
            )
        ]

    def _scaled(self, matrix: torch.Tensor | np.ndarray) -> np.ndarray:
        return np.asarray(matrix) * np.outer(self.unit, self.unit)

    def _errors(self) -> np.ndarray:
        """Standard error of J in each direction, from the covariance of the errors of its lower
        triangle."""
        rows, columns = np.tril_indices(len(self.unit))
        weights = self.directions[:, rows] * self.directions[:, columns]
        weights = weights * np.where(rows == columns, 1.0, 2.0)
        weights = weights * self.unit[rows] * self.unit[columns]
        covariance = self.layer.error_covariance.numpy()
        variance = np.einsum("da,ab,db->d", weights, covariance, weights)
        # an exact zero may come out as a small negative number
        return np.sqrt(np.where(np.isfinite(variance), np.maximum(variance, 0), np.nan))


def invariance(
    problem: Problem, layers: list[ff.LayerFisher], carried: list[bool], enough: bool
) -> Iterator[Check]:
    """The linear information of every invertible layer is that of the input."""
    whole = [good and not layer.compressed for layer, good in zip(layers, carried, strict=True)]
    if not enough or not whole[0]:
        return
    first = JudgedLayer(problem, layers[0], whole=True)
    for layer, good in zip(layers[1:], whole[1:], strict=True):
        if good:
            judged = JudgedLayer(problem, layer, whole=True)
            allowed = INVARIANT + SHARE_OF_ERROR * first.linear_error.max()
            yield _equal("invariance", layer.name, judged.linear, first.linear, allowed)


def other_unit(
    problem: Problem, layers: list[ff.LayerFisher], twins: list[ff.LayerFisher], _: list[bool]
) -> Iterator[Check]:
    """J and its error with each theta counted in a unit of its own."""
    units = np.outer(other_units(problem), other_units(problem))
    scale = 1 / np.sqrt(np.diag(problem.linear))
    for layer, twin in zip(layers, twins, strict=True):
        for name in ("J", "stderr", "linear", "lower"):
            one, other = (getattr(entry, name).numpy() for entry in (layer, twin))
            both = np.outer(scale, scale)
            yield _equal(f"unit of {name}", layer.name, other * units * both, one * both, ROUNDED)


def other_order(
    problem: Problem,
    layers: list[ff.LayerFisher],
    twins: list[ff.LayerFisher],
    carried: list[bool],
) -> Iterator[Check]:
    """The linear information with the samples in another order within their folds."""
    for layer, twin, good in zip(layers, twins, carried, strict=True):
        if good and not layer.compressed:
            one, other = (JudgedLayer(problem, entry, whole=True) for entry in (layer, twin))
            share = SHARE_OF_ERROR if problem.usual else SHARE_OF_ERROR_OF_TAILS
            allowed = REORDERED + share * one.linear_error.max()
            yield _equal("permutation", layer.name, other.linear, one.linear, allowed)


def _described(problem: Problem) -> str:
    """What is not usual about a problem, in words."""
    if problem.distribution != "Gaussian":
        raw = ", linear" if problem.features == RAW_ONLY else ""
        return problem.distribution + raw
    if problem.copies != "none":
        return problem.copies
    return problem.distribution if problem.order == "any" else "sorted"


def _equal(name: str, where: str, got: np.ndarray, wanted: np.ndarray, allowed: float) -> Check:
    """Equal within a share of the larger of the truth, which is 1, and the value, or both NaN."""
    if np.isnan(got).all() and np.isnan(wanted).all():
        return Check(name, where, True)
    largest = float(np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max()))
    detail = f"{np.diag(got)} for {np.diag(wanted)}, {largest:.1e} apart"
    return Check(name, where, largest <= allowed, detail=detail)


def _quadratic(directions: np.ndarray, matrix: np.ndarray) -> np.ndarray:
    return np.einsum("dp,pq,dq->d", directions, matrix, directions)
