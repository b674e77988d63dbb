"""Every rank works on every block: one process, or replicas that all do the same work."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shampoo_core.blocking import Tile
from shampoo_core.stacks import StackSet


class LocalExchange:
    """Needs no process group and sends nothing."""

    def owned(self, tiles: Sequence[Tile]) -> list[Tile]:
        """All of them."""
        return list(tiles)

    def collect(self, stack_set: StackSet, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Copy blocks into stacks."""
        return stack_set.gather(tensors)

    def deliver(
        self, stack_set: StackSet, updates: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> None:
        """Add blocks to parameters."""
        stack_set.add_to(parameters, updates)
