"""One step of one set of stacks, from gradients to parameters.

    G  <- gradients of the open blocks                   collected by the exchange; guard
    P  <- preconditioner(G)                              search direction
    U  <- -lr * (P + decay * W), or what averaging makes of it
    W  <- W + U                                          delivered by the exchange

The engine is the only place that knows this order. It sees the blocks that its rank owns, and nothing
of the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from shampoo_core.averaging import (
    AveragingConfig,
    AveragingRule,
    Descent,
    StepOptions,
    TrainingWeights,
    Update,
)
from shampoo_core.exchange.base import Collected, Exchange
from shampoo_core.exchange.division import Division
from shampoo_core.gradients import GradientGuard
from shampoo_core.preconditioners.base import Preconditioner
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states, stacked_state


class Engine:
    """State and step of the blocks that are stacked together and owned by this rank."""

    def __init__(
        self,
        exchange: Exchange,
        division: Division,
        create: Callable[[StackSet], Preconditioner],
        averaging: AveragingConfig | None,
        *,
        first_step: int = 1,
        alone: bool = False,
    ) -> None:
        """Allocate state for the rank's own blocks, if it has any.

        Args:
            exchange: Which made the division.
            division: Which blocks there are, and which are this rank's.
            create: Makes a preconditioner.
            averaging: The rule, None for none.
            first_step: The next one of the group, counted from 1.
            alone: Whether the others wait, so that only one has temporary memory at a time.
        """
        self.exchange = exchange
        self.alone = alone
        self.division = division
        self.stack_set = own = division.own
        self.averages = averaging is not None and averaging.averages
        """Whether other weights are evaluated than trained; the same on all ranks."""
        self._reads_weights = None if averaging is None else averaging.reads_weights
        self._leaves_decay = averaging is None or averaging.leaves_decay
        self._first_step = first_step
        self._parts: _Parts | None = None
        if own.num_blocks:
            rule = Descent(own) if averaging is None else averaging.create(own)
            self._parts = _Parts(create(own), rule, GradientGuard(own))

    @property
    def preconditioner(self) -> Preconditioner | None:
        """None where the rank owns nothing."""
        return None if self._parts is None else self._parts.preconditioner

    def resume(self, step: int) -> None:
        """Take for granted what the first step does, unless the state is one of before any step.

        Args:
            step: After which of the group's steps the state was saved.
        """
        self._first_step = 1 if step == 0 else 0

    def reads_weights(self, options: StepOptions) -> bool:
        """Whether a step needs the weights, or only their gradients; the same on all ranks."""
        if options.l2_decay != 0.0:
            return True
        if options.direction_decay != 0.0 and not self._leaves_decay:
            return True
        first = options.step == self._first_step
        return self._reads_weights is not None and self._reads_weights(options.step, first=first)

    def decay_left(self, options: StepOptions) -> float:
        """Decay that updates leave to the holders of weights, a factor on these; the same on all ranks."""
        return options.direction_decay if self._leaves_decay else 0.0

    def step(
        self,
        collected: Collected,
        gradients: Sequence[Tensor | None],
        step: int,
        options: StepOptions,
    ) -> Update | None:
        """Learn from gradients, and return what to do to the weights of the rank's own blocks.

        Args:
            collected: Gradients as stacks, changed in place, and weights.
            gradients: By parameter of the group, None where there is none.
            step: Of the group, counted from 1.
            options: Current learning rate and weight decay.

        Returns:
            The change, or None where nothing moves.
        """
        if self._parts is None:
            return None
        preconditioner, averaging, guard = self._parts
        stacks, weights = collected
        if step == self._first_step:
            averaging.start(weights)
        if options.l2_decay:
            weights.add_to(stacks, options.l2_decay)
        guarded = guard.close_bad_blocks(stacks, gradients)
        direction = preconditioner.step(guarded, step)
        if direction is None:
            return None
        if options.direction_shrink != 1.0:
            direction = direction._replace(scale=direction.scale * options.direction_shrink)
        return averaging.update(direction, weights, guarded.is_open, options)

    def evaluation_shift(self, weights: TrainingWeights) -> Update | None:
        """Evaluated minus training weights; None where these are the same."""
        parts = self._parts
        shift = None if parts is None else parts.averaging.evaluation_shift(weights)
        return None if shift is None else Update(shift)

    def state(self) -> StackState:
        """All state that a checkpoint has to keep, by stack: the live tensors, brought up to date.

        Steps leave alone what nobody reads, the lower triangle of a symmetric matrix.
        """
        if self._parts is None:
            return []
        preconditioner, averaging, guard = self._parts
        num_stacks = len(self.stack_set)
        counts = guard.num_non_finite.split(self.stack_set.sizes)
        return merge_states(
            num_stacks,
            {
                "": preconditioner.state(),
                "averaging": averaging.state(),
                "guard": stacked_state(num_stacks, {"non_finite": counts}),
            },
        )


class _Parts(NamedTuple):
    preconditioner: Preconditioner
    averaging: AveragingRule
    guard: GradientGuard
