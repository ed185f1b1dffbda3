r"""A live estimate from the training batches themselves: no forward pass of its own.

A training batch holds samples at many theta. Regressing the activations a of a layer on a
polynomial B(theta) *within each batch* gives the mean m(theta) = C^T B(theta) and, as residual, the
covariance S: weights that move between batches do not count as noise. Averaged over a window of
batches they give

    J = D^T S^-1 D,      D the mean of m'(theta), S the mean covariance over the training range

corrected for the finite window as for independent conditions. m'^T S^-1 m' is convex in m' and S
together, so this is at most the mean over theta of the linear Fisher information, and what the
polynomial cannot follow counts as noise: the trend is a lower bound, for these *training* samples
and a network in training mode (dropout and batch statistics included). More than the input holds is
memory.
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


class RegressionMoments:
    """Regressions of activations [n, d] on polynomials of theta [n, P], old batches fading.

    Args:
        dim: d.
        parameters: P.
        device: of the sums.

    Memory: (q + d)^2 numbers of float64, q the number of monomials. Cost of a batch: n d^2.
    """

    def __init__(self, dim: int, parameters: int, device: torch.device | str = "cpu") -> None:
        self._window = max(WINDOW, WINDOW_PER_ACTIVATION * dim)
        self._exponents = monomials(parameters)
        q = len(self._exponents)

        def zeros(*shape: int) -> torch.Tensor:
            return torch.zeros(*shape, dtype=torch.float64, device=device)

        self._sums = {
            "coefficients": zeros(q, dim),  # n C
            "square": zeros(dim, dim),  # residuals
            "errors": zeros(q, q),  # n^2 (B^T B)^-1: covariance of n C in units of S
            "slopes": zeros(parameters, q),  # n times the mean of B'
            "theta": zeros(2, parameters),  # mean and spread of the first batch
        }
        self._weight = 0.0  # sum of n
        self._freedom = 0.0  # of the residuals
        self._freedom_squared = 0.0

    def update(self, theta: torch.Tensor, activations: torch.Tensor) -> None:
        """Add a batch: theta [n, P] float64 and activations [n, d] of any floating dtype. One with
        too few samples for the polynomial, or too few different theta, adds nothing."""
        sums, n, q = self._sums, len(theta), len(self._exponents)
        if n <= q + 1:
            return
        if self._weight == 0.0:
            spread, mean = torch.std_mean(theta, 0, correction=0)
            sums["theta"] = torch.stack([mean, torch.where(spread > 0, spread, 1.0)])
        t = (theta - sums["theta"][0]) / sums["theta"][1]
        basis = powers(t, self._exponents)
        inverse, failed = torch.linalg.inv_ex(basis.T @ basis)
        usable = (failed == 0) & (inverse.diagonal().amax() < DEGENERATE)
        inverse = torch.where(usable, inverse, 0.0)
        a = activations.float()
        a = a - a.mean(0)
        coefficients = inverse @ (basis.T @ a.double())
        # float32 products of residuals, float64 sums: a trend needs three digits
        residual = torch.where(usable, a - (basis @ coefficients).float(), 0.0)
        slopes = slopes_of(t, self._exponents).sum(0)
        keep = math.exp(-n / self._window)
        sums["coefficients"].mul_(keep).add_(coefficients, alpha=n)
        sums["square"].mul_(keep).add_(residual.T @ residual)
        sums["errors"].mul_(keep**2).add_(inverse, alpha=n**2)
        sums["slopes"].mul_(keep).add_(slopes)
        self._weight = self._weight * keep + n
        self._freedom = self._freedom * keep + (n - q)
        self._freedom_squared = self._freedom_squared * keep**2 + (n - q)

    def estimate(self, ridge: float = RIDGE) -> LiveEstimate | None:
        """J of what was added; None while there are too few samples.

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
        slopes = sums["slopes"] / self._weight
        noise = slopes @ sums["errors"] @ slopes.T / self._weight**2
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
        unit = 1 / (sums["theta"][1][:, None] * sums["theta"][1])
        variance = independent_variance(J[None], dof, noise, torch.tensor([effective]).to(J))[0]
        stderr = variance.clamp_min(0).sqrt() * unit
        return LiveEstimate((J * unit).cpu(), stderr.cpu(), dof)

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers."""
        sums = {name: value.clone() for name, value in self._sums.items()}
        return sums | {"counts": [self._weight, self._freedom, self._freedom_squared]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned."""
        for name, value in self._sums.items():
            self._sums[name] = state[name].to(value.device, copy=True)
        self._weight, self._freedom, self._freedom_squared = state["counts"]


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
        self._caught: dict[str, tuple[torch.Tensor, int]] = {}
        self._calls = 0
        self.moments: dict[str, RegressionMoments] = {}

    def observe(self, theta: torch.Tensor) -> None:
        """Take the batch that the model has just seen, if it is its turn.

        Args:
            theta: [n] or [n, P] of the samples.
        """
        self._calls += 1
        if self._handles:
            try:
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
        return {name: estimate for name, estimate in found.items() if estimate is not None}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; a batch that is being listened to is not among them."""
        moments = {name: m.state_dict() for name, m in self.moments.items()}
        return {"calls": self._calls, "listening": bool(self._handles), "moments": moments}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take what `state_dict` returned; listens again if that was so."""
        self.release()
        self._calls = int(state["calls"])
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
            self._keep(name, output)

        return catch

    def _keep(self, name: str, output: Any) -> None:
        """Hold on to a reference: the activations are there anyway, for the backward pass."""
        if name in self._caught or not isinstance(output, torch.Tensor) or output.ndim < 1:
            return
        if output.is_floating_point() and output[:1].numel() <= WIDEST:
            version = -1 if output.is_inference() else output._version
            self._caught[name] = (output.detach(), version)

    def _take(self, theta: torch.Tensor) -> None:
        with torch.no_grad():
            for name, (output, version) in self._caught.items():
                if version not in (-1, output._version):  # overwritten by an in-place activation
                    continue
                rows = output.flatten(1) if output.ndim > 1 else output[:, None]
                wanted = self._theta(theta, len(rows), rows.device)
                moments = self.moments.get(name)
                if moments is None:
                    moments = RegressionMoments(rows.shape[1], self._parameters, device=rows.device)
                    self.moments[name] = moments
                with torch.autocast(rows.device.type, enabled=False):
                    moments.update(wanted, rows)

    def _theta(self, theta: torch.Tensor, n: int, device: torch.device) -> torch.Tensor:
        rows = torch.as_tensor(theta).detach()
        rows = rows.reshape(len(rows), -1) if rows.ndim else rows.reshape(1, 1)
        if rows.shape != (n, self._parameters):
            raise ValueError(
                f"theta must have shape [n, P] = [{n}, {self._parameters}], one row per sample of"
                f" the last forward pass, got {list(torch.as_tensor(theta).shape)}"
            )
        return rows.to(device, torch.float64)


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
