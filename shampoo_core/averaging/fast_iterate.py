"""Schedule-Free and primal averaging: a fast iterate z, its average x, and y between the two."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from shampoo_core.averaging.base import (
    AveragingRule,
    StepOptions,
    TrainingWeights,
    Update,
)
from shampoo_core.config import check_choice, check_range
from shampoo_core.filtering import Direction
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, stacked_state

DecayPlace = Literal["y", "z", "z_holding_y"]
DECAY_PLACES: tuple[DecayPlace, ...] = get_args(DecayPlace)


@dataclass(frozen=True)
class ScheduleFree:
    """Schedule-Free averaging; use a constant rate after warm-up and ``betas[0] = 0``.

    Args:
        interpolation: b in (0, 1), weight of the average in the training weights.
        weight_power: The average weighs a step by the largest rate so far to this power.
        step_power: r; the weight is also multiplied by t^r.
        decay_at: ``"y"`` decays the training weights, ``"z"`` the fast iterate, and
            ``"z_holding_y"`` the latter as facebookresearch/optimizers does, see
            `_FastIterateRule`.

    Raises:
        ValueError: A number is out of range.

    Source: Defazio et al. 2024 (arXiv 2405.15682), Algorithm 1.
    """

    interpolation: float = 0.9
    weight_power: float = 2.0
    step_power: float = 0.0
    decay_at: DecayPlace = "y"

    def __post_init__(self) -> None:
        owner = "ScheduleFree"
        check_range(
            owner, "interpolation", self.interpolation,
            low=0.0, high=1.0, low_open=True, high_open=True,
        )  # fmt: skip
        check_range(owner, "weight_power", self.weight_power, low=0.0, high_open=True)
        check_range(owner, "step_power", self.step_power, low=0.0, high_open=True)
        check_choice(owner, "decay_at", self.decay_at, DECAY_PLACES)

    @property
    def averages(self) -> bool:
        """See `AveragingConfig`."""
        return True

    @property
    def extrapolates(self) -> bool:
        """See `AveragingConfig`: seen from z, evaluated weights lie beyond the training weights."""
        return True

    @property
    def leaves_decay(self) -> bool:
        """See `AveragingConfig`: decay is of one of two iterates."""
        return False

    def reads_weights(self, step: int, *, first: bool) -> bool:
        """See `AveragingConfig`: at every step, for all that moves hangs on them."""
        return True

    def create(self, stack_set: StackSet) -> AveragingRule:
        """See `AveragingConfig`."""
        return _ScheduleFreeRule(self, stack_set)


@dataclass(frozen=True)
class PrimalAveraging:
    """Generalised primal averaging: like Schedule-Free with fixed coefficients and any schedule.

    Args:
        evaluation_decay: mu_x in [0, 1), decay of the average of the fast iterate.
        interpolation: mu_y in (0, 1], weight of the average in the training weights.
        decay_at: ``"z"`` decays the fast iterate, ``"y"`` the training weights, and
            ``"z_holding_y"`` the former as facebookresearch/optimizers does, see
            `_FastIterateRule`.

    Raises:
        ValueError: A number is out of range.

    Source: arXiv 2512.17131, in the in-place form that keeps y and z.
    """

    evaluation_decay: float = 0.9
    interpolation: float = 0.8
    decay_at: DecayPlace = "z"

    def __post_init__(self) -> None:
        owner = "PrimalAveraging"
        check_range(
            owner, "evaluation_decay", self.evaluation_decay, low=0.0, high=1.0, high_open=True
        )
        check_range(owner, "interpolation", self.interpolation, low=0.0, high=1.0, low_open=True)
        check_choice(owner, "decay_at", self.decay_at, DECAY_PLACES)

    @property
    def averages(self) -> bool:
        """See `AveragingConfig`."""
        return True

    @property
    def extrapolates(self) -> bool:
        """As of `ScheduleFree`."""
        return True

    @property
    def leaves_decay(self) -> bool:
        """See `AveragingConfig`: decay is of one of two iterates."""
        return False

    def reads_weights(self, step: int, *, first: bool) -> bool:
        """See `AveragingConfig`: at every step, for all that moves hangs on them."""
        return True

    def create(self, stack_set: StackSet) -> AveragingRule:
        """See `AveragingConfig`."""
        return _PrimalAveragingRule(self, stack_set)


class _FastIterateRule:
    """Shared by the rules that keep y (in the parameters) and z; x is read off the two.

    In place, with u = lr (P + decay y) or lr (P + decay z), and c the weight of the new z in x:

        y <- y + c (z - y) - (1 - b (1 - c)) u
        z <- z - u

    "z_holding_y" shrinks z first and then reads x off y and the shrunk z, so that x moves away from 0
    by (1 - b) / b * lr * decay * z; it is kept because published results were obtained with it.
    """

    def __init__(self, stack_set: StackSet, interpolation: float, decay_at: DecayPlace) -> None:
        self._stack_set = stack_set
        self._interpolation = interpolation
        self._decay_at = decay_at
        self.fast_iterate = stack_set.zeros()
        self.started = stack_set.block_vector()
        """1 for blocks whose fast iterate has been set to the weights it starts from."""

    def start(self, weights: TrainingWeights) -> None:
        pass

    def update(
        self, direction: Direction, weights: TrainingWeights, is_open: Tensor, options: StepOptions
    ) -> Update:
        split, b = self._stack_set.split, self._interpolation
        y = weights.stacks()
        self._start(y, is_open)
        rate = options.lr * is_open
        decay = options.direction_decay
        u = torch._foreach_mul(direction.stacks, split(direction.scale))
        if self._decay_at == "z_holding_y":
            torch._foreach_mul_(self.fast_iterate, split(1.0 - rate * decay))
        elif decay:
            decaying = y if self._decay_at == "y" else self.fast_iterate
            torch._foreach_add_(u, decaying, alpha=decay)
        torch._foreach_mul_(u, split(rate))
        c = self.averaging_weight(is_open, options.lr)
        updates = torch._foreach_sub(self.fast_iterate, y)
        torch._foreach_mul_(updates, split(c * is_open))
        torch._foreach_addcmul_(updates, u, split(b * (1.0 - c) - 1.0))
        torch._foreach_sub_(self.fast_iterate, u)
        return Update(list(updates))

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
