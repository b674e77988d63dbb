"""How the matrices that belong to factors, and moments, are kept between steps.

"dense" keeps all numbers. "packed" keeps the upper triangle of a symmetric matrix, d (d + 1) / 2 of d^2
numbers, without loss. "8bit" and "4bit" round, see `shampoo_core.quantization`; in bits per number, the
error of rounding included:

    ==========================  ========  ========
    what is kept                 "8bit"    "4bit"
    ==========================  ========  ========
    factors, half of them        8 + 8     4 + 8
    inverse roots, half of them  8         4
    eigenbases                   8         8
    first moments                8 + 8     4 + 8
    second moments               8 + 8     8 + 8
    ==========================  ========  ========

All but "dense" cost passes over memory: a Gram matrix is formed densely before it is added, and a matrix
is unfolded whenever it is read.

One object keeps one (N, d, d) stack per preconditioned axis, so that what touches many stacks is one
operation.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol

import torch
from torch import Tensor

from shampoo_core.config import Storage
from shampoo_core.quantization import (
    GROUP,
    CodedRows,
    CodedSymmetric,
    CodedTensors,
    Curve,
    Format,
)
from shampoo_core.refresh import FactorSlice

CODE_BITS = {"8bit": 8, "4bit": 4}
BASIS_BITS = 8
"""Of eigenbases in either: what four bits leave would have to be made orthogonal again at every use."""
SECOND_MOMENT_BITS = 8
"""Of second moments in either: with four, one with beta2 = 0.999 would stand still."""

MatrixKind = Literal["factors", "roots", "bases"]
"""Symmetric and accumulated; symmetric and replaced; replaced."""


class MatrixStore(Protocol):
    """One stack of (d, d) matrices per preconditioned axis, d differing between stacks."""

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """What is kept, per stack by name, one entry of the first dimension per matrix."""

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """Dense (K, d, d) matrices of some slices; maybe views, so not to be written to."""

    def blend(
        self, where: Sequence[FactorSlice], new: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> None:
        """``old + weight (new - old)`` in place: exactly new at weight 1, exactly old at 0.

        Args:
            where: Slices.
            new: (K, d, d) per slice, finite.
            weights: (K,) per slice, of the same dtype.
        """

    def scale(self, stack: int, factors: Tensor) -> None:
        """Multiply matrix n of a stack by ``factors[n]``, in place."""

    def add_gram(self, stack: int, rows: Tensor, *, decay: float, gain: float) -> None:
        """``A <- decay A + gain rows rows^T`` for a whole stack, in place; rows are (N, d, any)."""


class DenseMatrices:
    """All d^2 numbers of every matrix."""

    def __init__(self, initial: Iterable[Tensor]) -> None:
        """Keep (N, d, d) tensors as they are."""
        self._matrices = list(initial)

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """See `MatrixStore`."""
        return [{"": matrices} for matrices in self._matrices]

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """See `MatrixStore`; views."""
        return [self._matrices[item.stack][item.start : item.stop] for item in where]

    def blend(
        self, where: Sequence[FactorSlice], new: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> None:
        """See `MatrixStore`."""
        torch._foreach_lerp_(self.read(where), list(new), [w.view(-1, 1, 1) for w in weights])

    def scale(self, stack: int, factors: Tensor) -> None:
        """See `MatrixStore`."""
        self._matrices[stack].mul_(factors.view(-1, 1, 1))

    def add_gram(self, stack: int, rows: Tensor, *, decay: float, gain: float) -> None:
        """See `MatrixStore`."""
        self._matrices[stack].baddbmm_(rows, rows.mT, beta=decay, alpha=gain)


class PackedMatrices:
    """The upper triangle of every matrix, row by row; for symmetric matrices only."""

    def __init__(self, initial: Iterable[Tensor]) -> None:
        """Keep the upper triangles of symmetric (N, d, d) tensors."""
        self._dimensions: list[int] = []
        self._triangles: list[Tensor] = []
        for matrices in initial:  # one dense stack at a time
            self._dimensions.append(matrices.shape[-1])
            self._triangles.append(_pack(matrices))

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """See `MatrixStore`; (N, d (d + 1) / 2) each."""
        return [{"": triangles} for triangles in self._triangles]

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """See `MatrixStore`; copies."""
        return [
            _unpack(
                self._triangles[item.stack][item.start : item.stop], self._dimensions[item.stack]
            )
            for item in where
        ]

    def blend(
        self, where: Sequence[FactorSlice], new: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> None:
        """See `MatrixStore`."""
        old = [self._triangles[item.stack][item.start : item.stop] for item in where]
        torch._foreach_lerp_(old, [_pack(m) for m in new], [w.view(-1, 1) for w in weights])

    def scale(self, stack: int, factors: Tensor) -> None:
        """See `MatrixStore`."""
        self._triangles[stack].mul_(factors.view(-1, 1))

    def add_gram(self, stack: int, rows: Tensor, *, decay: float, gain: float) -> None:
        """See `MatrixStore`."""
        gram = _pack(torch.bmm(rows, rows.mT))
        self._triangles[stack].mul_(decay).add_(gram, alpha=gain)


class CodedMatrices:
    """Few bits per number; see `shampoo_core.quantization`."""

    def __init__(self, initial: Iterable[Tensor], form: Format, *, symmetric: bool) -> None:
        """Code (N, d, d) tensors, one dense stack at a time."""
        kind = CodedSymmetric if symmetric else CodedTensors
        self._stacks: list[CodedSymmetric | CodedTensors] = []
        self._counts: list[int] = []
        for matrices in initial:
            self._stacks.append(kind(matrices, form))
            self._counts.append(len(matrices))

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """See `MatrixStore`."""
        return [stack.tensors for stack in self._stacks]

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """See `MatrixStore`; copies."""
        return [self._stacks[item.stack].read(item.start, item.stop) for item in where]

    def blend(
        self, where: Sequence[FactorSlice], new: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> None:
        """See `MatrixStore`; weights are 0 or 1."""
        for item, matrices, weight in zip(where, new, weights, strict=True):
            self._stacks[item.stack].write(item.start, item.stop, matrices, weight > 0)

    def scale(self, stack: int, factors: Tensor) -> None:
        """See `MatrixStore`; for symmetric matrices."""
        matrices = self._stacks[stack]
        assert isinstance(matrices, CodedSymmetric)
        matrices.scale(factors)

    def add_gram(self, stack: int, rows: Tensor, *, decay: float, gain: float) -> None:
        """See `MatrixStore`."""
        count = self._counts[stack]
        matrices = self._stacks[stack].read(0, count)
        matrices.baddbmm_(rows, rows.mT, beta=decay, alpha=gain)
        self._stacks[stack].write(0, count, matrices)


class StackStore(Protocol):
    """One (N, *block shape) tensor per stack, such as a moment."""

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """What is kept, by name one tensor per stack."""

    def load(self) -> list[Tensor]:
        """The stacks: what is kept itself, or copies; changes to them count once saved."""

    def save(self, stacks: Sequence[Tensor]) -> None:
        """Keep what `load` gave, changed."""

    def load_blocks(self, stack: int, start: int, stop: int) -> Tensor:
        """Blocks ``start`` to ``stop`` (exclusive) of one stack, as of `load`."""

    def save_blocks(self, stack: int, start: int, stop: int, blocks: Tensor) -> None:
        """Put blocks into the place of old ones."""


class DenseStacks:
    """All numbers."""

    def __init__(self, initial: Sequence[Tensor]) -> None:
        """Keep the tensors as they are."""
        self._stacks = list(initial)

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """See `StackStore`."""
        return {"": self._stacks}

    def load(self) -> list[Tensor]:
        """See `StackStore`; the tensors themselves."""
        return self._stacks

    def save(self, stacks: Sequence[Tensor]) -> None:
        """See `StackStore`; they are here already."""

    def load_blocks(self, stack: int, start: int, stop: int) -> Tensor:
        """See `StackStore`; a view."""
        return self._stacks[stack][start:stop]

    def save_blocks(self, stack: int, start: int, stop: int, blocks: Tensor) -> None:
        """See `StackStore`."""
        self._stacks[stack][start:stop].copy_(blocks)


class CodedStacks:
    """Few bits per number; see `shampoo_core.quantization`.

    The groups of all stacks stand in one tensor, so that reading or writing all of them takes as many
    operations as one of them would.
    """

    def __init__(self, initial: Sequence[Tensor], form: Format) -> None:
        """Code (N, *block shape) tensors."""
        self._shapes = [stack.shape for stack in initial]
        self._lengths = [math.prod(shape[1:]) for shape in self._shapes]
        self._groups = [-(-length // GROUP) for length in self._lengths]
        """Per stack: groups of a block, the last one filled up."""
        counts = [s[0] * groups for s, groups in zip(self._shapes, self._groups, strict=True)]
        self._counts = counts
        like = initial[0] if initial else torch.empty(0)
        self._rows = CodedRows(sum(counts), GROUP, form, like.dtype, like.device)
        self.save(initial)

    @property
    def tensors(self) -> dict[str, list[Tensor]]:
        """See `StackStore`."""
        return {
            f".{name}": [
                part.view(shape[0], -1)
                for part, shape in zip(tensor.split(self._counts), self._shapes, strict=True)
            ]
            for name, tensor in self._rows.tensors.items()
        }

    def load(self) -> list[Tensor]:
        """See `StackStore`; copies."""
        parts = self._rows.read(0, sum(self._counts)).split(self._counts)
        return [self._as_blocks(index, part) for index, part in enumerate(parts)]

    def save(self, stacks: Sequence[Tensor]) -> None:
        """See `StackStore`."""
        if stacks:
            total = sum(self._counts)
            rows = torch.zeros(total, GROUP, dtype=stacks[0].dtype, device=stacks[0].device)
            parts = rows.split(self._counts)
            slots = [self._as_blocks(index, part) for index, part in enumerate(parts)]
            torch._foreach_copy_(slots, list(stacks))
            self._rows.write(0, total, rows)

    def load_blocks(self, stack: int, start: int, stop: int) -> Tensor:
        """See `StackStore`; a copy."""
        return self._as_blocks(stack, self._rows.read(*self._place(stack, start, stop)))

    def save_blocks(self, stack: int, start: int, stop: int, blocks: Tensor) -> None:
        """See `StackStore`."""
        first, last = self._place(stack, start, stop)
        rows = torch.zeros(last - first, GROUP, dtype=blocks.dtype, device=blocks.device)
        self._as_blocks(stack, rows).copy_(blocks)
        self._rows.write(first, last, rows)

    def _place(self, stack: int, start: int, stop: int) -> tuple[int, int]:
        """First group of some blocks, and one past their last."""
        before, groups = sum(self._counts[:stack]), self._groups[stack]
        return before + start * groups, before + stop * groups

    def _as_blocks(self, stack: int, rows: Tensor) -> Tensor:
        """View (K * groups, 64) rows of a stack as (K, *block shape)."""
        padded = rows.view(-1, self._groups[stack] * GROUP)
        return padded[:, : self._lengths[stack]].unflatten(1, self._shapes[stack][1:])


def matrix_store(initial: Iterable[Tensor], storage: Storage, kind: MatrixKind) -> MatrixStore:
    """Keep (N, d, d) tensors in the given way; eigenbases are never packed."""
    if storage in CODE_BITS:
        if kind == "bases":
            return CodedMatrices(initial, Format(BASIS_BITS, keeps_error=False), symmetric=False)
        form = Format(CODE_BITS[storage], keeps_error=kind == "factors")
        return CodedMatrices(initial, form, symmetric=True)
    packs = storage == "packed" and kind != "bases"
    return PackedMatrices(initial) if packs else DenseMatrices(initial)


def stack_store(initial: Sequence[Tensor], storage: Storage, curve: Curve) -> StackStore:
    """Keep (N, *block shape) tensors in the given way; "packed" is for matrices, and dense here."""
    if storage in CODE_BITS:
        bits = SECOND_MOMENT_BITS if curve == "fourth_root" else CODE_BITS[storage]
        return CodedStacks(initial, Format(bits, keeps_error=True, curve=curve))
    return DenseStacks(initial)


def _pack(matrices: Tensor) -> Tensor:
    """(N, d, d) -> (N, d (d + 1) / 2)."""
    fold, _ = _triangle_indices(matrices.shape[-1], matrices.device)
    return matrices.flatten(1).index_select(1, fold)


def _unpack(triangles: Tensor, dimension: int) -> Tensor:
    """(N, d (d + 1) / 2) -> (N, d, d)."""
    _, unfold = _triangle_indices(dimension, triangles.device)
    return triangles.index_select(1, unfold).view(-1, dimension, dimension)


@functools.cache
def _triangle_indices(dimension: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Where the triangle's entries stand in a flat matrix, and a flat matrix's in the triangle.

    32 bits hold any position of a factor that fits in memory, at half the memory of 64.
    """
    rows, columns = torch.triu_indices(dimension, dimension, device=device)
    fold = (rows * dimension + columns).to(torch.int32)
    places = torch.arange(len(fold), dtype=torch.int32, device=device)
    unfold = torch.empty(dimension, dimension, dtype=torch.int32, device=device)
    unfold[rows, columns] = places
    unfold[columns, rows] = places
    return fold, unfold.flatten()
