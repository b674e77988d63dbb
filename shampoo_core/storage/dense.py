"""All numbers of matrices and stacks, as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from shampoo_core.refresh import FactorSlice


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

    def read_all(self) -> Iterator[Tensor]:
        """See `MatrixStore`; the tensors themselves."""
        return iter(self._matrices)

    def blend(
        self, where: Sequence[FactorSlice], new: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> None:
        """See `MatrixStore`."""
        torch._foreach_lerp_(self.read(where), list(new), [w.view(-1, 1, 1) for w in weights])

    def scale(self, factors: Sequence[Tensor]) -> None:
        """See `FactorStore`."""
        torch._foreach_mul_(self._matrices, [factor.view(-1, 1, 1) for factor in factors])

    def add_grams(self, rows: Iterable[Tensor], *, decay: float, gain: float) -> None:
        """See `FactorStore`."""
        for matrices, own in zip(self._matrices, rows, strict=True):
            matrices.baddbmm_(own, own.mT, beta=decay, alpha=gain)


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
