"""Grafting: a diagonal method lends its step length, block by block, to another method's direction.

The same diagonal methods precondition the blocks that have no Kronecker factor (vectors), so that a
grafted method falls back to the method that it takes its length from.

Source: Agarwal et al. 2020 (arXiv 2002.11803); Shi et al. 2023 (arXiv 2309.06497), section 2.4.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from shampoo_core.config import GroupOptions, Storage, check_range
from shampoo_core.filtering import Direction, GradientFilter
from shampoo_core.fused_adam import average_and_scale
from shampoo_core.gradients import StackedGradients
from shampoo_core.moments import MovingAverage
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, stacked_state


class DiagonalMethod(Protocol):
    """What grafting needs of a diagonal method."""

    @property
    def second_moment(self) -> MovingAverage | None:
        """The running average of squared gradients, if the method keeps one."""

    def absorb(
        self,
        gradients: StackedGradients,
        gradient_filter: GradientFilter,
        *,
        ahead: bool = True,
        in_place: bool = False,
    ) -> Direction:
        """Update the second moment and the filter, and return the filtered gradient.

        Args:
            gradients: Of this step.
            gradient_filter: That of the preconditioner.
            ahead: Whether the direction may be made on the way, which takes its memory from now on.
            in_place: Whether that may be the memory of the gradients, which nobody reads then.
        """

    def direction(self, filtered: Direction) -> Direction:
        """Scale the filtered gradient of this step elementwise.

        The caller may write to the stacks that this returns, but for those of the filtered gradient itself.
        """

    def state(self) -> StackState:
        """The second moment, or nothing."""


class GraftingConfig(Protocol):
    """A frozen description of a diagonal method."""

    def create(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        """Allocate the method's state for a set of stacks."""


class _Sgd:
    second_moment: MovingAverage | None = None

    def __init__(self, stack_set: StackSet) -> None:
        self._num_stacks = len(stack_set)

    def absorb(
        self,
        gradients: StackedGradients,
        gradient_filter: GradientFilter,
        *,
        ahead: bool = True,
        in_place: bool = False,
    ) -> Direction:
        return gradient_filter.filter(gradients)  # no second moment

    def direction(self, filtered: Direction) -> Direction:
        return filtered._replace(stacks=list(filtered.stacks))

    def state(self) -> StackState:
        return stacked_state(self._num_stacks, {})


class SecondMomentScaling:
    """``f / ((V / weight)^exponent + eps)``, V a running average or sum of squared gradients."""

    def __init__(
        self,
        stack_set: StackSet,
        decay: float,
        eps: float,
        *,
        bias_correction: bool,
        exponent: float = 0.5,
        storage: Storage = "dense",
    ) -> None:
        """Start from zero.

        Args:
            stack_set: Geometry.
            decay: Of the average; 1 sums.
            eps: Positive.
            bias_correction: Whether V is divided by its weight.
            exponent: Positive; 1/2 is the root of Adam.
            storage: How V is kept.
        """
        self._stack_set = stack_set
        self._eps = eps
        self._exponent = exponent
        self._average = MovingAverage(
            stack_set, decay, bias_correction=bias_correction, storage=storage, kind="second"
        )
        self._is_adams = exponent == 0.5 and decay < 1.0 and storage in ("dense", "packed")
        self._made: tuple[list[Tensor], float] | None = None
        """Stacks that `direction` is to return, where these have been made along with the averages, and the
        root of the weight of V, one for all blocks."""

    @property
    def second_moment(self) -> MovingAverage:
        """V."""
        return self._average

    def absorb(
        self,
        gradients: StackedGradients,
        gradient_filter: GradientFilter,
        *,
        ahead: bool = True,
        in_place: bool = False,
    ) -> Direction:
        """See `DiagonalMethod`."""
        second, self._made = self._average, None
        if not ahead or not self._is_one_pass(gradients):
            second.absorb_squares(gradients)
            return gradient_filter.filter(gradients)
        second.absorb_weight(gradients)
        root = float(second.weight[0]) ** self._exponent
        # Without momentum the filtered gradient is the gradient, to be read beside the direction.
        in_place = in_place and gradient_filter.moment is not None
        scaled = list(gradients.stacks) if in_place else self._stack_set.zeros()

        def average_in(averages: list[Tensor], decay: float) -> None:
            betas = decay, second.decay
            eps = self._eps * root
            average_and_scale(
                gradients.stacks, averages, second.average, scaled, betas=betas, eps=eps
            )

        filtered = gradient_filter.filter(gradients, average_in)
        self._made = scaled, root
        return filtered

    def _is_one_pass(self, gradients: StackedGradients) -> bool:
        """Whether the kernel can do it: with one eps, hence one weight, for all."""
        return (
            self._is_adams
            and gradients.all_seen_open
            and self._average.weighs_all_alike()
            and all(stack.is_contiguous() for stack in gradients.stacks)
        )

    def direction(self, filtered: Direction) -> Direction:
        """See `DiagonalMethod`."""
        # f / ((V / w)^e + eps) = f / (V^e + eps w^e) * w^e
        made, self._made = self._made, None
        if made is not None:
            stacks, root = made
            return Direction(stacks, filtered.scale * root)
        weight = self._average.weight**self._exponent
        average = self._average.average
        if self._exponent == 0.5:
            denominators = torch._foreach_sqrt(average)
        else:
            denominators = torch._foreach_pow(average, self._exponent)
        torch._foreach_add_(denominators, self._stack_set.split(weight * self._eps))
        scaled = torch._foreach_div(filtered.stacks, denominators)
        return Direction(list(scaled), filtered.scale * weight)

    def state(self) -> StackState:
        """See `DiagonalMethod`."""
        return self._average.state()


