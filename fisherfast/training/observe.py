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

import contextlib
import math
import reprlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
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
        theta: [n, P] float64 on the CPU, n at least 2.

    Attributes:
        basis: [n, q] values of the monomials of the standardised thetas, float32.
        solver: [q, n], gives the coefficients of activations [n, d]; float32.
        slopes: [P, q] float64, means over the samples of the derivatives of the monomials by theta.
        noise: [P, P] float64, covariance of a mean derivative in units of that of an activation.
        weight: of the batch; n for batches of like thetas.
        usable: there are enough different thetas for the polynomial.
    """

    def __init__(self, theta: torch.Tensor) -> None:
        exponents = monomials(theta.shape[1])
        spread, center = torch.std_mean(theta, 0, correction=0)
        spread = torch.where(spread > 0, spread, 1.0)
        t = (theta - center) / spread  # of order 1: a polynomial that is well conditioned
        basis = powers(t, exponents)
        inverse, failed = torch.linalg.inv_ex(basis.T @ basis)
        largest = float(inverse.diagonal().amax())
        enough = len(theta) > len(exponents) + 1
        self.usable = enough and int(failed) == 0 and largest * len(theta) < DEGENERATE
        self.basis = basis.float()
        self.solver = (inverse @ basis.T).float()
        self.slopes = slopes_of(t, exponents).mean(0) / spread[:, None]
        self.noise = self.slopes @ inverse @ self.slopes.T
        # thetas close together tell little of a slope; a power that a change of units only scales
        size = float(torch.linalg.det(self.noise))
        self.usable = self.usable and size > 0
        self.weight = size ** (-1 / theta.shape[1]) if self.usable else 0.0

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

    Memory: d (P + d) numbers of float64. Cost of a batch: n d^2.
    """

    def __init__(self, dim: int, parameters: int, device: torch.device | str = "cpu") -> None:
        self.dim = dim
        self._window = max(WINDOW, WINDOW_PER_ACTIVATION * dim)
        f64 = torch.float64
        self._sums = {
            "derivative": torch.zeros(parameters, dim, dtype=f64, device=device),  # w D
            "square": torch.zeros(dim, dim, dtype=f64, device=device),  # w / n residuals
            # w^2 Cov(D) in units of S
            "noise": torch.zeros(parameters, parameters, dtype=f64, device="cpu"),
        }
        self._weight = 0.0  # sum of w
        self._freedom = 0.0  # of the residuals, times w / n
        self._freedom_squared = 0.0  # times (w / n)^2

    def update(self, batch: ThetaBatch, activations: torch.Tensor) -> None:
        """Add activations [n, d] of any floating dtype, of a usable batch of thetas."""
        sums, (n, q), weight = self._sums, batch.basis.shape, batch.weight
        a = activations.float()
        if a.device != sums["square"].device:  # the model has moved, or a state has
            for name in ("derivative", "square"):
                sums[name] = sums[name].to(a.device)
        coefficients = batch.solver @ a
        # float32 products of residuals, float64 sums: a trend needs three digits
        residual = torch.addmm(a, batch.basis, coefficients, alpha=-1)
        square = residual.T @ residual
        if not bool(torch.isfinite(square).all()):
            return  # one NaN would stay for ever
        keep = math.exp(-n / self._window)
        derivative = batch.slopes.to(a.device) @ coefficients.double()
        sums["derivative"].mul_(keep).add_(derivative, alpha=weight)
        sums["square"].mul_(keep).add_(square, alpha=weight / n)
        sums["noise"].mul_(keep**2).add_(batch.noise, alpha=weight**2)
        self._weight = self._weight * keep + weight
        self._freedom = self._freedom * keep + (n - q) * (weight / n)
        self._freedom_squared = self._freedom_squared * keep**2 + (n - q) * (weight / n) ** 2

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
        k = len(live)
        if dof < k + SPARE_DOF:
            return None
        if k == 0:
            zero = torch.zeros_like(sums["noise"])
            return LiveEstimate(zero, zero, dof)
        noise = (sums["noise"] / self._weight**2).to(covariance)
        solved = ops.fisher_solve_details(
            covariance[live][:, live].contiguous(),
            (sums["derivative"][:, live] / self._weight).T.contiguous(),
            ridge=ridge,
            inverse_rows=True,
        )
        if int(solved.info):
            return None
        effective = k - ridge * float(solved.inverse_rows.sum())
        J = (dof - effective - 1) / dof * solved.fisher - effective * noise
        variance = independent_variance(J[None], dof, noise, J.new_tensor([effective]))[0]
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


