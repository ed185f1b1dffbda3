"""A layer read by a probe as well: two networks are trained, each on half of the samples, and each
is a feature of the samples that it has not seen.

The first pass measures the layer as without a probe and keeps some samples of each half, the second
measures raw activations, probe and lift of each half beside the network of the other; both results
are averaged. J can then only be short of the truth, however much a network has memorised. Where a
probe does not help, the result is that of the first pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from fisherfast.data import Data
from fisherfast.data.dealing import Place, Tally
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.choice import GAIN_ERRORS, choose_features
from fisherfast.estimation.curve import (
    SPARE_DOF,
)
from fisherfast.estimation.fold_moments import FoldMoments, FoldStatistics
from fisherfast.estimation.probe import (
    Probe,
    ProbedDictionary,
    Regression,
    Trained,
    train_probe,
)
from fisherfast.estimation.ridge import RidgeSetting
from fisherfast.measurement.checks import carried_by
from fisherfast.measurement.cross_fit import (
    HalfFit,
    dealt_to_halves,
    error_of_mean,
    joined,
    leading_curve,
    mean_of,
)
from fisherfast.measurement.layer import LayerMeter, curve_points, in_turn
from fisherfast.measurement.meter import rows_of
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.model.sites import Site
from fisherfast.results.layer import LayerFisher, finite_step_note

__all__ = ["PROBE_BYTES", "ProbeMeter"]

PROBE_BYTES = 2**29
"""Samples kept to train on, of all layers together: 512 MB. A layer needs its share once more
while it is trained."""

FEWEST_ROWS = 64
"""Samples of each condition and half below which nothing is trained."""


class _HalfMeter(LayerMeter):
    """Moments of one half of the samples, the outputs of a probe among the features."""

    def __init__(self, site: Site, dictionary: ProbedDictionary, moments: FoldMoments) -> None:
        super().__init__(site)
        self.dictionary, self.moments = dictionary, moments


class ProbeMeter(LayerMeter):
    """Everything kept of one layer for which probes are trained between two passes.

    Args:
        site: the layer.
        budget: bytes of samples that may be kept.

    Attributes:
        halves: what is measured of each half in the second pass; empty before.
    """

    def __init__(self, site: Site, budget: int) -> None:
        super().__init__(site)
        self._budget = budget
        self.halves: list[_HalfMeter] = []
        self._trained: list[Trained] = []
        self._reason = ""

    @property
    def seen(self) -> list[int]:
        """Samples of each condition in this pass."""
        if not self.halves:
            return self.moments.seen
        return [sum(n) for n in zip(*(half.moments.seen for half in self.halves), strict=True)]

    def prepare(self, data: Data, settings: MeasurementSettings) -> None:
        """Fix the dictionary, and how many samples are kept."""
        super().prepare(data, settings)
        carried = carried_by(data)
        self._paired, self._carried, self._seed = data.paired, carried, settings.seed
        groups, folds = data.groups, settings.folds
        self._groups = None if groups is None else Tally.of_groups(len(groups), folds)
        columns = self.dictionary.raw * (1 + carried["tangents"]) + carried["score"]
        sample_bytes = torch.float32.itemsize * columns
        capacity = max(self._budget // (data.conditions * sample_bytes), 1)  # of both halves
        self._kept = [KeptSamples(data.conditions, capacity) for _ in range(2)]

    def observe(
        self,
        condition: int,
        activations: torch.Tensor,
        *,
        tangents: torch.Tensor | None = None,
        score: torch.Tensor | None = None,
        place: Place | None = None,
    ) -> torch.Tensor:
        """Add activations [n, ...] of a condition, with what they carry; see `LayerMeter`."""
        known, folds = self.moments.known, self.moments.folds
        if place is None:
            place, activations, tangents, score = in_turn(
                self.seen[condition], folds, activations, tangents, score
            )
        rows = rows_of(activations)
        moved = None if tangents is None else rows_of(tangents, 1)
        finite = []
        for half, (own, own_tangents, own_score) in enumerate(
            dealt_to_halves(place, rows, moved, score)
        ):
            own_place, order = place.half(half, folds)
            if self.halves:
                measured = self.halves[half].observe(
                    condition,
                    own[order],
                    tangents=None if own_tangents is None else own_tangents[:, order],
                    score=None if own_score is None else own_score[order],
                    place=own_place,
                )
                finite.append(measured)
            elif not known:
                self._keep(half, condition, place, own, own_tangents, own_score)
        if self.halves:
            return torch.stack(finite).all()
        return super().observe(condition, activations, tangents=tangents, score=score, place=place)

    def shared_sums(self) -> list[torch.Tensor]:
        """Views of all that this pass adds up over processes."""
        if self.halves:
            return [part for half in self.halves for part in half.shared_sums()]
        return super().shared_sums()

    def shared_samples(self) -> list[KeptSamples]:
        """Samples kept in this pass, those to train on among them."""
        if self.halves or self.moments.known:
            return []
        return super().shared_samples() + self._kept

    def learned(self) -> list[torch.Tensor]:
        """The weights of both networks, before they are read."""
        probes = [trained.probe for trained in self._trained if trained.probe is not None]
        return [weight for probe in probes for weight in probe.parameters()]

    def end_pass(self, contrast: torch.Tensor, ridge: RidgeSetting) -> bool:
        """Return whether another pass over the same samples must follow."""
        if self.halves:
            if self.seen != self.moments.seen:
                raise ValueError(
                    f"samples must be the same at every pass, got {self.seen} after"
                    f" {self.moments.seen} per condition"
                )
            return False
        if self._reason:
            return False
        if super().end_pass(contrast, ridge):
            return True
        self._reason = self._too_few(contrast)
        if not self._reason:
            self._train(contrast, ridge)
        return bool(self.halves)

    def estimate(self, data: Data, contrast: torch.Tensor, ridge: RidgeSetting) -> LayerFisher:
        """J, its errors and bounds: means over the two halves, or as without a probe."""
        plain = super().estimate(data, contrast, ridge)
        if not self.halves:
            return self._without(plain, self._reason)
        whole = self._joined(plain, contrast, ridge)
        if whole is None:
            return self._without(plain, "the features of a half are linear in each other")
        loss = (plain.J - whole.J).diagonal()
        error = (plain.stderr.square() + whole.stderr.square()).diagonal().sqrt()
        if not bool(torch.isfinite(whole.J).all()) or bool((loss > GAIN_ERRORS * error).any()):
            return self._without(plain, "the lift alone shows more")
        return whole

    def _without(self, plain: LayerFisher, reason: str) -> LayerFisher:
        if plain.features == 0:
            return plain
        return replace(plain, notes=(*plain.notes, f"no probe: {reason}"))

    def _keep(
        self,
        half: int,
        condition: int,
        whole: Place,
        rows: torch.Tensor,
        tangents: torch.Tensor | None,
        score: torch.Tensor | None,
    ) -> None:
        """Keep some samples of a half to train on, standardised, of a batch in this place."""
        raw = self.dictionary.raw_features(rows)
        place = whole.sides[half]
        if self._carried["tangents"]:
            if tangents is None:
                carried = raw.new_zeros(len(raw), self._carried["tangents"], raw.shape[1])
            else:
                carried = self.dictionary.raw_tangents(tangents, raw).transpose(0, 1)
            score = carried
        self._kept[half].add(condition, place, raw, score, whole=whole)

    def _too_few(self, contrast: torch.Tensor) -> str:
        """Why the samples of a half are too few to be trained on and measured; "" if they are
        not."""
        features = self.dictionary.raw + contrast.shape[1] + SPARE_DOF
        in_fold = self.moments.fewest // 2  # a half is dealt to as many folds as all
        if min(self.moments.seen) // 2 >= FEWEST_ROWS and in_fold >= 2:
            halves = [self.moments.statistics(contrast, half) for half in (0, 1)]
            cells = self.moments.counts.numel() // 2
            fewest = min(half.dof for half in halves) - cells
            if fewest >= 2 * features:
                return ""
        return f"half of {min(self.moments.seen)} samples per condition are too few to train on"

    def _train(self, contrast: torch.Tensor, ridge: RidgeSetting) -> None:
        """A network for each half; halves stay empty where one of them learned nothing."""
        probes = []
        for half, kept in enumerate(self._kept):
            trained = self._train_on(half, kept.take(), contrast, ridge)
            if trained is None or trained.probe is None:
                self._reason = _why_not(trained)
                break
            probes.append(trained.probe)
            self._trained.append(trained)
        self._kept = []
        if len(probes) == 2:
            self.halves = [self._half_meter(half, probes[1 - half]) for half in range(2)]

    def _half_meter(self, half: int, probe: Probe) -> _HalfMeter:
        """Measures samples of a half, which a probe has not seen."""
        lifted = self.moments.size - self.dictionary.raw
        dictionary = ProbedDictionary(self.dictionary, probe, lifted)
        moments = FoldMoments(
            dictionary.size,
            len(self.moments.seen),
            folds=self.moments.folds,
            paired=self._paired,
            groups=None if self._groups is None else self._groups.of_half(half, self.moments.folds),
            device=self.moments.sums.device,
            **self._carried,
        )
        return _HalfMeter(self.site, dictionary, moments)

    def _train_on(
        self, half: int, kept: tuple[torch.Tensor, ...], contrast: torch.Tensor, ridge: RidgeSetting
    ) -> Trained | None:
        """Train on the samples of a half; None where they show no information to start from."""
        whole, raw = self.moments.statistics(contrast, half), self.dictionary.raw
        alive = whole.covariance.diagonal() > self.rounding_variance()
        start = self._start(whole, alive.nonzero()[:, 0], self.ridges(ridge))
        if start is None:
            return None
        scale, readout = start
        z, carried = kept[0], kept[1] if len(kept) > 1 else None
        if carried is None:
            conditions = len(contrast)
            regression = Regression(z, (contrast.to(z) * conditions)[None])
        elif self._carried["score"]:
            regression = Regression(z, carried - carried.mean(0))
        else:
            regression = Regression(z, z.new_zeros(1), carried[:, 0])
        covariance = whole.covariance[:raw, :raw] * (alive[:raw, None] & alive[:raw])
        return train_probe(
            regression, covariance, readout, scale, dof=whole.dof, seed=2 * self._seed + half
        )

    def _start(
        self, whole: FoldStatistics, alive: torch.Tensor, ridge: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Scale [P] of the score, and its linear prediction [raw, P] from which training starts."""
        raw = int((alive < self.dictionary.raw).sum())
        if raw == 0:
            return None
        curve, index = leading_curve(whole, alive[: max(raw, int(whole.dof / 2))], ridge)
        if len(curve) < raw:
            return None
        chosen = choose_features(curve, raw).features
        J, error = curve.J[chosen - 1].diagonal(), curve.stderr[chosen - 1].diagonal()
        scale = torch.maximum(J, error).sqrt()
        if not bool((torch.isfinite(scale) & (scale > 0)).all()):
            return None
        linear = whole.select(index[:raw])
        size = linear.covariance.diagonal().sqrt()
        correlation = linear.covariance / (size[:, None] * size)
        correlation.diagonal().add_(ridge[index[:raw]].clamp_min(raw / whole.dof))
        solved = torch.linalg.solve(correlation, linear.derivative / size[:, None])
        naive = curve.naive[raw - 1].diagonal()
        shrink = (curve.J[raw - 1].diagonal() / naive).nan_to_num(0.0).clamp(0, 1)
        readout = whole.derivative.new_zeros(self.dictionary.raw, len(scale))
        readout[index[:raw]] = solved / size[:, None] * shrink
        return scale, readout

    def _joined(
        self, plain: LayerFisher, contrast: torch.Tensor, ridge: RidgeSetting
    ) -> LayerFisher | None:
        """The means over the two halves; None where a covariance is singular."""
        halves = self._fits(contrast, ridge)
        if halves is None:
            return None
        linear = int((halves[0].index < self.dictionary.raw).sum())
        points = curve_points(linear, len(halves[0].curve))
        first = torch.tensor([linear])
        measured = [meter.moments for meter in self.halves]
        layer = replace(
            joined(plain, halves, measured, contrast, points),
            linear=mean_of([fit.at("J", first)[0] for fit in halves]),
            linear_stderr=error_of_mean([fit.at("stderr", first)[0] for fit in halves]),
            feature_kind="probe",
        )
        notes = [f"{plain.dropped} constant features dropped"] if plain.dropped else []
        notes.append(self._note())
        notes += [warning] if (warning := finite_step_note(layer)) else []
        return replace(layer, notes=tuple(notes))

    def _fits(self, contrast: torch.Tensor, ridge: RidgeSetting) -> list[HalfFit] | None:
        """The curves of the halves over the same features, each read at the size that the other
        has chosen."""
        wholes = [meter.moments.statistics(contrast) for meter in self.halves]
        varied = [m.moments.variances() > m.rounding_variance() for m in self.halves]
        raw = self.halves[0].dictionary.raw
        alive = (varied[0] & varied[1]).nonzero()[:, 0]
        needed = int((alive < raw).sum())
        alive = alive[: max(needed, int(min(whole.dof for whole in wholes) / 2))]
        curves = []
        ridges = self.halves[0].ridges(ridge)
        for whole in wholes:
            curve, alive = leading_curve(whole, alive, ridges)
            curves.append(curve)
        if len(alive) < needed or needed == 0:
            return None
        if len(curves[0]) > len(alive):
            curves[0], _ = leading_curve(wholes[0], alive, ridges)
        sizes = [choose_features(curve, needed) for curve in curves]
        return [
            HalfFit(curve, alive, chosen, plateau, ridges[alive], half)
            for half, (curve, (chosen, plateau, *_)) in enumerate(
                zip(curves, reversed(sizes), strict=True)
            )
        ]

    def _note(self) -> str:
        steps = " and ".join(str(trained.steps) for trained in self._trained)
        rows = min(trained.rows for trained in self._trained)
        return (
            f"probes of {steps} steps on {rows} samples per condition of each half, measured on"
            " the other half in one more pass"
        )


def _why_not(trained: Trained | None) -> str:
    if trained is None:
        return "nothing to start from"
    if trained.diverged:
        return "training diverged"
    return f"{trained.steps} steps found nothing beyond the raw activations"
