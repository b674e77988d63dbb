"""Different methods for different stacks of one set: a method where it applies, Adam for the rest.

Each part sees its stacks as a set of its own and does not know about the others, so that a method for
matrices holds no state for vectors, and says nothing about them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from shampoo_core.config import GroupOptions
from shampoo_core.filtering import Direction
from shampoo_core.gradients import StackedGradients
from shampoo_core.preconditioners.base import Preconditioner
from shampoo_core.preconditioners.diagonal import AdamConfig
from shampoo_core.refresh import RefreshPolicy
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState


def with_adam_for_rest(
    stack_set: StackSet,
    chosen: Iterable[int],
    create: Callable[[StackSet], Preconditioner],
    options: GroupOptions,
    refresh: RefreshPolicy,
    *,
    idles_first: bool = False,
) -> Preconditioner:
    """Give some stacks to a method and the others to Adam.

    Args:
        stack_set: Geometry of all stacks.
        chosen: Indices of the method's stacks.
        create: Makes the method's preconditioner for a set of stacks.
        options: Of the parameter group; Adam takes its ``betas``, ``eps`` and ``storage``.
        refresh: Of the parameter group.
        idles_first: Whether the method takes no direction at its first step.

    Returns:
        The method's preconditioner itself where it gets all stacks: a rest costs only if there is one.
    """

    def create_adam(rest: StackSet) -> Preconditioner:
        return AdamConfig().create(rest, options, None, refresh)

    mine = sorted(set(chosen))
    others = [index for index in range(len(stack_set)) if index not in mine]
    if not others:
        return create(stack_set)
    if mine:
        parts = [Part(stack_set, mine, create), Part(stack_set, others, create_adam)]
        return Parts(stack_set, parts)
    return _Late(create_adam(stack_set)) if idles_first else create_adam(stack_set)


class Part:
    """Some stacks of a set and the preconditioner that steps them."""

    def __init__(
        self, whole: StackSet, indices: list[int], create: Callable[[StackSet], Preconditioner]
    ) -> None:
        """Make a stack set of the chosen stacks, and its preconditioner.

        Args:
            whole: Geometry of all stacks.
            indices: Of the chosen stacks, ascending.
            create: Makes the preconditioner.
        """
        self.indices = indices
        tiles = [tile for index in indices for tile in whole.layouts[index].tiles]
        self.stack_set = StackSet(tiles, dtype=whole.dtype, device=whole.device, whole=whole.whole)
        self.preconditioner = create(self.stack_set)
        positions = torch.arange(whole.num_blocks, device=whole.device).split(whole.sizes)
        self.blocks = torch.cat([positions[index] for index in indices])
        """Where the part's blocks stand in the block vectors of the whole set."""

    def step(self, gradients: StackedGradients, step: int) -> Direction | None:
        """Step the part with its share of the gradients of the whole set."""
        presence = gradients.presence
        share = replace(
            gradients,
            stacks=[gradients.stacks[index] for index in self.indices],
            is_open=gradients.is_open[self.blocks],
            presence=None if presence is None else presence[self.blocks],
        )
        return self.preconditioner.step(share, step)


class Parts:
    """Preconditioner that leaves every stack to the part it belongs to."""

    def __init__(self, stack_set: StackSet, parts: list[Part]) -> None:
        """Put parts together.

        Args:
            stack_set: Geometry of all stacks.
            parts: Every stack in exactly one of them. A step at which a part takes no direction is a
                step of none: the parts after it do not see its gradients either.
        """
        self._stack_set = stack_set
        self.parts = parts

    def step(self, gradients: StackedGradients, step: int) -> Direction | None:
        """See `Preconditioner`."""
        stacks: list[Tensor] = list(gradients.stacks)
        scale = self._stack_set.block_vector()
        for part in self.parts:
            direction = part.step(gradients, step)
            if direction is None:
                return None
            for index, stack in zip(part.indices, direction.stacks, strict=True):
                stacks[index] = stack
            scale[part.blocks] = direction.scale
        return Direction(stacks, scale)

    def state(self) -> StackState:
        """See `Preconditioner`."""
        state: StackState = [{} for _ in range(len(self._stack_set))]
        for part in self.parts:
            for index, entries in zip(part.indices, part.preconditioner.state(), strict=True):
                state[index] = entries
        return state


class _Late:
    """Sits out the first step, as `Parts` do whose method takes no direction then."""

    def __init__(self, preconditioner: Preconditioner) -> None:
        self._preconditioner = preconditioner

    def step(self, gradients: StackedGradients, step: int) -> Direction | None:
        return None if step == 1 else self._preconditioner.step(gradients, step)

    def state(self) -> StackState:
        return self._preconditioner.state()
