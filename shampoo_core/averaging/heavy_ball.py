"""Classic and Nesterov momentum on the search direction."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_core.averaging.base import (
    AveragingRule,
    StepOptions,
    TrainingWeights,
    Update,
)
from shampoo_core.config import check_flags, check_range
from shampoo_core.filtering import Direction
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, stacked_state


@dataclass(frozen=True)
class HeavyBall:
    """Momentum on the search direction.

    ``B <- momentum B + (1 - dampening) P``, and the step is B or, with Nesterov's look-ahead,
    ``(1 - dampening) P + momentum B``.

    Args:
        momentum: In [0, 1).
        dampening: In [0, 1]; equal to ``momentum`` it makes B an average instead of a sum.
        nesterov: Whether to look ahead.

    Raises:
        ValueError: A number is out of range.

    Source: Shi et al. 2023 (arXiv 2309.06497), section 3.5.
    """

    momentum: float = 0.9
    dampening: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_flags(self)
        check_range("HeavyBall", "momentum", self.momentum, low=0.0, high=1.0, high_open=True)
        check_range("HeavyBall", "dampening", self.dampening, low=0.0, high=1.0)

    @property
    def averages(self) -> bool:
        """See `AveragingConfig`."""
        return False

    @property
    def leaves_decay(self) -> bool:
        """See `AveragingConfig`: decay has momentum, too."""
        return False

    @property
    def extrapolates(self) -> bool:
        """See `AveragingConfig`."""
        return False

    def reads_weights(self, step: int, *, first: bool) -> bool:
        """See `AveragingConfig`."""
        return False

    def create(self, stack_set: StackSet) -> AveragingRule:
        """See `AveragingConfig`."""
        return _HeavyBallRule(self, stack_set)


class _HeavyBallRule:
    def __init__(self, config: HeavyBall, stack_set: StackSet) -> None:
        self._config = config
        self._stack_set = stack_set
        self.buffer = stack_set.zeros()

    def start(self, weights: TrainingWeights) -> None:
        pass

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> Update:
        config, split = self._config, self._stack_set.split
        gain = is_open * (1.0 - config.dampening)
        scaled = Update(direction.stacks, direction.scale, options.direction_decay, gain)
        ascent = scaled.to_add(self._stack_set, weights)
        torch._foreach_mul_(self.buffer, split(1.0 - (1.0 - config.momentum) * is_open))
        torch._foreach_add_(self.buffer, ascent)
        step: list[Tensor] = self.buffer
        if config.nesterov:
            step = list(torch._foreach_add(ascent, self.buffer, alpha=config.momentum))
        return Update(step, -options.lr * is_open)

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        return None

    def state(self) -> StackState:
        return stacked_state(len(self._stack_set), {"momentum": self.buffer})
