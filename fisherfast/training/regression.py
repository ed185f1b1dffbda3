r"""A live estimate of J from the training batches, without another forward pass.

A training batch holds samples at many theta. Regressing the activations a of a layer on a
polynomial B(theta) *within each batch* gives the mean m(theta) = C^T B(theta) and, from the
residuals, the covariance S: changes of the weights between batches do not count as noise. Averaged
over a window of batches they give

    J = D^T S^-1 D,      D the mean of m'(theta), S the mean covariance over the training range

corrected for the finite window as for independent conditions (docs/theory.md, 17). m'^T S^-1 m' is
convex in m' and S together, so this is at most the mean over theta of the linear Fisher
information, and deviations from the polynomial count as noise: the trend is a lower bound, for
these *training* samples and a network in training mode (including dropout and batch statistics). A
J above that of the input shows that the network memorises.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Annotated, Any

import torch

from fisherfast._fields import AtLeast, Matrix, Scope, Shape, read_fields
from fisherfast.estimation.curve import SPARE_DOF, whitened
from fisherfast.estimation.ridge import MOSTLY_RIDGE, raw_ridge, relative_rounding
from fisherfast.estimation.variance import independent_variance

WINDOW = 512
"""Samples after which the weight of a batch is 1/e: the effective number is twice as large, and J
of an output is known to 6 %."""

WINDOW_PER_ACTIVATION = 8
"""The same per activation of a wide layer, whose covariance needs more samples."""

DEGENERATE = 1e6
"""Largest entry of (B^T B)^-1 for a batch of n samples of order 1 each: nearly equal values of
theta do not determine a polynomial."""

DEGREES = {1: 3}
"""Degree of the polynomial by number of parameters, 2 for others; cubic for networks that
saturate."""


@dataclass(frozen=True)
class LiveEstimate:
    """Linear Fisher information of one layer from the last batches, in 1/theta^2.

    Attributes:
        J: [P, P] float64, a lower bound of its mean over the values of theta in the batches.
        stderr: [P, P] its standard errors for independent samples.
        samples: effective number of samples, the degrees of freedom of its covariance.
        age: training batches since the last one that was read.
    """

    J: torch.Tensor
    stderr: torch.Tensor
    samples: float
    age: int = 0


class ThetaBatch:
    """The polynomial of theta of one batch, which the regressions of all layers share.

    Args:
        theta: [n, P] float64 on the CPU, n at least 2.

    Attributes:
        basis: [n, q] float64 values of the monomials of the standardised theta.
        solver: [q, n] float64, maps activations [n, d] to coefficients.
        slopes: [P, q] float64, means over the samples of the derivatives of the monomials by theta.
        noise: [P, P] float64, covariance of a mean derivative in units of that of an activation.
        weight: of the batch; n for batches with similar theta.
        usable: there are enough different theta for the polynomial.
    """

    def __init__(self, theta: torch.Tensor) -> None:
        exponents = monomials(theta.shape[1])
        spread, center = torch.std_mean(theta, 0, correction=0)
        spread = torch.where(spread > 0, spread, 1.0)
        t = (theta - center) / spread  # of order 1, so that the polynomial is well conditioned
        basis = powers(t, exponents)
        inverse, failed = torch.linalg.inv_ex(basis.T @ basis)
        largest = float(inverse.diagonal().amax())
        enough = len(theta) > len(exponents) + 1
        self.usable = enough and int(failed) == 0 and largest * len(theta) < DEGENERATE
        self.basis = basis
        self.solver = inverse @ basis.T
        self.slopes = slopes_of(t, exponents).mean(0) / spread[:, None]
        self.noise = self.slopes @ inverse @ self.slopes.T
        # close values of theta determine a slope poorly; a power, so units only scale the weight
        size = float(torch.linalg.det(self.noise))
        self.usable = self.usable and size > 0
        self.weight = size ** (-1 / theta.shape[1]) if self.usable else 0.0

    def to(self, device: torch.device) -> ThetaBatch:
        """Move to another device."""
        self.basis, self.solver = self.basis.to(device), self.solver.to(device)
        return self


class RegressionMoments:
    """Regressions of activations [n, d] on polynomials of theta [n, P], with decaying weights of
    old batches.

    Args:
        dim: d.
        parameters: P.
        device: of the sums over activations.

    Sums and products are in float64. Memory: d (P + d) float64 numbers. Cost of a batch: n d^2.
    """

    def __init__(self, dim: int, parameters: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self._window = max(WINDOW, WINDOW_PER_ACTIVATION * dim)
        f64 = torch.float64
        self._sums = {
            "derivative": torch.zeros(parameters, dim, dtype=f64, device=device),  # w D
            "square": torch.zeros(dim, dim, dtype=f64, device=device),  # w / n residuals
            "rounding": torch.zeros(dim, dtype=f64, device=device),  # w / n rounding variance
            # w^2 Cov(D) in units of S
            "noise": torch.zeros(parameters, parameters, dtype=f64, device="cpu"),
        }
        self._weight = 0.0  # sum of w
        self._freedom = 0.0  # of the residuals, times w / n
        self._freedom_squared = 0.0  # times (w / n)^2

    def update(self, batch: ThetaBatch, activations: torch.Tensor) -> None:
        """Add activations [n, d] of any floating dtype, of a usable batch of thetas."""
        sums, (n, q), weight = self._sums, batch.basis.shape, batch.weight
        a = activations.double()
        if a.device != sums["square"].device:  # the model was moved, or a state loaded
            for name in ("derivative", "square", "rounding"):
                sums[name] = sums[name].to(a.device)
        coefficients = batch.solver @ a
        residual = torch.addmm(a, batch.basis, coefficients, alpha=-1)
        square = residual.T @ residual
        if not bool(torch.isfinite(square.float()).all()):
            return  # a NaN, or a number that dwarfs all others, would stay in the sums
        keep = math.exp(-n / self._window)
        derivative = batch.slopes.to(a.device) @ coefficients
        rounding = a.square().sum(0) * relative_rounding(activations.dtype) ** 2
        sums["derivative"].mul_(keep).add_(derivative, alpha=weight)
        sums["square"].mul_(keep).add_(square, alpha=weight / n)
        sums["rounding"].mul_(keep).add_(rounding, alpha=weight / n)
        sums["noise"].mul_(keep**2).add_(batch.noise, alpha=weight**2)
        self._weight = self._weight * keep + weight
        self._freedom = self._freedom * keep + (n - q) * (weight / n)
        self._freedom_squared = self._freedom_squared * keep**2 + (n - q) * (weight / n) ** 2

    def estimate(self) -> LiveEstimate | None:
        """Estimate J from the added batches; None while there are too few samples.

        The ridge is the least that the rounding of the activations allows, see `ridge`.

        Cost: d^3 / 3 operations.
        """
        sums = self._sums
        if self._weight == 0.0:
            return None
        dof = self._freedom**2 / self._freedom_squared
        covariance = sums["square"] / self._freedom
        live = (covariance.diagonal() > 0).nonzero()[:, 0]
        k = len(live)
        if dof < k + SPARE_DOF:
            return None
        if k == 0:
            zero = torch.zeros_like(sums["noise"])
            return LiveEstimate(zero, zero, dof)
        noise = (sums["noise"] / self._weight**2).to(covariance)
        ridge = raw_ridge(covariance.diagonal(), sums["rounding"] / self._freedom)
        derivative = (sums["derivative"][:, live] / self._weight).T
        solved = whitened(covariance[live][:, live], derivative, ridge[live])
        known = solved.ridge_share <= MOSTLY_RIDGE
        half = solved.columns[known]
        effective = float((1 - solved.ridge_share[known]).sum())
        J = (dof - effective - 1) / dof * half.T @ half - effective * noise
        variance = independent_variance(J[None], dof, noise, J.new_tensor([effective]))[0]
        return LiveEstimate(J.cpu(), variance.clamp_min(0).sqrt().cpu(), dof)

    def state_dict(self) -> dict[str, Any]:
        """Return tensors and plain numbers."""
        sums = {name: value.clone() for name, value in self._sums.items()}
        return sums | {"counts": [self._weight, self._freedom, self._freedom_squared]}

    @classmethod
    def from_state_dict(cls, state: Any, parameters: int) -> RegressionMoments:
        """Make the moments of the result of `state_dict`. Raises ValueError for anything else."""
        values = read_fields(_STATE, state, "", scope=Scope({"P": parameters}))
        weight, freedom, squared = counts = values.pop("counts")
        if not all(map(math.isfinite, counts)) or len({count > 0 for count in counts}) > 1:
            raise ValueError(f"counts must be zero, or positive and finite, got {counts}")
        made = cls(len(values["square"]), parameters, device=values["square"].device)
        made._sums = {
            name: values[name].to(zero.device, copy=True) for name, zero in made._sums.items()
        }
        made._weight, made._freedom, made._freedom_squared = weight, freedom, squared
        return made


_SUM = Annotated[float, AtLeast(0)]
_STATE = {
    "derivative": Annotated[torch.Tensor, Shape(("P", "d"))],
    "square": Annotated[torch.Tensor, Shape(("d", "d"))],
    "rounding": Annotated[torch.Tensor, Shape(("d",)), AtLeast(0)],
    "noise": Matrix,
    "counts": tuple[_SUM, _SUM, _SUM],
}


def monomials(parameters: int) -> list[tuple[int, ...]]:
    """List the exponents of all monomials of P variables up to the degree, the constant first."""
    variables = range(parameters)
    return [
        tuple(map(chosen.count, variables))
        for degree in range(DEGREES.get(parameters, 2) + 1)
        for chosen in itertools.combinations_with_replacement(variables, degree)
    ]


def powers(t: torch.Tensor, exponents: list[tuple[int, ...]]) -> torch.Tensor:
    """Compute the monomials [n, q] of t [n, P]."""
    orders = torch.tensor(exponents, device=t.device)
    return torch.pow(t[:, None, :], orders).prod(-1)


def slopes_of(t: torch.Tensor, exponents: list[tuple[int, ...]]) -> torch.Tensor:
    """Compute the derivatives [n, P, q] of the monomials."""
    columns = []
    for p in range(t.shape[1]):
        lowered = [tuple(max(e - (p == r), 0) for r, e in enumerate(es)) for es in exponents]
        factors = torch.tensor([es[p] for es in exponents], dtype=t.dtype, device=t.device)
        columns.append(powers(t, lowered) * factors)
    return torch.stack(columns, 1)
