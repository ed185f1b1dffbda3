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

Array = np.ndarray

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
    exact = [good and not layer.compressed for good, layer in zip(carried, layers, strict=True)]
    for layer, arithmetic, good in zip(layers, carried, exact, strict=True):
        judged = JudgedLayer(problem, layer, whole=enough and good)
        result.checks += judged.checks(arithmetic)
        result.reading = judged.reading(more) if judged.whole else None
        if problem.usual and judged.should_resolve:
            result.should_resolve += 1
            result.resolved += layer.status == "resolved"
    if enough and exact[0]:
        result.checks += invariance(problem, layers, exact)
    if problem.twin == "unit":
        result.checks += other_unit(problem, layers, twins)
    else:
        result.checks += other_order(problem, layers, twins, exact)
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


def other_units(problem: Problem) -> Array:
    """Of each theta [P], powers of two."""
    rng = np.random.default_rng(problem.seed)
    return 2.0 ** rng.integers(-UNIT_POWERS, UNIT_POWERS + 1, problem.parameters)


def measure(problem: Problem, data: ff.FiniteDifference) -> list[ff.LayerFisher]:
    """The input and each layer, under the names of the model."""
    if not problem.layers:
        return [ff.fisher_information(data, max_features=problem.features)]
    flow = ff.fisher_flow(problem.model(), data, max_features=problem.features)
    return [flow["input"], *(flow[str(index)] for index in range(len(problem.layers)))]