class Hook:
    """A hook whose copies do nothing: a network may be copied or pickled while it is listened to.

    A copy is a function of the standard library that takes anything and returns None, so that a
    file of such a network loads without this library. It is no part of what is compiled.
    """

    def __init__(self, react: Callable[..., None]) -> None:
        self._react = react

    def __call__(self, *given: Any) -> None:
        if not torch.compiler.is_compiling():
            self._react(*given)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (contextlib.nullcontext(), "__exit__")


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
        self._make_hooks()
        self._handles: list[torch.utils.hooks.RemovableHandle | _AroundCompiled] = []
        self._caught: dict[str, Caught] = {}
        self._sizes: list[int] = []  # of the batch that was caught: of its input and its output
        self._calls = 0
        self.moments: dict[str, RegressionMoments] = {}

    def _make_hooks(self) -> None:
        self._input_hook, self._output_hook = Hook(self._catch_input), Hook(self._catch_output)
        self._layer_hooks = {name: Hook(partial(self._catch_layer, name)) for name in self._modules}

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: without what was caught, which is part of a graph, and without
        hooks, whose copies do nothing."""
        hooks = {"_input_hook", "_output_hook", "_layer_hooks"}
        state = {name: value for name, value in vars(self).items() if name not in hooks}
        return state | {"_handles": [], "_caught": {}, "_sizes": [], "listening": self._listens()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy listens to its own network, if the original did."""
        listening = state.pop("listening")
        vars(self).update(state)
        self._make_hooks()
        if listening:
            self._listen()

    def _listens(self) -> bool:
        return bool(self._handles)

    def observe(self, theta: torch.Tensor) -> None:
        """Take the batch that the model has just seen, if it is its turn.

        Args:
            theta: [n] or [n, P] of the samples.

        Raises:
            TypeError: theta are no real numbers.
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
        self._caught, self._sizes = {}, []

    def estimates(self) -> dict[str, LiveEstimate]:
        """J of each layer that enough samples were seen of."""
        found = {name: moments.estimate() for name, moments in self.moments.items()}
        return {name: live for name, live in found.items() if live is not None}

    def state_dict(self) -> dict[str, Any]:
        """Tensors and plain numbers; a batch that is being listened to is not among them."""
        moments = {name: m.state_dict() for name, m in self.moments.items()}
        return {
            "calls": self._calls,
            "listening": self._listens(),
            "moments": moments,
        }

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

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """No hooks inside; afterwards it listens again if it did before."""
        listening = self._listens()
        self.release()
        try:
            yield
        finally:
            if listening:
                self._listen()

    def _listen(self) -> None:
        if self._model._compiled_call_impl is not None:  # by `model.compile()`
            hooks = self._input_hook, self._output_hook
            self._handles.append(_AroundCompiled(self._model, *hooks))
            return
        self._handles.append(self._model.register_forward_pre_hook(self._input_hook))
        self._handles.append(self._model.register_forward_hook(self._output_hook))
        for name, module in self._modules.items():
            self._handles.append(module.register_forward_hook(self._layer_hooks[name]))

    def _trains(self) -> bool:
        """Whether this forward pass is of the training: neither a validation nor a measurement."""
        return self._model.training or torch.is_grad_enabled()

    def _catch_input(self, module: nn.Module, args: tuple[Any, ...]) -> None:
        if self._trains():
            self._caught, self._sizes = {}, []  # the last pass counts
            if args:
                self._keep(INPUT, args[0])

    def _catch_output(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        # the last layer's own: one of them is enough
        same = [name for name, (tensor, _) in self._caught.items() if tensor is output]
        for name in same:
            del self._caught[name]
        self._keep(OUTPUT, output)

    def _catch_layer(
        self, name: str, module: nn.Module, args: tuple[Any, ...], output: Any
    ) -> None:
        self._keep(name, output)

    def _keep(self, name: str, output: Any) -> None:
        """Hold on to a reference: the activations are there anyway, for the backward pass."""
        if not (self._trains() and isinstance(output, torch.Tensor) and output.ndim):
            return
        if name in (INPUT, OUTPUT):
            self._sizes.append(len(output))
        floating = output.is_floating_point() and name not in self._caught
        if floating and output[:1].numel() <= WIDEST:
            version = -1 if output.is_inference() else output._version
            self._caught[name] = (output, version)

    def _take(self, theta: torch.Tensor) -> None:
        caught = {name: tensor for name, tensor in self._caught.items() if self._intact(tensor)}
        if not caught:
            return
        rows = self._theta(theta, self._sizes or [len(output) for output, _ in caught.values()])
        if len(rows) < 2:
            return
        batch = ThetaBatch(rows)
        if not batch.usable:
            return
        for name, (output, _) in caught.items():
            flat = output.detach().flatten(1) if output.ndim > 1 else output.detach()[:, None]
            if len(flat) != len(rows):
                continue
            moments = self.moments.get(name)
            if moments is None:
                moments = RegressionMoments(flat.shape[1], self._parameters, device=flat.device)
                self.moments[name] = moments
            if flat.shape[1] == moments.dim:  # sequences may differ in length
                with torch.autocast(flat.device.type, enabled=False):
                    moments.update(batch.to(flat.device), flat)

    def _intact(self, caught: Caught) -> bool:
        """Not overwritten since, by an in-place activation."""
        output, version = caught
        return version == -1 or version == output._version

    def _theta(self, theta: torch.Tensor, sizes: list[int]) -> torch.Tensor:
        """theta [n, P] float64 on the CPU; n is one of the sizes, for the batch need not come
        first."""
        try:
            rows = torch.as_tensor(theta, device=getattr(theta, "device", "cpu")).detach()
        except (TypeError, ValueError, RuntimeError):
            rows = torch.empty(0, dtype=torch.complex64, device="cpu")
        if rows.is_complex():
            raise TypeError(f"theta must be a tensor of real numbers, got {reprlib.repr(theta)}")
        flat = rows.flatten(1) if rows.ndim > 1 else rows.reshape(-1, 1)
        if len(flat) not in sizes or flat.shape[1] != self._parameters:
            raise ValueError(
                f"theta must have shape [n, P] = [{sizes[0]}, {self._parameters}], one row per"
                f" sample of the last forward pass, got {list(rows.shape)}"
            )
        return flat.to("cpu", torch.float64)


class _AroundCompiled:
    """Hooks on the input and output of a module that compiles its own call, hooks included: these
    are outside of it. Those of several observers lie around each other, and may come off in any
    order."""

    def __init__(self, module: nn.Module, catch_input: Hook, catch_output: Hook) -> None:
        self._module = module
        self._inner: Any = module._compiled_call_impl
        self._catch_input, self._catch_output = catch_input, catch_output
        self._removed = False
        module._compiled_call_impl = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._removed:
            return self._inner(*args, **kwargs)
        self._catch_input(self._module, args)
        output = self._inner(*args, **kwargs)
        self._catch_output(self._module, args, output)
        return output

    def remove(self) -> None:
        """Put the compiled call back, once nobody else's hooks are around it."""
        self._removed = True
        call: Any = self._module._compiled_call_impl
        while isinstance(call, _AroundCompiled) and call._removed:
            call = call._inner
        self._module._compiled_call_impl = call


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
