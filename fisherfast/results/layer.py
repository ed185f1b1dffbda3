"""`LayerFisher`: the Fisher information in the activations of one layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np
import torch

from fisherfast._errors import FisherWarning
from fisherfast.results.marginal import (
    SINGULAR,
    MarginalFisher,
    cramer_rao,
    marginal_fisher,
)
from fisherfast.results.profile import Profile
from fisherfast.results.text import diagonal_text

NOT_INDEPENDENT = (
    "neighbouring samples depend on each other (pairs, repeated measurements, a time series, or a"
    " sorted file), but errors and bounds assume independent samples: pass groups= for samples that"
    " belong together, or shuffle a file that is only sorted"
)

FINITE_STEP_LIMIT = 0.3
"""dtheta sqrt(J) / 2 above which the finite step overshoots by more than 0.4 % (Gaussian shift)."""


@dataclass(frozen=True, eq=False, repr=False)
class LayerFisher:
    """Fisher information in the activations of one layer.

    All matrices are float64 [P, P] on the CPU, per unit of theta squared. For one parameter
    `value`, or ``float(layer)``, is J as a number.

    Attributes:
        name: of the layer; "input" for the data themselves.
        kind: class of the module, or the function.
        shape: of one sample's activations.
        J: best estimate of the linear Fisher information of the features, bias-corrected; a lower
            bound of the Fisher information. It is not clipped, and may be negative within its error
            if the truth is near 0.
        stderr: standard error of J.
        lower: the honest bound: a readout learned on one half of the samples, measured on the
            other.
        lower_stderr: its standard error.
        linear: linear Fisher information of the raw activations, without lift, with the same
            corrections as J (and equal to J for a wide layer).
        linear_stderr: its standard error.
        naive: J without any finite-sample correction (biased upwards).
        curve_k: [K'] int64 numbers of features at which the curve is stored.
        curve_J: [K', P, P] J of the first k features.
        curve_stderr: [K', P, P] standard errors.
        features: number of features k used for J; for "krylov" the larger of those of its two
            halves.
        feature_kind: "raw", "lift", "krylov" or "sketch" for a wide layer, or "none" for a layer
            without variation (J = 0).
        effective_dim: k_eff, the effective number of features after the ridge.
        samples: number of samples used, over all conditions.
        dropped: activations and features that never varied and were left out.
        plateau: a plateau of the curve was reached before the last feature.
        dtheta: [P] full separation of the conditions; empty without a finite step.
        aliases: other names of the same activations.
        descendants: names of layers that are a function of this one alone.
        notes: remarks for the reader.
        error_covariance: [m, m] covariance of the errors of the lower triangle of J, row by row, m
            = P (P + 1) / 2; None if unknown. `marginal` computes its error from it.
        response: [d, P] derivative of the mean activations, in their unit per unit of theta, of
            layers with at most 16 activations; None for others. The unit matrix for the output of
            an unbiased estimator.
        status: how reliable J is: "unresolved", "noisy", "rising" or "resolved".
        compressed: the activations were compressed before they were measured.
        carried: the precision is enough for the condition of the covariance; if not, information
            may be lost in the rounding of the activations.
        independent: no dependence between neighbouring samples was found; errors and bounds assume
            that there is none.
        sensitive: more features that add a tenth of J would have been noticed.
        rounding: J is rounding if less than this fraction of the information about a parameter
            remains when the others are unknown: `crlb` is then infinite.
        replicates: [F, P, P] J without each fold of the samples, scaled so that their jackknife is
            the covariance of the error of J. All layers of a flow leave out the same samples, so
            they give the error of any function of several layers. Empty if there are none.
        cut: the output depends on the input through this layer alone; None if that is unknown.
        copies: names, also in `aliases`, of layers that are an invertible affine map of this one
            (batch norm, scales that are not zero): they hold the same information.
        label: what tables and figures call it, as in "layer1.0 (sum)"; empty for its name.
        profile: the information along theta, of which J is the mean over samples; None for samples
            at one theta.
        parameter_names: [P] names of the parameters; empty if they have none.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    J: torch.Tensor
    stderr: torch.Tensor
    lower: torch.Tensor
    lower_stderr: torch.Tensor
    linear: torch.Tensor
    linear_stderr: torch.Tensor
    naive: torch.Tensor
    curve_k: torch.Tensor
    curve_J: torch.Tensor
    curve_stderr: torch.Tensor
    features: int
    feature_kind: str
    effective_dim: float
    samples: int
    dropped: int
    plateau: bool
    dtheta: tuple[float, ...]
    aliases: tuple[str, ...] = ()
    descendants: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error_covariance: torch.Tensor | None = None
    response: torch.Tensor | None = None
    status: str = "unresolved"
    compressed: bool = False
    carried: bool = True
    independent: bool = True
    sensitive: bool = True
    rounding: float = SINGULAR
    replicates: torch.Tensor = field(
        default_factory=lambda: torch.empty(0, 0, 0, dtype=torch.float64, device="cpu")
    )
    cut: bool | None = None
    copies: tuple[str, ...] = ()
    label: str = ""
    profile: Profile | None = None
    parameter_names: tuple[str, ...] = ()

    @property
    def converged(self) -> bool:
        """Whether J is reliable: status == "resolved"."""
        return self.status == "resolved"

    @property
    def dim(self) -> int:
        """d, the number of activations of one sample."""
        return math.prod(self.shape)

    @property
    def parameters(self) -> int:
        """P."""
        return len(self.J)

    @property
    def value(self) -> float:
        """J as a number in 1/theta^2; for one parameter only."""
        if self.parameters != 1:
            raise ValueError(f"value needs exactly one parameter, got {self.parameters}: use .J")
        return float(self.J)

    def __float__(self) -> float:
        return self.value

    def __repr__(self) -> str:
        J, stderr, lower = map(diagonal_text, (self.J, self.stderr, self.lower))
        return (
            f"LayerFisher({self.name!r}, J={J}, stderr={stderr}, lower={lower},"
            f" features={self.features})"
        )

    @property
    def crlb(self) -> torch.Tensor:
        """Cramer-Rao bound [P] float64 in the unit of theta: sqrt of the diagonal of J^-1.

        This is the smallest standard deviation of an unbiased estimate from these features with all
        parameters unknown. Infinite if J is not positive definite within rounding.
        """
        return cramer_rao(self.J, self.rounding)

    def marginal(self, keep: int | Sequence[int]) -> MarginalFisher:
        """Compute the information about some parameters with the others as unknown nuisances: the
        Schur complement J_aa - J_ab J_bb^-1 J_ba, in 1/theta^2.

        Its standard error is to first order, from the covariance of the errors of all entries of J.
        ``marginal([p]).J`` is ``crlb[p] ** -2``. Equivalent nuisances count once, and nuisances
        without information do not count; NaN if their J is not positive semi-definite.

        Args:
            keep: the parameters to keep, one index or several; negative ones count from the end.

        Raises:
            ValueError: keep is empty, or holds a parameter twice or one that does not exist.
            TypeError: keep does not hold whole numbers.

        Example:
            >>> import torch, fisherfast as ff
            >>> x, tangents = torch.randn(1000, 2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
            >>> dx = tangents.expand(1000, 2, 2)                # J = [[1, 0.6], [0.6, 1]]
            >>> input = ff.fisher_information(ff.Pathwise(x, dx))
            >>> abs(input.marginal(0).value - 0.64) < 0.2       # 1 - 0.6^2 / 1
            True
        """
        return marginal_fisher(self.J, self.error_covariance, keep, self.rounding)

    @property
    def finite_step(self) -> torch.Tensor:
        """dtheta sqrt(J) / 2 [P]: the distance of each condition from theta in units of its
        uncertainty. Zero without a finite step."""
        if not self.dtheta:
            return torch.zeros(self.parameters, dtype=torch.float64, device="cpu")
        step = torch.tensor(self.dtheta, dtype=torch.float64, device="cpu")
        return step * self.J.diagonal().clamp_min(0).sqrt() / 2

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and nested lists; NaN and infinity as "nan", "inf"."""
        entry = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {name: value for name, value in entry.items() if value is not None}

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> LayerFisher:
        """Rebuild a layer from the result of `to_dict`.

        Raises:
            KeyError, TypeError, ValueError: an entry is missing or of the wrong kind.
        """
        values = {
            f.name: entry[f.name] for f in fields(cls) if f.name not in _OPTIONAL or f.name in entry
        }
        parameters = len(values["J"])
        if len(values["dtheta"]) not in (0, parameters):
            raise ValueError(
                f"dtheta must hold {parameters} steps or none, got {len(values['dtheta'])}"
            )
        entries = parameters * (parameters + 1) // 2
        shapes = {
            **dict.fromkeys(_MATRICES, (parameters, parameters)),
            **dict.fromkeys(_STACKS, (-1, parameters, parameters)),
            "error_covariance": (entries, entries),
            "response": (-1, parameters),
        }
        for name in values.keys() & shapes.keys():
            numbers = np.array(values[name], dtype=np.float64)
            values[name] = torch.from_numpy(numbers.reshape(shapes[name]))
        if "profile" in values:
            values["profile"] = Profile.from_dict(values["profile"])
        values["effective_dim"] = float(values["effective_dim"])
        values["curve_k"] = torch.tensor(values["curve_k"], dtype=torch.int64, device="cpu")
        for name in _TUPLES:
            values[name] = tuple(values[name])
        lengths = {len(values[name]) for name in ("curve_k", "curve_J", "curve_stderr")}
        if len(lengths) > 1:
            raise ValueError(f"curves must have the same length, got {sorted(lengths)}")
        return cls(**values)


_MATRICES = ("J", "stderr", "lower", "lower_stderr", "linear", "linear_stderr", "naive")
_STACKS = ("curve_J", "curve_stderr", "replicates")
_TUPLES = ("shape", "dtheta", "aliases", "descendants", "notes", "copies", "parameter_names")
_OPTIONAL = (
    "error_covariance",
    "response",
    "cut",
    "profile",
)  # None in the layer, left out of `to_dict`


def finite_step_note(layer: LayerFisher) -> str | None:
    """Make a warning if the two conditions are too far apart for a derivative."""
    worst = float(layer.finite_step.max())
    if worst <= FINITE_STEP_LIMIT:
        return None
    return (
        f"dtheta sqrt(J) / 2 = {worst:.2f} > {FINITE_STEP_LIMIT}: the finite step distorts J;"
        f" use a dtheta about {FINITE_STEP_LIMIT / worst:.2f} times as large"
    )


def warn_of(layers: tuple[LayerFisher, ...], *, stacklevel: int = 4) -> None:
    """Warn once of samples that depend on each other, and once of too wide finite steps."""
    dependent = [layer.name for layer in layers if not layer.independent]
    if dependent:
        names = ", ".join(dependent)
        warnings.warn(f"{NOT_INDEPENDENT} (layers: {names})", FisherWarning, stacklevel=stacklevel)
    noted = [(layer.name, note) for layer in layers if (note := finite_step_note(layer))]
    if noted:
        names = ", ".join(name for name, _ in noted)
        warnings.warn(f"{noted[0][1]} (layers: {names})", FisherWarning, stacklevel=stacklevel)


def _plain(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return _plain(value.tolist())
    if isinstance(value, Profile):
        return _plain(value.to_dict())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
