"""The Fisher matrix of the parameters by brute force: one sample and one output after the other.

F = 1/n sum_i J^T H J, J = df_i / dw by autograd, every sample alone in its batch, and H the Hessian
of -log p(y | f) from `torch.distributions`, which is the same for every label; of given labels,
F = 1/n sum_i s s^T, s = d log p(y_i | f_i) / dw. Nothing of the library is used.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Categorical, Normal, Poisson


def log_probability(kind: str, f: Tensor, y: Tensor, variance: float = 1.0) -> Tensor:
    """log p(y | f): "categorical" and "bernoulli" of logits, "gaussian", "poisson" of log rates."""
    density = {
        "categorical": lambda: Categorical(logits=f),
        "gaussian": lambda: Normal(f, torch.full_like(f, variance**0.5)),  # 1.0 is of float32
        "bernoulli": lambda: Bernoulli(logits=f),
        "poisson": lambda: Poisson(f.exp()),
    }[kind]()
    return density.log_prob(y).sum()


def gradients(outputs: Tensor, parameters: Sequence[Tensor]) -> Tensor:
    """d outputs / d parameters of one number, side by side [P]; zero where autograd sees none."""
    found = torch.autograd.grad(outputs, parameters, retain_graph=True, allow_unused=True)
    parts = []
    for gradient, parameter in zip(found, parameters, strict=True):
        part = torch.zeros_like(parameter) if gradient is None else gradient
        parts.append((part.to_dense() if part.is_sparse else part).flatten())
    return torch.cat(parts)


def brute_force(
    model: nn.Module,
    kind: str,
    x: Tensor,
    y: Tensor | None = None,
    *,
    variance: float = 1.0,
    chosen: Callable[[str], bool] | None = None,
) -> Tensor:
    """F [P, P] over the parameters that require grad.

    Args:
        model: maps [n, ...] to [n, ...].
        kind: of likelihood, see `log_probability`.
        x: inputs [n, ...].
        y: labels [n, ...] of the empirical matrix; None for the exact one.
        variance: of the Gaussian.
        chosen: parameters by name; None for all that require grad.
    """
    named = model.named_parameters()
    parameters = [p for n, p in named if p.requires_grad and (chosen is None or chosen(n))]
    parts = []
    for i in range(len(x)):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # tests of the library see its own
            f = model(x[i : i + 1])
        if y is not None:
            log = log_probability(kind, f, y[i : i + 1], variance)
            s = gradients(log, parameters).double()
            parts.append(torch.outer(s, s))
            continue
        J = torch.stack([gradients(output, parameters) for output in f.flatten()]).double()
        any_label = torch.zeros_like(f[:, 0] if kind == "categorical" else f)
        H = torch.autograd.functional.hessian(
            lambda f, y=any_label: -log_probability(kind, f, y.to(f), variance), f.detach().double()
        ).reshape(len(J), len(J))
        parts.append(J.T @ H @ J)
    return torch.stack(parts).mean(0)


def moments_of_trace(model: nn.Module, x: Tensor) -> tuple[float, float]:
    """Mean and variance, over labels of a classifier drawn once for each sample, of the Monte Carlo
    trace 1/n sum_i |s_i|^2, with the s_i of different samples independent."""
    mean, variance = 0.0, 0.0
    for i in range(len(x)):
        log_p = model(x[i : i + 1])[0].log_softmax(0)
        p, scores = (
            log_p.detach().exp(),
            [gradients(each, list(model.parameters())) for each in log_p],
        )
        squares = torch.stack([s.dot(s) for s in scores])
        first, second = float(p @ squares), float(p @ squares**2)
        mean += first / len(x)
        variance += (second - first**2) / len(x) ** 2
    return mean, variance
