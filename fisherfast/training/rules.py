"""Stopping rules: the published rule and one that needs no error. A new rule is a class with
`judge`, and an entry in `RULES`.
"""

from __future__ import annotations

import math
import reprlib
import statistics
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fisherfast._validation import check_whole
from fisherfast.model.sites import INPUT
from fisherfast.results.comparison import DIVIDES, divides
from fisherfast.results.flow import FisherFlow
from fisherfast.results.layer import LayerFisher
from fisherfast.training.attainable import Prior, attainable_error, check_prior
from fisherfast.training.checks import numbers_of
from fisherfast.training.record import EpochRecord, output_of
from fisherfast.training.stopping_rule import History, StoppingRule, Verdict

TOLERANCE = 0.02
"""Tolerance relative to the largest share: less than slope and offset still add to the error in the
study of benchmarks/accuracy/early_stopping.py; it costs at most about as much in validation
loss."""
SIGNIFICANT = 3.0
"""Standard errors above 0 from which a share is not noise: below it, nothing has been learned."""
NOISE_WINDOW = 10
"""Measurements from which the noise is estimated: enough for a median, few enough to be recent."""
PLATEAU = 5
"""Measurements without a rise that make a plateau, settled in the same study."""
NORMAL_MEDIAN = 0.6745  # of |z|, z standard normal
THIRD_DIFFERENCE = 20.0  # 1 + 9 + 9 + 1, variance of the third difference of independent numbers


