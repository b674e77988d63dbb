"""One step of one set of stacks, from gradients to parameters.

    G  <- gradients of the open blocks                   collect, guard
    P  <- preconditioner(G)                              search direction
    P  <- P + decay * W                                  weight decay
    W  <- W - lr * P                                     deliver

The engine is the only place that knows this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_core.exchange.base import Exchange
from shampoo_core.gradients import GradientGuard
from shampoo_core.preconditioners.base import Preconditioner
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states, stacked_state


@dataclass(frozen=True)
class StepOptions:
    """What a user may change from step to step."""

    lr: float
    l2_decay: float
    """Added to the gradient, times the weights."""
    direction_decay: float
    """Added to the search direction, times the weights."""


class Engine:
    """State and step of the blocks that are stacked together."""

    def __init__(
        self, stack_set: StackSet, preconditioner: Preconditioner, exchange: Exchange
    ) -> None:
        """Put the parts together.

        Args:
            stack_set: Geometry of the blocks this rank owns.
            preconditioner: Made for ``stack_set``.
            exchange: Moves blocks between ranks.
        """
        self.stack_set = stack_set
        self.preconditioner = preconditioner
        self.guard = GradientGuard(stack_set)
        self._exchange = exchange

    def step(
        self,
        parameters: Sequence[Tensor],
        gradients: Sequence[Tensor | None],
        step: int,
        options: StepOptions,
    ) -> None:
        """Update the parameters in place.

        Args:
            parameters: All parameters of the group.
            gradients: Their gradients, None where there is none.
            step: Of the group, counted from 1.
            options: Current learning rate and weight decay.
        """
        stacks = self._exchange.collect(self.stack_set, gradients)
        if options.l2_decay:
            self.stack_set.add_from(stacks, parameters, options.l2_decay)
        guarded = self.guard.close_bad_blocks(stacks, gradients)
        direction = self.preconditioner.step(guarded, step)
        if options.direction_decay:
            ascent = torch._foreach_mul(direction.stacks, self.stack_set.split(direction.scale))
            self.stack_set.add_from(ascent, parameters, options.direction_decay)
            descent = -options.lr * guarded.is_open
            torch._foreach_mul_(ascent, self.stack_set.split(descent))
            updates = ascent
        else:
            descent = direction.scale * (-options.lr * guarded.is_open)
            updates = torch._foreach_mul(direction.stacks, self.stack_set.split(descent))
        self._exchange.deliver(self.stack_set, updates, parameters)

    def state(self) -> StackState:
        """All state that a checkpoint has to keep, by stack."""
        counts = self.guard.num_non_finite.split(self.stack_set.sizes)
        num_stacks = len(self.stack_set)
        guard = stacked_state(num_stacks, {"non_finite": counts})
        return [
            {**own, **guarded}
            for own, guarded in zip(
                self.preconditioner.state(),
                merge_states(num_stacks, {"guard": guard}),
                strict=True,
            )
        ]
