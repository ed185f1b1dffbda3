"""The dual ops in plain PyTorch: one operation on a primal and its P tangents.

A dual buffer x [1 + P, ...] holds the primal x[0] and the tangents x[1:], the derivatives of the
primal along P directions. Each function returns the buffer of y = f(primal) and of J_f(primal)
x[p], with J_f the Jacobian. At a kink the derivative is the one that PyTorch's autograd uses. Their
float64 results are what a kernel is measured against.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

HARD_SIX = 6.0
HARD_THREE = 3.0
GELU_CUBIC = 0.044715
"""Coefficient of x^3 in the tanh form of GELU (Hendrycks and Gimpel 2016)."""
GELU_FLAT = 25.0
"""Beyond it the tanh of that form is -1 or 1 in float64, and x^3 may overflow."""

Parameters = Sequence[float]
ValueAndSlope = tuple[Tensor, Tensor]


def dual_activation(
    x: Tensor,
    kind: str,
    parameters: Parameters = (),
    scale: Tensor | None = None,
    shift: Tensor | None = None,
    slope: Tensor | None = None,
    channel_dim: int = 2,
) -> Tensor:
    """Value and tangents of y = f(scale_c u + shift_c), elementwise.

        z = scale_c x[0] + shift_c,   y[0] = f(z),   y[p] = f'(z) scale_c x[p]

    See `fisherfast.ops.dual_activation` for kinds, arguments and results.
    """
    y = x
    if scale is not None:
        y = y * _along(scale, x, channel_dim)
    if shift is not None:
        y = torch.cat([y[:1] + _along(shift, x, channel_dim), y[1:]])
    if kind == "prelu":
        if slope is None:
            raise ValueError("slope must be given for prelu, got None")
        negative = _along(slope, x, channel_dim)[0]
        derivative = torch.where(y[0] > 0, torch.ones_like(y[0]), negative.expand_as(y[0]))
        value = y[0] * derivative
    else:
        value, derivative = ACTIVATIONS[kind](y[0], *parameters)
    return torch.cat([value[None], y[1:] * derivative])


def _along(vector: Tensor, x: Tensor, channel_dim: int) -> Tensor:
    """A vector [C] with its entries along one dimension of x."""
    return vector.reshape([-1 if dim == channel_dim else 1 for dim in range(x.dim())])


def _elu(z: Tensor, alpha: float, scale: float, input_scale: float) -> ValueAndSlope:
    """scale * (z if z > 0 else alpha (exp(input_scale z) - 1)): ELU, SELU and CELU."""
    negative = alpha * torch.expm1(input_scale * z)
    value = scale * torch.where(z > 0, z, negative)
    slope = torch.where(z > 0, torch.ones_like(z), alpha * input_scale * (input_scale * z).exp())
    return value, scale * slope


def _gelu(z: Tensor) -> ValueAndSlope:
    cdf = 0.5 * torch.erfc(-z / math.sqrt(2))
    pdf = torch.exp(-0.5 * z.square()) / math.sqrt(2 * math.pi)
    return z * cdf, cdf + z * pdf


def _gelu_tanh(z: Tensor) -> ValueAndSlope:
    """The tanh form: 0.5 (1 + tanh(u)) = sigmoid(2 u)."""
    factor = math.sqrt(8 / math.pi)
    bounded = z.clamp(-GELU_FLAT, GELU_FLAT)
    u = factor * (bounded + GELU_CUBIC * bounded**3)
    inner = factor * (1 + 3 * GELU_CUBIC * bounded.square())
    s = torch.sigmoid(u)
    return z * s, s + z * s * torch.sigmoid(-u) * inner


def _silu(z: Tensor) -> ValueAndSlope:
    s = torch.sigmoid(z)
    return z * s, s * (1 + z * torch.sigmoid(-z))


def _mish(z: Tensor) -> ValueAndSlope:
    t, s = torch.tanh(F.softplus(z)), torch.sigmoid(z)
    return F.mish(z), t + z * s * (1 - t.square())


def _softplus(z: Tensor, beta: float, threshold: float) -> ValueAndSlope:
    linear = z * beta > threshold
    return F.softplus(z, beta, threshold), torch.where(linear, 1.0, torch.sigmoid(beta * z))


def _sigmoid(z: Tensor) -> ValueAndSlope:
    s = torch.sigmoid(z)
    return s, s * torch.sigmoid(-z)


def _hardswish(z: Tensor) -> ValueAndSlope:
    middle = z / HARD_THREE + 0.5
    slope = torch.where(z <= -HARD_THREE, 0.0, torch.where(z >= HARD_THREE, 1.0, middle))
    return F.hardswish(z), slope.to(z.dtype)


def _hardsigmoid(z: Tensor) -> ValueAndSlope:
    inside = (z > -HARD_THREE) & (z < HARD_THREE)
    return F.hardsigmoid(z), inside.to(z.dtype) / HARD_SIX


ACTIVATIONS: dict[str, Callable[..., ValueAndSlope]] = {
    "identity": lambda z: (z, torch.ones_like(z)),
    "relu": lambda z: (F.relu(z), (~(z <= 0)).to(z.dtype)),  # 1 at NaN
    "leaky_relu": lambda z, a: (F.leaky_relu(z, a), torch.where(z > 0, 1.0, a).to(z.dtype)),
    "hardtanh": lambda z, a, b: (F.hardtanh(z, a, b), ((z > a) & (z < b)).to(z.dtype)),
    "elu": _elu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "silu": _silu,
    "mish": _mish,
    "softplus": _softplus,
    "sigmoid": _sigmoid,
    "tanh": lambda z: (torch.tanh(z), z.cosh().square().reciprocal()),
    "hardswish": _hardswish,
    "hardsigmoid": _hardsigmoid,
}
"""f(z) and f'(z) by kind; the parameters follow z."""


