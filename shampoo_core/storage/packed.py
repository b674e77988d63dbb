"""Symmetric matrices in half the memory, without loss."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from shampoo_core.grams import upper_gram
from shampoo_core.refresh import FactorSlice
from shampoo_core.storage.triangles import triangle_indices


class PackedMatrices:
    """The upper triangle of every matrix, row by row; for symmetric matrices only."""

    def __init__(self, initial: Iterable[Tensor]) -> None:
        """Keep the upper triangles of symmetric (N, d, d) tensors."""
        self._sides: list[int] = []
        self._triangles: list[Tensor] = []
        for matrices in initial:  # one dense stack at a time
            self._sides.append(matrices.shape[-1])
            self._triangles.append(_pack(matrices))

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """See `MatrixStore`; (N, d (d + 1) / 2) each."""
        return [{"": triangles} for triangles in self._triangles]

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """See `MatrixStore`; copies."""
        return [
            _unpack(self._triangles[item.stack][item.start : item.stop], self._sides[item.stack])
            for item in where
        ]

    def read_all(self) -> Iterator[Tensor]:
        """See `MatrixStore`; copies, one stack at a time."""
        return map(_unpack, self._triangles, self._sides)

    def blend(
        self, where: Sequence[FactorSlice], new: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> None:
        """See `MatrixStore`."""
        old = [self._triangles[item.stack][item.start : item.stop] for item in where]
        torch._foreach_lerp_(old, [_pack(m) for m in new], [w.view(-1, 1) for w in weights])

    def scale(self, factors: Sequence[Tensor]) -> None:
        """See `FactorStore`."""
        torch._foreach_mul_(self._triangles, [factor.view(-1, 1) for factor in factors])

    def complete(self) -> None:
        """See `FactorStore`; nothing is kept twice."""

    def add_grams(self, rows: Iterable[Tensor], *, decay: float, gain: float) -> None:
        """See `FactorStore`; every Gram matrix is dense for a while."""
        for triangles, own in zip(self._triangles, rows, strict=True):
            triangles.mul_(decay).add_(_pack(upper_gram(own)), alpha=gain)


def _pack(matrices: Tensor) -> Tensor:
    """(N, d, d) -> (N, d (d + 1) / 2)."""
    indices = triangle_indices(matrices.shape[-1], matrices.device, with_diagonal=True)
    return matrices.flatten(1).index_select(1, indices.fold)


def _unpack(triangles: Tensor, side: int) -> Tensor:
    """(N, d (d + 1) / 2) -> (N, d, d)."""
    indices = triangle_indices(side, triangles.device, with_diagonal=True)
    return triangles.index_select(1, indices.unfold).view(-1, side, side)
