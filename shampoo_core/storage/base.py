"""What a store of matrices, and one of stacks, can do."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

from torch import Tensor

from shampoo_core.refresh import FactorSlice


class MatrixStore(Protocol):
    """One stack of (d, d) matrices per preconditioned axis, d differing between stacks."""

    @property
    def tensors(self) -> list[dict[str, Tensor]]:
        """What is kept, per stack by name, one entry of the first dimension per matrix."""

    def read(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """Dense (K, d, d) matrices of some slices; maybe views, so not to be written to."""

    def read_all(self) -> Iterator[Tensor]:
        """Dense matrices of every stack in turn, as `read` gives them, but not all at once.

        What has to be decoded is decoded a few stacks at a time, see `batches`.
        """

    def blend(
        self, where: Sequence[FactorSlice], new: Sequence[Tensor], weights: Sequence[Tensor]
    ) -> None:
        """``old + weight (new - old)`` in place: exactly new at weight 1, exactly old at 0.

        Args:
            where: Slices.
            new: (K, d, d) per slice, finite.
            weights: (K,) per slice, of the same dtype.
        """


class FactorStore(MatrixStore, Protocol):
    """Matrices that accumulate: symmetric and positive semi-definite."""

    def scale(self, factors: Sequence[Tensor]) -> None:
        """Multiply matrix n of stack i by ``factors[i][n]``, in place."""

    def complete(self) -> None:
        """Bring up to date what is kept twice and was not needed so far, before `tensors` are looked at."""

    def add_grams(self, rows: Iterable[Tensor], *, decay: float, gain: float) -> None:
        """``A <- decay A + gain R R^T`` in place; R is (N, d, any number), one for every stack in turn."""


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


def batches(numels: Sequence[int], limit: int) -> list[list[int]]:
    """Neighbouring stacks of together at most ``limit`` numbers, or one stack that has more.

    Args:
        numels: Numbers per stack, none zero.
        limit: Of a batch.

    Returns:
        Indices of stacks, every one once, in order.
    """
    result: list[list[int]] = []
    filled = 0
    for index, numel in enumerate(numels):
        if not result or filled + numel > limit:
            result.append([])
            filled = 0
        result[-1].append(index)
        filled += numel
    return result
