"""How the matrices that belong to factors are kept between steps: dense, or packed.

Packed keeps the upper triangle of a symmetric matrix, d (d + 1) / 2 of d^2 numbers, without loss. It
costs passes over memory: a Gram matrix is formed densely before its triangle is added, and a matrix is
unfolded whenever it is read.

One object keeps one (N, d, d) stack per preconditioned axis, so that what touches many stacks is one
operation.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from shampoo_core.refresh import FactorSlice

Storage = Literal["dense", "packed"]
STORAGES: tuple[Storage, ...] = get_args(Storage)


class MatrixStore(Protocol):
    """One stack of (d, d) matrices per preconditioned axis, d differing between stacks."""

    @property
    def tensors(self) -> list[Tensor]:
        """What is kept, per stack, one entry of the first dimension per matrix."""

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """Dense (K, d, d) matrices of some slices; maybe views, so not to be written to."""

    def read_all(self) -> list[Tensor]:
        """Dense (N, d, d) matrices of every stack; maybe views, so not to be written to."""

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
    def tensors(self) -> list[Tensor]:
        """See `MatrixStore`."""
        return self._matrices

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """See `MatrixStore`; views."""
        return [self._matrices[item.stack][item.start : item.stop] for item in where]

    def read_all(self) -> list[Tensor]:
        """See `MatrixStore`; the tensors themselves."""
        return self._matrices

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
    def tensors(self) -> list[Tensor]:
        """See `MatrixStore`; (N, d (d + 1) / 2) each."""
        return self._triangles

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """See `MatrixStore`; copies."""
        return [
            _unpack(
                self._triangles[item.stack][item.start : item.stop], self._dimensions[item.stack]
            )
            for item in where
        ]

    def read_all(self) -> list[Tensor]:
        """See `MatrixStore`; copies."""
        return [
            _unpack(triangles, dimension)
            for triangles, dimension in zip(self._triangles, self._dimensions, strict=True)
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


def matrix_store(initial: Iterable[Tensor], storage: Storage) -> MatrixStore:
    """Keep (N, d, d) tensors in the given way."""
    return PackedMatrices(initial) if storage == "packed" else DenseMatrices(initial)


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
