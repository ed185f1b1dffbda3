"""The Fisher matrix in dense blocks: one for each module, or one for the whole network."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from fisherfast.measurement.memory import in_words
from fisherfast.measurement.settings import bytes_of
from fisherfast.parameters.backward.columns import FisherType, Sweep
from fisherfast.parameters.checks import check_damping
from fisherfast.parameters.layers.base import Rule
from fisherfast.parameters.layout import ParameterLayout
from fisherfast.parameters.structures.base import DENSE_BYTES, ParameterFisher
from fisherfast.parameters.structures.dense import PositiveMatrix, singular

__all__ = ["BlockAccumulator", "BlockFisher", "FullAccumulator", "FullFisher"]

DOUBLE = 8
"""Bytes of a float64 number."""

ROWS_BYTES = 2**25
"""Per-sample gradients that are multiplied at a time, in float64: 32 MiB."""


class BlockFisher(ParameterFisher):
    """The dense blocks of F of each module's own parameters, its weight and bias together.

    Correlations between the parameters of different modules are left out. A tied parameter belongs
    to the module that has it first.

    ``fisher(..., structure="block", memory_budget="8 GiB")``: bytes that the blocks may take, as a
    number or like "8 GiB"; None for no bound. It is checked before anything runs.

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

    def __init__(
        self,
        layout: ParameterLayout,
        samples: int,
        fisher_type: FisherType,
        blocks: Mapping[str, Tensor],
        rounding: float,
    ) -> None:
        """blocks: [p, p] float64 by name of the module; rounding: of the gradients' dtype."""
        super().__init__(layout, samples, fisher_type)
        self._where = _block_slices(layout, self.members(layout))
        self._rounding = rounding
        self._blocks = {name: PositiveMatrix(blocks[name], rounding) for name in self._where}

    @staticmethod
    def members(layout: ParameterLayout) -> Mapping[str, Sequence[str]]:
        """The parameters of each module's own: they follow each other in the layout."""
        found: dict[str, list[str]] = {}
        for name in layout.names:
            found.setdefault(name.rpartition(".")[0], []).append(name)
        return found

    def slices(self) -> dict[str, slice]:
        """Where each module's parameters lie in a vector of P numbers."""
        return dict(self._where)

    def block(self, name: str) -> Tensor:
        """The block [p, p] of a module's own parameters; "" is the whole model's own.

        Raises:
            ValueError: no such block.
        """
        if name not in self._blocks:
            raise ValueError(f"name must be one of {', '.join(self._blocks)}, got {name!r}")
        return self._blocks[name].matrix.clone()

    def diag(self) -> Tensor:
        return torch.cat([block.matrix.diagonal() for block in self._blocks.values()])

    def _matmul(self, columns: Tensor) -> Tensor:
        parts = [block.matrix @ columns[self._where[name]] for name, block in self._blocks.items()]
        return torch.cat(parts)

    def _solve(self, columns: Tensor, damping: float) -> Tensor:
        parts = []
        for name, block in self._blocks.items():
            solved = block.solve(columns[self._where[name]], damping)
            if solved is None:
                raise singular(f"the block of {name!r} is singular to rounding", damping)
            parts.append(solved)
        return torch.cat(parts)

    def eigenvalues(self) -> Tensor:
        """All P, ascending; what rounding made negative is 0."""
        return torch.cat([block.eigenvalues() for block in self._blocks.values()]).sort().values

    def logdet(self, *, damping: float = 0.0) -> float:
        check_damping(damping)
        return sum(block.logdet(damping) for block in self._blocks.values())

    def _device(self) -> torch.device:
        return next(iter(self._blocks.values())).matrix.device

    def _state(self) -> dict[str, Any]:
        blocks = {name: block.matrix for name, block in self._blocks.items()}
        return {"blocks": blocks, "rounding": self._rounding}

    @classmethod
    def _from_state(
        cls,
        layout: ParameterLayout,
        samples: int,
        fisher_type: FisherType,
        state: Mapping[str, Any],
    ) -> BlockFisher:
        return cls(layout, samples, fisher_type, state["blocks"], state["rounding"])


def _block_slices(
    layout: ParameterLayout, members: Mapping[str, Sequence[str]]
) -> dict[str, slice]:
    where = layout.slices()
    return {
        block: slice(where[names[0]].start, where[names[-1]].stop)
        for block, names in members.items()
    }


def _check_memory(
    layout: ParameterLayout,
    blocks: Mapping[str, Sequence[str]],
    memory_budget: int | str | None,
    way: str,
) -> None:
    """Raise MemoryError, naming the largest block, unless all of them fit.

    Args:
        layout: the parameters.
        blocks: names of the parameters of each block.
        memory_budget: bytes, or like "8 GiB"; None for no bound.
        way: the advice in the message.
    """
    budget = bytes_of(memory_budget)
    sizes = _block_sizes(layout, blocks)
    needed = DOUBLE * sum(size * size for size in sizes.values())
    if budget is None or needed <= budget:
        return
    name = max(sizes, key=lambda name: sizes[name])
    raise MemoryError(
        f"memory_budget must be at least {in_words(needed)} for these {layout.size} parameters, got"
        f" {in_words(budget)}: {name or 'the model'!r} takes {in_words(DOUBLE * sizes[name] ** 2)}"
        f" for its {sizes[name]}; {way}, or leave parameters out by parameters="
    )


