"""Single operations that a forward method may call, each a network of its own.

Axes differ in length as in `dual_zoo_layers`: from each other, from the batch and from the stack.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from support.dual_oracle import calls
from torch import Tensor
from torch.utils.checkpoint import checkpoint

VIEWS = {
    "roll": calls(lambda x: x.roll((1, 2), (1, 2))),
    "flip": calls(lambda x: x.flip(1, -1)),
    "permute": calls(lambda x: x.permute(2, 0, 1).contiguous().movedim(1, 0)),
    "view_of_batch": calls(lambda x: x.reshape(len(x) * 5, 7).view(-1, 5, 7).mT * 2),
    "slices": calls(lambda x: x[:, 1:, ::2] + x[..., :4][:, :4] * x[:, None, 0, :4]),
    "steps_of_list": calls(lambda x: x[:, [3, 0, 0]] - x[:, torch.tensor([1, 2, 4])]),
    "mask": calls(lambda x: x[:, torch.tensor([True, False, True, True, False])]),
    "repeat": calls(lambda x: x.repeat(1, 2, 3) + x.tile(2, 3)),
    "repeat_interleave": calls(lambda x: x.repeat_interleave(2, dim=1)),
    "split": calls(lambda x: torch.cat(x.split([1, 4], 1)[::-1], 1) * x.split(2, 2)[0][..., :1]),
    "windows": calls(lambda x: x.unfold(2, 3, 2).narrow(1, 1, 3).select(2, 1)),
    "diagonal": calls(
        lambda x: torch.diagonal(x, dim1=1, dim2=2) + torch.diag_embed(x)[:, 0, :5, 0]
    ),
    "triangle": calls(lambda x: x.tril() + x.triu(1) * 2),
}


PRODUCTS = {
    "matmul_left": calls(lambda x: torch.linspace(0, 1, 10).to(x).view(2, 5) @ x),
    "matmul_constant": calls(lambda x: x @ torch.linspace(0, 1, 14).to(x).view(7, 2)),
    "matmul_vector": calls(lambda x: x @ torch.linspace(0, 1, 7).to(x)),
    "matmul_of_heads": calls(lambda x: x.view(-1, 2, 5, 7) @ x.view(-1, 2, 5, 7).mT, (10, 7)),
    "matmul_first_of_one": calls(lambda x: x[:1] @ x.mT),
    "matmul_second_of_one": calls(lambda x: x @ x[:1].mT),
    "bmm": calls(lambda x: torch.bmm(x[:, :2], x.transpose(1, 2))),
    "addmm": calls(lambda x: torch.addmm(x[0, 0], x[:, 0], x[0, 1:4].mT @ x[0, 1:4], alpha=2)),
    "baddbmm": calls(lambda x: torch.baddbmm(x[:, :, :5], x, x.mT, beta=0.5, alpha=2)),
    "einsum_constant": calls(
        lambda x: torch.einsum("nij,kj->nk", x, torch.linspace(0, 1, 14).to(x).view(2, 7))
    ),
    "dot": calls(lambda x: x[:, 0] * torch.dot(x[0, 0], x[-1, 1])),
    "addcmul": calls(lambda x: torch.addcmul(x, x.sin(), x.cos(), value=0.3)),
    "addcdiv": calls(lambda x: torch.addcdiv(x, x.sin(), x.cosh(), value=0.3)),
    "lerp": calls(lambda x: torch.lerp(x, x.exp(), 0.3) + torch.lerp(x, x.sin(), x.sigmoid())),
    "rsub": calls(lambda x: 1 - 2 * x + 3 / (x * x + 1) - x / 4 + (-x) ** 2 + 2.0**x),
    "alpha": calls(lambda x: torch.add(x, x.sin(), alpha=2) + torch.sub(x, x.cos(), alpha=0.5)),
}

REDUCTIONS = {
    "sum": calls(lambda x: x.sum() + x.sum(1) + x.sum((1, 2), keepdim=True)[..., 0]),
    "mean_of_batch": calls(lambda x: x - x.mean(0)),
    "var": calls(lambda x: x.var(1) + x.var((1, 2), correction=0, keepdim=True)[:, 0]),
    "std": calls(lambda x: (x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True)),
    "var_mean": calls(lambda x: torch.cat(torch.var_mean(x, -1), 1)),
    "norm": calls(
        lambda x: x.norm(dim=-1) + x.norm(p=3, dim=-1) + x.flatten(1).norm(1, 1)[:, None]
    ),
    "normalize": calls(lambda x: F.normalize(x, dim=1)),
    "max_all": calls(lambda x: x * x.max() - x.min()),
    "max_dim": calls(lambda x: x.max(dim=1)[0] + x.min(1, keepdim=True).values[:, 0]),
    "amax": calls(lambda x: x.amax((1, 2)) - x.amin(dim=2).sum(1)),
    "median": calls(lambda x: x.median(-1).values + x.kthvalue(2, -1).values),
    "prod": calls(lambda x: x.prod(-1) + x[:, 0].prod(1, keepdim=True)),
    "logsumexp": calls(lambda x: x.logsumexp(1)),
    "softmax_of_a_number": calls(lambda x: x * x.mean().softmax(0)),
    "softmax_of_nothing": calls(
        lambda x: torch._safe_softmax(x.masked_fill(torch.eye(5, 7)[:, :1] > 0, -torch.inf), -1)
    ),
    "cumsum": calls(lambda x: x.cumsum(1) + x.cumsum(-1)),
    "cumprod": calls(lambda x: x.cumprod(2)),
    "cummax": calls(lambda x: x.cummax(1).values),
    "diff_behind_constants": calls(
        lambda x: torch.diff(x, prepend=torch.arange(5.0).to(x).view(5, 1).expand(len(x), -1, -1))
    ),
    "sort": calls(lambda x: x.sort(-1, descending=True).values),
    "argsort": calls(lambda x: x.gather(1, x.argsort(1))),
    "topk": calls(lambda x: x.topk(3, dim=1)[0] * 2),
    "gather": calls(lambda x: x.gather(2, torch.arange(6).view(1, 2, 3).expand(len(x), 2, 3))),
    "take_along": calls(lambda x: torch.take_along_dim(x, x.topk(2, -1).indices, -1)),
    "index_select": calls(lambda x: x.index_select(-1, torch.tensor([4, 0, 4]))),
    "fft_and_back": calls(lambda x: torch.fft.irfft(torch.fft.rfft(x) * 2j, n=7)),
}


def _with_graph(x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x.sin()
    with torch.no_grad():
        return y * x.cos()


def _asked(x: Tensor) -> Tensor:
    """What a forward method may ask a tensor before it does anything."""
    assert isinstance(x, Tensor)
    assert torch.is_tensor(x)
    assert x.ndim == x.dim() == len(x.shape) == 3
    assert (x.size(), x.stride(1), x.is_contiguous()) == (x.shape, x.shape[2], True)
    assert x.device.type == "cpu"
    assert not x.is_cuda
    assert x.is_floating_point()
    assert not torch.is_complex(x)
    assert x.dtype == x.new_empty(0).dtype == torch.empty_like(x).dtype
    assert len(repr(x)) > len(f"{x.sum().item():.1f}") > 0
    assert torch.isfinite(x).all()
    assert bool((x == x).all())
    assert torch.allclose(x, x)
    return x * 2


ELEMENTWISE = {
    "exponentials": calls(lambda x: x.exp() + x.expm1() + torch.exp2(x) + x.sinh() - x.cosh()),
    "logarithms": calls(lambda x: (x * x + 1).log() + x.abs().log1p() + (x.exp() + 1).log2()),
    "powers": calls(lambda x: x.abs().sqrt() + (x * x + 1).rsqrt() + x.exp().reciprocal() + x**3),
    "trigonometry": calls(lambda x: x.sin() * x.cos() + x.atan() - torch.tan(x / 4)),
    "atan2": calls(lambda x: torch.atan2(x, x.exp()) + torch.hypot(x, x + 4)),
    "erf": calls(lambda x: x.erf() + torch.special.erfc(x) + torch.lgamma(x.abs() + 1)),
    "abs": calls(lambda x: x.abs() * x.sign() - x.neg() + x.square()),
    "clamp": calls(lambda x: x.clamp(-0.5, 0.8) + x.clamp(min=0) + torch.clip(x, max=0.3)),
    "clamp_tensor": calls(lambda x: torch.clamp(x, x.sin() - 0.1, x.sin() + 0.1)),
    "maximum": calls(lambda x: torch.maximum(x, x.sin() - 0.1) - torch.minimum(x, x * x)),
    "where": calls(lambda x: torch.where(x > 0.3, x, x.exp()) + torch.where(x < 0, x, 0.0)),
    "masked_fill": calls(lambda x: x.masked_fill(x < 0, -2.0)),
    "nan_to_num": calls(lambda x: torch.nan_to_num(x) + torch.floor(x) + x.round() + x.frac()),
    "remainder": calls(lambda x: x % 1.5 + torch.fmod(x, 0.7)),
    "xlogy": calls(lambda x: torch.xlogy(x, x.abs() + 1) + torch.logaddexp(x, x.sin())),
    "pow_tensor": calls(lambda x: x.abs().pow(x) + torch.pow(x.abs(), 1.7)),
    "channels_last": calls(
        lambda x: x[:, None].clone(memory_format=torch.channels_last).squeeze(1) * x
    ),
    "to_float": calls(lambda x: x.float().double() + x.to(torch.float64).type_as(x)),
    "constants": calls(
        lambda x: x + torch.ones_like(x) * torch.arange(7) + x.new_tensor(2.0) * x.new_ones(7)
    ),
    "decision": calls(lambda x: x * 2 if x.mean() > 0 else x * 3),
    "detached": calls(lambda x: x * x.detach() + x.data.sin()),
    "number_of_tensor": calls(lambda x: x * x.mean().item() + float(x[0, 0, 0])),
    "graph_inside": calls(_with_graph),
    "asked": calls(_asked),
    "checkpoint": calls(lambda x: checkpoint(lambda t: t.sin() * t, x, use_reentrant=False)),
}


def _overwritten(x: Tensor) -> Tensor:
    y = x.clone()
    y[:, 0] = x[:, 1].sin()
    y[:, 1:3] *= 2
    y[:, 4] += y[:, 3] ** 2
    y[:, :, 6] = 1.5
    return y


def _filled(x: Tensor) -> Tensor:
    out = torch.zeros(len(x), 6, 8, dtype=x.dtype)
    out[:, :5, :7] = x
    out[:, 5, 1:] += x.sum(1)
    return out


def _scattered(x: Tensor) -> Tensor:
    out = x.new_zeros(len(x), 9, 7)
    out.index_add_(1, torch.tensor([8, 1, 3, 3, 0]), x)
    out.scatter_(2, torch.tensor([[[2], [0], [1]]]).expand(len(x), 3, 1), x[:, :3, :1])
    out.index_copy_(1, torch.tensor([6]), x[:, :1])
    return out.scatter_add(1, torch.zeros(len(x), 1, 7, dtype=torch.int64), x[:, 2:3])


def _in_place(x: Tensor) -> Tensor:
    y = x * 1.0
    y.add_(x, alpha=2).mul_(x).sub_(1).div_(3.0).neg_().clamp_(-2, 2)
    y.addcmul_(x, x, value=0.1).tanh_().exp_().sigmoid_().pow_(2)
    return y.masked_fill_(y < 0.3, 0.1).copy_(y * 2)


def _aliased(x: Tensor) -> Tensor:
    y = x + 0
    y.view(len(x), -1)[:, ::3].mul_(2)
    F.relu(y[:, 1], inplace=True)
    y.transpose(1, 2)[:, 0].fill_(0.5)
    row = y[:, 4]
    row.zero_()
    return y + row.sum()


def _put(x: Tensor) -> Tensor:
    y = x.sin()
    y[:, torch.tensor([1, 3])] = 0.5
    y[..., torch.tensor([2, 6])] = x[..., :2]
    return y * x


WRITES = {
    "put": calls(_put),
    "overwritten": calls(_overwritten),
    "filled": calls(_filled),
    "scattered": calls(_scattered),
    "in_place": calls(_in_place),
    "squeezed_in_place": calls(lambda x: x.sin().unsqueeze_(1).squeeze_(1) * 2),
    "aliased": calls(_aliased),
    "index_put": calls(
        lambda x: x.index_put((torch.tensor([0]), torch.tensor([2])), x[0, 1].sin())
    ),
}

FALLBACKS = {
    "inverse": calls(lambda x: torch.linalg.inv(x @ x.mT + torch.eye(5).to(x))),
    "complex": calls(lambda x: (torch.complex(x, x.sin()) @ torch.complex(x.mT, x.mT)).abs()),
    "spectrogram": calls(
        lambda x: torch.stft(
            x.flatten(1), 8, 4, window=torch.hann_window(8).to(x), return_complex=True
        ).abs()
    ),
    "quantile": calls(lambda x: x.quantile(0.3, dim=1)),
    "covariance": calls(lambda x: x * torch.corrcoef(x[0]).sum()),
    "spread": calls(
        lambda x: x.scatter_reduce(1, torch.zeros(len(x), 5, 7).long(), x.sin(), "mean")
    ),
    "bags": calls(lambda x: F.embedding_bag(x.argmax(-1), torch.ones(7, 2).to(x)) + x[:, 0, :2]),
    "mapped": calls(lambda x: torch.vmap(lambda row: row.sin() * row.sum())(x)),
    "slope_inside": calls(lambda x: torch.func.grad(lambda t: (t**3).sum())(x)),
}
"""Operations that are rare enough to leave them to PyTorch's forward mode."""

OPERATIONS = VIEWS | PRODUCTS | REDUCTIONS | ELEMENTWISE | WRITES | FALLBACKS
