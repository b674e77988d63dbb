"""What a rule of averaging takes and gives, and the rule that does nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from shampoo_core.filtering import Direction
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, stacked_state


@dataclass(frozen=True)
class StepOptions:
    """What differs from step to step."""

    step: int
    """Of the group, counted from 1."""
    lr: float
    l2_decay: float
    """Added to the gradient, times the weights."""
    direction_decay: float
    """Added to the search direction, times the weights."""
    direction_shrink: float = 1.0
    """Factor on the search direction before the weights are added."""


class TrainingWeights(Protocol):
    """The weights that gradients are taken at, as stacks on demand."""

    def add_to(self, stacks: list[Tensor], scale: float) -> None:
        """``stacks += scale * weights``, in place."""

    def stacks(self) -> list[Tensor]:
        """A copy of the weights."""


class Update(NamedTuple):
    """What a step does to the weights: ``W <- W + factors * (scale * stacks + decay * W)``, block by block.

    Not multiplied out: whoever holds the weights does it in two passes over memory, where stacks to be
    added would have to be made first, in twice as many. Nobody may change ``stacks`` in place.
    """

    stacks: list[Tensor]
    scale: Tensor | None = None
    """Block vector; None is 1, then the factors are 1 as well."""
    decay: float = 0.0
    factors: Tensor | None = None
    """Block vector: negative where the weights descend, 0 where a block does not move; None is 1."""

    @property
    def total_scale(self) -> Tensor | None:
        """Of the stacks: block vector, None for 1."""
        if self.scale is None or self.factors is None:
            return self.scale
        return self.scale * self.factors

    @property
    def growth(self) -> Tensor | None:
        """Of the weights: block vector, None for 0."""
        if self.factors is None or not self.decay:
            return None
        return self.decay * self.factors

    @property
    def open_blocks(self) -> Tensor | None:
        """Block vector: 1 where a block moves, else 0; None where that is not said."""
        return None if self.factors is None else (self.factors != 0).to(self.factors.dtype)

    def to_add(self, stack_set: StackSet, weights: TrainingWeights | None) -> list[Tensor]:
        """``factors * (scale * stacks + decay * W)``, new unless nothing has to be done.

        Args:
            stack_set: Geometry.
            weights: W; read only if there is decay. None leaves decay out.
        """
        if self.scale is None:
            return self.stacks
        if self.factors is None or not self.decay or weights is None:
            assert self.total_scale is not None
            return list(torch._foreach_mul(self.stacks, stack_set.split(self.total_scale)))
        # Factors come last, so that weights are added as they are: in a few kernels on a GPU.
        stacks = list(torch._foreach_mul(self.stacks, stack_set.split(self.scale)))
        weights.add_to(stacks, self.decay)
        torch._foreach_mul_(stacks, stack_set.split(self.factors))
        return stacks


class AveragingRule(Protocol):
    """State and step of one rule for one set of stacks."""

    def start(self, weights: TrainingWeights) -> None:
        """See the weights before the first step; called then, if ever."""

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> Update:
        """Return what happens to the training weights; nothing to those of closed blocks.

        Args:
            direction: The search direction.
            weights: Of the blocks; there if `AveragingConfig.reads_weights` or a decay asked for them.
            is_open: Block vector: 1 where the block moves, else 0.
            options: Of this step.
        """

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        """Evaluated minus training weights; None where these are the same."""

    def state(self) -> StackState:
        """What a checkpoint has to keep."""


class AveragingConfig(Protocol):
    """A frozen description of a rule."""

    @property
    def averages(self) -> bool:
        """Whether other weights are evaluated than trained."""

    @property
    def leaves_decay(self) -> bool:
        """Whether updates leave decay to whoever holds the weights, see `Update.decay`."""

    @property
    def extrapolates(self) -> bool:
        """Whether evaluated weights lie beyond the training weights: rounding these leads them away."""

    def reads_weights(self, step: int, *, first: bool) -> bool:
        """Whether a step needs the weights for this rule, the same for all blocks and on all ranks.

        Without `leaves_decay` a step with decay needs them anyway.

        Args:
            step: Of the group, counted from 1.
            first: Whether it is the first one of the blocks.
        """

    def create(self, stack_set: StackSet) -> AveragingRule:
        """Allocate the rule's state for a set of stacks."""


class Descent:
    """``y <- y - lr (P + decay y)``: no momentum, no averaging."""

    def __init__(self, stack_set: StackSet) -> None:
        """No state."""
        self._stack_set = stack_set

    def start(self, weights: TrainingWeights) -> None:
        """See `AveragingRule`."""

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> Update:
        """See `AveragingRule`."""
        factors = -options.lr * is_open
        return Update(direction.stacks, direction.scale, options.direction_decay, factors)

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        """See `AveragingRule`."""
        return None

    def state(self) -> StackState:
        """See `AveragingRule`."""
        return stacked_state(len(self._stack_set), {})
