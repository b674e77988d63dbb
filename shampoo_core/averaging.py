"""Momentum and iterate averaging: what happens between a search direction and the weights.

A rule turns the direction P into the change of the training weights, and may keep other weights to be
evaluated. Every rule works on stacks and gates by block: a closed block neither moves nor averages.

| rule            | training weights y            | evaluated weights x                     |
|-----------------|-------------------------------|-----------------------------------------|
| Descent         | y - lr P                      | y                                       |
| HeavyBall       | y - lr (momentum of P)        | y                                       |
| ScheduleFree    | (1-b) z + b x                 | x <- (1-c) x + c z, c from the rates    |
| PrimalAveraging | (1-mu_y) z + mu_y x           | x <- mu_x x + (1-mu_x) z                |
| WeightEMA       | y - lr P                      | exponential moving average of y         |

with z <- z - lr P, the fast iterate.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shampoo_core.config import check_choice, check_count, check_range
from shampoo_core.filtering import Direction
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, stacked_state


@dataclass(frozen=True)
class StepOptions:
    """What a user may change from step to step."""

    lr: float
    l2_decay: float
    """Added to the gradient, times the weights."""
    direction_decay: float
    """Added to the search direction, times the weights."""
    direction_shrink: float = 1.0
    """Factor on the search direction before the weights are added."""


@dataclass(frozen=True)
class TrainingWeights:
    """The weights that gradients are taken at, as stacks on demand."""

    stack_set: StackSet
    parameters: Sequence[Tensor]

    def add_to(self, stacks: list[Tensor], scale: float) -> None:
        """``stacks += scale * weights``, in place."""
        self.stack_set.add_from(stacks, self.parameters, scale)

    def stacks(self) -> list[Tensor]:
        """A copy of the weights."""
        return self.stack_set.gather(self.parameters)


class AveragingRule(Protocol):
    """State and step of one rule for one set of stacks."""

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> list[Tensor]:
        """Return what has to be added to the training weights; 0 for closed blocks."""

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        """Evaluated minus training weights; None where these are the same."""

    def state(self) -> StackState:
        """What a checkpoint has to keep."""


class AveragingConfig(Protocol):
    """A frozen description of a rule."""

    def create(self, stack_set: StackSet) -> AveragingRule:
        """Allocate the rule's state for a set of stacks."""


class Descent:
    """``y <- y - lr (P + decay y)``: no momentum, no averaging."""

    def __init__(self, stack_set: StackSet) -> None:
        """No state."""
        self._stack_set = stack_set

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> list[Tensor]:
        """See `AveragingRule`."""
        if not options.direction_decay:
            descent = direction.scale * (-options.lr * is_open)
            return list(torch._foreach_mul(direction.stacks, self._stack_set.split(descent)))
        ascent = decayed(self._stack_set, direction, weights, options.direction_decay)
        torch._foreach_mul_(ascent, self._stack_set.split(-options.lr * is_open))
        return ascent

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        """See `AveragingRule`."""
        return None

    def state(self) -> StackState:
        """See `AveragingRule`."""
        return stacked_state(len(self._stack_set), {})


