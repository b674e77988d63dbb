"""The filtered gradient: what momentum makes of the gradients before they are preconditioned.

    f      = beta3 * average + (1 - beta3) * G        with the average of the steps before
    average <- beta1 * average + (1 - beta1) * G
    f / (weight that f's entries sum to)              when bias correction is on

``beta3 = beta1`` is Adam's first moment; ``beta3 = beta1 ** 2`` looks one step ahead, as NAdam does.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_core.config import GroupOptions
from shampoo_core.gradients import StackedGradients
from shampoo_core.moments import AverageIn, MovingAverage, nonzero_weight
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, stacked_state


class Direction(NamedTuple):
    """``stacks`` times ``scale``: a direction whose per-block factor is not multiplied in yet.

    Bias corrections, grafting ratios and the learning rate are one number per block. Carrying them
    beside the stacks makes them one multiplication at the end instead of a pass over memory each.
    Nobody may change ``stacks`` in place, for they can be somebody's state, but where their maker says so.
    """

    stacks: list[Tensor]
    scale: Tensor
    """Block vector."""


class GradientFilter:
    """First moment of the gradients with an optional look-ahead."""

    def __init__(self, stack_set: StackSet, options: GroupOptions) -> None:
        """Allocate the average unless ``betas[0]`` and ``beta3`` are both 0.

        Args:
            stack_set: Geometry.
            options: ``betas[0]``, ``beta3``, ``bias_correction`` and ``momentum_normaliser`` are used.
        """
        self._stack_set = stack_set
        self._beta3 = options.betas[0] if options.beta3 is None else options.beta3
        self._looks_ahead = self._beta3 != options.betas[0]
        self._normalises_as_v05 = options.momentum_normaliser == "algoperf_v05"
        self._corrects = options.bias_correction
        self.moment: MovingAverage | None = None
        # With betas[0] = 0 it is the last gradient, of which only a look-ahead makes use.
        if options.betas[0] > 0.0 or self._looks_ahead:
            self.moment = MovingAverage(
                stack_set,
                options.betas[0],
                bias_correction=options.bias_correction,
                storage=options.storage,
            )

    def filter(self, gradients: StackedGradients, average_in: AverageIn | None = None) -> Direction:
        """Absorb the gradients of this step and return the filtered gradient.

        Args:
            gradients: Of this step.
            average_in: Is called once, with what becomes the filtered gradient, if all blocks are open; the
                gradients are not read after that.
        """
        if self.moment is None:
            if average_in is not None:
                average_in(gradients.stacks, 0.0)
            return Direction(list(gradients.stacks), self._stack_set.block_vector(1.0))
        if not self._looks_ahead:
            self.moment.absorb(gradients, average_in)
            return Direction(self.moment.average, self.moment.weight.reciprocal())
        weight_ahead = torch.lerp(self.moment.raw_weight, gradients.is_open, 1.0 - self._beta3)
        if average_in is not None:
            ahead = [stack.clone() for stack in self.moment.average]
            self.moment.absorb(gradients)
            average_in(ahead, self._beta3)
        else:
            gain = 1.0 - self._beta3
            ahead = list(torch._foreach_lerp(self.moment.average, gradients.stacks, gain))
            self.moment.absorb(gradients)
        if self._normalises_as_v05 or not self._corrects:
            weight = self.moment.weight
        else:
            weight = nonzero_weight(weight_ahead)
        return Direction(ahead, weight.reciprocal())

    def state(self) -> StackState:
        """The average and its weight, or nothing."""
        if self.moment is None:
            return stacked_state(len(self._stack_set), {})
        return self.moment.state()
