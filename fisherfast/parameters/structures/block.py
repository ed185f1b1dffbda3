"""The Fisher matrix in dense blocks: one for each module, or one for the whole network."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from fisherfast._fields import AtLeast, Shape, read
from fisherfast.measurement.memory import in_words
from fisherfast.measurement.settings import bytes_of
from fisherfast.parameters.backward.columns import Sweep
from fisherfast.parameters.checks import check_damping
from fisherfast.parameters.layers.base import Rule, some_samples
from fisherfast.parameters.layout import ParameterLayout, module_of
from fisherfast.parameters.structures.base import DENSE_BYTES, ParameterFisher
from fisherfast.parameters.structures.dense import PositiveMatrix, singular

DOUBLE = 8
"""Bytes of a float64 number."""

ROWS_BYTES = 2**25
"""Per-sample gradients that are multiplied at a time, in float64: 32 MiB."""


@dataclass(eq=False, repr=False)
class BlockFisher(ParameterFisher):
    """The dense blocks of F of each module's own parameters, its weight and bias together.

    Correlations between the parameters of different modules are left out. A tied parameter belongs
    to the module that has it first.

    ``fisher(..., structure="block", memory_budget="8 GiB")``: bytes that the blocks may take, as a
    number or like "8 GiB"; None for no bound. It is checked before anything runs.

    Attributes:
        blocks: [p, p] by name of the module.
        rounding: of the gradients' dtype.

    Cost: with p parameters in a block, 8 p^2 bytes, and p^2 operations per sample and column;
    `solve` and `logdet` p^3 / 3, `eigenvalues` about 4 p^3.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(2, 1)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 1.0], [0.0, 2.0]])
        >>> F = ff.parameters.fisher(model, ff.parameters.Gaussian(), x, structure="block")
        >>> 3 * F.block("")  # the sum over samples of (x, 1) (x, 1)^T
        tensor([[10.,  3.,  4.],
                [ 3.,  5.,  3.],
                [ 4.,  3.,  3.]], dtype=torch.float64)
        >>> F.solve(torch.ones(3), damping=1e-3).shape
        torch.Size([3])
    """

    structure = "block"

    blocks: dict[str, Tensor]
    rounding: Annotated[float, AtLeast(0)]

    def check_fields(self) -> None:
        sizes = {name: where.stop - where.start for name, where in self.slices().items()}
        if list(self.blocks) != list(sizes):
            raise ValueError(f"blocks must be those of {list(sizes)}, got {list(self.blocks)}")
        for name, size in sizes.items():
            kind = Annotated[Tensor, Shape((size, size))]
            read(kind, self.blocks[name], f"blocks[{name!r}]")

    @staticmethod
    def members(layout: ParameterLayout) -> dict[str, list[str]]:
        """The parameters of each module's own: they follow each other in the layout."""
        found: dict[str, list[str]] = {}
        for name in layout.names:
            found.setdefault(module_of(name), []).append(name)
        return found

    @cached_property
    def _matrices(self) -> dict[str, PositiveMatrix]:
        return {name: PositiveMatrix(block, self.rounding) for name, block in self.blocks.items()}

    def slices(self) -> dict[str, slice]:
        """Where each module's parameters lie in a vector of P numbers."""
        where = self.layout.slices()
        return {
            block: slice(where[names[0]].start, where[names[-1]].stop)
            for block, names in self.members(self.layout).items()
        }

    def block(self, name: str) -> Tensor:
        """The block [p, p] of a module's own parameters; "" is the whole model's own.

        Raises:
            ValueError: no such block.
        """
        if name not in self.blocks:
            raise ValueError(f"name must be one of {', '.join(self.blocks)}, got {name!r}")
        return self.blocks[name].clone()

    def diag(self) -> Tensor:
        return torch.cat([block.diagonal() for block in self.blocks.values()])

    def _matmul(self, columns: Tensor) -> Tensor:
        slices = self.slices()
        return torch.cat([block @ columns[slices[name]] for name, block in self.blocks.items()])

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        parts, slices = [], self.slices()
        for name, matrix in self._matrices.items():
            solved = matrix.solve(columns[slices[name]], damping)
            if solved is None:
                raise singular(f"the block of {name!r} is singular to rounding", damping)
            parts.append(solved)
        return torch.cat(parts)

    def eigenvalues(self) -> Tensor:
        """All P, ascending; what rounding made negative is 0."""
        return torch.cat([each.eigenvalues() for each in self._matrices.values()]).sort().values

    def logdet(self, *, damping: float = 0.0) -> float:
        check_damping(damping)
        return sum(matrix.logdet(damping) for matrix in self._matrices.values())