def within_folds(n: int) -> Array:
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
        self.problem, self.layer, self.whole = problem, layer, whole
        P = problem.parameters
        self.J = in_units(problem, layer.J)
        self.linear, self.linear_error, self.lower, self.lower_error = (
            in_units(problem, matrix).diagonal()
            for matrix in (layer.linear, layer.linear_stderr, layer.lower, layer.lower_stderr)
        )
        linear = in_units(problem, problem.linear)
        self.directions = np.eye(P)
        if P > 1:  # the axes, and the principal axes of the truth
            self.directions = np.concatenate([self.directions, np.linalg.eigh(linear)[1].T])
        most, least = problem.information, problem.least
        if problem.source == "score" and layer.name == "input":
            most = least = problem.noises.score_covariance(problem.structure.signal)
        self.truth, self.least = self._along(most), self._along(least)
        self.linear_truth = self._along(problem.linear)
        self.linear_least = self._along(problem.least)
        # no error bar serves where the fourth moment is infinite, none from below a rare event
        self.above = problem.noises.fourth
        self.below = self.whole and problem.noises.firing is None
        self.errors = self._errors()

    @property
    def values(self) -> Array:
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
        J = self.values, self.errors
        lower = self.lower, self.lower_error
        if self.above:
            checks += self._bounds("J", *J, self.least, self.truth)
            least, most = self.linear_least, self.linear_truth
            checks += self._bounds("linear", self.linear, self.linear_error, least, most)
            right = self._not_above(*lower, self.truth)
            checks += self._each("lower above", right, *lower, self.truth)
        if self.layer.status == "resolved":
            share = 1.0 if self.problem.usual else 1 - MISSING
            right = self._not_above(*J, self.truth, RESOLVED_SIGMAS)
            right &= self._not_below(*J, self.least, RESOLVED_SIGMAS, share)
            checks += self._each("resolved", right, *J, self.truth, RESOLVED_CHANCE)
        return checks

    def reading(self, more: int) -> Reading:
        """The first parameter, for `Tally`."""
        problem, n = self.problem, self.problem.independent_samples(more)
        truth = self.truth[0] if np.isfinite(self.truth[0]) else np.nan
        J, lower, linear = self.values[0], self.lower[0], self.linear[0]
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

    def _not_above(
        self, values: Array, errors: Array, most: Array, sigmas: float = SIGMAS
    ) -> Array:
        most = most[: len(values)]
        allowed = ROUNDING if self.problem.usual else ROUNDING + BEYOND * most
        return values <= most + sigmas * errors + allowed

    def _not_below(
        self,
        values: Array,
        errors: Array,
        least: Array,
        sigmas: float = SIGMAS,
        share: float = 1 - MISSING,
    ) -> Array:
        return values >= share * least[: len(values)] - sigmas * errors - ROUNDING

    def _covariance_check(self) -> Check:
        """A covariance whose variances are the squares of the standard errors."""
        rows, columns = np.tril_indices(self.problem.parameters)
        unit = unit_of(self.problem)
        scale = unit[rows] * unit[columns]
        covariance = self.layer.error_covariance.numpy() * np.outer(scale, scale)
        stated = (self.layer.stderr.numpy()[rows, columns] * scale) ** 2
        spectrum = np.linalg.eigvalsh(covariance)
        agree = np.allclose(covariance.diagonal(), stated, rtol=ROUNDED, atol=0)
        agree = agree and spectrum[0] >= -ROUNDED * spectrum[-1]
        detail = f"variances {covariance.diagonal()} for {stated}, eigenvalues {spectrum}"
        return Check("error covariance", self.layer.name, bool(agree), detail=detail)

    def _bounds(
        self, name: str, values: Array, errors: Array, least: Array, most: Array
    ) -> Iterator[Check]:
        above = self._not_above(values, errors, most)
        yield from self._each(f"{name} above", above, values, errors, most)
        if self.below:
            below = self._not_below(values, errors, least)
            yield from self._each(f"{name} below", below, values, errors, least)

    def _each(
        self,
        name: str,
        passed: Array,
        values: Array,
        errors: Array,
        bounds: Array,
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

    def _along(self, matrix: Array) -> Array:
        """A matrix of the truth in each direction."""
        if np.isinf(matrix).any():
            return np.full(len(self.directions), np.inf)
        return _quadratic(self.directions, in_units(self.problem, matrix))

    def _errors(self) -> Array:
        """Standard error of J in each direction, from the covariance of the errors of its lower
        triangle."""
        rows, columns = np.tril_indices(self.problem.parameters)
        weights = self.directions[:, rows] * self.directions[:, columns]
        weights = weights * np.where(rows == columns, 1.0, 2.0)
        unit = unit_of(self.problem)
        weights = weights * unit[rows] * unit[columns]
        covariance = self.layer.error_covariance.numpy()
        variance = np.einsum("da,ab,db->d", weights, covariance, weights)
        # an exact zero may come out as a small negative number
        return np.sqrt(np.where(np.isfinite(variance), np.maximum(variance, 0), np.nan))


def invariance(
    problem: Problem, layers: list[ff.LayerFisher], exact: list[bool]
) -> Iterator[Check]:
    """The linear information of every invertible layer is that of the input."""
    first = in_units(problem, layers[0].linear)
    error = in_units(problem, layers[0].linear_stderr).diagonal().max()
    for layer, good in zip(layers[1:], exact[1:], strict=True):
        if good:
            found, allowed = in_units(problem, layer.linear), INVARIANT + SHARE_OF_ERROR * error
            yield _equal("invariance", layer.name, found, first, allowed)


def other_unit(
    problem: Problem, layers: list[ff.LayerFisher], twins: list[ff.LayerFisher]
) -> Iterator[Check]:
    """J and its error with each theta counted in a unit of its own."""
    units = np.outer(other_units(problem), other_units(problem))
    for layer, twin in zip(layers, twins, strict=True):
        for name in ("J", "stderr", "linear", "lower"):
            one, other = (getattr(entry, name).numpy() for entry in (layer, twin))
            one, other = in_units(problem, one), in_units(problem, other * units)
            yield _equal(f"unit of {name}", layer.name, other, one, ROUNDED)


def other_order(
    problem: Problem,
    layers: list[ff.LayerFisher],
    twins: list[ff.LayerFisher],
    exact: list[bool],
) -> Iterator[Check]:
    """The linear information with the samples in another order within their folds."""
    share = SHARE_OF_ERROR if problem.usual else SHARE_OF_ERROR_OF_TAILS
    for layer, twin, good in zip(layers, twins, exact, strict=True):
        if good:
            one, other = (in_units(problem, entry.linear) for entry in (layer, twin))
            error = in_units(problem, layer.linear_stderr).diagonal().max()
            yield _equal("permutation", layer.name, other, one, REORDERED + share * error)


def in_units(problem: Problem, matrix: torch.Tensor | Array) -> Array:
    """A matrix [P, P] with theta in the units of this module."""
    unit = unit_of(problem)
    return np.asarray(matrix) * np.outer(unit, unit)


def unit_of(problem: Problem) -> Array:
    """The unit in which this module measures each theta [P]: 1 / sqrt(information)."""
    return 1 / np.sqrt(np.diag(problem.linear))


def _described(problem: Problem) -> str:
    """What is not usual about a problem, in words."""
    if problem.distribution != "Gaussian":
        raw = ", linear" if problem.features == RAW_ONLY else ""
        return problem.distribution + raw
    if problem.copies != "none":
        return problem.copies
    return problem.distribution if problem.order == "any" else "sorted"


def _equal(name: str, where: str, got: Array, wanted: Array, allowed: float) -> Check:
    """Equal within a share of the larger of the truth, which is 1, and the value, or both NaN."""
    if np.isnan(got).all() and np.isnan(wanted).all():
        return Check(name, where, True)
    largest = float(np.abs(got - wanted).max() / max(1.0, np.abs(wanted).max()))
    detail = f"{np.diag(got)} for {np.diag(wanted)}, {largest:.1e} apart"
    return Check(name, where, largest <= allowed, detail=detail)


def _quadratic(directions: Array, matrix: Array) -> Array:
    return np.einsum("dp,pq,dq->d", directions, matrix, directions)
