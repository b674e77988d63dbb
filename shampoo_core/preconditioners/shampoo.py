"""Shampoo with stored roots.

    A_i <- beta2 A_i + (1 - beta2) Gram_i(G)
    X_i  = (A_i / weight)^(-e),  e = 1 / (2 order)           at refreshes
    P    = f x_1 X_1 x_2 X_2 ...                              f is the filtered gradient

with the length of P taken, block by block, from a diagonal method (grafting).

Source: Gupta et al. 2018 (arXiv 1802.09568), Algorithms 1 and 2; Anil et al. 2020 (arXiv 2002.09018);
Shi et al. 2023 (arXiv 2309.06497).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from shampoo_core.config import GroupOptions, check_count, check_range
from shampoo_core.filtering import Direction, GradientFilter
from shampoo_core.gradients import StackedGradients
from shampoo_core.grafting import AdamGrafting, GraftingConfig, lend_length
from shampoo_core.preconditioners.axes import (
    ExponentOverride,
    check_exponents,
    exponent_of_order,
    group_due,
    preconditioned_axes,
    slices_of,
    write_slices,
)
from shampoo_core.refresh import FactorSlice, RefreshPolicy
from shampoo_core.solvers import EighSolver, RootSolver
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states
from shampoo_core.statistics import KroneckerFactors, by_axis, multiply_along_axes


@dataclass(frozen=True)
class ShampooConfig:
    """Shampoo with stored inverse roots.

    Args:
        solver: Computes the inverse roots.
        exponent: e of A^(-e): one number, or a number per order of the block; None means
            1 / (2 order).
        rank_tolerance: Eigenvalues up to this times the largest are dropped (pseudo-inverse); None
            means dimension times machine epsilon.
        ridge: Added to every (bias-corrected) factor before the root.
        relative_ridge: As ``ridge``, in units of the factor's largest eigenvalue.
        trace_scaling: c of A * trace(A)^(-c) before the root, in [0, 1]; 0 is off.
        factor_decay: Decay of the factors per step, 1 sums; None takes ``betas[1]``.
        statistics_interval: Steps from one update of the factors to the next.
        precondition_vectors: Whether blocks with one axis get a full matrix too; by default they
            follow the grafting method.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number is out of range.
    """

    solver: RootSolver = field(default_factory=EighSolver)
    exponent: ExponentOverride = None
    rank_tolerance: float | None = None
    ridge: float = 0.0
    relative_ridge: float = 0.0
    trace_scaling: float = 0.0
    factor_decay: float | None = None
    statistics_interval: int = 1
    precondition_vectors: bool = False

    def __post_init__(self) -> None:
        owner = "ShampooConfig"
        check_exponents(owner, self.exponent)
        if self.rank_tolerance is not None:
            check_range(owner, "rank_tolerance", self.rank_tolerance, low=0.0, high=1.0)
        check_range(owner, "ridge", self.ridge, low=0.0)
        check_range(owner, "relative_ridge", self.relative_ridge, low=0.0)
        check_range(owner, "trace_scaling", self.trace_scaling, low=0.0, high=1.0)
        if self.factor_decay is not None:
            check_range(owner, "factor_decay", self.factor_decay, low=0.0, high=1.0)
        check_count(owner, "statistics_interval", self.statistics_interval)

    @property
    def default_grafting(self) -> GraftingConfig | None:
        """Adam: without a graft the step length would depend on the dimensions."""
        return AdamGrafting()

    def create(
        self,
        stack_set: StackSet,
        options: GroupOptions,
        grafting: GraftingConfig | None,
        refresh: RefreshPolicy,
    ) -> Shampoo:
        """See `PreconditionerConfig`."""
        return Shampoo(self, stack_set, options, grafting, refresh)


class Shampoo:
    """State and step of Shampoo for one set of stacks."""

    def __init__(
        self,
        config: ShampooConfig,
        stack_set: StackSet,
        options: GroupOptions,
        grafting: GraftingConfig | None,
        refresh: RefreshPolicy,
    ) -> None:
        """Allocate factors (zero), roots (identity), the filter and the grafting method."""
        self._config = config
        self._stack_set = stack_set
        self._refresh = refresh
        axes = preconditioned_axes(stack_set, precondition_vectors=config.precondition_vectors)
        self.factors = KroneckerFactors(
            stack_set,
            axes,
            options.betas[1] if config.factor_decay is None else config.factor_decay,
            bias_correction=options.bias_correction,
            interval=config.statistics_interval,
        )
        self.roots = [
            torch.eye(axis.dimension, dtype=stack_set.dtype, device=stack_set.device).repeat(
                size.num_factors, 1, 1
            )
            for axis, size in zip(axes, self.factors.sizes, strict=True)
        ]
        self.num_refreshes = self._counters()
        """Per factor, how many refreshes gave it a new root."""
        self.num_failures = self._counters()
        """Per factor, how many refreshes kept the old root because the new one was no good."""
        self._solver_keys = [
            (axis.dimension, exponent_of_order(axis.order, config.exponent, 0.5 / axis.order))
            for axis in axes
        ]
        self.filter = GradientFilter(stack_set, options)
        self.grafting = None if grafting is None else grafting.create(stack_set, options)

    def _counters(self) -> list[Tensor]:
        return [
            torch.zeros(size.num_factors, dtype=torch.int64, device=self._stack_set.device)
            for size in self.factors.sizes
        ]

    def step(self, gradients: StackedGradients, step: int) -> Direction:
        """See `Preconditioner`."""
        self.factors.absorb(gradients, step)
        if self.grafting is not None:
            self.grafting.absorb(gradients)
        due = self._refresh.due(step, self.factors.sizes)
        if due:
            self._refresh_roots(due)
        filtered = self.filter.filter(gradients)
        grafted = filtered if self.grafting is None else self.grafting.direction(filtered)
        if step < self._refresh.first_step:
            return grafted
        direction = self._precondition(filtered, grafted)
        if step < self._refresh.settled_step:
            return self._mix_unready(direction, grafted)
        return direction

    def _precondition(self, filtered: Direction, grafted: Direction) -> Direction:
        stacks = list(grafted.stacks)
        matrices: dict[int, list[Tensor | None]] = {}
        for axis, root in zip(self.factors.axes, self.roots, strict=True):
            matrices.setdefault(axis.stack, [None] * axis.order)[axis.axis] = root
        for index, per_axis in matrices.items():
            stacks[index] = multiply_along_axes(filtered.stacks[index], per_axis)
        if self.grafting is None:
            return Direction(stacks, filtered.scale)
        return lend_length(self._stack_set, stacks, grafted)

    def _mix_unready(self, direction: Direction, grafted: Direction) -> Direction:
        """Use the grafting method's direction for blocks whose first root is still to come."""
        ready = self._ready_blocks()
        mixed = torch._foreach_mul(direction.stacks, self._stack_set.split(direction.scale * ready))
        rest = torch._foreach_mul(
            grafted.stacks, self._stack_set.split(grafted.scale * (1.0 - ready))
        )
        torch._foreach_add_(mixed, rest)
        return Direction(list(mixed), self._stack_set.block_vector(1.0))

    def _ready_blocks(self) -> Tensor:
        """Block vector: 1 where every factor of the block has a root by now, else 0."""
        ready = self._stack_set.block_vector(1.0)
        per_stack = ready.split(self._stack_set.sizes)
        for axis, count in zip(self.factors.axes, self.num_refreshes, strict=True):
            per_stack[axis.stack].mul_(count > 0)
        return ready

    def _refresh_roots(self, due: list[FactorSlice]) -> None:
        config = self._config
        for (_, exponent), group in group_due(due, self._solver_keys).items():
            factors = torch.cat([self.factors.corrected(*item) for item in group])
            if config.trace_scaling > 0.0:
                factors = _scale_by_trace(factors, config.trace_scaling)
            old = torch.cat(slices_of(self.roots, group))
            result = config.solver.inverse_root(
                factors,
                exponent,
                rank_tolerance=config.rank_tolerance,
                ridge=config.ridge,
                relative_ridge=config.relative_ridge,
                warm_start=old,
            )
            accepted = result.accepted
            roots = torch.where(accepted.view(-1, 1, 1), result.roots, old)
            write_slices(self.roots, group, roots)
            counts = [item.stop - item.start for item in group]
            torch._foreach_add_(slices_of(self.num_refreshes, group), accepted.split(counts))
            torch._foreach_add_(slices_of(self.num_failures, group), (~accepted).split(counts))

    def state(self) -> StackState:
        """See `Preconditioner`."""
        count, axes = len(self._stack_set), self.factors.axes
        parts = {
            "factors": self.factors.state(),
            "roots": by_axis(count, axes, "axis", self.roots),
            "refreshes": by_axis(count, axes, "axis", self.num_refreshes),
            "failures": by_axis(count, axes, "axis", self.num_failures),
            "filter": self.filter.state(),
        }
        if self.grafting is not None:
            parts["grafting"] = self.grafting.state()
        return merge_states(count, parts)


def _scale_by_trace(factors: Tensor, exponent: float) -> Tensor:
    """``A * trace(A)^(-exponent)``; a zero factor stays zero."""
    trace = factors.diagonal(dim1=-2, dim2=-1).sum(-1)
    scale = torch.where(trace > 0, trace, torch.ones_like(trace)).pow(-exponent)
    return factors * scale.view(-1, 1, 1)
