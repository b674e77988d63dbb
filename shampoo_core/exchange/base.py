"""How blocks get to the ranks that work on them, and results to everyone who holds the parameter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from torch import Tensor

from shampoo_core.blocking import Tile
from shampoo_core.stacks import StackSet


class Exchange(Protocol):
    """Three verbs; the optimizer knows nothing else about ranks."""

    def owned(self, tiles: Sequence[Tile]) -> list[Tile]:
        """The tiles this rank works on."""

    def collect(self, stack_set: StackSet, tensors: Sequence[Tensor | None]) -> list[Tensor]:
        """Bring parameter-shaped tensors into this rank's stacks."""

    def deliver(
        self, stack_set: StackSet, updates: Sequence[Tensor], parameters: Sequence[Tensor]
    ) -> None:
        """Add this rank's updates to the parameters, wherever these are held."""