WHOLE = "model"
"""Name of the only block of `FullFisher`."""


@dataclass(eq=False, repr=False)
class FullFisher(BlockFisher):
    """F [P, P] as it is, for a few thousand parameters.

    ``fisher(..., structure="full", memory_budget="8 GiB")``: bytes that the matrix may take, as a
    number or like "8 GiB"; None for no bound. It is checked before anything runs.

    Cost: 8 P^2 bytes, the per-sample gradients of one batch and column [n, P], and P^2 operations
    per sample and column; `solve` and `logdet` P^3 / 3, `eigenvalues` about 4 P^3.

    Example:
        >>> import torch, fisherfast as ff
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [3.0, 1.0]])
        >>> F = ff.parameters.fisher(model, ff.parameters.Gaussian(), x, structure="full")
        >>> F.to_dense()
        tensor([[5.0000, 1.5000],
                [1.5000, 0.5000]], dtype=torch.float64)
        >>> round(F.logdet(), 4) == round(torch.logdet(F.to_dense()).item(), 4)
        True
    """

    structure = "full"

    @staticmethod
    def members(layout: ParameterLayout) -> dict[str, list[str]]:
        """All parameters, in one block."""
        return {WHOLE: list(layout.names)}

    def to_dense(self) -> Tensor:
        return self.block(WHOLE)


class BlockAccumulator:
    """Sums sum_i G_i G_i^T of each block over batches. The per-sample gradients of one batch and
    column that belong to a block are kept until it is complete."""

    kind: ClassVar[type[BlockFisher]] = BlockFisher
    smaller: ClassVar[str] = 'structure="kfac" or "diag" takes less'

    def __init__(
        self, layout: ParameterLayout, *, memory_budget: int | str | None = DENSE_BYTES
    ) -> None:
        """memory_budget: bytes that the blocks may take, or like "8 GiB"; None for no bound.

        Raises:
            MemoryError: they take more.
        """
        self._members = self.kind.members(layout)
        self._block_of = {name: block for block, names in self._members.items() for name in names}
        numbers = {n: shape.numel() for n, shape in zip(layout.names, layout.shapes, strict=True)}
        self._size = {b: sum(numbers[n] for n in names) for b, names in self._members.items()}
        self._check_memory(memory_budget)
        self._pieces: dict[str, dict[str, Tensor]] = {block: {} for block in self._members}
        self._sums: dict[str, Tensor] = {}
        self._rounding = 0.0

    def _check_memory(self, memory_budget: int | str | None) -> None:
        budget = bytes_of(memory_budget)
        needed = DOUBLE * sum(size**2 for size in self._size.values())
        if budget is None or needed <= budget:
            return
        name, size = max(self._size.items(), key=lambda block: block[1])
        raise MemoryError(
            f"memory_budget must be at least {in_words(needed)} for these"
            f" {sum(self._size.values())} parameters, got {in_words(budget)}:"
            f" {name or 'the model'!r} takes {in_words(DOUBLE * size**2)} for its {size};"
            f" {self.smaller}, or leave parameters out by parameters="
        )

    def add(self, sweep: Sweep) -> None:
        sweep.visit(self._take)

    def _take(self, column: int, rule: Rule, x: Tensor, g: Tensor) -> None:
        """Add the gradients of one layer; all of a column arrive before those of the next."""
        self._rounding = max(self._rounding, torch.finfo(g.dtype).eps)
        for name, rows in zip(rule.names, rule.gradients(x, g), strict=True):
            block = self._block_of[name]
            pieces = self._pieces[block]
            pieces[name] = rows.reshape(len(rows), -1)
            if len(pieces) == len(self._members[block]):
                self._multiply(block, [pieces[name] for name in self._members[block]])
                pieces.clear()

    def _multiply(self, block: str, pieces: list[Tensor]) -> None:
        size = self._size[block]
        if block not in self._sums:
            self._sums[block] = pieces[0].new_zeros(size, size, dtype=torch.float64)
        for part in some_samples(len(pieces[0]), size, ROWS_BYTES // DOUBLE):
            rows = torch.cat([piece[part].double() for piece in pieces], dim=1)
            self._sums[block].addmm_(rows.T, rows)

    def means(self, samples: int) -> tuple[dict[str, Tensor], float]:
        return {block: self._sums[block].div_(samples) for block in self._members}, self._rounding


class FullAccumulator(BlockAccumulator):
    """Sums the whole matrix; keeps the per-sample gradients of one column for one batch, [n, P]."""

    kind = FullFisher
    smaller = 'structure="gram", "block", "kfac" or "diag" takes less'
