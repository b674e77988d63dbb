"""Averages of the training weights that training itself does not notice.

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
        interval: Steps from one contribution to the next.

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

    def create(self, stack_set: StackSet) -> AveragingRule:
        """See `AveragingConfig`."""
        return _WeightEMARule(self, stack_set)


class _WeightEMARule(Descent):
    def __init__(self, config: WeightEMA, stack_set: StackSet) -> None:
        super().__init__(stack_set)
        self._config = config
        self.average = stack_set.zeros()
        self.num_steps = stack_set.block_vector()

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> list[Tensor]:
        updates = super().update(direction, weights, is_open, options)
        y = weights.stacks()
        # The average starts at the weights before the first step.
        fresh = is_open * (self.num_steps == 0)
        torch._foreach_lerp_(self.average, y, self._stack_set.split(fresh))
        self.num_steps.add_(is_open)
        due = is_open * (self.num_steps % self._config.interval == 0)
        torch._foreach_add_(y, updates)
        gain = due * (1.0 - self._config.decay)
        torch._foreach_lerp_(self.average, y, self._stack_set.split(gain))
        return updates

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        shift = torch._foreach_sub(self.average, weights.stacks())
        torch._foreach_mul_(shift, self._stack_set.split((self.num_steps > 0).to(shift[0].dtype)))
        return list(shift)

    def state(self) -> StackState:
        steps = self.num_steps.split(self._stack_set.sizes)
        return stacked_state(len(self._stack_set), {"weights": self.average, "num_steps": steps})


@dataclass(frozen=True)
class LatestWeightAverage:
    """Evaluate the mean of the latest weights, one copy kept every so many steps (LAWA).

    Before the first copy is kept the weights themselves are evaluated.

    Args:
        length: Copies kept; each costs as much memory as the weights.
        interval: Steps from one copy to the next.

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

    def create(self, stack_set: StackSet) -> AveragingRule:
        """See `AveragingConfig`."""
        return _LatestWeightAverageRule(self, stack_set)


class _LatestWeightAverageRule(Descent):
    def __init__(self, config: LatestWeightAverage, stack_set: StackSet) -> None:
        super().__init__(stack_set)
        self._config = config
        self.copies = [stack_set.zeros() for _ in range(config.length)]
        self.num_steps = torch.zeros(
            stack_set.num_blocks, dtype=torch.int64, device=stack_set.device
        )

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> list[Tensor]:
        updates = super().update(direction, weights, is_open, options)
        self.num_steps += is_open.to(torch.int64)
        y = weights.stacks()
        torch._foreach_add_(y, updates)
        due = (self.num_steps % self._config.interval == 0) & (is_open > 0)
        place = (self.num_steps // self._config.interval - 1) % self._config.length
        for index, copy in enumerate(self.copies):
            here = (due & (place == index)).to(y[0].dtype)
            torch._foreach_lerp_(copy, y, self._stack_set.split(here))
        return updates

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        y = weights.stacks()
        kept = (self.num_steps // self._config.interval).clamp_max(self._config.length)
        share = (1.0 / kept.clamp_min(1)).to(y[0].dtype)
        shift = list(torch._foreach_mul(y, self._stack_set.split(-(kept > 0).to(y[0].dtype))))
        for index, copy in enumerate(self.copies):
            weight = share * (kept > index)
            torch._foreach_addcmul_(shift, copy, self._stack_set.split(weight))
        return shift

    def state(self) -> StackState:
        steps = self.num_steps.split(self._stack_set.sizes)
        copies = {f"copy{index}": copy for index, copy in enumerate(self.copies)}
        return stacked_state(len(self._stack_set), {"num_steps": steps, **copies})