@dataclass(frozen=True, kw_only=True, eq=False)
class CramerRao(StoppingRule):
    r"""Stop when the training error falls below the least possible error on unseen samples.

    The level of an epoch is the mean over parameters of :math:`mse_p / E_p`, with :math:`E_p` the
    least possible error on samples that the network was not trained on. The rule stops at the first
    epoch whose level is at most 1 - min_delta and stays there for `patience` more. By default
    :math:`E_p = (J^{-1})_{pp}`, J that of the input.

    Args:
        prior: range of theta, to use an attainable error instead of 1/J: a pair (low, high), or a
            tensor or array [n] of the theta of the training samples; for P parameters P of these,
            or [n, P]. See `attainable_error` for the assumptions. None uses the labels of a monitor
            of `Labelled` samples; False uses 1/J all the same, as published.
        least_error: E_p in theta^2 if known from elsewhere, such as a simulation, one number or P.
            Prior and J are then not used.
        input_J: information in the input at several theta, if it varies: numbers, [P, P] tensors or
            `LayerFisher`. The corresponding least errors are averaged. None uses that of the
            monitor.
        target_scale: theta per unit of the network's targets, one number or P, for errors given to
            the monitor in the unit of the targets (the monitor has its own `target_scale`).
        smoothing: number of epochs over which the logarithm of the level is fitted by a straight
            line, whose end is used, for errors of few samples. 1 uses the level itself.
        min_epochs: first epoch number at which training may stop.
        check_finite: stop if an error or an activation is NaN or infinite.

    Raises:
        ValueError, TypeError: an option is out of its range.

    Reference: Weimar et al., Phys. Rev. X 15, 031072 (2025), section on early stopping; E_p is 1/J
        there.

    Example:
        >>> import fisherfast as ff
        >>> stopping = ff.FisherEarlyStopping(ff.CramerRao(prior=(-1.0, 1.0)), patience=2)
    """

    prior: Any = None
    least_error: float | Sequence[float] | None = None
    input_J: Sequence[Any] | None = None
    target_scale: float | Sequence[float] = 1.0
    smoothing: int = 1
    _known: dict[tuple[float, ...], list[float]] = field(
        default_factory=dict, init=False, repr=False
    )

    name = "crlb"
    largest_delta = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_whole("smoothing", self.smoothing, least=1)
        _numbers("target_scale", self.target_scale)
        if self.least_error is not None:
            if self.prior is not None or self.input_J is not None:
                raise ValueError("least_error must be given without prior and input_J, got both")
            _numbers("least_error", self.least_error)
        if self._given_prior is not None:
            _parts_of(self._given_prior)
        if self.input_J is not None:
            _matrices(self.input_J)

    @property
    def _given_prior(self) -> Any:
        return None if self.prior is False else self.prior

    @property
    def reads_input(self) -> bool:
        """True if the rule uses the measured information in the input."""
        return self.input_J is None and self.least_error is None

    def judge(self, history: History, *, patience: int = 0, min_delta: float = 0.0) -> Verdict:
        """See `StoppingRule`; the level to stop at is 1 - min_delta."""
        levels = self.levels(history)
        known = [index for index, level in enumerate(levels) if not math.isnan(level)]
        if not known:
            return Verdict(None)
        below = 0  # consecutive epochs at the end
        for index in reversed(known):
            late = history[index].epoch >= self.min_epochs
            if not late or levels[index] > 1 - min_delta:
                break
            below += 1
        best = known[-below] if below else known[-1]
        if below <= patience:
            return Verdict(best)
        return Verdict(best, self._reason(history[best], levels[best]))

    def levels(self, history: History) -> list[float]:
        """Return the training error in units of the least error; NaN before the first measurement,
        and while J_input is zero within its error."""
        raw = self._each(history, self._level)
        return raw if self.smoothing == 1 else _line_ends(raw, self.smoothing)

    def least_errors(self, J: torch.Tensor) -> list[float]:
        """Compute E_p in theta^2, for P parameters.

        Args:
            J: [P, P] information in the input, used if `input_J` was not given.

        Raises:
            ValueError: J is not positive definite, or the prior has another number of parameters.
        """
        if self.least_error is not None:
            return _per_parameter("least_error", self.least_error, len(J))
        key = tuple(J.flatten().tolist())
        if key not in self._known:
            matrices = [J] if self.input_J is None else _matrices(self.input_J)
            errors = torch.tensor(
                [self._errors_of(matrix) for matrix in matrices], dtype=torch.float64, device="cpu"
            )
            self._known[key] = errors.mean(0).tolist()
        return self._known[key]

    def _errors_of(self, J: torch.Tensor) -> list[float]:
        factor, failed = torch.linalg.cholesky_ex(J)
        if int(failed) or not bool(torch.isfinite(factor).all()):
            raise ValueError(
                "input_J must be positive definite for rule 'crlb', got"
                f' {J.tolist()}: measure with more samples, or use rule="transmission"'
            )
        errors: list[float] = torch.cholesky_inverse(factor).diagonal().tolist()
        if self._given_prior is None:
            return errors
        priors = _parts_of(self.prior)
        if len(priors) != len(errors):
            raise ValueError(
                f"prior must be given for each of the {len(errors)} parameters, got {len(priors)}"
            )
        return [attainable_error(1 / e, prior) for e, prior in zip(errors, priors, strict=True)]

    def _level(self, record: EpochRecord) -> float:
        errors = record.train_mse
        if errors is None:
            raise ValueError(
                f"train_mse must be given to the monitor for rule 'crlb', got None in epoch"
                f' {record.epoch}; rule="transmission" needs none'
            )
        if min(errors) < 0:
            raise ValueError(
                "train_mse must be a mean square error, at least 0, for rule 'crlb', got"
                f" {min(errors)} in epoch {record.epoch}: another loss has no Cramer-Rao bound; use"
                ' rule="transmission"'
            )
        if self.reads_input and bool(torch.isnan(record.input_J).any()):
            return math.nan
        least = self._least_of(record)
        if len(errors) != len(least):
            raise ValueError(
                f"train_mse must hold an error for each of the {len(least)} parameters, got"
                f" {len(errors)}"
            )
        scales = _per_parameter("target_scale", self.target_scale, len(least))
        triples = zip(errors, scales, least, strict=True)
        return statistics.fmean(mse * scale**2 / error for mse, scale, error in triples)

    def _by_labels(self, record: EpochRecord) -> bool:
        return record.attainable is not None and self.prior is None and self.reads_input

    def _least_of(self, record: EpochRecord) -> Sequence[float]:
        if self._by_labels(record):
            return record.attainable or ()
        return self.least_errors(record.input_J)

    def _reason(self, record: EpochRecord, level: float) -> str:
        published = self._given_prior is None and self.least_error is None
        published = published and not self._by_labels(record)
        bound = "1 / J_input" if published else "the attainable error"
        return (
            f"training error at {level:.3g} of {bound} in epoch {record.epoch}: below it the"
            " network memorises the training samples"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class Transmission(StoppingRule):
    r"""Stop when the information in the output on held-out samples stops rising.

    The share of an epoch is :math:`\mathrm{tr}(J_{in}^{-1} J_{out}) / P` on the held-out samples of
    the monitor. The rule stops when `plateau` measurements have not risen above the largest share
    (which must be three standard errors above 0); the best epoch is the last one within `tolerance`
    of it. It needs no error, unit or prior, so it works with any loss.

    `FisherEarlyStopping` waits for `patience` further measurements. Its `min_delta` is the smallest
    rise that counts, in standard errors of the difference of two epochs. These are far below the
    standard error of a share, because all epochs are measured on the same samples; they are
    estimated from the scatter of the last measurements about a smooth curve.

    Args:
        information: "linear" for the linear information of the outputs themselves, which is that of
            an estimate corrected for slope and offset; "J" to include a lift of the outputs, if
            they are not estimates.
        tolerance: fraction of the largest share that may be lost. Information is measured at one
            theta and does not depend on slope and offset, which converge later: while the share is
            constant, later weights are better.
        plateau: measurements in succession without a rise, at least 1.
        min_epochs: first epoch number at which training may stop.
        check_finite: stop if an error or an activation is NaN or infinite.

    Raises:
        ValueError, TypeError: an option is out of its range.

    Reference: docs/training.md, stopping; the defaults are those that
    benchmarks/accuracy/early_stopping.py settles.

    Example:
        >>> import fisherfast as ff
        >>> stopping = ff.FisherEarlyStopping(ff.Transmission(plateau=3))
    """

    information: str = "linear"
    tolerance: float = TOLERANCE
    plateau: int = PLATEAU

    name = "transmission"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.information not in ("linear", "J"):
            raise ValueError(f'information must be "linear" or "J", got {self.information!r}')
        if not 0 <= self.tolerance < 1:
            raise ValueError(f"tolerance must be at least 0 and below 1, got {self.tolerance}")
        check_whole("plateau", self.plateau, least=1)

    def judge(self, history: History, *, patience: int = 0, min_delta: float = 0.0) -> Verdict:
        """See `StoppingRule`; min_delta is in standard errors of the difference of two epochs."""
        shares = self.shares(history)
        known = [index for index, share in enumerate(shares) if not math.isnan(share)]
        if not known:
            return Verdict(None)
        peak = best = known[0]
        since = 0
        for count, index in enumerate(known[1:], start=2):
            since += 1
            recent = [shares[i] for i in known[max(0, count - NOISE_WINDOW) : count]]
            least_rise = min_delta * self.noise(recent) if min_delta else 0.0
            if shares[index] > shares[peak] + least_rise:
                peak, since = index, 0
            if index == peak or shares[index] >= (1 - self.tolerance) * shares[peak]:
                best = index
        measured_now = known[-1] == len(history) - 1
        late = history[-1].epoch >= self.min_epochs
        if since < self.plateau + patience or not late or not measured_now:
            return Verdict(best)
        if not self._has_begun(history[peak]):
            return Verdict(best)
        reason = (
            f"J_output / J_input has not risen above the {shares[peak]:.4g} of epoch"
            f" {history[peak].epoch} for {since} measurements"
        )
        return Verdict(best, reason)

    def shares(self, history: History) -> list[float]:
        """Return tr(J_input^-1 J_output) / P of each record; NaN if it was not measured, or if
        J_input is within three errors of zero."""
        return self._each(history, self._share)

    def noise(self, shares: Sequence[float]) -> float:
        """Estimate the standard error of the difference of two of these shares from their third
        differences, which are zero for a smooth curve. 0 for fewer than four shares."""
        if len(shares) < 4:
            return 0.0
        thirds = torch.tensor(shares, dtype=torch.float64, device="cpu").diff(n=3)
        spread = float(thirds.abs().median()) / NORMAL_MEDIAN / math.sqrt(THIRD_DIFFERENCE)
        return math.sqrt(2) * spread

    def _has_begun(self, record: EpochRecord) -> bool:
        """Return whether the information in the output is above noise for some parameter."""
        if record.flow is None:
            return False
        J, stderr = self._output(record.flow)
        return bool((J.diagonal() > SIGNIFICANT * stderr.diagonal()).any())

    def _output(self, flow: FisherFlow) -> tuple[torch.Tensor, torch.Tensor]:
        """Return J of the output and its standard error."""
        layer = flow[output_of(flow)]
        if self.information == "linear":
            return layer.linear, layer.linear_stderr
        return layer.J, layer.stderr

    def _share(self, record: EpochRecord) -> float:
        if record.held_out is not True:
            known = "samples that are trained on" if record.held_out is False else "unknown"
            raise ValueError(
                "data of the monitor must be held-out samples for rule 'transmission', got"
                f" {known}: the information in memorised outputs keeps rising; pass held_out=True"
                ' to the monitor if the network is not trained on them, or use rule="crlb"'
            )
        if record.flow is None or not divides(record.flow[INPUT]):
            return math.nan
        J, _ = self._output(record.flow)
        return float(torch.linalg.solve(record.flow[INPUT].J, J).trace()) / len(J)


RULES: Mapping[str, type[StoppingRule]] = {rule.name: rule for rule in (CramerRao, Transmission)}


def _line_ends(levels: Sequence[float], window: int) -> list[float]:
    """Fit a straight line to the logarithms of the last known levels, at most `window`, and return
    its end for each record. Unlike a mean it does not lag behind a falling error."""
    ends = []
    recent: deque[float] = deque(maxlen=int(window))
    for level in levels:
        if not math.isnan(level):
            recent.append(level)
        if math.isnan(level) or not all(0 < value < math.inf for value in recent):
            ends.append(level)
            continue
        y = torch.tensor(list(recent), dtype=torch.float64, device="cpu").log()
        x = torch.arange(len(recent), dtype=torch.float64, device="cpu") - (len(recent) - 1) / 2
        slope = (x @ y) / (x @ x) if len(recent) > 1 else torch.zeros((), device="cpu")
        ends.append(float((y.mean() + slope * x[-1]).exp()))
    return ends


def _parts_of(prior: Any) -> list[Prior]:
    """Split a prior into a range or values of theta for each parameter.

    Raises:
        ValueError: one is neither.
    """
    if isinstance(prior, np.ndarray):
        prior = torch.as_tensor(prior, device="cpu")
    if isinstance(prior, torch.Tensor):
        parts = list(prior.reshape(len(prior), -1).T if prior.ndim else prior.reshape(1, 1))
    elif not isinstance(prior, Sequence) or all(not np.ndim(entry) for entry in prior):
        parts = [prior]
    else:
        parts = [
            torch.as_tensor(p, device="cpu") if isinstance(p, np.ndarray) else p for p in prior
        ]
    for part in parts:
        check_prior(part)
    return parts


def _matrices(input_J: Any) -> list[torch.Tensor]:
    """Return the information at several theta, each [P, P]."""
    try:
        matrices = [_as_matrix(J) for J in input_J]
    except TypeError:
        raise TypeError(
            "input_J must be a list of numbers, [P, P] tensors or LayerFisher, one for each theta,"
            f" got {reprlib.repr(input_J)}"
        ) from None
    if not matrices:
        raise ValueError("input_J must hold the information at least at one theta, got none")
    return matrices


def _as_matrix(J: Any) -> torch.Tensor:
    """Convert a number, [P, P] or `LayerFisher` to float64 [P, P]."""
    if isinstance(J, LayerFisher) and not divides(J):
        raise ValueError(f"input_J must be {DIVIDES:g} errors above zero, got {J!r}")
    known = J.J if isinstance(J, LayerFisher) else J
    matrix = torch.as_tensor(known, dtype=torch.float64, device="cpu")
    matrix = matrix.reshape(1, 1) if matrix.numel() == 1 else matrix
    if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1]:
        raise ValueError(f"input_J must hold [P, P] matrices, got shape {tuple(matrix.shape)}")
    return matrix


def _per_parameter(name: str, values: float | Sequence[float], parameters: int) -> list[float]:
    """Return one positive number per parameter."""
    numbers = _numbers(name, values)
    if len(numbers) not in (1, parameters):
        raise ValueError(f"{name} must be one number or {parameters}, got {len(numbers)}")
    return numbers * parameters if len(numbers) == 1 else numbers


def _numbers(name: str, values: float | Sequence[float]) -> list[float]:
    """Return one number or several as a list, each positive."""
    listed = numbers_of(name, values)
    if not listed or not all(0 < value < math.inf for value in listed):
        raise ValueError(f"{name} must be positive and finite, got {values}")
    return listed
