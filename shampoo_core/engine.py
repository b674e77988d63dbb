"""One step of one set of stacks, from gradients to parameters.

    G  <- gradients of the open blocks                   collect, guard
    P  <- preconditioner(G)                              search direction
    U  <- -lr * (P + decay * W), or what averaging makes of it
    W  <- W + U                                          deliver

The engine is the only place that knows this order.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from shampoo_core.averaging import AveragingRule, StepOptions, TrainingWeights
from shampoo_core.exchange.base import Exchange
from shampoo_core.gradients import GradientGuard
from shampoo_core.preconditioners.base import Preconditioner
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states, stacked_state


class Engine:
    """State and step of the blocks that are stacked together."""

    def __init__(
        self,
        stack_set: StackSet,
        preconditioner: Preconditioner,
        averaging: AveragingRule,
        exchange: Exchange,
    ) -> None:
        """Put the parts together.

        Args:
            stack_set: Geometry of the blocks this rank owns.
            preconditioner: Made for ``stack_set``.
            averaging: Made for ``stack_set``.
            exchange: Moves blocks between ranks.
        """
        self.stack_set = stack_set
        self.preconditioner = preconditioner
        self.averaging = averaging
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
        if direction is None:
            return
        if options.direction_shrink != 1.0:
            direction = direction._replace(scale=direction.scale * options.direction_shrink)
        weights = TrainingWeights(self.stack_set, parameters)
        updates = self.averaging.update(direction, weights, guarded.is_open, options)
        self._exchange.deliver(self.stack_set, updates, parameters)

    def evaluation_shift(self, parameters: Sequence[Tensor]) -> list[Tensor] | None:
        """Evaluated minus training weights as stacks; None where these are the same."""
        return self.averaging.evaluation_shift(TrainingWeights(self.stack_set, parameters))

    def shift(self, parameters: Sequence[Tensor], updates: Sequence[Tensor]) -> None:
        """Add stacks to the parameters, in place."""
        self._exchange.deliver(self.stack_set, updates, parameters)

    def state(self) -> StackState:
        """All state that a checkpoint has to keep, by stack."""
        num_stacks = len(self.stack_set)
        counts = self.guard.num_non_finite.split(self.stack_set.sizes)
        return merge_states(
            num_stacks,
            {
                "": self.preconditioner.state(),
                "averaging": self.averaging.state(),
                "guard": stacked_state(num_stacks, {"non_finite": counts}),
            },
        )
