"""Kronecker factors: a product of two small matrices for each linear or convolution layer."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Annotated, Any

import torch
from torch import Tensor

from fisherfast._fields import AtLeast, Shape, inside, read, wrong
from fisherfast.parameters.backward.columns import Sweep
from fisherfast.parameters.checks import check_choice
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layers.linear import MatrixRule, Sharing
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.structures.base import ParameterFisher
from fisherfast.parameters.structures.dense import singular


@dataclass(eq=False, repr=False)
class KroneckerFisher(ParameterFisher):
    """K-FAC: for each linear and convolution layer the block B (x) A, and no terms between layers.

    With rows a_it that multiply the weights at position t of sample i (the input, or the patch of
    it that a kernel meets, and a 1 for the bias) and gradients b_itr = the part of column r of the
    root of the output Fisher that comes back to the layer's output there (the columns are those of
    every structure), n samples and T positions:

        sharing="expand"    A = 1/(n T) sum_it a_it a_it^T,     B = 1/n sum_itr b_itr b_itr^T
        sharing="reduce"    A = 1/n sum_i abar_i abar_i^T,      B = 1/n sum_ir bsum_ir bsum_ir^T
                            abar_i = 1/T sum_t a_it,            bsum_ir = sum_t b_itr

    Both equal the exact block of one sample without shared positions (T = 1), and that of any
    number of samples in a deep linear network under Gaussian noise: "expand" where each position
    has outputs of its own, "reduce" where the outputs are means over the positions. A network that
    pools its positions is nearer to "reduce", one that answers at each of them to "expand".
    Otherwise it is an approximation: A and B are averaged apart from each other.

    A convolution in groups has one pair of factors for each. Weight and bias of a layer have a
    joint block. Parameters without a Kronecker form (norms, embeddings, transposed convolutions,
    attention's and recurrent layers' own matrices, parameters used in expressions) have their exact
    diagonal; `diagonal_names` lists them, and so does the repr.

    ``fisher(..., structure="kfac", sharing="expand")``: the treatment of shared positions.

    Cost: 8 (D^2 + M^2) bytes for a layer with D inputs of a weight and M outputs; T (D^2 + R M^2)
    operations per sample with R columns and T positions; `solve`, `eigenvalues` and `logdet` about
    10 (D^3 + M^3).

    Reference: Martens and Grosse 2015 (arXiv 1503.05671), Grosse and Martens 2016 (arXiv
    1602.01407); shared positions and the scales above: Eschenhagen et al. 2023 (arXiv 2311.00636),
    sections 3.2 and 3.3, for a loss that is a mean over samples.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        >>> F = ff.parameters.fisher(model, ff.parameters.Gaussian(), x, structure="kfac")
        >>> F.to_dense()  # exact for one layer under Gaussian noise
        tensor([[5.0000, 1.5000],
                [1.5000, 0.5000]], dtype=torch.float64)
    """

    structure = "kfac"

    blocks: list[KroneckerBlock]
    diagonal: dict[str, Tensor]
    sharing: Sharing

    @property
    def diagonal_names(self) -> tuple[str, ...]:
        """The parameters that have no Kronecker form: only their exact diagonal is kept."""
        return tuple(name for name in self.layout.names if name in self.diagonal)

    def __repr__(self) -> str:
        text = super().__repr__()
        if self.diagonal:
            text = f"{text[:-1]}; diagonal alone: {', '.join(self.diagonal_names)}>"
        return text

    @cached_property
    def _rest(self) -> Tensor:
        """The diagonal [P] of the parameters without a Kronecker form; 0 for the others."""
        found = torch.zeros(self.layout.size, dtype=torch.float64, device=self._device)
        for name, place in self.layout.slices().items():
            if name in self.diagonal:
                found[place] = self.diagonal[name].flatten()
        return found

    def _matmul(self, columns: Tensor) -> Tensor:
        result = self._rest[:, None] * columns
        for block in self.blocks:
            block.put(block.product(block.take(columns)), result)
        return result

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        if damping == 0 and bool((self.eigenvalues() == 0).any()):
            raise singular("some directions have no Fisher information")
        result = columns / (self._rest + damping)[:, None]
        for block in self.blocks:
            block.put(block.solution(block.take(columns), damping), result)
        return result

    def diag(self) -> Tensor:
        column = self._rest[:, None].clone()
        for block in self.blocks:
            block.put(block.diag().unsqueeze(-1), column)
        return column[:, 0]

    def eigenvalues(self) -> Tensor:
        """All P, ascending; those within rounding of zero are zero."""
        parts = [*(block.spectrum for block in self.blocks), *self.diagonal.values()]
        return torch.cat([part.flatten() for part in parts]).sort().values

    @property
    def _device(self) -> torch.device:
        every = [*(block.inputs for block in self.blocks), *self.diagonal.values()]
        return every[0].device

    def _state(self) -> dict[str, Any]:
        return super()._state() | {"blocks": [block.state() for block in self.blocks]}

    def check_fields(self) -> None:
        shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        places = {(place.start, place.stop): name for name, place in self.layout.slices().items()}
        found = list(self.diagonal)
        for name, values in self.diagonal.items():
            if name in shapes:
                kind = Annotated[Tensor, Shape(tuple(shapes[name])), AtLeast(0)]
                read(kind, values, f"diagonal[{name!r}]")
        for number, block in enumerate(self.blocks):
            with inside(f"blocks[{number}]"):
                found += [places.get(place, str(place)) for place in block.own()]
        if sorted(found) != sorted(shapes):
            raise ValueError(
                f"blocks and diagonal must hold each of {sorted(shapes)} once, got {sorted(found)}"
            )


class KroneckerAccumulator:
    """Sums of both factors of each layer while the gradients pass; A once a batch, from the first
    column."""

    kind = KroneckerFisher

    def __init__(self, layout: ParameterLayout, *, sharing: Sharing = "expand") -> None:
        """sharing: the treatment of shared positions, see `KroneckerFisher`.

        Raises:
            ValueError: sharing is neither "expand" nor "reduce".
        """
        check_choice("sharing", sharing, ("expand", "reduce"))
        self._layout, self._sharing = layout, sharing
        self._inputs: dict[tuple[str, ...], Any] = defaultdict(float)  # A, by the parameters
        self._gradients: dict[tuple[str, ...], Any] = defaultdict(float)  # B
        self._attributes: dict[tuple[str, ...], tuple[str, ...]] = {}
        self._diagonal: dict[str, Any] = defaultdict(float)

    def add(self, sweep: Sweep) -> None:
        if sweep.matrices_without_tap:  # the sum of two Kronecker products is none
            raise ValueError(
                'parameters must be used by one call of one layer for "kfac", got'
                f" {sweep.matrices_without_tap[0]!r}, which is shared (tied), called more than"
                " once, or in a layer that mixes the samples; leave it out by parameters=, or use"
                ' structure="diag" or "block"'
            )

        def take(column: int, rule: Rule, x: Tensor, g: Tensor) -> None:
            if isinstance(rule, MatrixRule):
                if column == 0:
                    self._inputs[rule.names] += rule.input_factor(x, g, self._sharing)
                self._gradients[rule.names] += rule.gradient_factor(x, g, self._sharing)
                self._attributes[rule.names] = rule.attributes
            else:
                for name, squares in zip(rule.names, rule.squares(x, g), strict=True):
                    self._diagonal[name] += squares.double()

        sweep.visit(take)

    def means(self, samples: int) -> tuple[list[KroneckerBlock], dict[str, Tensor], Sharing]:
        slices = self._layout.slices()
        blocks = []
        for names, inputs in self._inputs.items():
            places = [(slices[name].start, slices[name].stop) for name in names]
            own = dict(zip(self._attributes[names], places, strict=True))
            blocks.append(KroneckerBlock(inputs / samples, self._gradients[names] / samples, **own))
        diagonal = {name: values / samples for name, values in self._diagonal.items()}
        return blocks, diagonal, self._sharing


@dataclass(eq=False)
class KroneckerBlock:
    """One layer's block B (x) A in each of G groups: entry ((m, d), (m', d')) is B[m, m'] A[d, d'].

    The weights of a group are a matrix [M, D] in the order of their parameter, row by row; a bias
    that is measured with them is one more column, the last.

    Attributes:
        inputs: A [G, D, D] float64, of what multiplies the weights.
        gradients: B [G, M, M] float64, of the gradients at the layer's output.
        weight, bias: (start, stop) of the two in a vector of all parameters; None
            what is not measured.
    """

    inputs: Annotated[Tensor, Shape(("G", "D", "D"))]
    gradients: Annotated[Tensor, Shape(("G", "M", "M"))]
    weight: tuple[int, int] | None = None
    bias: tuple[int, int] | None = None

    def own(self) -> list[tuple[int, int]]:
        """Its places in a vector of all parameters.

        Raises:
            ValueError: they do not have the sizes of the factors.
        """
        groups, rows, columns = *self.gradients.shape[:2], self.inputs.shape[1]
        sizes = {"weight": columns - (self.bias is not None), "bias": 1}
        found = []
        for name, size in sizes.items():
            place = getattr(self, name)
            if place is not None:
                if place[1] - place[0] != groups * rows * size:
                    raise wrong(name, f"have {groups * rows * size} numbers", place)
                found.append(place)
        return found

    def take(self, columns: Tensor) -> Tensor:
        """This layer's part of vectors [P, m] as matrices [G, M, D, m]."""
        groups, rows = self.gradients.shape[:2]
        parts = []
        if self.weight is not None:
            parts.append(columns[slice(*self.weight)].reshape(groups, rows, -1, columns.shape[1]))
        if self.bias is not None:
            parts.append(columns[slice(*self.bias)].reshape(groups, rows, 1, columns.shape[1]))
        return torch.cat(parts, 2)

    def put(self, matrices: Tensor, columns: Tensor) -> None:
        """Write matrices [G, M, D, m] to their place in vectors [P, m]."""
        if self.weight is not None:
            end = matrices.shape[2] - (self.bias is not None)
            columns[slice(*self.weight)] = matrices[:, :, :end].reshape(-1, columns.shape[1])
        if self.bias is not None:
            columns[slice(*self.bias)] = matrices[:, :, -1].reshape(-1, columns.shape[1])

    def product(self, matrices: Tensor) -> Tensor:
        """(B (x) A) V of V [G, M, D, m]: the matrices B V A."""
        return _both_sides(self.gradients, matrices, self.inputs)

    def solution(self, matrices: Tensor, damping: float) -> Tensor:
        """(B (x) A + damping)^-1 V of V [G, M, D, m], in the basis of the eigenvectors."""
        (_, left), (_, right) = self._eigen
        rotated = _both_sides(left.mT, matrices, right)
        rotated = rotated / (self.spectrum + damping).unsqueeze(-1)
        return _both_sides(left, rotated, right.mT)

    @cached_property
    def _eigen(self) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        return _eigen(self.gradients), _eigen(self.inputs)

    @property
    def spectrum(self) -> Tensor:
        """All eigenvalues [G, M, D]: products of those of B and of A, with those within rounding of
        zero set to zero."""
        (left, _), (right, _) = self._eigen
        return left.unsqueeze(-1) * right.unsqueeze(-2)

    def diag(self) -> Tensor:
        """The diagonal as matrices [G, M, D]."""
        left, right = (part.diagonal(dim1=-2, dim2=-1) for part in (self.gradients, self.inputs))
        return left.unsqueeze(-1) * right.unsqueeze(-2)

    def state(self) -> dict[str, Any]:
        """Its fields, as tensors and plain numbers."""
        return {part.name: getattr(self, part.name) for part in fields(self)}


def _both_sides(left: Tensor, matrices: Tensor, right: Tensor) -> Tensor:
    """L V R of V [G, M, D, m], for each of the m."""
    moved = matrices.movedim(-1, 1)
    return (left.unsqueeze(1) @ moved @ right.unsqueeze(1)).movedim(1, -1)


def _eigen(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues [G, D] and eigenvectors; those within rounding of zero are zero.

    The rounding error of an eigenvalue is at most about D eps times the largest.
    """
    values, vectors = torch.linalg.eigh(matrix)
    size = max(matrix.shape[-1], 1)
    floor = size * torch.finfo(values.dtype).eps * values.abs().amax(-1, keepdim=True)
    return torch.where(values > floor, values, 0.0), vectors
