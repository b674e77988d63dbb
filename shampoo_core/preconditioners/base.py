"""What a preconditioner is to the rest of the optimizer."""

from __future__ import annotations

from typing import Protocol

from shampoo_core.blocking import Shape
from shampoo_core.config import GroupOptions
from shampoo_core.filtering import Direction
from shampoo_core.gradients import StackedGradients
from shampoo_core.grafting import GraftingConfig
from shampoo_core.refresh import RefreshPolicy
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState


class Preconditioner(Protocol):
    """Turns the gradients of a set of stacks into search directions."""

    def step(self, gradients: StackedGradients, step: int) -> Direction | None:
        """Absorb the gradients of step ``step`` (counted from 1) and return the ascent direction.

        None means that the gradients were only learnt from and the parameters stay.
        Directions of closed blocks are finite, and otherwise meaningless: the caller drops them.
        """

    def state(self) -> StackState:
        """All state that a checkpoint has to keep, by stack: the live tensors, brought up to date.

        The caller may write to them: what the host knows of them is forgotten.
        """


class PreconditionerConfig(Protocol):
    """A frozen description of a preconditioner."""

    @property
    def default_grafting(self) -> GraftingConfig | None:
        """Grafting used where the user leaves it to the preconditioner."""

    def block_flops(self, block_shape: Shape, refresh_interval: int) -> float:
        """Modelled cost of an average step on one block; see `shampoo_core.costs`."""

    def create(
        self,
        stack_set: StackSet,
        options: GroupOptions,
        grafting: GraftingConfig | None,
        refresh: RefreshPolicy,
    ) -> Preconditioner:
        """Allocate the preconditioner's state for a set of stacks."""
