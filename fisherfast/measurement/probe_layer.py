"""`ProbeMeter` also reads a layer with a probe: two networks are trained, each on half of the
samples, and each is a feature of the samples that it has not seen.

The first pass measures the layer without a probe and keeps some samples of each half. The second
measures raw activations, probe and lift of each half with the network of the other; the two results
are averaged. J is then never too large, however much a network has memorised. If a probe does not
help, the result is that of the first pass.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from fisherfast.data import Batch, Data
from fisherfast.data.dealing import Place
from fisherfast.data.reservoir import KeptSamples
from fisherfast.estimation.choice import GAIN_ERRORS, choose_features
from fisherfast.estimation.curve import SPARE_DOF
from fisherfast.estimation.fold_moments import FoldMoments, FoldStatistics
from fisherfast.estimation.pilot import Standardisation
from fisherfast.estimation.probe import Probe, ProbedDictionary, Regression, Trained, train_probe
from fisherfast.measurement.cross_fit import (
    HalfFit,
    crossed,
    error_of_mean,
    joined,
    leading_curve,
    mean_of,
)
from fisherfast.measurement.fit import affordable
from fisherfast.measurement.layer import LayerMeter, curve_points
from fisherfast.measurement.moments import LayerMoments, all_finite, streams_of
from fisherfast.measurement.settings import MeasurementSettings
from fisherfast.model.sites import Site
from fisherfast.results.layer import LayerFisher, finite_step_note

PROBE_BYTES = 2**29
"""Samples kept for training, of all layers together: 512 MB. A layer needs its share twice while it
is trained."""

FEWEST_ROWS = 64
"""Samples of each condition and half below which nothing is trained."""


class ProbeMeter(LayerMeter):
    """Everything kept of one layer for which probes are trained between two passes.

    Args:
        site: the layer.
        data: the samples.
        settings: of the measurement.
        budget: bytes of samples that may be kept.

    Attributes:
        halves: moments of each half in the second pass, with the outputs of a probe among the
            features; empty before.
    """

    def __init__(self, site: Site, data: Data, settings: MeasurementSettings, budget: int) -> None:
        super().__init__(site, data, settings)
        self._budget = budget
        self.halves: list[LayerMoments] = []
        self._trained: list[Trained] = []
        self._reason = ""

    @property
    def seen(self) -> list[int]:
        """Samples of each condition in this pass."""
        if not self.halves:
            return self.moments.seen
        return [sum(n) for n in zip(*(half.moments.seen for half in self.halves), strict=True)]

    def _prepare(self, standardisation: Standardisation) -> None:
        """Fix the dictionary, and how many samples are kept."""
        super()._prepare(standardisation)
        conditions = self._data.conditions
        carried = streams_of(self._data, self._settings.folds)
        columns = self.features.dictionary.raw * (1 + carried["tangents"]) + carried["score"]
        capacity = max(self._budget // (conditions * torch.float32.itemsize * columns), 1)
        self._kept = [KeptSamples(conditions, capacity) for _ in range(2)]  # of both halves

    def _observe(self, condition: int, batch: Batch, place: Place) -> Tensor:
        parts = [batch.part(rows.start, rows.stop) for rows in place.halves]
        if not self.halves:
            if self._first_pass:
                for kept, side, part in zip(self._kept, place.sides, parts, strict=True):
                    self._keep(kept, condition, side, part)
            return super()._observe(condition, batch, place)
        finite = []
        for half, (part, features) in enumerate(zip(parts, self.halves, strict=True)):
            own, order = place.half(half, self.moments.folds)
            features.add(condition, part.sorted(own, order), own)
            finite.append(all_finite(features.moments, condition))
        return torch.stack(finite).all()

    def _keep(self, kept: KeptSamples, condition: int, place: Place, batch: Batch) -> None:
        """Keep some samples of a half for training, standardised."""
        dictionary, carried = self.features.dictionary, batch.score
        raw = dictionary.raw_features(batch.x)
        if self._data.source == "pathwise":
            if batch.tangents is None:
                carried = raw.new_zeros(len(raw), self._data.parameters, raw.shape[1])
            else:
                carried = dictionary.raw_tangents(batch.tangents, raw).transpose(0, 1)
        kept.add(condition, place, raw, carried)

    def shared_sums(self) -> list[Tensor]:
        """Return views of all sums of this pass."""
        if self.halves:
            return [part for half in self.halves for part in half.moments.shared_sums()]
        return super().shared_sums()

    def shared_samples(self) -> list[KeptSamples]:
        """Return the samples kept in this pass."""
        return super().shared_samples() + (self._kept if self._first_pass else [])

    def learned(self) -> list[Tensor]:
        """Return the weights of both networks before they are read."""
        probes = [trained.probe for trained in self._trained if trained.probe is not None]
        return [weight for probe in probes for weight in probe.parameters()]

    def _end_pass(self) -> bool:
        """Ask for one more pass after those without a probe, if two probes were trained."""
        if self.halves or self._reason:
            return False
        if super()._end_pass():
            return True
        self._reason = self._too_few()
        if not self._reason:
            self._train()
        return bool(self.halves)

    def estimate(self) -> LayerFisher:
        """Estimate J, its errors and bounds: means over the two halves, or as without a probe."""
        plain = super().estimate()
        if not self.halves:
            return self._without(plain, self._reason)
        whole = self._joined(plain)
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

    def _too_few(self) -> str:
        """Return why the samples of a half are too few for training and measurement; "" if they are
        not."""
        moments = self.moments
        features = self.features.dictionary.raw + self._data.parameters + SPARE_DOF
        in_fold = moments.fewest // 2  # a half is dealt to as many folds as all
        if min(moments.seen) // 2 >= FEWEST_ROWS and in_fold >= 2:
            halves = [moments.statistics(self._contrast, half) for half in (0, 1)]
            cells = moments.counts.numel() // 2
            if min(half.dof for half in halves) - cells >= 2 * features:
                return ""
        return f"half of {min(moments.seen)} samples per condition are too few to train on"

    def _train(self) -> None:
        """Train a network for each half; `halves` stays empty if one of them learned nothing."""
        probes = []
        for half, kept in enumerate(self._kept):
            trained = self._train_on(half, kept.take())
            if trained is None or trained.probe is None:
                self._reason = _why_not(trained)
                break
            probes.append(trained.probe)
            self._trained.append(trained)
        self._kept = []
        if len(probes) == 2:
            self.halves = [self._half_moments(half, probes[1 - half]) for half in range(2)]

    def _half_moments(self, half: int, probe: Probe) -> LayerMoments:
        """Begin the moments of a half, whose samples the probe has not seen."""
        data, moments, dictionary = self._data, self.moments, self.features.dictionary
        folds = moments.folds  # a half is dealt to as many folds as all
        probed = ProbedDictionary(dictionary, probe, moments.size - dictionary.raw)
        streams, device = streams_of(data, folds, half, folds), moments.sums.device
        own = FoldMoments(probed.size, data.conditions, device=device, **streams)
        return LayerMoments(self.site.name, probed, own)

    def _train_on(self, half: int, kept: tuple[Tensor, ...]) -> Trained | None:
        """Train on the samples of a half; None if they show no information to start from."""
        whole, raw = self.moments.statistics(self._contrast, half), self.features.dictionary.raw
        rounding = self.features.dictionary.rounding_variance[: self.moments.size]
        alive = whole.covariance.diagonal() > rounding
        start = self._start(whole, alive.nonzero()[:, 0])
        if start is None:
            return None
        scale, readout = start
        z, carried = kept[0], kept[1] if len(kept) > 1 else None
        if carried is None:
            regression = Regression(z, (self._contrast.to(z) * len(self._contrast))[None])
        elif self._data.source == "score":
            regression = Regression(z, carried - carried.mean(0))
        else:
            regression = Regression(z, z.new_zeros(1), carried[:, 0])
        covariance = whole.covariance[:raw, :raw] * (alive[:raw, None] & alive[:raw])
        seed = 2 * self._settings.seed + half
        return train_probe(regression, covariance, readout, scale, dof=whole.dof, seed=seed)

    def _start(self, whole: FoldStatistics, alive: Tensor) -> tuple[Tensor, Tensor] | None:
        """Compute the scale [P] of the score, and its linear prediction [raw, P] from which
        training starts."""
        ridge = self.features.ridges(self._settings.ridge)
        raw = int((alive < self.features.dictionary.raw).sum())
        if raw == 0:
            return None
        curve, index = leading_curve(whole, alive[: affordable(len(alive), raw, whole.dof)], ridge)
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
        readout = whole.derivative.new_zeros(self.features.dictionary.raw, len(scale))
        readout[index[:raw]] = solved / size[:, None] * shrink
        return scale, readout

    def _joined(self, plain: LayerFisher) -> LayerFisher | None:
        """Average the two halves; None if a covariance is singular."""
        halves = self._fits()
        if halves is None:
            return None
        linear = int((halves[0].index < self.features.dictionary.raw).sum())
        points = curve_points(linear, len(halves[0].curve))
        first = torch.tensor([linear])
        measured = [half.moments for half in self.halves]
        layer = replace(
            joined(plain, halves, measured, self._contrast, points),
            linear=mean_of([fit.at("J", first)[0] for fit in halves]),
            linear_stderr=error_of_mean([fit.at("stderr", first)[0] for fit in halves]),
            feature_kind="probe",
            replicates=plain.replicates[:0],
        )
        notes = [f"{plain.dropped} constant features dropped"] if plain.dropped else []
        notes.append(self._note())
        notes += [warning] if (warning := finite_step_note(layer)) else []
        return replace(layer, notes=tuple(notes))

    def _fits(self) -> list[HalfFit] | None:
        """Fit both halves over the same features. None if their raw activations are linear in each
        other."""
        wholes = [half.moments.statistics(self._contrast) for half in self.halves]
        alive = (self.halves[0].varied() & self.halves[1].varied()).nonzero()[:, 0]
        needed = int((alive < self.halves[0].dictionary.raw).sum())
        alive = alive[: affordable(len(alive), needed, min(whole.dof for whole in wholes))]
        curves = []
        ridges = self.halves[0].ridges(self._settings.ridge)
        for whole in wholes:
            curve, alive = leading_curve(whole, alive, ridges)
            curves.append(curve)
        if len(alive) < needed or needed == 0:
            return None
        if len(curves[0]) > len(alive):
            curves[0], _ = leading_curve(wholes[0], alive, ridges)
        return crossed([(curve, alive) for curve in curves], [ridges, ridges], needed)

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
