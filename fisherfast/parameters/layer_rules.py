"""The rules of PyTorch's own layers: linear, convolution, transposed convolution, norms, embedding.

Each is found by the class of the module and the way it is set; what has no rule here is measured by
per-sample gradients (`rows.py`), which is slower and always right.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fisherfast import ops
from fisherfast.parameters.column_gram import column_gram
from fisherfast.parameters.rules import Rule

__all__ = ["Convolution", "Embedding", "Linear", "Norm", "TransposedConvolution", "rule_for"]

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Sharing = Literal["expand", "reduce"]
"""What Kronecker factors do with shared positions: see `KroneckerFisher`."""

PORTION_BYTES = 32 * 2**20
"""Of the rows a that are in memory at a time, where they are a copy of x."""

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d)
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

IN_CACHE = 1 << 18
"""Numbers of a temporary that is read at once: some samples at a time, 2 MB at most."""
IN_MEMORY = 1 << 22
"""Numbers of patches and per-sample gradients at a time, where no kernel does without: 32 MB."""


class _Layer(Rule):
    """A module whose own parameters `weight` and `bias` are measured, either or both."""

    def __init__(self, module: nn.Module, own: Mapping[str, str]) -> None:
        """own: attribute -> full name, of the parameters that are measured."""
        self.module = module
        self.attributes = tuple(own)
        self.names = tuple(own.values())
        self.shapes = tuple(getattr(module, attribute).shape for attribute in own)

    def _ordered(self, **parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            parts[attribute].reshape(-1, *shape)
            for attribute, shape in zip(self.attributes, self.shapes, strict=True)
        )

    def _shaped(self, **parts: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            parts[attribute].reshape(shape)
            for attribute, shape in zip(self.attributes, self.shapes, strict=True)
        )


class _LinearMap(_Layer):
    """A layer whose output is known to be linear in its parameters: products with vectors are
    passes of the layer, and no per-sample gradients."""

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        """The output [n, ...] for x if the parameters measured were v and all others zero: it is
        linear in v, and <G_i, v> = <g_i, output_i>."""
        raise NotImplementedError

    def products(self, x: Tensor, g: Tensor, v: Sequence[Tensor]) -> Tensor:
        """<G_i, v> [n], by one forward pass of the layer."""
        output = self.applied(x, [part.to(g.dtype) for part in v])
        return (g * output.reshape(g.shape)).flatten(1).sum(1)

    def weighted_sum(self, x: Tensor, g: Tensor, u: Tensor) -> tuple[Tensor, ...]:
        """sum_i u_i G_i, by one backward pass of the layer."""
        weighted = g * u.to(g.dtype).reshape(-1, *[1] * (g.dim() - 1))
        with torch.inference_mode(False), torch.enable_grad():
            v = [g.new_zeros(shape).requires_grad_() for shape in self.shapes]
            output = self.applied(x, v)
            return torch.autograd.grad(output, v, weighted.reshape(output.shape))


def _parts(samples: int, numbers: int, limit: int) -> Iterator[slice]:
    """Slices of samples of `numbers` numbers each: of at most `limit` numbers, or one sample."""
    few = max(1, limit // max(1, numbers))
    return (slice(first, first + few) for first in range(0, samples, few))


def _sum_of_squares(rows: Tensor) -> Tensor:
    """sum_i rows_i^2 of rows [n, ...], in float64."""
    return rows.double().square().sum(0)


class MatrixRule(_LinearMap):
    """A layer that multiplies by a matrix: at each of T positions, in each of G groups, rows
    a [n, G, T, D] meet gradients b [n, G, T, M], and the weights' gradient is sum_t b_t a_t^T."""

    def matrices(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        """a [n, G, T, D] and b [n, G, T, M]."""
        raise NotImplementedError

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        a, b = self.matrices(x, g)
        parts = {}
        if "weight" in self.attributes:
            parts["weight"] = b.transpose(-1, -2) @ a
        if "bias" in self.attributes:
            parts["bias"] = b.sum(2)
        return self._ordered(**parts)

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Rule.squares`; a few samples at a time."""
        sums = [torch.zeros(shape, dtype=torch.float64, device=g.device) for shape in self.shapes]
        a, b = self.matrices(x[:1], g[:1])
        numbers = a.numel() + b.numel() + sum(shape.numel() for shape in self.shapes)
        for part in _parts(len(x), numbers, IN_MEMORY):
            for total, rows in zip(sums, self.gradients(x[part], g[part]), strict=True):
                total += _sum_of_squares(rows)
        return tuple(sums)

    def gram(self, x: Tensor, g: Tensor, other_x: Tensor, other_g: Tensor) -> Tensor:
        same = x is other_x and g is other_g
        columns = g[None]
        others = columns if same else other_g[None]
        return self.columns_gram(x, columns, other_x, others)[0, :, 0]

    def columns_gram(self, x: Tensor, g: Tensor, other_x: Tensor, other_g: Tensor) -> Tensor:
        """`gram` of several columns at a time, whose products of x are computed once.

        Args:
            x, other_x: [n, ...] and [n', ...].
            g, other_g: [R, n, ...] and [R', n', ...].

        Returns:
            [R, n, R', n'] float64.
        """
        weight, bias = "weight" in self.attributes, "bias" in self.attributes
        same = x is other_x and g is other_g
        gram = g.new_empty((*g.shape[:2], *other_g.shape[:2]), dtype=torch.float64)
        for here, a, b in self._column_portions(x, g):
            for there, other_a, other_b in self._column_portions(other_x, other_g):
                if same and there.start < here.start:
                    continue
                others = (None, None) if same and there == here else (other_a, other_b)
                gram[:, here, :, there] = column_gram(a, b, *others, weight=weight, bias=bias)
                if same and there != here:
                    gram[:, there, :, here] = gram[:, here, :, there].permute(2, 3, 0, 1)
        return gram

    def _column_portions(self, x: Tensor, g: Tensor) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """(samples, a, b [R, n, G, T, M]) of some samples after the others."""
        start = 0
        for a, _ in self._portions(x, g[0]):
            where = slice(start, start + len(a))
            columns = g[:, where]
            b = self.output_rows(columns.flatten(0, 1))
            yield where, a, b.unflatten(0, columns.shape[:2])
            start += len(a)

    def input_factor(self, x: Tensor, g: Tensor, sharing: Sharing) -> Tensor:
        """The sum over samples of the inputs' Kronecker factor [G, D, D] (`KroneckerFisher`), with
        a last row and column for the bias."""
        bias = "bias" in self.attributes
        total: Tensor | None = None
        for a, _ in self._portions(x, g):
            if "weight" not in self.attributes:
                a = a[..., :0]
            positions = a.shape[2]
            rows = a if sharing == "expand" else a.mean(2, keepdim=True)
            part = _second_moment(rows, with_one=bias) / (positions if sharing == "expand" else 1)
            total = part if total is None else total + part
        assert total is not None
        return total

    def gradient_factor(self, x: Tensor, g: Tensor, sharing: Sharing) -> Tensor:
        """The sum over samples of the gradients' Kronecker factor [G, M, M]."""
        b = self.output_rows(g)
        return _second_moment(b if sharing == "expand" else b.sum(2, keepdim=True))

    def output_rows(self, g: Tensor) -> Tensor:
        """b of `matrices`."""
        raise NotImplementedError

    def _portions(self, x: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """`matrices` of some samples after the others, so that they take bounded memory."""
        first = self.matrices(x[:1], g[:1])[0]
        step = max(1, PORTION_BYTES // max(first.numel() * first.element_size(), 1))
        for start in range(0, len(x), step):
            yield self.matrices(x[start : start + step], g[start : start + step])


def _second_moment(rows: Tensor, *, with_one: bool = False) -> Tensor:
    """sum over n and T of rows rows^T, rows [n, G, T, D] with a 1 at their end if wanted:
    [G, D, D] float64."""
    n, groups, positions, width = rows.shape
    if groups == 1:
        _, sums, cross = ops.moments(_kernel_dtype(rows.reshape(n * positions, width)))
    else:
        wide = rows.transpose(0, 1).reshape(groups, n * positions, width).double()
        sums, cross = wide.sum(1), wide.mT @ wide
    return _bordered(sums, cross, n * positions) if with_one else cross


def _bordered(sums: Tensor, cross: Tensor, count: int) -> Tensor:
    """The second moment [G, D + 1, D + 1] of rows with a 1 at their end."""
    right = torch.cat([sums, sums.new_full((len(sums), 1), count)], 1)
    return torch.cat([torch.cat([cross, sums.unsqueeze(1)], 1), right.unsqueeze(2)], 2)


class Linear(MatrixRule):
    """nn.Linear: x [n, ..., D], g [n, ..., M]; the dimensions between are shared positions."""

    folds = True

    def matrices(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        return (
            x.reshape(len(x), 1, -1, x.shape[-1]),
            self.output_rows(g),
        )

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        parts = dict(zip(self.attributes, v, strict=True))
        if "weight" in parts:
            return F.linear(x, parts["weight"], parts.get("bias"))
        return parts["bias"].expand(*x.shape[:-1], -1)

    def output_rows(self, g: Tensor) -> Tensor:
        return g.reshape(len(g), 1, -1, g.shape[-1])

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Rule.squares`; where there is one position, it is a product of matrices."""
        x, g = (rows.reshape(len(rows), -1, rows.shape[-1]) for rows in (x, g))
        parts = {}
        if "weight" in self.attributes and x.shape[1] > 1:
            parts["weight"] = _kernel_squares(x.mT, g.mT)
        elif "weight" in self.attributes:
            # float64: a reduced precision of products, which the user may have set, ends at float32
            parts["weight"] = g.sum(1).double().square().T @ x.sum(1).double().square()
        if "bias" in self.attributes:
            parts["bias"] = _sum_of_squares(g.sum(1))
        return self._shaped(**parts)


class Convolution(MatrixRule):
    """nn.Conv1d, Conv2d, Conv3d, any stride, padding, dilation and groups."""

    def matrices(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
        groups = int(self.module.groups)  # type: ignore[arg-type]
        patches = unfolded(self.module, x)  # [n, C, *kernel, *positions]
        taps = patches[0, 0].numel() // g[0, 0].numel() if g.numel() else 1
        a = patches.reshape(len(x), groups, x.shape[1] // groups * taps, -1).transpose(-1, -2)
        return a, self.output_rows(g)

    def input_factor(self, x: Tensor, g: Tensor, sharing: Sharing) -> Tensor:
        module = self.module
        if sharing == "reduce" or "weight" not in self.attributes:
            return super().input_factor(x, g, sharing)
        if not isinstance(module, nn.Conv1d | nn.Conv2d):
            return super().input_factor(x, g, sharing)
        image, padding = _with_border(module, x)
        sums, cross = ops.patch_moments(
            _kernel_dtype(image),
            _pair(module.kernel_size),
            stride=_pair(module.stride),
            padding=padding,
            dilation=_pair(module.dilation),
            groups=module.groups,
        )
        positions = g[0, 0].numel()
        if "bias" in self.attributes:
            cross = _bordered(sums, cross, len(x) * positions)
        return cross / positions

    def output_rows(self, g: Tensor) -> Tensor:
        groups = int(self.module.groups)  # type: ignore[arg-type]
        return g.reshape(len(g), groups, g.shape[1] // groups, -1).transpose(-1, -2)

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        module = self.module
        assert isinstance(module, CONVOLUTIONS)
        parts = dict(zip(self.attributes, v, strict=True))
        weight = parts.get("weight")
        if weight is None:
            weight = x.new_zeros(module.weight.shape)
        return module._conv_forward(x, weight, parts.get("bias"))  # as its padding mode has it

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Rule.squares`; a few samples at a time for three dimensions."""
        module = self.module
        assert isinstance(module, CONVOLUTIONS)
        spatial = len(module.kernel_size)
        if spatial > 2:  # the kernel knows images
            return super().squares(x, g)
        parts = {}
        if "weight" in self.attributes:
            around = list(module._reversed_padding_repeated_twice)
            padding = around[::2][::-1]
            if module.padding_mode != "zeros" or around[::2] != around[1::2]:
                x, padding = padded(module, x), [0] * spatial
            parts["weight"] = _kernel_squares(
                x,
                g,
                module.kernel_size,
                stride=module.stride,
                padding=padding,
                dilation=module.dilation,
                groups=module.groups,
            )
        if "bias" in self.attributes:
            parts["bias"] = _sum_of_squares(g.flatten(2).sum(2))
        return self._shaped(**parts)


class TransposedConvolution(_Layer):
    """nn.ConvTranspose1d, ConvTranspose2d: the convolution that takes g to the shape of x has the
    same gradients, with x and g in exchanged roles."""

    products = Rule.products
    weighted_sum = Rule.weighted_sum

    def _settings(self) -> Iterator[tuple[int, int, int, int]]:
        """(stride, dilation, kernel, padding) of each axis."""
        module = self.module
        assert isinstance(module, TRANSPOSED)
        padding = module.padding
        assert not isinstance(padding, str)
        return zip(module.stride, module.dilation, module.kernel_size, padding, strict=True)

    def _margins(self, x: Tensor, g: Tensor) -> list[int]:
        """What the windows over g reach beyond it, as F.pad takes it; `output_padding` widens g on
        one side, to where no window may reach (then it is negative)."""
        margins = []
        for axis, (stride, dilation, kernel, padding) in enumerate(self._settings(), start=2):
            last = (x.shape[axis] - 1) * stride - padding + dilation * (kernel - 1)
            margins.append([padding, last + 1 - g.shape[axis]])
        return [margin for pair in reversed(margins) for margin in pair]

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        parts = {}
        if "weight" in self.attributes:
            groups = int(self.module.groups)  # type: ignore[arg-type]
            settings = list(self._settings())
            patches = F.pad(g, self._margins(x, g))
            for axis, (stride, dilation, kernel, _) in enumerate(settings):
                reach = dilation * (kernel - 1) + 1
                patches = patches.unfold(2 + axis, reach, stride)[..., ::dilation]
            # [n, M, *positions, *kernel]
            spatial = len(settings)
            patches = patches.unflatten(1, (groups, -1)).flatten(3, 2 + spatial)
            a = patches.movedim(3, -1).flatten(2, -2)  # [n, G, M / G taps, T]
            b = x.reshape(len(x), groups, x.shape[1] // groups, -1)
            parts["weight"] = b @ a.mT
        if "bias" in self.attributes:
            parts["bias"] = g.flatten(2).sum(2)
        return self._ordered(**parts)

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        parts = {}
        if "weight" in self.attributes:
            stride, dilation, kernel, padding = zip(*self._settings(), strict=True)
            margins, image = self._margins(x, g), g
            wider = [
                before - after for before, after in zip(margins[::2], margins[1::2], strict=True)
            ]
            if any(wide >= jump for wide, jump in zip(reversed(wider), stride, strict=True)):
                image, padding = F.pad(g, margins), (0,) * len(kernel)  # else a window more
            parts["weight"] = _kernel_squares(
                image,
                x,
                kernel,
                stride=stride,
                padding=padding,
                dilation=dilation,
                groups=int(self.module.groups),  # type: ignore[arg-type]
            )
        if "bias" in self.attributes:
            parts["bias"] = _sum_of_squares(g.flatten(2).sum(2))
        return self._shaped(**parts)


def _kernel_squares(
    x: Tensor,
    g: Tensor,
    kernel: Sequence[int] = (1,),
    *,
    stride: Sequence[int] = (1,),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    groups: int = 1,
) -> Tensor:
    """`ops.gradient_squares` of x and g [n, C, L] or [n, C, H, W]."""
    if x.dim() == 3:
        x, g = x.unsqueeze(2), g.unsqueeze(2)
        kernel, stride, dilation = ((1, *numbers) for numbers in (kernel, stride, dilation))
        padding = (0, *padding)
    settings = {"stride": stride, "padding": padding, "dilation": dilation}
    return ops.gradient_squares(
        _kernel_dtype(x), _kernel_dtype(g), kernel, groups=groups, **settings
    )


def _kernel_dtype(x: Tensor) -> Tensor:
    """x in a dtype that kernels read: half precision in float32."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def padded(module: nn.Module, x: Tensor) -> Tensor:
    """x with the margins of a convolution, whatever they hold."""
    assert isinstance(module, CONVOLUTIONS)
    around = list(module._reversed_padding_repeated_twice)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    return F.pad(x, around, mode=mode) if any(around) else x


def _with_border(module: nn.Module, x: Tensor) -> tuple[Tensor, list[int]]:
    """x with what the padding adds, as far as it is not the same zeros on both sides: [n, C, H, W],
    and the zeros that are left to add; a line is an image of one row."""
    assert isinstance(module, nn.Conv1d | nn.Conv2d)
    around = list(module._reversed_padding_repeated_twice)
    padding = around[::2][::-1]  # before each axis, the first one first
    if module.padding_mode != "zeros" or around[::2] != around[1::2]:
        mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
        x, padding = F.pad(x, around, mode=mode), [0] * len(padding)
    return (x, padding) if x.dim() == 4 else (x.unsqueeze(2), [0, *padding])


def _pair(numbers: Sequence[int]) -> list[int]:
    return [1] * (2 - len(numbers)) + list(numbers)


def unfolded(module: nn.Module, x: Tensor) -> Tensor:
    """Every patch that a convolution's kernel meets: [n, C, *kernel, *positions], a view of x."""
    assert isinstance(module, CONVOLUTIONS)
    x = padded(module, x)
    spatial = len(module.kernel_size)
    for axis in range(spatial):
        reach = module.dilation[axis] * (module.kernel_size[axis] - 1) + 1
        x = x.unfold(2 + axis, reach, module.stride[axis])[..., :: module.dilation[axis]]
    return x.movedim(tuple(range(2, 2 + spatial)), tuple(range(-spatial, 0)))


class Norm(_LinearMap):
    """Batch norm that uses its running statistics, layer, group, instance and RMS norm: a scale and
    a shift of the normalised activations, shared by all positions."""

    def __init__(self, module: nn.Module, own: Mapping[str, str]) -> None:
        super().__init__(module, own)
        self.folds = isinstance(module, nn.LayerNorm | nn.RMSNorm)

    def normalised(self, x: Tensor) -> Tensor:
        """What the scale multiplies, in the shape of x."""
        module = self.module
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            shape = [1, -1] + [1] * (x.dim() - 2)
            mean, variance = module.running_mean, module.running_var
            assert mean is not None
            assert variance is not None
            return (x - mean.view(shape)) * (variance.view(shape) + module.eps).rsqrt()
        if isinstance(module, nn.LayerNorm):
            return F.layer_norm(x, module.normalized_shape, None, None, module.eps)
        if isinstance(module, nn.RMSNorm):
            return F.rms_norm(x, module.normalized_shape, None, module.eps)
        if isinstance(module, INSTANCE_NORMS):
            return F.instance_norm(x, eps=module.eps)
        assert isinstance(module, nn.GroupNorm)
        return F.group_norm(x, module.num_groups, None, None, module.eps)

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        parts = {}
        if "weight" in self.attributes:
            parts["weight"] = self._shared(g * self.normalised(x))
        if "bias" in self.attributes:
            parts["bias"] = self._shared(g)
        return self._ordered(**parts)

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        last = isinstance(self.module, nn.LayerNorm | nn.RMSNorm)
        parts = {
            attribute: value if last else value.reshape(-1, *[1] * (x.dim() - 2))
            for attribute, value in zip(self.attributes, v, strict=True)
        }
        output = torch.zeros_like(x)
        if "weight" in parts:
            output = output + self.normalised(x) * parts["weight"]
        return output + parts["bias"] if "bias" in parts else output

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        """See `Rule.squares`; so few samples at a time that what is normalised is in the caches."""
        sums = [torch.zeros(shape, dtype=torch.float64, device=g.device) for shape in self.shapes]
        for part in _parts(len(x), x[:1].numel(), IN_CACHE):
            for total, rows in zip(sums, self.gradients(x[part], g[part]), strict=True):
                total += _sum_of_squares(rows)
        return tuple(sums)

    def _shared(self, values: Tensor) -> Tensor:
        """Sums over the positions that share a parameter: [n, numbers of the parameter]."""
        if isinstance(self.module, nn.LayerNorm | nn.RMSNorm):
            kept = self.shapes[0].numel()
            return values.reshape(len(values), -1, kept).sum(1)
        return values.flatten(2).sum(2) if values.dim() > 2 else values


class Embedding(_LinearMap):
    """nn.Embedding: x [n, ...] whole numbers, g [n, ..., D]; the padding row has no gradient."""

    folds = True

    def _segments(self, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sample, row of the table, gradient) of each pair that occurs: [U], [U], [U, D]."""
        rows, dim = self.shapes[0]
        index = x.reshape(len(x), -1)
        values = g.reshape(-1, dim)
        key = (torch.arange(len(x), device=x.device)[:, None] * rows + index).flatten()
        if self.module.padding_idx is not None:
            wanted = index.flatten() != self.module.padding_idx
            key, values = key[wanted], values[wanted]
        pairs, place = key.unique(return_inverse=True)
        sums = values.new_zeros(len(pairs), dim).index_add_(0, place, values)
        return pairs // rows, pairs % rows, sums

    def gradients(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        sample, row, values = self._segments(x, g)
        dense = values.new_zeros(len(x), *self.shapes[0])
        dense[sample, row] = values
        return (dense,)

    def squares(self, x: Tensor, g: Tensor) -> tuple[Tensor, ...]:
        _, row, values = self._segments(x, g)
        return (values.new_zeros(self.shapes[0]).index_add_(0, row, values.square()),)

    def applied(self, x: Tensor, v: Sequence[Tensor]) -> Tensor:
        assert isinstance(self.module, nn.Embedding)
        table, padding = v[0], self.module.padding_idx
        if padding is not None:
            kept = torch.ones(len(table), 1, dtype=table.dtype, device=table.device)
            kept[padding] = 0
            table = table * kept
        return F.embedding(x, table)


def rule_for(module: nn.Module, own: Mapping[str, str]) -> Rule | None:
    """The rule of a module whose parameters `own` (attribute -> full name) are measured, or None
    where it has none."""
    if not set(own) <= {"weight", "bias"} or "forward" in vars(module):  # or it is somebody's own
        return None
    if type(module) is nn.Linear:
        return Linear(module, own)
    if type(module) in CONVOLUTIONS:
        return Convolution(module, own)
    if type(module) in TRANSPOSED:
        return TransposedConvolution(module, own)
    if type(module) in BATCH_NORMS:
        fixed = not module.training and module.running_mean is not None
        return Norm(module, own) if fixed else None
    if type(module) in (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm):
        return Norm(module, own)
    if type(module) in INSTANCE_NORMS and not module.track_running_stats:
        return Norm(module, own)
    if type(module) is nn.Embedding and module.max_norm is None and not module.scale_grad_by_freq:
        return Embedding(module, own)
    return None
