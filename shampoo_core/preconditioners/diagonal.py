"""Diagonal methods in their own right: SGD, AdaGrad, RMSprop, Adam, and AdaGrad by rows.

    P = f / (sqrt(V) + eps),     f the filtered gradient, V a running mean or sum of squared gradients

A parameter group with one of these as its ``preconditioner`` is stepped as by the classical optimizer:
for embedding tables, norms and biases, and as the baseline that grafted methods start from. Cutting
changes nothing but the number of blocks.

Source: Duchi et al. 2011 (AdaGrad), Tieleman and Hinton 2012 (RMSprop), Kingma and Ba 2015 (Adam);
rows: Gupta et al. 2014 ("Training highly multiclass classifiers") and Naumov et al. 2019
(arXiv 1906.00091).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from shampoo_core.blocking import Shape
from shampoo_core.config import GroupOptions, check_range
from shampoo_core.costs import method_flops
from shampoo_core.filtering import Direction, GradientFilter
from shampoo_core.gradients import StackedGradients
from shampoo_core.grafting import (
    AdaGradGrafting,
    AdamGrafting,
    DiagonalMethod,
    GraftingConfig,
    RMSpropGrafting,
    SGDGrafting,
    check_beta2_and_eps,
)
from shampoo_core.moments import absorb_weight, decay_stacks, nonzero_weight
from shampoo_core.preconditioners.checks import refuse_grafting
from shampoo_core.refresh import RefreshPolicy
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states, stacked_state


class _DiagonalConfig:
    """What all diagonal methods share: no grafting, no refreshes."""

    @property
    def default_grafting(self) -> GraftingConfig | None:
        """None: these methods are what others are grafted to."""
        return None

    def block_flops(self, block_shape: Shape, refresh_interval: int) -> float:
        """See `PreconditionerConfig`: elementwise work alone."""
        return method_flops(block_shape, [], 0.0, refresh_interval)

    def create(
        self,
        stack_set: StackSet,
        options: GroupOptions,
        grafting: GraftingConfig | None,
        refresh: RefreshPolicy,
    ) -> Diagonal:
        """See `PreconditionerConfig`; ``refresh`` is not used.

        Raises:
            ValueError: Grafting was asked for.
        """
        refuse_grafting(self, grafting, "a diagonal method has its own length")
        return Diagonal(stack_set, options, self._method(stack_set, options))

    def _method(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        raise NotImplementedError


@dataclass(frozen=True)
class SGDConfig(_DiagonalConfig):
    """``P = f``: the filtered gradient; ``betas[0] = 0`` leaves the gradient as it is."""

    def _method(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        return SGDGrafting().create(stack_set, options)


@dataclass(frozen=True)
class AdaGradConfig(_DiagonalConfig):
    """``P = f / (sqrt(sum of G^2) + eps)``.

    Args:
        eps: Added to the root, positive; None takes the group's.

    Raises:
        ValueError: ``eps`` is not positive.
    """

    eps: float | None = None

    def __post_init__(self) -> None:
        check_beta2_and_eps(self, None, self.eps)

    def _method(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        return AdaGradGrafting(self.eps).create(stack_set, options)


@dataclass(frozen=True)
class RMSpropConfig(_DiagonalConfig):
    """``P = f / (sqrt(average of G^2) + eps)`` without bias correction of the average.

    Args:
        beta2: Decay of the average, in (0, 1]; None takes ``betas[1]``.
        eps: Added to the root, positive; None takes the group's.

    Raises:
        ValueError: ``beta2`` or ``eps`` is out of range.
    """

    beta2: float | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        check_beta2_and_eps(self, self.beta2, self.eps)

    def _method(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        return RMSpropGrafting(self.beta2, self.eps).create(stack_set, options)


@dataclass(frozen=True)
class AdamConfig(_DiagonalConfig):
    """``P = f / (sqrt(average of G^2 / weight) + eps)``: Adam, and AdamW with decoupled decay.

    ``beta3 = betas[0] ** 2`` in the group makes it NAdam, but for the bias correction of the first steps,
    where NAdam divides the gradient and the average before it by weights of their own; see
    ``momentum_normaliser``.

    Args:
        beta2: Decay of the average, in (0, 1]; None takes ``betas[1]``.
        eps: Added to the root, positive; None takes the group's.

    Raises:
        ValueError: ``beta2`` or ``eps`` is out of range.
    """

    beta2: float | None = None
    eps: float | None = None

    def __post_init__(self) -> None:
        check_beta2_and_eps(self, self.beta2, self.eps)

    def _method(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        return AdamGrafting(self.beta2, self.eps).create(stack_set, options)


@dataclass(frozen=True)
class RowWiseAdaGradConfig(_DiagonalConfig):
    """AdaGrad with one accumulator per row, for embedding tables.

        V_r <- V_r + mean over the row of G^2,      P = f / (sqrt(V) + eps)

    A row is an index of the first axis of a block: rows stay whole as long as they are no longer
    than ``max_block_size``. State: one number per row, and the filtered gradient unless ``betas[0]``
    is 0, which is what a table that is large for a reason should have.

    Args:
        decay: 1 sums; less than 1 averages, in (0, 1]; None takes ``betas[1]``.
        eps: Added to the root, positive; None takes the group's.

    Raises:
        ValueError: ``decay`` or ``eps`` is out of range.
    """

    decay: float | None = 1.0
    eps: float | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        if self.decay is not None:
            check_range(owner, "decay", self.decay, low=0.0, high=1.0, low_open=True)
        check_beta2_and_eps(self, None, self.eps)

    def _method(self, stack_set: StackSet, options: GroupOptions) -> DiagonalMethod:
        decay = options.betas[1] if self.decay is None else self.decay
        eps = options.eps if self.eps is None else self.eps
        return _RowWiseScaling(stack_set, decay, eps, bias_correction=options.bias_correction)


class Diagonal:
    """State and step of a diagonal method for one set of stacks."""

    def __init__(self, stack_set: StackSet, options: GroupOptions, method: DiagonalMethod) -> None:
        """Put the filter before the method.

        Args:
            stack_set: Geometry.
            options: Of the parameter group.
            method: Made for ``stack_set``.
        """
        self._stack_set = stack_set
        self.filter = GradientFilter(stack_set, options)
        self.method = method

    def step(self, gradients: StackedGradients, step: int) -> Direction:
        """See `Preconditioner`."""
        del step
        filtered = self.method.absorb(gradients, self.filter, in_place=True)
        gradients.free_stacks()  # before the direction, which needs memory of its own
        return self.method.direction(filtered)

    def state(self) -> StackState:
        """See `Preconditioner`."""
        parts = {"filter": self.filter.state(), "second_moment": self.method.state()}
        return merge_states(len(self._stack_set), parts)


class _RowWiseScaling:
    """``f / (sqrt(V / weight) + eps)`` with one V per row."""

    second_moment = None  # not one number per element, so nobody can share its weight

    def __init__(
        self, stack_set: StackSet, decay: float, eps: float, *, bias_correction: bool
    ) -> None:
        self._stack_set = stack_set
        self._decay = decay
        self._gain = 1.0 if decay == 1.0 else 1.0 - decay
        self._eps = eps
        self._corrects = bias_correction and decay < 1.0
        # (N, rows, 1, ..., 1), so that it broadcasts over its stack.
        self.rows = [
            torch.zeros(
                *layout.shape[:2], *[1] * (len(layout.shape) - 2),
                dtype=stack_set.dtype, device=stack_set.device,
            )
            for layout in stack_set.layouts
        ]  # fmt: skip
        self.weight = stack_set.block_vector()

    def absorb(
        self,
        gradients: StackedGradients,
        gradient_filter: GradientFilter,
        *,
        ahead: bool = True,
        in_place: bool = False,
    ) -> Direction:
        decaying = gradients.decaying(corrected=self._corrects)
        decay_stacks(self._stack_set, self.rows, self._decay, decaying)
        for rows, stack in zip(self.rows, gradients.stacks, strict=True):
            per_row = stack.reshape(*stack.shape[:2], -1)
            norms = torch.linalg.vector_norm(per_row, dim=-1).view(rows.shape)
            rows.addcmul_(norms, norms, value=self._gain / per_row.shape[-1])
        absorb_weight(self.weight, self._decay, self._gain, gradients)
        return gradient_filter.filter(gradients)

    def direction(self, filtered: Direction) -> Direction:
        denominators = torch._foreach_sqrt(self.rows)
        if not self._corrects:
            torch._foreach_add_(denominators, self._eps)
            return filtered._replace(stacks=list(torch._foreach_div(filtered.stacks, denominators)))
        # f / (sqrt(V / w) + eps) = f / (sqrt(V) + eps sqrt(w)) * sqrt(w)
        root = nonzero_weight(self.weight).sqrt()
        torch._foreach_add_(denominators, self._stack_set.split(root * self._eps))
        stacks = torch._foreach_div(filtered.stacks, denominators)
        return Direction(list(stacks), filtered.scale * root)

    def state(self) -> StackState:
        weights = self.weight.split(self._stack_set.sizes)
        return stacked_state(len(self._stack_set), {"rows": self.rows, "weight": weights})
