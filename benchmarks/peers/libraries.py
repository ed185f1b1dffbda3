"""Fisher matrices of the parameters by other libraries, in the conventions of fisherfast.

fisherfast: F = 1/n sum_i E_y[s s^T], s = d log p(y | x_i, w)/dw. The others, for n samples of C
outputs and the losses of torch, measured in the versions of `peers.txt`:

| library    | what                               | scale of it                    | factor to F |
|------------|------------------------------------|--------------------------------|-------------|
| nngeometry | FIM, "classif_logits"              | mean over samples              | 1           |
|            | FIM, "regression"                  | mean, variance 1               | 1           |
|            | own function log p(y_i)            | mean (the empirical one)       | 1           |
|            | PMatKFAC                           | A summed, G averaged over t    | 1 (expand)  |
| curvlinops | GGN, CrossEntropyLoss("mean")      | mean over samples              | 1           |
|            | GGN, MSELoss("sum")                | sum, Hessian 2 per output      | 1 / (2 n)   |
|            | EF, MSELoss("sum")                 | sum, gradient 2 (f - y)        | 1 / (4 n)   |
|            | FisherMC, MSELoss("sum")           | sum, gradient of variance 2    | 1 / (2 n)   |
|            | GGN, MSELoss("mean")               | mean over samples and outputs  | C / 2       |
|            | KFAC                               | as GGN ("type-2") and EF       | as those    |
| BackPACK   | DiagGGNExact, CrossEntropyLoss("mean") | mean over samples          | 1           |
|            | SumGradSquared, CrossEntropyLoss("mean") | sum of (1/n gradient)^2  | n           |

MSELoss stands for a Gaussian of variance 1/2, hence its factors of 2 beside ours of variance 1.
curvlinops has no exact diagonal: that of a linear operator costs one product per parameter, and
its `hutchinson_diag` is an estimate.

nngeometry builds its buffers in torch's default dtype: `default_dtype` sets that of the model.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

import fisherfast as ff

PEERS = ("nngeometry", "curvlinops", "backpack")
Kind = Literal["categorical", "gaussian"]
FisherType = Literal["exact", "empirical"]


@dataclass(frozen=True)
class Case:
    """A network in eval mode with its data: labels [n] of classes, or targets [n, C] of variance
    1."""

    model: nn.Module
    kind: Kind
    x: Tensor
    y: Tensor

    def likelihood(self) -> ff.parameters.Likelihood:
        """Of fisherfast."""
        if self.kind == "categorical":
            return ff.parameters.Categorical()
        return ff.parameters.Gaussian(1.0)

    def parameters(self) -> list[nn.Parameter]:
        """In the order of every vector here."""
        return list(self.model.parameters())


def missing() -> list[str]:
    """Peers that are not installed."""
    return [name for name in PEERS if importlib.util.find_spec(name) is None]


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """torch's default dtype inside."""
    former = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(former)


# --- nngeometry ----------------------------------------------------------------------------------


def nngeometry_matrix(case: Case, representation: str, fisher_type: FisherType) -> Any:
    """The matrix in one of nngeometry's representations: "PMatDiag", "PMatBlockDiag", ..."""
    import nngeometry.object
    from nngeometry.backend import TorchHooksJacobianBackend
    from nngeometry.layercollection import LayerCollection
    from nngeometry.metrics import FIM

    kind = getattr(nngeometry.object, representation)
    with default_dtype(case.x.dtype):
        if fisher_type == "exact":
            variant = {"categorical": "classif_logits", "gaussian": "regression"}[case.kind]
            return FIM(case.model, (case.x.clone(),), kind, variant=variant)
        generator = TorchHooksJacobianBackend(
            layer_collection=LayerCollection.from_model(case.model),
            model=case.model,
            function=lambda x, y: log_likelihood(case.kind, case.model(x), y)[:, None],
        )
        return kind(generator=generator, examples=(case.x.clone(), case.y))


def nngeometry_diag(case: Case, fisher_type: FisherType) -> Tensor:
    """[P], patches of convolutions unfolded (the library's default)."""
    return nngeometry_matrix(case, "PMatDiag", fisher_type).get_diag()


def nngeometry_diag_by_convolution(case: Case, fisher_type: FisherType) -> Tensor:
    """[P], per-sample gradients of convolutions by grouped convolutions."""
    from nngeometry.backend.torch_hooks.grads_conv import use_conv_impl_for_convs

    with use_conv_impl_for_convs():
        return nngeometry_diag(case, fisher_type)


def nngeometry_dense(case: Case, representation: str, fisher_type: FisherType) -> Tensor:
    """[P, P] of any representation."""
    with default_dtype(case.x.dtype):
        return nngeometry_matrix(case, representation, fisher_type).to_torch()


# --- curvlinops ----------------------------------------------------------------------------------


def curvlinops_loss(kind: Kind) -> tuple[nn.Module, dict[str, float]]:
    """Loss, and what the sum over samples of its matrices is divided by beside n."""
    if kind == "categorical":
        return nn.CrossEntropyLoss(reduction="sum"), {"exact": 1, "empirical": 1, "mc": 1}
    return nn.MSELoss(reduction="sum"), {"exact": 2, "empirical": 4, "mc": 2}


