"""Matrices and stacks in few bits per number, many stacks decoded in the operations of one.

See `shampoo_core.storage.quantization` for the codes.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from shampoo_core.grams import add_gram, strip_bounds
from shampoo_core.refresh import FactorSlice, FactorStackSize
from shampoo_core.stacks import StackSet
from shampoo_core.storage.base import batches
from shampoo_core.storage.joined import Joined, Run, copy_to, spread, taken
from shampoo_core.storage.quantization import GROUP, CodedGroups, Format
from shampoo_core.storage.triangles import Triangle, triangle_indices


class CodedBlocks:
    """Blocks of numbers of several stacks, each block as many groups of codes as it needs."""

    def __init__(
        self,
        counts: Sequence[int],
        lengths: Sequence[int],
        form: Format,
        dtype: torch.dtype,
        device: torch.device,
        order: Sequence[int] | None = None,
    ) -> None:
        """Start from zeros.

        Args:
            counts: Blocks per stack.
            lengths: Numbers of a block, per stack; the last group of a block is filled up.
            form: Of the codes.
            dtype: Of the numbers that are read.
            device: Of all tensors.
            order: In which stacks stand behind each other, see `Joined`.
        """
        self._lengths = list(lengths)
        self._places = Joined(counts, [max(1, -(-length // GROUP)) for length in lengths], order)
        self._groups = CodedGroups(self._places.total, form, dtype, device)

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """Per stack by name, (N, any number)."""
        per_stack: list[dict[str, Tensor]] = [{} for _ in self._lengths]
        for name, tensor in self._groups.tensors.items():
            for entries, part in zip(per_stack, self._places.by_stack(tensor), strict=True):
                entries[name] = part
        return per_stack

    def read(self, runs: Sequence[Run]) -> list[Tensor]:
        """Blocks of every run, (K, length rounded up to whole groups); parts of one copy."""
        groups = self._groups.read(self._places.spans(runs))
        parts = groups.split(self._places.rows_of(runs))
        return [
            part.view(-1, self._places.width(run) * GROUP)
            for run, part in zip(runs, parts, strict=True)
        ]

    def write(
        self, runs: Sequence[Run], blocks: Sequence[Tensor], where: Sequence[Tensor] | None = None
    ) -> None:
        """Round blocks into the place of old ones.

        Args:
            runs: Which.
            blocks: (K, ...) per run, with the numbers of K blocks; finite.
            where: (K,) bool per run; where it is false blocks stay exactly as they are.
        """
        rows = self._places.rows_of(runs)
        groups = torch.zeros(sum(rows), GROUP, dtype=blocks[0].dtype, device=blocks[0].device)
        slots = [
            part.view(len(own), -1)[:, : self._lengths[run[0].stack]]
            for run, own, part in zip(runs, blocks, groups.split(rows), strict=True)
        ]
        torch._foreach_copy_(slots, [own.flatten(1) for own in blocks])
        wanted = None
        if where is not None:
            wanted = spread(where, [self._places.width(run) for run in runs])
        self._groups.write(self._places.spans(runs), groups, wanted)


class CodedBases:
    """Matrices without structure."""

    def __init__(self, stack_set: StackSet, sizes: Sequence[FactorStackSize], form: Format) -> None:
        """Start from zeros; arguments as of `CodedSymmetric`."""
        self._sides = [size.dimension for size in sizes]
        counts = [size.num_factors for size in sizes]
        lengths = [side**2 for side in self._sides]
        self._blocks = CodedBlocks(counts, lengths, form, stack_set.dtype, stack_set.device)
        self._batches = _batches(sizes, stack_set.numel)

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """See `MatrixStore`."""
        return self._blocks.tensors

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """See `MatrixStore`; copies."""
        sides = [self._sides[item.stack] for item in where]
        return [
            rows[:, : side**2].unflatten(1, (side, side))
            for rows, side in zip(self._blocks.read([[i] for i in where]), sides, strict=True)
        ]

    def read_all(self) -> Iterator[Tensor]:
        """See `MatrixStore`; copies, a batch at a time."""
        return itertools.chain.from_iterable(map(self.read, self._batches))

    def blend(
        self, where: Sequence[FactorSlice], new: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> None:
        """See `MatrixStore`; weights are 0 or 1."""
        self._blocks.write([[item] for item in where], new, [weight > 0 for weight in weights])


class CodedSymmetric:
    """Symmetric positive semi-definite matrices: diagonals as they are, triangles coded.

    All matrices of one side are decoded together.
    """

    def __init__(self, stack_set: StackSet, sizes: Sequence[FactorStackSize], form: Format) -> None:
        """Start from zeros.

        Args:
            stack_set: Geometry of the stacks that they belong to.
            sizes: Of every stack of matrices.
            form: Of the codes.
        """
        self._sides = sides = [size.dimension for size in sizes]
        self._batches = _batches(sizes, stack_set.numel)
        # Of one side next to each other, so that a batch is one piece.
        order = [
            item.stack
            for batch in self._batches
            for item in sorted(batch, key=lambda item: sides[item.stack])
        ]
        counts = [size.num_factors for size in sizes]
        dtype, device = stack_set.dtype, stack_set.device
        lengths = [side * (side - 1) // 2 for side in sides]
        self._triangles = CodedBlocks(counts, lengths, form, dtype, device, order)
        self._places = Joined(counts, sides, order)
        self._diagonals = torch.zeros(self._places.total, dtype=dtype, device=device)

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """See `MatrixStore`."""
        diagonals = self._places.by_stack(self._diagonals)
        return [
            {"diagonal": diagonal, **codes}
            for diagonal, codes in zip(diagonals, self._triangles.tensors, strict=True)
        ]

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """See `MatrixStore`; copies."""
        runs, order = self._by_side(where)
        return _apart(self._decode(runs), where, order)

    def read_all(self) -> Iterator[Tensor]:
        """See `MatrixStore`; copies, a batch at a time."""
        return itertools.chain.from_iterable(map(self.read, self._batches))

    def blend(
        self, where: Sequence[FactorSlice], new: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> None:
        """See `MatrixStore`; weights are 0 or 1."""
        runs, order = self._by_side(where)
        lengths = list(map(len, runs))
        ranked = _cut([new[index] for index in order], lengths)
        accepted = _cut([weights[index] > 0 for index in order], lengths)
        self._encode(runs, list(map(torch.cat, ranked)), list(map(torch.cat, accepted)))

    def scale(self, factors: Sequence[Tensor]) -> None:
        """See `FactorStore`: only diagonals change, nothing is rounded."""
        diagonals = self._places.by_stack(self._diagonals)
        torch._foreach_mul_(diagonals, [factor.view(-1, 1) for factor in factors])

    def complete(self) -> None:
        """See `FactorStore`; nothing is kept twice."""

    def add_grams(self, rows: Iterable[Tensor], *, decay: float, gain: float) -> None:
        """See `FactorStore`; a batch at a time."""
        remaining = iter(rows)
        for batch in self._batches:
            runs, order = self._by_side(batch)
            together = self._decode(runs)
            _add_grams(_apart(together, batch, order), remaining, decay, gain)
            self._encode(runs, together)

    def _by_side(self, where: Sequence[FactorSlice]) -> tuple[list[Run], list[int]]:
        """Slices in runs of one side, and which slice of ``where`` each of them is."""

        def key(index: int) -> tuple[int, int]:
            item = where[index]
            return self._sides[item.stack], self._places.start(item)

        order = sorted(range(len(where)), key=key)
        runs = itertools.groupby(order, key=lambda index: self._sides[where[index].stack])
        return [[where[index] for index in run] for _, run in runs], order

    def _decode(self, runs: Sequence[Run]) -> list[Tensor]:
        """(K, d, d) per run."""
        sides = [self._sides[run[0].stack] for run in runs]
        numbers = taken(self._diagonals, self._places.spans(runs))
        matrices = [
            rows.index_select(1, self._indices(side).unfold).view(-1, side, side)
            for rows, side in zip(self._triangles.read(runs), sides, strict=True)
        ]
        roots = self._per_run(numbers.sqrt(), runs)
        # Multiplied with each other first, which leaves the result exactly symmetric.
        scales = torch._foreach_mul([r[:, :, None] for r in roots], [r[:, None, :] for r in roots])
        torch._foreach_mul_(matrices, scales)
        diagonals = [m.diagonal(dim1=-2, dim2=-1) for m in matrices]
        torch._foreach_copy_(diagonals, self._per_run(numbers, runs))
        return matrices

    def _encode(
        self,
        runs: Sequence[Run],
        matrices: list[Tensor],
        where: Sequence[Tensor] | None = None,
    ) -> None:
        """Round (K, d, d) matrices, one tensor per run, into the place of old ones; uses them up."""
        sides = [matrix.shape[-1] for matrix in matrices]
        spans = self._places.spans(runs)
        # Rounding can leave a matrix that is not quite semi-definite.
        diagonals = torch._foreach_clamp_min([m.diagonal(dim1=-2, dim2=-1) for m in matrices], 0.0)
        numbers = torch.cat([diagonal.flatten() for diagonal in diagonals])
        copy_to(self._diagonals, spans, numbers, None if where is None else spread(where, sides))
        # Directions that nothing was seen in have rows of rounding alone.
        roots = numbers.rsqrt().masked_fill_(numbers == 0, 0.0)
        scales = self._per_run(roots, runs)
        torch._foreach_mul_(matrices, [scale[:, :, None] for scale in scales])
        torch._foreach_mul_(matrices, [scale[:, None, :] for scale in scales])
        triangles = [
            m.flatten(1).index_select(1, self._indices(side).fold)
            for m, side in zip(matrices, sides, strict=True)
        ]
        # Correlations, but for rounding where little was seen, which is not to set the scale.
        torch._foreach_clamp_min_(triangles, -1.0)
        torch._foreach_clamp_max_(triangles, 1.0)
        matrices.clear()
        self._triangles.write(runs, triangles, where)

    def _per_run(self, numbers: Tensor, runs: Sequence[Run]) -> list[Tensor]:
        """Numbers of diagonals as (K, d) per run."""
        parts = numbers.split(self._places.rows_of(runs))
        return [
            part.view(-1, self._places.width(run)) for part, run in zip(parts, runs, strict=True)
        ]

    def _indices(self, side: int) -> Triangle:
        return triangle_indices(side, self._diagonals.device, with_diagonal=False)


class CodedStacks:
    """Stacks of blocks, such as moments; all are read and written together."""

    def __init__(self, initial: Sequence[Tensor], form: Format) -> None:
        """Code (N, *block shape) tensors."""
        self._shapes = [stack.shape for stack in initial]
        self._lengths = [math.prod(shape[1:]) for shape in self._shapes]
        self._runs: list[Run] = [
            [FactorSlice(index, 0, shape[0])] for index, shape in enumerate(self._shapes)
        ]
        counts = [shape[0] for shape in self._shapes]
        like = initial[0] if initial else torch.empty(0, device="cpu")
        self._blocks = CodedBlocks(counts, self._lengths, form, like.dtype, like.device)
        self.save(initial)

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """See `StackStore`."""
        per_stack = self._blocks.tensors
        names = per_stack[0] if per_stack else {}
        return {f".{name}": [entries[name] for entries in per_stack] for name in names}

    def load(self) -> list[Tensor]:
        """See `StackStore`; copies."""
        if not self._runs:
            return []
        return [self._as_blocks(i, rows) for i, rows in enumerate(self._blocks.read(self._runs))]

    def save(self, stacks: Sequence[Tensor]) -> None:
        """See `StackStore`."""
        if stacks:
            self._blocks.write(self._runs, stacks)

    def load_blocks(self, stack: int, start: int, stop: int) -> Tensor:
        """See `StackStore`; a copy."""
        (rows,) = self._blocks.read([[FactorSlice(stack, start, stop)]])
        return self._as_blocks(stack, rows)

    def save_blocks(self, stack: int, start: int, stop: int, blocks: Tensor) -> None:
        """See `StackStore`."""
        self._blocks.write([[FactorSlice(stack, start, stop)]], [blocks])

    def _as_blocks(self, stack: int, rows: Tensor) -> Tensor:
        """(K, length rounded up) as (K, *block shape)."""
        return rows[:, : self._lengths[stack]].unflatten(1, self._shapes[stack][1:])


def _batches(sizes: Sequence[FactorStackSize], limit: int) -> list[list[FactorSlice]]:
    """Whole stacks of matrices, as many at a time as may be dense together."""
    numels = [size.num_factors * size.dimension**2 for size in sizes]
    return [
        [FactorSlice(stack, 0, sizes[stack].num_factors) for stack in batch]
        for batch in batches(numels, limit)
    ]


def _add_grams(stacks: Iterable[Tensor], rows: Iterator[Tensor], decay: float, gain: float) -> None:
    """A function of its own, which lets go of the stacks when it is done."""
    for matrices, own in zip(stacks, rows, strict=False):
        add_gram(matrices, own, strip_bounds(own), decay=decay, gain=gain)


def _apart(
    together: Sequence[Tensor], where: Sequence[FactorSlice], order: Sequence[int]
) -> list[Tensor]:
    """Views of the matrices of every slice of ``where``, of which ``together`` has those of ``order``."""
    result: list[Tensor] = [together[0]] * len(where)
    remaining = iter(order)
    for matrices in together:
        start = 0
        while start < len(matrices):
            index = next(remaining)
            length = where[index].stop - where[index].start
            result[index] = matrices[start : start + length]
            start += length
    return result


def _cut(items: list[Tensor], lengths: Sequence[int]) -> list[list[Tensor]]:
    """Cut a list into pieces of the given lengths."""
    remaining = iter(items)
    return [list(itertools.islice(remaining, length)) for length in lengths]
