"""`LayerFisher`: the Fisher information in the activations of one layer."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any

import torch

from fisherfast._errors import FisherWarning
from fisherfast._fields import AtLeast, Count, ErrorMatrix, Matrix, OneOf, Shape, build, plain
from fisherfast.results.forecast import (
    LEVEL,
    Ellipse,
    bias_of,
    check_precision,
    credible_ellipse,
)
from fisherfast.results.marginal import (
    SINGULAR,
    Keep,
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

READOUT_WIDTH = 512
"""Widest layer after the input that keeps its readout, which `LayerFisher.bias` needs."""
UNMEASURED = "not measured: "
"""Begin of the note of a layer whose J is NaN because it cannot be measured."""

_ESTIMATES = ("J", "lower", "linear", "naive")

STATUSES = ("unresolved", "noisy", "rising", "resolved")

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
        prior: [P, P] precision of a prior that J contains, see `with_prior`; None without one.
        readout: [d, P] S^-1 D of the raw activations, per unit of activation and theta, corrected
            for few samples, from which `bias` is computed; None for wide layers.
    """

    name: str
    kind: str
    shape: tuple[Count, ...]
    J: Matrix
    stderr: ErrorMatrix
    lower: Matrix
    lower_stderr: ErrorMatrix
    linear: Matrix
    linear_stderr: ErrorMatrix
    naive: Matrix
    curve_k: Annotated[torch.Tensor, Shape(("K",), torch.int64), AtLeast(0)]
    curve_J: Annotated[torch.Tensor, Shape(("K", "P", "P"))]
    curve_stderr: Annotated[torch.Tensor, Shape(("K", "P", "P")), AtLeast(0)]
    features: Count
    feature_kind: str
    effective_dim: Annotated[float, AtLeast(0)]
    samples: Count
    dropped: Count
    plateau: bool
    dtheta: tuple[float, ...]
    aliases: tuple[str, ...] = ()
    descendants: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    error_covariance: Annotated[torch.Tensor, Shape(("m", "m"))] | None = None
    response: Annotated[torch.Tensor, Shape(("d", "P"))] | None = None
    status: Annotated[str, OneOf(STATUSES)] = "unresolved"
    compressed: bool = False
    carried: bool = True
    independent: bool = True
    sensitive: bool = True
    rounding: Annotated[float, AtLeast(0)] = SINGULAR
    replicates: Annotated[torch.Tensor, Shape(("F", "P", "P"))] = field(
        default_factory=lambda: torch.empty(0, 0, 0, dtype=torch.float64, device="cpu")
    )
    cut: bool | None = None
    copies: tuple[str, ...] = ()
    label: str = ""
    profile: Profile | None = None
    parameter_names: tuple[str, ...] = ()
    prior: Matrix | None = None
    readout: Annotated[torch.Tensor, Shape(("d", "P"))] | None = None

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

    def marginal(self, keep: Keep) -> MarginalFisher:
        """Compute the information about some parameters with the others as unknown nuisances: the
        Schur complement J_aa - J_ab J_bb^-1 J_ba, in 1/theta^2.

        Its standard error is to first order, from the covariance of the errors of all entries of J.
        ``marginal([p]).J`` is ``crlb[p] ** -2``. Equivalent nuisances count once, and nuisances
        without information do not count; NaN if their J is not positive semi-definite.

        Args:
            keep: the parameters to keep, one or several, by number or name; negative numbers count
                from the end.

        Raises:
            ValueError: keep is empty, or holds a parameter twice or one that does not exist.
            TypeError: keep does not hold whole numbers or names.

        Example:
            >>> import torch, fisherfast as ff
            >>> x, tangents = torch.randn(1000, 2), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
            >>> dx = tangents.expand(1000, 2, 2)                # J = [[1, 0.6], [0.6, 1]]
            >>> input = ff.fisher_information(ff.Pathwise(x, dx))
            >>> abs(input.marginal(0).value - 0.64) < 0.2       # 1 - 0.6^2 / 1
            True
        """
        return marginal_fisher(
            self.J, self.error_covariance, keep, self.rounding, self.parameter_names
        )

    def ellipse(
        self, keep: Keep, level: float = LEVEL, *, center: Sequence[float] = (0.0, 0.0)
    ) -> Ellipse:
        r"""Compute the credible ellipse of two parameters with the others unknown.

        .. math:: (\theta - c)^T M (\theta - c) = -2 \ln(1 - \text{level})

        with M the `marginal` information: 2.30 on the right for 68.3 %, 6.17 for 95.4 %.

        Args:
            keep: two parameters, numbers or names.
            level: probability inside, between 0 and 1.
            center: of the ellipse, in the units of theta.

        Raises:
            ValueError: keep, level or center is wrong, or there is no information on a parameter
                with the others unknown.

        Example:
            >>> import torch, fisherfast as ff
            >>> x, tangents = torch.randn(1000, 2), torch.eye(2).expand(1000, 2, 2)   # J = 1
            >>> input = ff.fisher_information(ff.Pathwise(x, tangents, names=["x", "y"]))
            >>> ellipse = input.ellipse(["x", "y"])
            >>> abs(ellipse.semi_axes[0] - 2.30**0.5) < 0.3, ellipse.points().shape
            (True, torch.Size([181, 2]))
        """
        return credible_ellipse(self.marginal(keep), self.J, self.rounding, level, center)

    def with_prior(self, precision: Any) -> LayerFisher:
        """Add the information of a prior, or of another experiment, that is known without error.

        J, lower, linear, naive, the curve, the profile and the replicates become J + precision;
        errors and status stay those of the measurement. A `bias` is then that of the estimate of
        maximal posterior density.

        Args:
            precision: [P, P] symmetric positive semi-definite, in 1/theta^2; or [P] of 1/sigma^2,
                0 for no prior; or a number for one parameter.

        Raises:
            ValueError: precision has another shape, is not finite, or not symmetric positive
                semi-definite.
            TypeError: it does not hold real numbers.

        Example:
            >>> import torch, fisherfast as ff
            >>> x, dx = torch.randn(1000, 4), torch.ones(1000, 4)
            >>> input = ff.fisher_information(ff.Pathwise(x, dx))
            >>> both = input.with_prior(1 / 0.25**2)               # sigma = 0.25: J = 4 + 16
            >>> round(both.value - input.value, 6)
            16.0
        """
        more = check_precision(precision, self.parameters)
        sums = {name: getattr(self, name) + more for name in (*_ESTIMATES, "curve_J")}
        if len(self.replicates):
            sums["replicates"] = self.replicates + more
        profile = self.profile and replace(self.profile, J=self.profile.J + more)
        prior = more if self.prior is None else self.prior + more
        return replace(self, **sums, profile=profile, prior=prior)

    def bias(self, shift: Any) -> torch.Tensor:
        r"""Compute the bias [P] of an efficient linear estimate if the mean of the activations is
        shifted by an effect that the estimate does not know, in the unit of theta.

        .. math:: b = J^{-1} D^T S^{-1} \delta

        to first order in the shift, with J the `linear` information: the estimate weighs the raw
        activations, without their lift. The error of b is not computed.

        Args:
            shift: delta of the activations, of the shape of one sample; or [n, ...] of n samples,
                of which the mean is used. For the input this is the shift of x; for other layers
                `fisherfast.propagate` turns that into theirs.

        Returns:
            [P] float64. NaN if J is not positive definite.

        Raises:
            ValueError: shift has another shape or is not finite; the layer has no readout.

        Example:
            >>> import torch, fisherfast as ff
            >>> x, dx = torch.randn(1000, 4), torch.ones(1000, 4)
            >>> input = ff.fisher_information(ff.Pathwise(x, dx))
            >>> shift = torch.tensor([0.2, 0.0, 0.0, 0.0])         # of one of four equal pixels
            >>> abs(float(input.bias(shift)) - 0.05) < 0.02
            True
        """
        if self.readout is None:
            raise ValueError(
                f"layer {self.name!r} must have a readout of its activations for a bias, got none:"
                " it is of several theta, compressed, from the state of a monitor, or wider than"
                f" {READOUT_WIDTH} activations"
            )
        return bias_of(self.linear, self.readout, self.shape, shift)

    @property
    def finite_step(self) -> torch.Tensor:
        """dtheta sqrt(J) / 2 [P]: the distance of each condition from theta in units of its
        uncertainty. Zero without a finite step."""
        if not self.dtheta:
            return torch.zeros(self.parameters, dtype=torch.float64, device="cpu")
        step = torch.tensor(self.dtheta, dtype=torch.float64, device="cpu")
        J = self.J if self.prior is None else self.J - self.prior
        return step * J.diagonal().clamp_min(0).sqrt() / 2

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers, strings and nested lists; NaN and infinity as "nan", "inf"."""
        return plain(self)

    @classmethod
    def from_dict(cls, entry: dict[str, Any]) -> LayerFisher:
        """Rebuild a layer from the result of `to_dict`.

        Raises:
            ValueError: an entry is missing or of the wrong kind.
        """
        return build(cls, entry)

    def check_fields(self) -> None:
        """Raise ValueError unless the fields of a rebuilt layer fit together."""
        P = self.parameters
        for name, each in (("dtheta", self.dtheta), ("parameter_names", self.parameter_names)):
            if len(each) not in (0, P):
                raise ValueError(f"{name} must have {P} entries or none, got {len(each)}")
        m = P * (P + 1) // 2
        if self.error_covariance is not None and len(self.error_covariance) != m:
            raise ValueError(
                f"error_covariance must have {m} rows for {P} parameters, got"
                f" {len(self.error_covariance)}"
            )
        if self.response is not None and len(self.response) != self.dim:
            raise ValueError(
                f"response must have {self.dim} rows for the shape {list(self.shape)}, got"
                f" {len(self.response)}"
            )
        if self.profile is not None and self.profile.theta.shape[1] != P:
            raise ValueError(f"profile must have {P} parameters, got {self.profile.theta.shape[1]}")


def finite_step_note(layer: LayerFisher) -> str | None:
    """Make a warning if the two conditions are too far apart for a derivative."""
    worst = float(layer.finite_step.max())
    if not worst > FINITE_STEP_LIMIT:  # NaN: not measured
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
