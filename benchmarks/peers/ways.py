"""The diagonal of the parameters' Fisher matrix as a user of torch alone would compute it.

Two ways, each with settings of which the fastest counts:

vmap    per-sample gradients by torch.func, a chunk of samples at a time; squares are summed chunk
        by chunk, so that only one chunk of gradients is in memory.
hooks   one backward pass over the batch; hooks keep each layer's input and gradient at its output,
        from which the layer's per-sample gradients are built and squared (einsum for linear layers,
        patches and a batched product, or a grouped convolution, for convolutions).

Both return [P] float32, the mean over samples, in the order of the parameters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NORMS = nn.modules.batchnorm._BatchNorm


def columns(f: Tensor, y: Tensor, exact: bool) -> Iterator[Tensor]:
    """What is sent back for logits f [n, C]: gradients of log p at labels y, or all columns of a
    root of the Fisher matrix diag(p) - p p^T."""
    p = f.softmax(1)
    for label in range(f.shape[1]) if exact else [None]:
        if label is None:
            yield F.one_hot(y, f.shape[1]).to(f) - p
        else:
            root = -p
            root[:, label] += 1
            yield p[:, label, None].sqrt() * root


# --- vmap ----------------------------------------------------------------------------------------


def by_vmap(model: nn.Module, x: Tensor, y: Tensor, exact: bool, chunk: int) -> Tensor:
    """vmap(grad) of log p(y_i | x_i); for the exact one the vjp of all columns of a sample, which
    share its forward pass."""
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def output(values: dict[str, Tensor], sample: Tensor) -> Tensor:
        return torch.func.functional_call(model, (values, buffers), (sample[None],))

    def loss(values: dict[str, Tensor], sample: Tensor, label: Tensor) -> Tensor:
        return -F.cross_entropy(output(values, sample), label[None])

    def rows(values: dict[str, Tensor], sample: Tensor, label: Tensor) -> dict[str, Tensor]:
        f, pull_back = torch.func.vjp(lambda v: output(v, sample), values)
        p = f[0].softmax(0)
        root = p.sqrt()[:, None] * (torch.eye(len(p), dtype=p.dtype) - p)
        return torch.func.vmap(lambda column: pull_back(column[None])[0])(root)

    each = rows if exact else torch.func.grad(loss)
    vectorised = torch.func.vmap(each, in_dims=(None, 0, 0))
    totals = {name: torch.zeros_like(value) for name, value in parameters.items()}
    for start in range(0, len(x), chunk):
        part = slice(start, start + chunk)
        for name, gradients in vectorised(parameters, x[part], y[part]).items():
            shape = parameters[name].shape
            totals[name] += gradients.reshape(-1, *shape).square_().sum(0)
    return torch.cat([total.flatten() for total in totals.values()]) / len(x)


# --- hooks ---------------------------------------------------------------------------------------


def by_hooks(
    model: nn.Module, x: Tensor, y: Tensor, exact: bool, gradients: Callable[..., Tensor]
) -> Tensor:
    """Every layer's input and gradient at its output, from hooks; per-sample gradients of one layer
    at a time."""
    layers = {name: m for name, m in model.named_modules() if list(m.parameters(recurse=False))}
    inputs: dict[str, Tensor] = {}
    totals: dict[str, Tensor] = {}

    def keep(name: str, module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        inputs[name] = args[0].detach()
        output.register_hook(lambda g: add(name, module, g))

    def add(name: str, module: nn.Module, g: Tensor) -> None:
        for attribute, part in squares(module, inputs[name], g, gradients).items():
            key = f"{name}.{attribute}"
            totals[key] = totals[key] + part if key in totals else part

    handles = [
        m.register_forward_hook(lambda m, a, o, name=name: keep(name, m, a, o))
        for name, m in layers.items()
    ]
    try:
        f = model(x)
    finally:
        for handle in handles:
            handle.remove()
    sent = list(columns(f.detach(), y, exact))
    for number, vector in enumerate(sent):
        first = next(model.parameters())
        torch.autograd.grad(f, [first], vector, retain_graph=number + 1 < len(sent))
    return torch.cat([totals[name].flatten() for name, _ in model.named_parameters()]) / len(x)


def squares(
    module: nn.Module, x: Tensor, g: Tensor, gradients: Callable[..., Tensor]
) -> dict[str, Tensor]:
    """sum_i of the squared gradients of weight, and bias where there is one."""
    with torch.no_grad():
        if isinstance(module, nn.Linear):
            weight = torch.einsum("nm,nd->md", g.square(), x.square())
            bias = g.square().sum(0)
        elif isinstance(module, nn.Conv2d):
            weight = gradients(module, x, g).square_().sum(0).reshape(module.weight.shape)
            bias = g.sum((2, 3)).square_().sum(0)
        elif isinstance(module, NORMS):
            scale = (module.running_var + module.eps).rsqrt()[:, None, None]
            normal = (x - module.running_mean[:, None, None]) * scale
            weight = torch.einsum("nchw,nchw->nc", g, normal).square_().sum(0)
            bias = g.sum((2, 3)).square_().sum(0)
        else:
            raise TypeError(f"layers must be linear, convolutions or norms, got {module}")
    return {"weight": weight} | ({"bias": bias} if module.bias is not None else {})


def by_patches(module: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    """Per-sample gradients [n, M, D] of a convolution: patches of its input, batched products."""
    patches = F.unfold(x, module.kernel_size, module.dilation, module.padding, module.stride)
    return torch.einsum("nmt,ndt->nmd", g.flatten(2), patches)


def by_grouped_convolution(module: nn.Conv2d, x: Tensor, g: Tensor) -> Tensor:
    """The same [n, M, C, k, k] by torch's own gradient of a convolution that has one group for each
    sample."""
    n, channels = x.shape[:2]
    return torch.nn.grad.conv2d_weight(
        x.reshape(1, n * channels, *x.shape[2:]),
        (n * module.out_channels, channels, *module.kernel_size),
        g.reshape(1, n * module.out_channels, *g.shape[2:]),
        module.stride,
        module.padding,
        module.dilation,
        groups=n,
    ).reshape(n, *module.weight.shape)