@dataclass(frozen=True)
class HeavyBall:
    """Momentum on the search direction.

    ``B <- momentum B + (1 - dampening) P``, and the step is B or, with Nesterov's look-ahead,
    ``(1 - dampening) P + momentum B``.

    Args:
        momentum: In (0, 1).
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
        check_range("HeavyBall", "momentum", self.momentum, low=0.0, high=1.0, high_open=True)
        check_range("HeavyBall", "dampening", self.dampening, low=0.0, high=1.0)

    def create(self, stack_set: StackSet) -> AveragingRule:
        """See `AveragingConfig`."""
        return _HeavyBallRule(self, stack_set)


class _HeavyBallRule:
    def __init__(self, config: HeavyBall, stack_set: StackSet) -> None:
        self._config = config
        self._stack_set = stack_set
        self.buffer = stack_set.zeros()

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> list[Tensor]:
        config, split = self._config, self._stack_set.split
        ascent = decayed(self._stack_set, direction, weights, options.direction_decay)
        torch._foreach_mul_(ascent, split(is_open * (1.0 - config.dampening)))
        torch._foreach_mul_(self.buffer, split(1.0 - (1.0 - config.momentum) * is_open))
        torch._foreach_add_(self.buffer, ascent)
        step: list[Tensor] = self.buffer
        if config.nesterov:
            step = list(torch._foreach_add(ascent, self.buffer, alpha=config.momentum))
        return list(torch._foreach_mul(step, split(-options.lr * is_open)))

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        return None

    def state(self) -> StackState:
        return stacked_state(len(self._stack_set), {"momentum": self.buffer})


@dataclass(frozen=True)
class ScheduleFree:
    """Schedule-Free averaging; use a constant rate after warm-up and ``betas[0] = 0``.

    Args:
        interpolation: b in (0, 1), weight of the average in the training weights.
        weight_power: The average weighs a step by the largest rate so far to this power.
        step_power: r; the weight is also multiplied by t^r.
        decay_at: ``"y"`` decays the training weights, ``"z"`` the fast iterate.

    Raises:
        ValueError: A number is out of range.

    Source: Defazio et al. 2024 (arXiv 2405.15682), Algorithm 1.
    """

    interpolation: float = 0.9
    weight_power: float = 2.0
    step_power: float = 0.0
    decay_at: str = "y"

    def __post_init__(self) -> None:
        owner = "ScheduleFree"
        check_range(
            owner, "interpolation", self.interpolation,
            low=0.0, high=1.0, low_open=True, high_open=True,
        )  # fmt: skip
        check_range(owner, "weight_power", self.weight_power, low=0.0)
        check_range(owner, "step_power", self.step_power, low=0.0)
        check_choice(owner, "decay_at", self.decay_at, ("y", "z"))

    def create(self, stack_set: StackSet) -> AveragingRule:
        """See `AveragingConfig`."""
        return _ScheduleFreeRule(self, stack_set)


@dataclass(frozen=True)
class PrimalAveraging:
    """Generalised primal averaging: like Schedule-Free with fixed coefficients and any schedule.

    Args:
        evaluation_decay: mu_x in [0, 1), decay of the average of the fast iterate.
        interpolation: mu_y in (0, 1], weight of the average in the training weights.
        decay_at: ``"z"`` decays the fast iterate, ``"y"`` the training weights.

    Raises:
        ValueError: A number is out of range.

    Source: arXiv 2512.17131, in the in-place form that keeps y and z.
    """

    evaluation_decay: float = 0.9
    interpolation: float = 0.8
    decay_at: str = "z"

    def __post_init__(self) -> None:
        owner = "PrimalAveraging"
        check_range(
            owner, "evaluation_decay", self.evaluation_decay, low=0.0, high=1.0, high_open=True
        )
        check_range(owner, "interpolation", self.interpolation, low=0.0, high=1.0, low_open=True)
        check_choice(owner, "decay_at", self.decay_at, ("y", "z"))

    def create(self, stack_set: StackSet) -> AveragingRule:
        """See `AveragingConfig`."""
        return _PrimalAveragingRule(self, stack_set)


class _FastIterateRule:
    """Shared by the rules that keep y (in the parameters) and z; x is read off the two.

    In place, with u = lr P and c the weight of the new z in x:

        y <- y + c (z - y) - (1 - b (1 - c)) u
        z <- z - u
    """

    def __init__(self, stack_set: StackSet, interpolation: float, decay_at: str) -> None:
        self._stack_set = stack_set
        self._interpolation = interpolation
        self._decay_at = decay_at
        self.fast_iterate = stack_set.zeros()
        self.started = stack_set.block_vector()
        """1 for blocks whose fast iterate has been set to the weights it starts from."""

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> list[Tensor]:
        split, b = self._stack_set.split, self._interpolation
        y = weights.stacks()
        self._start(y, is_open)
        rate = options.lr * is_open
        if self._decay_at == "z":
            torch._foreach_mul_(self.fast_iterate, split(1.0 - rate * options.direction_decay))
            u = torch._foreach_mul(direction.stacks, split(direction.scale * rate))
        else:
            u = torch._foreach_mul(direction.stacks, split(direction.scale))
            torch._foreach_add_(u, y, alpha=options.direction_decay)
            torch._foreach_mul_(u, split(rate))
        c = self.averaging_weight(is_open, options.lr)
        updates = torch._foreach_sub(self.fast_iterate, y)
        torch._foreach_mul_(updates, split(c * is_open))
        torch._foreach_addcmul_(updates, u, split(b * (1.0 - c) - 1.0))
        torch._foreach_sub_(self.fast_iterate, u)
        return list(updates)

    def averaging_weight(self, is_open: Tensor, lr: float) -> Tensor:
        """Block vector c: weight of the newest fast iterate in the average."""
        raise NotImplementedError

    def evaluation_shift(self, weights: TrainingWeights) -> list[Tensor] | None:
        # x - y = (1 - 1/b) (z - y), and z is still y in blocks that have not started.
        shift = torch._foreach_sub(self.fast_iterate, weights.stacks())
        factor = self.started * (1.0 - 1.0 / self._interpolation)
        torch._foreach_mul_(shift, self._stack_set.split(factor))
        return list(shift)

    def state(self) -> StackState:
        started = self.started.split(self._stack_set.sizes)
        return stacked_state(
            len(self._stack_set), {"fast_iterate": self.fast_iterate, "started": started}
        )

    def _start(self, y: list[Tensor], is_open: Tensor) -> None:
        # z <- y where a block takes its first step: weight 1 there, 0 elsewhere.
        fresh = is_open * (1.0 - self.started)
        torch._foreach_lerp_(self.fast_iterate, y, self._stack_set.split(fresh))
        self.started.add_(fresh)


class _ScheduleFreeRule(_FastIterateRule):
    def __init__(self, config: ScheduleFree, stack_set: StackSet) -> None:
        super().__init__(stack_set, config.interpolation, config.decay_at)
        self._config = config
        self.largest_rate = stack_set.block_vector()
        self.weight_sum = stack_set.block_vector()
        self.num_steps = stack_set.block_vector()

    def averaging_weight(self, is_open: Tensor, lr: float) -> Tensor:
        config = self._config
        self.num_steps.add_(is_open)
        torch.maximum(self.largest_rate, lr * is_open, out=self.largest_rate)
        weight = self.largest_rate**config.weight_power * self.num_steps**config.step_power
        self.weight_sum.add_(weight * is_open)
        # 0 / 0 while every rate so far was 0.
        return weight / (self.weight_sum + (self.weight_sum == 0))

    def state(self) -> StackState:
        vectors = {
            "largest_rate": self.largest_rate,
            "weight_sum": self.weight_sum,
            "num_steps": self.num_steps,
        }
        split = {name: v.split(self._stack_set.sizes) for name, v in vectors.items()}
        extra = stacked_state(len(self._stack_set), split)
        return [{**base, **more} for base, more in zip(super().state(), extra, strict=True)]


class _PrimalAveragingRule(_FastIterateRule):
    def __init__(self, config: PrimalAveraging, stack_set: StackSet) -> None:
        super().__init__(stack_set, config.interpolation, config.decay_at)
        self._weight = 1.0 - config.evaluation_decay

    def averaging_weight(self, is_open: Tensor, lr: float) -> Tensor:
        return torch.full_like(is_open, self._weight)


@dataclass(frozen=True)
class WeightEMA:
    """Evaluate an exponential moving average of the weights; training does not notice.

    Args:
        decay: In [0, 1), per ``interval`` steps.
        interval: Steps from one contribution to the next.

    Raises:
        ValueError: A number is out of range.

    Source: Ajroldi et al. 2025 (arXiv 2502.06761): best with a window
    ``interval / (1 - decay)`` of about 1 % of the training steps.
    """

    decay: float = 0.9
    interval: int = 1

    def __post_init__(self) -> None:
        check_range("WeightEMA", "decay", self.decay, low=0.0, high=1.0, high_open=True)
        check_count("WeightEMA", "interval", self.interval)

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


def decayed(
    stack_set: StackSet, direction: Direction, weights: TrainingWeights, decay: float
) -> list[Tensor]:
    """``direction + decay * weights`` as new stacks."""
    ascent = list(torch._foreach_mul(direction.stacks, stack_set.split(direction.scale)))
    if decay:
        weights.add_to(ascent, decay)
    return ascent
