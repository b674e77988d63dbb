"""All numbers of matrices and stacks, as they are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from shampoo_core.grams import add_gram, mirror, strip_bounds
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


class DenseFactors(DenseMatrices):
    """Symmetric matrices that accumulate: the triangle below is filled in when somebody reads it."""

    def __init__(self, initial: Iterable[Tensor]) -> None:
        """Keep symmetric (N, d, d) tensors as they are."""
        super().__init__(initial)
        self._bounds: list[tuple[int, ...]] = [() for _ in self._matrices]
        """Per stack, the strips that its Gram matrices are added in; none before the first."""

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """See `MatrixStore`; views."""
        matrices = super().read(where)
        mirror(matrices, [self._bounds[item.stack] for item in where])
        return matrices

    def read_all(self) -> Iterator[Tensor]:
        """See `MatrixStore`; the tensors themselves."""
        self.complete()
        return super().read_all()

    def complete(self) -> None:
        """See `FactorStore`."""
        mirror(self._matrices, self._bounds)

    def scale(self, factors: Sequence[Tensor]) -> None:
        """See `FactorStore`."""
        torch._foreach_mul_(self._matrices, [factor.view(-1, 1, 1) for factor in factors])

    def add_grams(self, rows: Iterable[Tensor], *, decay: float, gain: float) -> None:
        """See `FactorStore`."""
        for stack, own in enumerate(rows):
            matrices = self._matrices[stack]
            self._bounds[stack] = bounds = strip_bounds(own)
            add_gram(matrices, own, bounds, decay=decay, gain=gain)


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
