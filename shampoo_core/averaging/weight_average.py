"""Averages of the training weights that training itself does not notice.

With an ``interval`` a contribution is due at every so many steps of the parameter group, and weights are
read at no others. A block that does not move at such a step, for want of a finite gradient, contributes
nothing at it.

Source of both: Ajroldi et al. 2025 (arXiv 2502.06761), who find a window of about 1 % of the training
steps best, and that averaging does not replace learning-rate decay.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_core.averaging.base import (
    AveragingRule,
    Descent,
    StepOptions,
    TrainingWeights,
    Update,
)
from shampoo_core.config import check_count, check_range
from shampoo_core.filtering import Direction
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, stacked_state


@dataclass(frozen=True)
class WeightEMA:
    """Evaluate an exponential moving average of the weights; training does not notice.

    Args:
        decay: In [0, 1), per ``interval`` steps.
        interval: Steps of the parameter group from one contribution to the next.

    Raises:
        ValueError: A number is out of range.

    Source: arXiv 2502.06761, section 3; the window is ``interval / (1 - decay)`` steps.
    """

    decay: float = 0.9
    interval: int = 1

    def __post_init__(self) -> None:
        check_range("WeightEMA", "decay", self.decay, low=0.0, high=1.0, high_open=True)
        check_count("WeightEMA", "interval", self.interval)

    @property
    def averages(self) -> bool:
        """See `AveragingConfig`."""
        return True

    @property
    def leaves_decay(self) -> bool:
        """See `AveragingConfig`."""
        return True

    @property
    def extrapolates(self) -> bool:
        """See `AveragingConfig`."""
        return False

    def reads_weights(self, step: int, *, first: bool) -> bool:
        """See `AveragingConfig`."""
        return first or step % self.interval == 0

    def create(self, stack_set: StackSet) -> AveragingRule:
        """See `AveragingConfig`."""
        return _WeightEMARule(self, stack_set)


class _WeightEMARule(Descent):
    def __init__(self, config: WeightEMA, stack_set: StackSet) -> None:
        super().__init__(stack_set)
        self._config = config
        self.average = stack_set.zeros()
        self.moved = stack_set.block_vector()
        """1 for blocks that have taken a step."""

    def start(self, weights: TrainingWeights) -> None:
        """The average starts at the weights before the first step."""
        torch._foreach_lerp_(
            self.average, weights.stacks(), self._stack_set.split(1.0 - self.moved)
        )

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> Update:
        update = super().update(direction, weights, is_open, options)
        torch.maximum(self.moved, is_open, out=self.moved)
        if options.step % self._config.interval == 0:
            self._absorb(update, weights, is_open * (1.0 - self._config.decay))
        return update

    def _absorb(self, update: Update, weights: TrainingWeights, gain: Tensor) -> None:
        """``average <- average + gain * (W - average)`` with the weights W that the update leads to.

        Term by term, ``W = y + scale * stacks + growth * y``: what is to be added is not made first.
        """
        y = weights.stacks()
        split = self._stack_set.split
        torch._foreach_lerp_(self.average, y, split(gain))
        scale, growth = update.total_scale, update.growth
        own_gain = gain if scale is None else gain * scale
        torch._foreach_addcmul_(self.average, update.stacks, split(own_gain))
        if growth is not None:
            torch._foreach_addcmul_(self.average, y, split(gain * growth))

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        shift = torch._foreach_sub(self.average, weights.stacks())
        torch._foreach_mul_(shift, self._stack_set.split(self.moved))
        return list(shift)

    def state(self) -> StackState:
        moved = self.moved.split(self._stack_set.sizes)
        return stacked_state(len(self._stack_set), {"weights": self.average, "moved": moved})


@dataclass(frozen=True)
class LatestWeightAverage:
    """Evaluate the mean of the latest weights, one copy kept every so many steps (LAWA).

    Before the first copy is kept the weights themselves are evaluated.

    Args:
        length: Copies kept; each costs as much memory as the weights.
        interval: Steps of the parameter group from one copy to the next.

    Raises:
        ValueError: A number is smaller than 1.

    Source: Kaddour 2022 (arXiv 2209.14981); the window is ``interval * length`` steps.
    """

    length: int = 20
    interval: int = 64

    def __post_init__(self) -> None:
        check_count("LatestWeightAverage", "length", self.length)
        check_count("LatestWeightAverage", "interval", self.interval)

    @property
    def averages(self) -> bool:
        """See `AveragingConfig`."""
        return True

    @property
    def leaves_decay(self) -> bool:
        """See `AveragingConfig`."""
        return True

    @property
    def extrapolates(self) -> bool:
        """See `AveragingConfig`."""
        return False

    def reads_weights(self, step: int, *, first: bool) -> bool:
        """See `AveragingConfig`."""
        return step % self.interval == 0

    def create(self, stack_set: StackSet) -> AveragingRule:
        """See `AveragingConfig`."""
        return _LatestWeightAverageRule(self, stack_set)


class _LatestWeightAverageRule(Descent):
    def __init__(self, config: LatestWeightAverage, stack_set: StackSet) -> None:
        super().__init__(stack_set)
        self._config = config
        self.copies = [stack_set.zeros() for _ in range(config.length)]
        self.filled = [stack_set.block_vector() for _ in range(config.length)]
        """Per copy: 1 for the blocks that it has."""

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> Update:
        update = super().update(direction, weights, is_open, options)
        number, rest = divmod(options.step, self._config.interval)
        if rest == 0:
            place = (number - 1) % self._config.length
            y = weights.stacks()
            torch._foreach_add_(y, update.to_add(self._stack_set, weights))
            torch._foreach_lerp_(self.copies[place], y, self._stack_set.split(is_open))
            torch.maximum(self.filled[place], is_open, out=self.filled[place])
        return update

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        y = weights.stacks()
        kept = torch.stack(self.filled).sum(0)
        shift = list(torch._foreach_mul(y, self._stack_set.split(-(kept > 0).to(kept))))
        share = 1.0 / kept.clamp_min(1.0)
        for copy, filled in zip(self.copies, self.filled, strict=True):
            torch._foreach_addcmul_(shift, copy, self._stack_set.split(share * filled))
        return shift

    def state(self) -> StackState:
        sizes = self._stack_set.sizes
        copies = {f"copy{index}": copy for index, copy in enumerate(self.copies)}
        filled = {f"filled{index}": one.split(sizes) for index, one in enumerate(self.filled)}
        return stacked_state(len(self._stack_set), {**copies, **filled})
