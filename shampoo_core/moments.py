"""Running averages of stacks that know the weight of what they hold.

An exponential moving average that started from zero underestimates by the weight of that zero.
Instead of the closed form ``1 - decay ** t``, which needs to know t and holds only if no step was ever
missed, the weight is carried along as a block vector: it is exact for every pattern of missing
gradients.

A block whose gradient was not finite contributes nothing to the average nor to its weight, so that the
corrected average (average / weight) stays as it was; one that is not corrected does not decay either. A
block without a gradient is left untouched.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from shampoo_core.config import Storage
from shampoo_core.gradients import StackedGradients
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, stacked_state
from shampoo_core.storage import MomentKind, stack_store

AverageIn = Callable[[list[Tensor], float], None]
"""Averages the gradients of a step into stacks, in place, with a decay."""

SMALLEST_WEIGHT = 1e-12
"""Below any real weight: the first gradient already brings 1 - decay."""


class MovingAverage:
    """``average <- decay * average + (1 - decay) * value``, or a sum when ``decay`` is 1."""

    def __init__(
        self,
        stack_set: StackSet,
        decay: float,
        *,
        bias_correction: bool = True,
        storage: Storage = "dense",
        kind: MomentKind = "first",
    ) -> None:
        """Start from zero.

        Args:
            stack_set: Geometry of the averaged stacks.
            decay: In [0, 1]; 1 sums instead of averaging, as AdaGrad does.
            bias_correction: Whether `weight` reports the true weight; when off it is always 1.
            storage: How the average is kept.
            kind: ``"second"`` for averages of squares; matters in few bits.
        """
        self._stack_set = stack_set
        self.decay = decay
        self.gain = 1.0 if decay == 1.0 else 1.0 - decay
        """Factor on each new value."""
        self._store = stack_store(stack_set.zeros(), storage, kind, decay)
        self._corrects = bias_correction and decay < 1.0
        self.raw_weight = stack_set.block_vector()
        """Block vector: the weight of what the average holds; 0 before the first gradient."""

    @property
    def average(self) -> list[Tensor]:
        """The average, not divided by its weight: what is kept itself, or copies; not to be changed."""
        return self._store.load()

    def blocks(self, stack: int, start: int, stop: int) -> Tensor:
        """Blocks ``start`` to ``stop`` (exclusive) of the average of a stack; not to be changed."""
        return self._store.load_blocks(stack, start, stop)

    def replace_blocks(self, stack: int, start: int, stop: int, blocks: Tensor) -> None:
        """Put blocks into the place of those that `blocks` gives."""
        self._store.save_blocks(stack, start, stop, blocks)

    @property
    def weight(self) -> Tensor:
        """Block vector by which the average has to be divided; never 0."""
        if not self._corrects:
            return torch.ones_like(self.raw_weight)
        return nonzero_weight(self.raw_weight)

    def weighs_all_alike(self) -> bool:
        """Whether all blocks have one weight; the host waits for it."""
        return not self._corrects or bool((self.raw_weight == self.raw_weight[0]).all())

    def absorb(self, gradients: StackedGradients, average_in: AverageIn | None = None) -> None:
        """Average in the gradients themselves.

        Args:
            gradients: Of this step.
            average_in: What does so, if all blocks are open.
        """
        average = self.average
        if average_in is not None:
            average_in(average, self.decay)
        elif not self._corrects and self.decay < 1.0:
            gains = self._stack_set.split(self.gain * gradients.is_open)
            torch._foreach_lerp_(average, gradients.stacks, gains)
        elif self._decaying(gradients) is None and self.decay < 1.0:
            torch._foreach_lerp_(average, gradients.stacks, self.gain)
        else:
            self._decay(average, gradients)
            torch._foreach_add_(average, gradients.stacks, alpha=self.gain)
        self._store.save(average)
        self.absorb_weight(gradients)

    def absorb_squares(self, gradients: StackedGradients) -> None:
        """Average in the elementwise squares of the gradients."""
        average = self.average
        self._decay(average, gradients)
        torch._foreach_addcmul_(average, gradients.stacks, gradients.stacks, value=self.gain)
        self._store.save(average)
        self.absorb_weight(gradients)

    def _decay(self, average: list[Tensor], gradients: StackedGradients) -> None:
        decay_stacks(self._stack_set, average, self.decay, self._decaying(gradients))

    def _decaying(self, gradients: StackedGradients) -> Tensor | None:
        return gradients.decaying(corrected=self._corrects)

    def absorb_weight(self, gradients: StackedGradients) -> None:
        """Update the weight alone, where the average is left to somebody else."""
        absorb_weight(self.raw_weight, self.decay, self.gain, gradients)

    def state(self) -> StackState:
        """The average and its weight."""
        kept = {f"average{part}": stacks for part, stacks in self._store.tensors.items()}
        weights = self.raw_weight.split(self._stack_set.sizes)
        return stacked_state(len(self._stack_set), {**kept, "weight": weights})


def decay_stacks(
    stack_set: StackSet, stacks: list[Tensor], decay: float, decaying: Tensor | None
) -> None:
    """Multiply stacks by ``decay``, in place, but blocks where ``decaying`` is 0; None means none is."""
    if decay == 1.0:
        return
    if decaying is None:
        torch._foreach_mul_(stacks, decay)
    else:
        torch._foreach_mul_(stacks, stack_set.split(1.0 - (1.0 - decay) * decaying))


def nonzero_weight(weight: Tensor) -> Tensor:
    """Lift weight 0, of a block that never had a gradient and whose average is 0, off zero."""
    return weight.clamp_min(SMALLEST_WEIGHT)


def absorb_weight(weight: Tensor, decay: float, gain: float, gradients: StackedGradients) -> None:
    """``weight <- decay * weight + gain`` for open blocks, in place."""
    if gradients.presence is None and decay < 1.0:
        weight.lerp_(gradients.is_open, gain)
        return
    if gradients.presence is not None:
        weight.mul_(1.0 - (1.0 - decay) * gradients.presence)
    weight.add_(gradients.is_open, alpha=gain)