@dataclass(frozen=True)
class SGDGrafting:
    """Length of the filtered gradient itself; keeps SGD's learning-rate scale."""

    def create(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        """No state."""
        return _Sgd(stack_set)


@dataclass(frozen=True)
class AdaGradGrafting:
    """``f / (sqrt(sum of G^2) + eps)``.

    Args:
        eps: Added to the root; None takes the group's.

    Raises:
        ValueError: ``eps`` is not positive.
    """

    eps: float | None = None

    def __post_init__(self) -> None:
        check_beta2_and_eps(self, None, self.eps)

    def create(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        """Allocate the sum of squares."""
        eps = _or(self.eps, options.eps)
        return SecondMomentScaling(
            stack_set, 1.0, eps, bias_correction=False, storage=options.storage
        )


@dataclass(frozen=True)
class RMSpropGrafting:
    """``f / (sqrt(average of G^2) + eps)`` without bias correction.

    Args:
        beta2: Decay of the average; None takes the group's ``betas[1]``.
        eps: Added to the root; None takes the group's.

    Raises:
        ValueError: ``beta2`` is outside (0, 1] or ``eps`` is not positive.
    """

    beta2: float | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        check_beta2_and_eps(self, self.beta2, self.eps)

    def create(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        """Allocate the average of squares."""
        beta2 = _or(self.beta2, options.betas[1])
        eps = _or(self.eps, options.eps)
        return SecondMomentScaling(
            stack_set, beta2, eps, bias_correction=False, storage=options.storage
        )


@dataclass(frozen=True)
class AdamGrafting:
    """``f / (sqrt(average of G^2 / weight) + eps)``: with this alone the step is Adam's.

    Args:
        beta2: Decay of the average; None takes the group's ``betas[1]``.
        eps: Added to the root; None takes the group's.

    Raises:
        ValueError: ``beta2`` is outside (0, 1] or ``eps`` is not positive.
    """

    beta2: float | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        check_beta2_and_eps(self, self.beta2, self.eps)

    def create(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        """Allocate the average of squares."""
        beta2 = _or(self.beta2, options.betas[1])
        eps = _or(self.eps, options.eps)
        return SecondMomentScaling(
            stack_set,
            beta2,
            eps,
            bias_correction=options.bias_correction,
            storage=options.storage,
        )


def lengths_of(stack_set: StackSet, lender: Direction) -> Tensor:
    """Norm of each block of a direction, as a block vector."""
    return stack_set.norms(lender.stacks) * lender.scale


def lend_lengths(stack_set: StackSet, lengths: Tensor, borrower: list[Tensor]) -> Direction:
    """Give each block a norm.

    Args:
        stack_set: Geometry.
        lengths: Block vector, of the direction of the grafting method.
        borrower: Direction of another method, on any scale.

    Returns:
        ``borrower * length / |borrower|`` per block; shorter where the squares of the borrower
        underflow, zero where it is zero.
    """
    own = stack_set.norms(borrower)
    # Squares of less vanish, or all but: a quotient by what is left of them would be noise, or infinite.
    own = own.clamp_min(torch.finfo(own.dtype).tiny ** 0.5)
    return Direction(borrower, lengths / own)


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def check_beta2_and_eps(config: object, beta2: float | None, eps: float | None) -> None:
    """Check options of a diagonal method; None, the group's, is checked there.

    Raises:
        TypeError: One is not a number.
        ValueError: ``beta2`` is outside (0, 1] or ``eps`` is not positive.
    """
    owner = type(config).__name__
    if beta2 is not None:
        check_range(owner, "beta2", beta2, low=0.0, high=1.0, low_open=True)
    if eps is not None:
        check_range(owner, "eps", eps, low=0.0, low_open=True, high_open=True)