def _block_sizes(layout: ParameterLayout, blocks: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Numbers in the parameters of each block."""
    shapes = dict(zip(layout.names, layout.shapes, strict=True))
    return {block: sum(shapes[name].numel() for name in names) for block, names in blocks.items()}


class _BlockSums:
    """sum_i G_i G_i^T of blocks of parameters, added up as the gradients arrive.

    A block that arrives in one piece is multiplied at once, `ROWS_BYTES` of per-sample
    gradients at a time; the pieces of one that arrives in several are kept until it is complete.

    Attributes:
        rounding: of the gradients' dtype.
    """

    def __init__(self, layout: ParameterLayout, blocks: Mapping[str, Sequence[str]]) -> None:
        """blocks: names of the parameters of each, in the order of its rows."""
        self._blocks = blocks
        self._block_of = {name: block for block, names in blocks.items() for name in names}
        self._size = _block_sizes(layout, blocks)
        self._pieces: dict[str, dict[str, Tensor]] = {block: {} for block in blocks}
        self._sums: dict[str, Tensor] = {}
        self.rounding = 0.0

    def take(self, column: int, rule: Rule, x: Tensor, g: Tensor) -> None:
        """Add the gradients of one layer; all of a column arrive before those of the next."""
        self.rounding = max(self.rounding, torch.finfo(g.dtype).eps)
        block = self._block_of[rule.names[0]]
        if set(self._blocks[block]) == set(rule.names):
            for part in _parts(len(g), self._size[block]):
                rows = rule.gradients(x[part], g[part])
                self._add(block, dict(zip(rule.names, rows, strict=True)))
            return
        for name, row in zip(rule.names, rule.gradients(x, g), strict=True):
            block = self._block_of[name]
            pieces = self._pieces[block]
            pieces[name] = row
            if len(pieces) == len(self._blocks[block]):
                for part in _parts(len(g), self._size[block]):
                    self._add(block, {name: rows[part] for name, rows in pieces.items()})
                pieces.clear()

    def _add(self, block: str, rows: Mapping[str, Tensor]) -> None:
        ordered = [rows[name].reshape(len(rows[name]), -1).double() for name in self._blocks[block]]
        side_by_side = torch.cat(ordered, dim=1) if len(ordered) > 1 else ordered[0]
        if block not in self._sums:
            size = self._size[block]
            self._sums[block] = side_by_side.new_zeros(size, size)
        self._sums[block].addmm_(side_by_side.T, side_by_side)

    def means(self, samples: int) -> dict[str, Tensor]:
        """The blocks, averaged over the samples seen: [p, p] float64 by name."""
        return {block: self._sums[block].div_(samples) for block in self._blocks}


def _parts(samples: int, numbers: int) -> list[slice]:
    """Slices of the samples, so that so many numbers for each stay within `ROWS_BYTES`."""
    step = max(1, ROWS_BYTES // max(DOUBLE * numbers, 1))
    return [slice(start, start + step) for start in range(0, samples, step)]


class BlockAccumulator:
    """Sums the blocks over batches."""

    kind: ClassVar[type[BlockFisher]] = BlockFisher
    smaller: ClassVar[str] = 'structure="kfac" or "diag" takes less'

    def __init__(
        self,
        layout: ParameterLayout,
        fisher_type: FisherType,
        *,
        memory_budget: int | str | None = DENSE_BYTES,
    ) -> None:
        """memory_budget: bytes that the blocks may take, or like "8 GiB"; None for no bound."""
        blocks = self.kind.members(layout)
        _check_memory(layout, blocks, memory_budget, self.smaller)
        self._layout, self._fisher_type = layout, fisher_type
        self._sums = _BlockSums(layout, blocks)

    def add(self, sweep: Sweep) -> None:
        sweep.visit(self._sums.take)

    def result(self, samples: int) -> BlockFisher:
        blocks = self._sums.means(samples)
        return self.kind(self._layout, samples, self._fisher_type, blocks, self._sums.rounding)


WHOLE = "model"
"""Name of the only block."""


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
    def members(layout: ParameterLayout) -> Mapping[str, Sequence[str]]:
        """All parameters, in one block."""
        return {WHOLE: layout.names}

    def to_dense(self) -> Tensor:
        return self.block(WHOLE)


class FullAccumulator(BlockAccumulator):
    """Sums the whole matrix over batches; keeps the per-sample gradients of one vector at a time
    for one batch, [n, P]."""

    kind = FullFisher
    smaller = 'structure="gram", "block", "kfac" or "diag" takes less'
