"""Learning tasks one after another: a penalty that protects what earlier ones determine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from fisherfast._fields import AtLeast, Count, Shape, has_version, inside, read, read_fields, wrong
from fisherfast._validation import check_positive
from fisherfast.model.unwrap import check_model, unwrapped
from fisherfast.parameters.analysis.parabola import Parabola, at_least_float32
from fisherfast.parameters.backward.batches import Data
from fisherfast.parameters.checks import check_choice, check_number
from fisherfast.parameters.fisher import fisher as measure
from fisherfast.parameters.fisher import from_state_dict
from fisherfast.parameters.layout import SHAPES
from fisherfast.parameters.likelihood import Likelihood
from fisherfast.parameters.structures.base import ParameterFisher, check_fisher
from fisherfast.parameters.structures.diagonal import DiagonalFisher

STATE_VERSION = 1
SETTINGS = ("strength", "online", "decay", "new")
STATE = {
    "version": int,
    "strength": float,
    "online": bool,
    "decay": float,
    "new": str,
    "tasks": Count,
    "known": SHAPES,
    "information": dict[str, Tensor],
    "anchors": dict[str, Tensor],
    "constant": Annotated[float, AtLeast(0)],
    "quadratics": list[object],
}
QUADRATIC = {"fisher": object, "anchor": Tensor, "weight": float}


@dataclass
class _Quadratic:
    """1/2 weight (w - anchor)^T F (w - anchor) of one task, F in a structure with off-diagonals."""

    fisher: ParameterFisher
    anchor: Tensor
    weight: float

    def value(self, parameters: Mapping[str, Tensor]) -> Tensor:
        """The value, with the gradient weight F (w - anchor)."""
        flat = self.fisher.layout.flatten(parameters).to(self.anchor)
        step = flat - self.anchor
        force = self.fisher @ step.detach()
        twice = step @ force
        return self.weight * (twice - 0.5 * twice.detach())


class ElasticWeightConsolidation:
    """A penalty on moving the parameters w that earlier tasks k have determined, at w_k:

        penalty(w) = strength / 2 sum_k weight_k (w - w_k)^T F_k (w - w_k)

    with F_k the Fisher matrix of task k's data at w_k, by default its diagonal. It is minus the
    logarithm of the Gaussian (Laplace) approximation of the posterior p(w | earlier tasks), up to a
    constant and a factor, which `strength` sets.

    Several tasks take the memory of one: a sum of parabolas in one parameter is a parabola, whose
    curvature sum_k F_k, vertex and height are kept exactly, so that nothing grows and nothing is
    approximated. Structures with off-diagonals ("kfac", "block", ...) keep one matrix for each task
    instead.

    Online (Schwarz et al.), one parabola about the latest weights is kept; older tasks are
    remembered through the curvature alone, F = decay F + F_k: the penalty cannot pull back to where
    earlier tasks were, and their weight fades.

    Args:
        strength: how much the earlier tasks count. F is a mean over samples in nats, so that with a
            loss that is a mean over samples in nats, the posterior says (samples of a former task)
            / (samples of the new one), 1 for tasks of equal size; more is needed in practice,
            since the approximation holds only near w_k: try 10 to 1000.
        online: keep one parabola about the latest weights.
        decay: of the older tasks' information at each new task, in [0, 1]; only online.
        new: the treatment of parameters that no consolidation has seen (an output head added
            later): "refuse" raises an error, "free" leaves them without a penalty.

    Attributes:
        tasks: how many were consolidated.

    Raises:
        ValueError: an argument out of its range, or a decay that nothing uses.

    Buffers (the running statistics of batch norm) have no Fisher information: they drift with each
    new task unless the training loop keeps them in eval mode.

    Data-parallel: every process consolidates with the same data (or the same ``fisher=``) and
    adds the penalty to its loss before the one ``backward()``; the numbers are those of one
    process.

    Cost: `penalty` reads the parameters and two numbers for each, and its backward pass one; kept
    are two float64 numbers per parameter, and two in the network's dtype.

    References: Kirkpatrick et al., PNAS 114 (2017) 3521, eq. 3; Huszar, PNAS 115 (2018) E2496 (how
    several tasks add up); Schwarz et al., ICML 2018, eq. 9 (online).

    Example:
        >>> import torch, fisherfast as ff
        >>> model, x = torch.nn.Linear(4, 3), torch.randn(100, 4)
        >>> ewc = ff.parameters.ElasticWeightConsolidation(strength=10.0)
        >>> ewc.penalty(model).item()  # nothing to keep yet
        0.0
        >>> _ = ewc.consolidate(model, ff.parameters.Categorical(), x)
        >>> optimizer = torch.optim.SGD(model.parameters(), 0.1)
        >>> for _ in range(3):  # the next task
        ...     loss = model(torch.randn(8, 4)).square().mean() + ewc.penalty(model)
        ...     optimizer.zero_grad()
        ...     loss.backward()
        ...     optimizer.step()
        >>> ewc.penalty(model).item() > 0
        True
    """

    def __init__(
        self,
        strength: float,
        *,
        online: bool = False,
        decay: float = 1.0,
        new: Literal["refuse", "free"] = "refuse",
    ) -> None:
        check_positive("strength", strength)
        check_number("decay", decay)
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must lie in [0, 1], got {decay}")
        if decay != 1 and not online:
            raise ValueError(f"decay must be 1 unless online=True, got {decay}")
        if not isinstance(online, bool):
            raise TypeError(f"online must be True or False, got {online!r}")
        check_choice("new", new, ("refuse", "free"))
        self.strength, self.online, self.decay, self.new = strength, online, decay, new
        self.tasks = 0
        self._known: dict[str, torch.Size] = {}
        self._information: dict[str, Tensor] = {}  # sum_k F_k
        self._anchors: dict[str, Tensor] = {}  # vertex of the sum of parabolas
        self._constant = 0.0  # its height: sum_k F_k (vertex - w_k)^2
        self._quadratics: list[_Quadratic] = []
        self._parabola: Parabola | None = None

    def __repr__(self) -> str:
        how = f", online, decay={self.decay:g}" if self.online else ""
        size = sum(shape.numel() for shape in self._known.values())
        return (
            f"<ElasticWeightConsolidation: strength={self.strength:g}{how}, {self.tasks} tasks,"
            f" {size} parameters>"
        )

    def consolidate(
        self,
        model: nn.Module,
        likelihood: Likelihood | str | None = None,
        data: Data | None = None,
        *,
        fisher: ParameterFisher | None = None,
        weight: float = 1.0,
        **settings: Any,
    ) -> ParameterFisher:
        """Add a task; call it at the end of the task's training.

        Args:
            model: at the task's weights; left as it is.
            likelihood, data: of the task, as `ff.parameters.fisher` takes them; inputs suffice.
            fisher: a matrix measured already, in place of both.
            weight: of this task relative to the others, for instance its number of samples.
            **settings: of `ff.parameters.fisher`, among them ``structure`` and ``parameters``;
                parameters left out of the latter are free as far as this task is concerned.

        Returns:
            The task's Fisher matrix.

        Raises:
            ValueError: parameters of another network, or new ones where that is refused; a weight
                that is not positive; a Fisher matrix that is not finite; structures mixed.

        Cost: that of `ff.parameters.fisher`.
        """
        model = unwrapped(model)
        check_model(model)
        check_positive("weight", weight)
        if self.tasks:
            self._check_known(model)
        if fisher is None:
            if likelihood is None or data is None:
                raise ValueError("likelihood and data must be given, or fisher, got neither")
            with torch.inference_mode(False):
                fisher = measure(model, likelihood, data, **settings)
        elif likelihood is not None or data is not None or settings:
            raise ValueError("fisher must be given alone, got likelihood, data or settings as well")
        check_fisher(fisher)
        parameters = dict(model.named_parameters())
        measured = dict(zip(fisher.layout.names, fisher.layout.shapes, strict=True))
        _check_shapes(
            measured,
            parameters,
            "fisher must be of the model's parameters, got {0} {1} in it and {2} in the model",
        )
        if not bool(torch.isfinite(fisher.diag()).all()):
            raise ValueError("fisher must be finite, got NaN or infinity: are the weights finite?")
        with torch.inference_mode(False), torch.no_grad():
            self._remember(fisher, parameters, weight)
        self._known |= {name: p.shape for name, p in parameters.items() if p.requires_grad}
        self._known |= measured
        self.tasks += 1
        self._parabola = None
        return fisher

    def _remember(
        self, fisher: ParameterFisher, parameters: Mapping[str, Tensor], weight: float
    ) -> None:
        diagonal = isinstance(fisher, DiagonalFisher)
        if self.tasks and diagonal == bool(self._quadratics):
            kept = "a diagonal" if self._information else self._quadratics[0].fisher.structure
            raise ValueError(
                f"structure must be the same for all tasks ({kept}), got {fisher.structure}"
            )
        here = {name: p.detach().double().clone() for name, p in parameters.items()}
        if diagonal:
            found = fisher.layout.unflatten(weight * fisher.diag())
            if self.online:
                self._fade(found, here)
            else:
                self._add(found, here)
            return
        if self.online:
            for former in self._quadratics:
                former.anchor = former.fisher.layout.flatten(here)
                former.weight *= self.decay
        anchor = fisher.layout.flatten(here)
        self._quadratics.append(_Quadratic(fisher.released(), anchor, weight))

    def _add(self, found: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
        """Add parabolas of curvature `found` about `here`, as moments are merged:
        S a^2 + F b^2 about their common vertex, plus S F / (S + F) (distance of the two)^2."""
        for name, added in found.items():
            if name not in self._information:
                self._information[name], self._anchors[name] = added.clone(), here[name]
                continue
            old, anchor = self._information[name], self._anchors[name].to(here[name].device)
            total = old.to(added.device) + added
            share = torch.where(total > 0, added / total, 0.0)
            distance = here[name] - anchor
            self._constant += float((old.to(added.device) * share * distance.square()).sum())
            self._information[name], self._anchors[name] = total, anchor + share * distance

    def _fade(self, found: Mapping[str, Tensor], here: Mapping[str, Tensor]) -> None:
        """F = decay F + F_k, about the latest weights."""
        for name in {**self._information, **found}:
            nothing = torch.zeros_like(here[name])
            old = self._information.get(name, nothing).to(nothing.device)
            self._information[name] = self.decay * old + found.get(name, nothing)
            self._anchors[name] = here[name]

    def penalty(self, model: nn.Module) -> Tensor:
        """The penalty at the model's weights, to be added to the loss.

        Args:
            model: that was consolidated; wrappers (compiled, data-parallel) may be around it.

        Returns:
            A scalar in nats on the model's device, in its dtype (float32 for half types), with a
            gradient for its parameters; 0 before the first task.

        Raises:
            ValueError: another network's parameters, or new ones where that is refused.
        """
        parameters = self._check_known(unwrapped(model))
        if not self.tasks:
            first = next((p for p in parameters.values() if p.requires_grad), None)
            if first is None:
                raise ValueError("model must have parameters that require grad, got none")
            return at_least_float32(first.reshape(-1)[:0]).sum()
        if self._quadratics:
            values = [quadratic.value(parameters) for quadratic in self._quadratics]
            dtype = at_least_float32(parameters[self._quadratics[0].fisher.layout.names[0]]).dtype
            return (self.strength * torch.stack(values).sum()).to(dtype)
        if self._parabola is None or self._parabola.key != Parabola.key_of(
            parameters, self._information
        ):
            self._parabola = Parabola.of(parameters, self._information, self._anchors)
        return self.strength * (self._parabola.value(parameters) + 0.5 * self._constant)

    def _check_known(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The model's parameters, if they are those consolidated."""
        check_model(model)
        parameters = dict(model.named_parameters())
        _check_shapes(
            self._known,
            parameters,
            "model must be the network that was consolidated, got {0} {2} in it and {1} in the"
            " consolidation",
        )
        if self.tasks and self.new == "refuse":
            for name, parameter in parameters.items():
                if name not in self._known and parameter.requires_grad:
                    raise ValueError(
                        f"model must be the network that was consolidated, got {name!r} that is"
                        ' new; ElasticWeightConsolidation(..., new="free") leaves new ones without'
                        " a penalty"
                    )
        return parameters

    def state_dict(self) -> dict[str, Any]:
        """All of it, for ``torch.save``: plain numbers and tensors."""
        return {
            "version": STATE_VERSION,
            **{name: getattr(self, name) for name in SETTINGS},
            "tasks": self.tasks,
            "known": {name: list(shape) for name, shape in self._known.items()},
            "information": {name: value.clone() for name, value in self._information.items()},
            "anchors": {name: value.clone() for name, value in self._anchors.items()},
            "constant": self._constant,
            "quadratics": [
                {
                    "fisher": quadratic.fisher.state_dict(),
                    "anchor": quadratic.anchor.clone(),
                    "weight": quadratic.weight,
                }
                for quadratic in self._quadratics
            ],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore a state with its settings; the penalties are the same bits.

        Raises:
            ValueError: not a state of an `ElasticWeightConsolidation`, or a damaged one; nothing is
                changed then. A state of another model is refused at the next use.
        """
        if not has_version(state, "version", STATE_VERSION):
            raise wrong(
                "state", f"be of an ElasticWeightConsolidation, version {STATE_VERSION}", state
            )
        self.__dict__.update(vars(_from_state(read_fields(STATE, state, "state"))))


def _from_state(state: Mapping[str, Any]) -> ElasticWeightConsolidation:
    made = ElasticWeightConsolidation(**{name: state[name] for name in SETTINGS})
    made.tasks, made._constant = state["tasks"], state["constant"]
    made._known = {name: torch.Size(shape) for name, shape in state["known"].items()}
    information, anchors = state["information"], state["anchors"]
    for name in {**information, **anchors}:
        if name not in made._known:
            raise ValueError(f"state.known must hold {name!r}, got {list(made._known)}")
        for what, kept in (("information", information), ("anchors", anchors)):
            kind = Annotated[Tensor, Shape(tuple(made._known[name]))]
            read(kind, kept.get(name), f"state.{what}[{name!r}]")
        made._information[name] = information[name].clone()
        made._anchors[name] = anchors[name].clone()
        if not bool(((information[name] >= 0) & information[name].isfinite()).all()):
            raise wrong(
                f"state.information[{name!r}]", "be finite and at least 0", information[name]
            )
    for number, each in enumerate(state["quadratics"]):
        made._quadratics.append(_quadratic_of(each, made._known, f"state.quadratics[{number}]"))
    kept_tasks = len(made._quadratics) or made.tasks
    if made.tasks != kept_tasks or bool(made.tasks) != bool(information or made._quadratics):
        raise ValueError(
            f"state.tasks must be those of {len(information)} parabolas and"
            f" {len(made._quadratics)} matrices, got {made.tasks}"
        )
    if information and made._quadratics:
        raise ValueError("state must hold parabolas or matrices, got both")
    return made


def _quadratic_of(state: Any, known: Mapping[str, torch.Size], name: str) -> _Quadratic:
    """A task's matrix and weights."""
    values = read_fields(QUADRATIC, state, name)
    with inside(name):
        fisher = from_state_dict(values["fisher"])
        layout = fisher.layout
        if any(known.get(n) != s for n, s in zip(layout.names, layout.shapes, strict=True)):
            raise ValueError(f"layout must be of the known parameters, got {layout.state_dict()}")
        check_positive("weight", values["weight"])
        anchor = read(Annotated[Tensor, Shape((layout.size,))], values["anchor"], "anchor")
    return _Quadratic(fisher, anchor.clone(), values["weight"])


def _check_shapes(
    shapes: Mapping[str, torch.Size], parameters: Mapping[str, Tensor], message: str
) -> None:
    """Raise ValueError unless the parameters have these shapes; the message has fields for the
    name, the shape there should be, and what the model has."""
    for name, shape in shapes.items():
        if name not in parameters or parameters[name].shape != shape:
            there = list(parameters[name].shape) if name in parameters else "missing"
            raise ValueError(message.format(repr(name), list(shape), there))