def dual_norm(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    groups: int = 1,
    inner: int = 1,
    centre: bool = True,
) -> Tensor:
    """Normalisation of each row: layer, group, instance and RMS norm.

        m = mean(u) (0 unless `centre`),   r = 1 / sqrt(mean((u - m)^2) + eps),   h = r (u - m)
        y[0] = w h + b,   y[p] = w r (v - mean(v) - h mean(h v)),   u = x[0], v = x[p]

    with mean(v) left out unless `centre`. See `fisherfast.ops.dual_norm` for arguments.
    """
    centred = x - x.mean(-1, keepdim=True) if centre else x
    rate = (centred[:1].square().mean(-1, keepdim=True) + eps).rsqrt()
    normal = rate * centred[:1]
    tangents = rate * (centred[1:] - normal * (normal * x[1:]).mean(-1, keepdim=True))
    y = torch.cat([normal, tangents])
    rows, width = x.shape[1:]
    row = torch.arange(rows, device=x.device)[:, None] % groups
    entry = (row * width + torch.arange(width, device=x.device)) // inner
    if weight is not None:
        y = y * weight[entry]
    if bias is not None:
        y = torch.cat([y[:1] + bias[entry], y[1:]])
    return y


def dual_softmax(x: Tensor, dim: int, log: bool = False) -> Tensor:
    """Softmax or log-softmax along a dimension.

        s = softmax(x[0]);   y[0] = s, y[p] = s (x[p] - sum(s x[p]))
        log:                 y[0] = log s, y[p] = x[p] - sum(s x[p])

    See `fisherfast.ops.dual_softmax` for arguments.
    """
    value = torch.softmax(x[:1], dim)
    tangents = x[1:] - (value * x[1:]).sum(dim, keepdim=True)
    if log:
        return torch.cat([torch.log_softmax(x[:1], dim), tangents])
    return torch.cat([value, value * tangents])


def dual_pool(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool = False,
) -> Tensor:
    """Max pooling: the largest primal of each window, and the tangents at its place.

        i(o) = argmax of x[0] over window o (the first of equals; of NaN the last)
        y[:, o] = x[:, i(o)]

    See `fisherfast.ops.dual_pool` for arguments.
    """
    pool = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
    # Contiguous: channels last, PyTorch 2.13 names the place of another window where all is -inf.
    primal = x[0].contiguous()
    value, index = pool(
        primal, list(kernel), list(stride), list(padding), list(dilation), ceil_mode, True
    )
    flat = x.flatten(3)
    places = index.flatten(2).expand(len(x), -1, -1, -1)
    return flat.gather(3, places).reshape(len(x), *value.shape)