def curvlinops_operator(case: Case, name: str, **settings: Any) -> Any:
    """A linear operator of curvlinops on the whole data as one batch."""
    import curvlinops

    loss, _ = curvlinops_loss(case.kind)
    return getattr(curvlinops, name)(
        case.model,
        loss,
        case.parameters(),
        [(case.x, case.y)],
        check_deterministic=False,
        **settings,
    )


def curvlinops_dense(case: Case, fisher_type: Literal["exact", "empirical", "mc"]) -> Tensor:
    """[P, P] by GGN (exact), EF or FisherMC, multiplied with the identity."""
    name = {
        "exact": "GGNLinearOperator",
        "empirical": "EFLinearOperator",
        "mc": "FisherMCLinearOperator",
    }[fisher_type]
    scale = len(case.x) * curvlinops_loss(case.kind)[1][fisher_type]
    return _columns(curvlinops_operator(case, name), case) / scale


def curvlinops_labels(case: Case, seed: int = 2147483647) -> Tensor:
    """The classes that FisherMC draws with one sample, from its generator with its seed."""
    probabilities = case.model(case.x).detach().softmax(1)
    generator = torch.Generator().manual_seed(seed)
    return probabilities.multinomial(1, replacement=True, generator=generator)[:, 0]


def curvlinops_kfac(case: Case, fisher_type: FisherType, sharing: str) -> Tensor:
    """[P, P], weights and biases of a layer jointly; sharing: "expand" or "reduce"."""
    kind = {"exact": "type-2", "empirical": "empirical"}[fisher_type]
    operator = curvlinops_operator(
        case,
        "KFACLinearOperator",
        fisher_type=kind,
        kfac_approx=sharing,
        separate_weight_and_bias=False,
    )
    scale = len(case.x) * curvlinops_loss(case.kind)[1][fisher_type]
    return _columns(operator, case) / scale


def _columns(operator: Any, case: Case) -> Tensor:
    size = sum(parameter.numel() for parameter in case.parameters())
    return operator @ torch.eye(size, dtype=case.x.dtype)


# --- BackPACK ------------------------------------------------------------------------------------


class BackPack:
    """The diagonal by BackPACK: [P]. The model is a copy, as `extend` changes it for good."""

    def __init__(self, case: Case, fisher_type: FisherType) -> None:
        from backpack import backpack, extend, extensions

        self._backpack = backpack
        exact = fisher_type == "exact"
        self._extension = extensions.DiagGGNExact() if exact else extensions.SumGradSquared()
        self._name = "diag_ggn_exact" if exact else "sum_grad_squared"
        self._scale = 1 if exact else len(case.x)
        model = without_in_place(copy.deepcopy(case.model))
        # second order needs every operation as a module; the copy's order of parameters may change
        names = [name for name, _ in model.named_parameters()]
        self._case = case
        with quiet():
            self._model = extend(model, use_converter=exact and not _sequential(model))
            self._loss = extend(nn.CrossEntropyLoss())
        self._model.eval()
        renamed = dict(self._model.named_parameters())
        self._parameters = [renamed[name] for name in names]

    def __call__(self) -> Tensor:
        """[P] in the order of the model's parameters."""
        with quiet(), self._backpack(self._extension):
            self._loss(self._model(self._case.x), self._case.y).backward()
        found = [getattr(parameter, self._name).flatten() for parameter in self._parameters]
        for parameter in self._parameters:
            delattr(parameter, self._name)
            parameter.grad = None
        return torch.cat(found) * self._scale


def _sequential(model: nn.Module) -> bool:
    return isinstance(model, nn.Sequential) and not any(list(m.children()) for m in model)


def without_in_place(model: nn.Module) -> nn.Module:
    """Full backward hooks of torch allow no activation that overwrites a layer's output."""
    for module in model.modules():
        if getattr(module, "inplace", False):
            module.inplace = False
    return model


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Warnings of a peer are not ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# --- the truth -----------------------------------------------------------------------------------


def log_likelihood(kind: Kind, f: Tensor, y: Tensor) -> Tensor:
    """log p(y_i | f_i) [n] but for a constant."""
    if kind == "categorical":
        return -nn.functional.cross_entropy(f, y, reduction="none")
    return -0.5 * (y - f).square().sum(1)


def brute_force(case: Case, fisher_type: FisherType) -> Tensor:
    """[P, P] in float64: a loop over samples, and over every label of a class or output."""
    model = copy.deepcopy(case.model).double()
    parameters = list(model.parameters())
    size = sum(parameter.numel() for parameter in parameters)
    total = torch.zeros(size, size, dtype=torch.float64)
    for x, y in zip(case.x.double(), case.y, strict=True):
        output = model(x[None])
        for weight, scalar in _terms(case.kind, fisher_type, output, y[None]):
            row = torch.cat(
                [g.flatten() for g in torch.autograd.grad(scalar, parameters, retain_graph=True)]
            )
            total += weight * torch.outer(row, row)
    return total / len(case.x)


def _terms(
    kind: Kind, fisher_type: FisherType, output: Tensor, y: Tensor
) -> Iterator[tuple[float, Tensor]]:
    """(weight, scalar whose gradient is squared) of one sample."""
    if fisher_type == "empirical":
        yield 1.0, log_likelihood(kind, output, y).sum()
    elif kind == "gaussian":
        for scalar in output[0]:
            yield 1.0, scalar
    else:
        for probability, scalar in zip(
            output[0].softmax(0).tolist(), output[0].log_softmax(0), strict=True
        ):
            yield probability, scalar
