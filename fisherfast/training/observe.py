r"""A live estimate from the training batches themselves: no forward pass of its own.

A training batch holds samples at many theta. Regressing the activations a of a layer on a
polynomial B(theta) *within each batch* gives the mean m(theta) = C^T B(theta) and, as residual, the
covariance S: weights that move between batches do not count as noise. Averaged over a window of
batches they give

    J = D^T S^-1 D,      D the mean of m'(theta), S the mean covariance over the training range

corrected for the finite window as for independent conditions (docs/theory.md, 17). m'^T S^-1 m' is
convex in m' and S together, so this is at most the mean over theta of the linear Fisher
information, and what the polynomial cannot follow counts as noise: the trend is a lower bound, for
these *training* samples and a network in training mode (dropout and batch statistics included).
More than the input holds is memory.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fisherfast import ops
from fisherfast.estimators import RIDGE, SPARE_DOF
from fisherfast.taps import INPUT, OUTPUT
from fisherfast.uncertainty import independent_variance

__all__ = ["LiveEstimate", "Observer", "RegressionMoments"]

WINDOW = 512
"""Samples after which a batch counts 1/e: twice as many effective ones, J of an output to 6 %."""

WINDOW_PER_ACTIVATION = 8
"""The same per activation of a wide layer: its covariance needs them."""

WIDEST = 256
"""Activations of the widest layer that is observed: beyond, a batch costs more than it tells."""

DEGENERATE = 1e6
"""Largest entry of (B^T B)^-1 for a batch of n samples of order 1 each: thetas that are nearly all
the same tell no polynomial."""

DEGREES = {1: 3}
"""Degree of the polynomial by number of parameters, else 2: a saturating network is cubic."""


@dataclass(frozen=True)
class LiveEstimate:
    """Linear Fisher information of one layer as the last batches show it, in 1/theta^2.

    Attributes:
        J: [P, P] float64, a lower bound of its mean over the thetas of the batches.
        stderr: [P, P] its standard errors, of independent samples.
        samples: effective number of samples behind it, degrees of freedom of its covariance.
    """

    J: torch.Tensor
    stderr: torch.Tensor
    samples: float


class ThetaBatch:
    """The polynomial of the thetas of one batch: what the regressions of all layers share.

    Args:
        theta: [n, P] float64 on the CPU.
        center, spread: [P], so that (theta - center) / spread is of order 1.

    Attributes:
        basis: [n, q] values of the monomials, float32.
        solver: [q, n], gives the coefficients of activations [n, d]; float32.
        slopes: [P, q] float64, sums over the samples of the derivatives of the monomials.
        inverse: [q, q] float64, (B^T B)^-1.
        usable: there are enough different thetas for the polynomial.
    """

    def __init__(self, theta: torch.Tensor, center: torch.Tensor, spread: torch.Tensor) -> None:
        exponents = monomials(theta.shape[1])
        t = (theta - center) / spread
        basis = powers(t, exponents)
        self.inverse, failed = torch.linalg.inv_ex(basis.T @ basis)
        largest = float(self.inverse.diagonal().amax())
        enough = len(theta) > len(exponents) + 1
        self.usable = enough and int(failed) == 0 and largest * len(theta) < DEGENERATE
        self.basis = basis.float()
        self.solver = (self.inverse @ basis.T).float()
        self.slopes = slopes_of(t, exponents).sum(0)

    def to(self, device: torch.device) -> ThetaBatch:
        """On another device."""
        self.basis, self.solver = self.basis.to(device), self.solver.to(device)
        return self


class RegressionMoments:
    """Regressions of activations [n, d] on polynomials of theta [n, P], old batches fading.

    Args:
        dim: d.
        parameters: P.
        device: of the sums over activations.

    Memory: d (q + d) numbers of float64, q the number of monomials. Cost of a batch: n d^2.
    """

    def __init__(self, dim: int, parameters: int, device: torch.device | str = "cpu") -> None:
        self._window = max(WINDOW, WINDOW_PER_ACTIVATION * dim)
        q = len(monomials(parameters))
        f64 = torch.float64
        self._sums = {
            "coefficients": torch.zeros(q, dim, dtype=f64, device=device),  # n C
            "square": torch.zeros(dim, dim, dtype=f64, device=device),  # residuals
            "errors": torch.zeros(q, q, dtype=f64),  # n^2 (B^T B)^-1: Cov(n C) in units of S
            "slopes": torch.zeros(parameters, q, dtype=f64),  # n times the mean of B'
        }
        self._weight = 0.0  # sum of n
        self._freedom = 0.0  # of the residuals
        self._freedom_squared = 0.0

    def update(self, batch: ThetaBatch, activations: torch.Tensor) -> None:
        """Add activations [n, d] of any floating dtype, of a usable batch of thetas."""
        sums, (n, q) = self._sums, batch.basis.shape
        a = activations.float()
        coefficients = batch.solver @ a
        # float32 products of residuals, float64 sums: a trend needs three digits
        residual = torch.addmm(a, batch.basis, coefficients, alpha=-1)
        keep = math.exp(-n / self._window)
        sums["coefficients"].mul_(keep).add_(coefficients, alpha=n)
        sums["square"].mul_(keep).add_(residual.T @ residual)
        sums["errors"].mul_(keep**2).add_(batch.inverse, alpha=n**2)
        sums["slopes"].mul_(keep).add_(batch.slopes)
        self._weight = self._weight * keep + n
        self._freedom = self._freedom * keep + (n - q)
        self._freedom_squared = self._freedom_squared * keep**2 + (n - q)

    def estimate(self, ridge: float = RIDGE) -> LiveEstimate | None:
        """J of what was added, in units of the spread of theta; None while there are too few
        samples.

        Cost: d^3 / 3 operations.
        """
        sums = self._sums
        if self._weight == 0.0:
            return None
        dof = self._freedom**2 / self._freedom_squared
        covariance = sums["square"] / self._freedom
        live = (covariance.diagonal() > 0).nonzero()[:, 0]
        k, P = len(live), len(sums["slopes"])
        if dof < k + SPARE_DOF:
            return None
        slopes = (sums["slopes"] / self._weight).to(covariance)
        noise = slopes @ sums["errors"].to(covariance) @ slopes.T / self._weight**2
        if k == 0:
            zero = torch.zeros(P, P, dtype=torch.float64)
            return LiveEstimate(zero, zero, dof)
        solved = ops.fisher_solve_details(
            covariance[live][:, live].contiguous(),
            (slopes @ sums["coefficients"][:, live] / self._weight).T.contiguous(),
            ridge=ridge,
            inverse_rows=True,
        )
        if int(solved.info):
            return None
        effective = k - ridge * float(solved.inverse_rows.sum())
        J = (dof - effective - 1) / dof * solved.fisher - effective * noise
        variance = independent_variance(J[None], dof, noise, torch.tensor([effective]).to(J))[0]
        return LiveEstimate(J.cpu(), variance.clamp_min(0).sqrt().cpu(), dof)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers."""
        sums = {name: value.clone() for name, value in self._sums.items()}
        return sums | {"counts": [self._weight, self._freedom, self._freedom_squared]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        for name, value in self._sums.items():
            self._sums[name] = state[name].to(value.device, copy=True)
        self._weight, self._freedom, self._freedom_squared = state["counts"]


Caught = tuple[torch.Tensor, int]
"""An activation and the number of its in-place changes when it was caught."""


class Observer:
    """Reads activations of one training batch in `every`, from hooks that live for that batch.

    Args:
        model: in training; its hooks are put back after each batch that is read.
        parameters: P.
        every: batches from one that is read to the next.
        modules: names and modules to read, the output aside.

    Attributes:
        moments: by name of the layer.
    """

    def __init__(
        self, model: nn.Module, parameters: int, *, every: int, modules: Mapping[str, nn.Module]
    ) -> None:
        self._model = model
        self._parameters = parameters
        self._every = every
        self._modules = modules
        self._handles: list[torch.utils.hooks.RemovableHandle] = []
        self._caught: dict[str, Caught] = {}
        self._calls = 0
        # of the first batch that is read: thetas of order 1 keep the polynomial well conditioned
        self._center = torch.zeros(parameters, dtype=torch.float64)
        self._spread = torch.ones(parameters, dtype=torch.float64)
        self.moments: dict[str, RegressionMoments] = {}

    def observe(self, theta: torch.Tensor) -> None:
        """Take the batch that the model has just seen, if it is its turn.

        Args:
            theta: [n] or [n, P] of the samples.
        """
        self._calls += 1
        if self._handles:
            try:
                with torch.no_grad():
                    self._take(theta)
            finally:
                self.release()
        if (self._calls - 1) % self._every == 0:
            self._listen()

    def release(self) -> None:
        """Remove the hooks and let go of what they caught."""
        while self._handles:
            self._handles.pop().remove()
        self._caught = {}

    def estimates(self) -> dict[str, LiveEstimate]:
        """J of each layer that enough samples were seen of."""
        found = {name: moments.estimate() for name, moments in self.moments.items()}
        unit = 1 / (self._spread[:, None] * self._spread)
        return {
            name: LiveEstimate(live.J * unit, live.stderr * unit, live.samples)
            for name, live in found.items()
            if live is not None
        }

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; a batch that is being listened to is not among them."""
        moments = {name: m.state_dict() for name, m in self.moments.items()}
        return {
            "calls": self._calls,
            "listening": bool(self._handles),
            "center": self._center.clone(),
            "spread": self._spread.clone(),
            "moments": moments,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned; listens again if that was so."""
        self.release()
        self._calls = int(state["calls"])
        self._center, self._spread = state["center"].clone(), state["spread"].clone()
        self.moments = {}
        for name, sums in state["moments"].items():
            moments = RegressionMoments(
                len(sums["square"]), self._parameters, device=sums["square"].device
            )
            moments.load_state_dict(sums)
            self.moments[name] = moments
        if state["listening"]:
            self._listen()

    def _listen(self) -> None:
        self._handles.append(self._model.register_forward_pre_hook(self._catch_input))
        self._handles.append(self._model.register_forward_hook(self._catch(OUTPUT)))
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._catch(name)))

    def _catch_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if args:
            self._keep(INPUT, args[0])

    def _catch(self, name: str) -> Any:
        def catch(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if name == OUTPUT:  # the last layer's own: one of them is enough
                same = [other for other, (tensor, _) in self._caught.items() if tensor is output]
                for other in same:
                    del self._caught[other]
            self._keep(name, output)

        return catch

    def _keep(self, name: str, output: Any) -> None:
        """Hold on to a reference: the activations are there anyway, for the backward pass."""
        if name in self._caught or not isinstance(output, torch.Tensor) or output.ndim < 1:
            return
        if output.is_floating_point() and output[:1].numel() <= WIDEST:
            version = -1 if output.is_inference() else output._version
            self._caught[name] = (output, version)

    def _take(self, theta: torch.Tensor) -> None:
        caught = {name: tensor for name, tensor in self._caught.items() if self._intact(tensor)}
        if not caught:
            return
        n = len(next(iter(caught.values()))[0])
        rows = self._theta(theta, n)
        if not self.moments:
            spread, self._center = torch.std_mean(rows, 0, correction=0)
            self._spread = torch.where(spread > 0, spread, 1.0)
        batch = ThetaBatch(rows, self._center, self._spread)
        if not batch.usable:
            return
        for name, (output, _) in caught.items():
            flat = output.detach().flatten(1) if output.ndim > 1 else output.detach()[:, None]
            if len(flat) != n:
                continue
            if name not in self.moments:
                self.moments[name] = RegressionMoments(
                    flat.shape[1], self._parameters, device=flat.device
                )
            with torch.autocast(flat.device.type, enabled=False):
                self.moments[name].update(batch.to(flat.device), flat)

    def _intact(self, caught: Caught) -> bool:
        """Not overwritten since, by an in-place activation."""
        output, version = caught
        return version in (-1, output._version)

    def _theta(self, theta: torch.Tensor, n: int) -> torch.Tensor:
        rows = torch.as_tensor(theta).detach()
        flat = rows.reshape(len(rows), -1) if rows.ndim else rows.reshape(1, 1)
        if flat.shape != (n, self._parameters):
            raise ValueError(
                f"theta must have shape [n, P] = [{n}, {self._parameters}], one row per sample of"
                f" the last forward pass, got {list(rows.shape)}"
            )
        return flat.to("cpu", torch.float64)


def monomials(parameters: int) -> list[tuple[int, ...]]:
    """Exponents of all monomials of P variables up to the degree, the constant first."""
    degree = DEGREES.get(parameters, 2)
    found: list[tuple[int, ...]] = [(0,) * parameters]
    for _ in range(degree):
        more = [
            tuple(e + (p == q) for q, e in enumerate(exponents))
            for exponents in found
            for p in range(parameters)
        ]
        found = list(dict.fromkeys([*found, *more]))
    return found


def powers(t: torch.Tensor, exponents: list[tuple[int, ...]]) -> torch.Tensor:
    """Monomials [n, q] of t [n, P]."""
    orders = torch.tensor(exponents, device=t.device)
    return torch.pow(t[:, None, :], orders).prod(-1)


def slopes_of(t: torch.Tensor, exponents: list[tuple[int, ...]]) -> torch.Tensor:
    """Derivatives [n, P, q] of the monomials."""
    columns = []
    for p in range(t.shape[1]):
        lowered = [tuple(max(e - (p == r), 0) for r, e in enumerate(es)) for es in exponents]
        factors = torch.tensor([es[p] for es in exponents], dtype=t.dtype, device=t.device)
        columns.append(powers(t, lowered) * factors)
    return torch.stack(columns, 1)
