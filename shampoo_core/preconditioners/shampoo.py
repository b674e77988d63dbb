"""Shampoo with stored roots.

    A_i <- beta2 A_i + (1 - beta2) Gram_i(G)
    X_i  = (A_i / weight)^(-e),  e = 1 / (2 order)           at refreshes
    P    = f x_1 X_1 x_2 X_2 ...                              f is the filtered gradient

with the length of P taken, block by block, from a diagonal method (grafting).

With ``statistics="whitened"`` the factor of an axis is measured on gradients that the other axes' roots
have whitened already, the stationarity condition of KL-Shampoo; `shampoo_core.preconditioners.kl` is
that method in full.

Source: Gupta et al. 2018 (arXiv 1802.09568), Algorithms 1 and 2; Anil et al. 2020 (arXiv 2002.09018);
Shi et al. 2023 (arXiv 2309.06497); whitening: Lin et al. 2025 (arXiv 2509.03378).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal, get_args

import torch
from torch import Tensor

from shampoo_core.blocking import Shape
from shampoo_core.config import (
    STORAGES,
    GroupOptions,
    Storage,
    check_choice,
    check_count,
    check_flags,
    check_range,
)
from shampoo_core.costs import method_flops
from shampoo_core.filtering import Direction, GradientFilter
from shampoo_core.gradients import StackedGradients
from shampoo_core.grafting import AdamGrafting, GraftingConfig
from shampoo_core.preconditioners.axes import (
    SIDES,
    ExponentOverride,
    Sides,
    axes_with_factor,
    check_exponents,
    inverse_exponents,
    preconditioned_axes,
    root_limits,
)
from shampoo_core.preconditioners.batches import Batch, Solution
from shampoo_core.preconditioners.checks import (
    check_default_exponents,
    check_regularizers,
    check_root_solver,
)
from shampoo_core.preconditioners.factor_matrices import FactorMatrices
from shampoo_core.preconditioners.grafted import Matrices, absorb, precondition
from shampoo_core.preconditioners.roots import limited, scale_by_trace
from shampoo_core.refresh import FactorSlice, RefreshPolicy
from shampoo_core.solvers import EighSolver, RootResult, RootSolver
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states
from shampoo_core.statistics import (
    FactorAxis,
    KroneckerFactors,
    RowsOf,
    multiply_along_axes,
    unfold,
)

Statistics = Literal["gram", "whitened", "whitened_mean"]

WHITENING_RIDGE = 1e-6
"""Relative to the largest eigenvalue; several times what float32 rounds it by."""


@dataclass(frozen=True)
class ShampooConfig:
    """Shampoo with stored inverse roots.

    Args:
        solver: Computes the inverse roots.
        exponent: e of A^(-e): one number, or a number per order of the block; None means
            1 / (2 order), of axes that have a factor: 1/2 one-sided.
        rank_tolerance: Eigenvalues up to this times the largest are dropped (pseudo-inverse); None
            means dimension times machine epsilon.
        ridge: Added to every (bias-corrected) factor before the root.
        relative_ridge: As ``ridge``, in units of the factor's largest eigenvalue.
        trace_scaling: c of A * trace(A)^(-c) before the root, in [0, 1]; 0 is off.
        factor_decay: Decay of the factors per step, 1 sums; None takes ``betas[1]``.
        statistics: Of which gradients the factor of an axis is the second moment: ``"gram"`` the raw
            ones; ``"whitened"`` multiplied by the stored roots of the other axes; ``"whitened_mean"``
            also divided by the product of the other dimensions. For whitening proper the exponent has
            to be 1/2. Roots that whiten are not truncated: without a ridge they get a relative one of
            1e-6.
        statistics_interval: Steps from one update of the factors to the next; a parameter's first
            gradient counts at any step.
        precondition_vectors: Whether blocks with one axis get a full matrix too; by default they
            follow the grafting method.
        sides: Which axes of a block with several get a factor: ``"all"``, or one-sided on its
            ``"first"`` or ``"last"``.
        max_factor_dimension: Longer axes get no factor; for ``max_block_size=None``.
        storage: How factors, roots and moments are kept: ``"dense"``; ``"packed"``, symmetric matrices in
            half the memory without loss; ``"8bit"`` or ``"4bit"``, rounded; see
            `shampoo_core.storage`.

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
    statistics: Statistics = "gram"
    statistics_interval: int = 1
    precondition_vectors: bool = False
    sides: Sides = "all"
    max_factor_dimension: int | None = None
    storage: Storage = "dense"

    def __post_init__(self) -> None:
        owner = "ShampooConfig"
        check_flags(self)
        check_exponents(owner, self.exponent)
        check_root_solver(owner, self.solver, self.exponent)
        check_regularizers(owner, self.rank_tolerance, self.ridge, self.relative_ridge)
        check_choice(owner, "statistics", self.statistics, get_args(Statistics))
        if self.statistics != "gram" and self.rank_tolerance is not None:
            raise ValueError(
                f"{owner}: statistics={self.statistics!r} with rank_tolerance={self.rank_tolerance}: what "
                "whitens must not be truncated, for gradients along dropped directions would never be "
                "seen; give ridge or relative_ridge instead"
            )
        check_range(owner, "trace_scaling", self.trace_scaling, low=0.0, high=1.0)
        if self.factor_decay is not None:
            check_range(owner, "factor_decay", self.factor_decay, low=0.0, high=1.0)
        check_count(owner, "statistics_interval", self.statistics_interval)
        check_choice(owner, "sides", self.sides, SIDES)
        check_count(owner, "max_factor_dimension", self.max_factor_dimension, optional=True)
        check_choice(owner, "storage", self.storage, STORAGES)

    @property
    def default_grafting(self) -> GraftingConfig | None:
        """Adam: without a graft the step length would depend on the dimensions."""
        return AdamGrafting()

    def block_flops(self, block_shape: Shape, refresh_interval: int) -> float:
        """See `PreconditionerConfig`: Gram matrices and preconditioning."""
        axes = axes_with_factor(
            block_shape,
            precondition_vectors=self.precondition_vectors,
            sides=self.sides,
            max_factor_dimension=self.max_factor_dimension,
        )
        return method_flops(block_shape, [block_shape[a] for a in axes], 2.0, refresh_interval)

    def axes(self, stack_set: StackSet) -> list[FactorAxis]:
        """The axes of a set of stacks that get a factor."""
        return preconditioned_axes(
            stack_set,
            precondition_vectors=self.precondition_vectors,
            sides=self.sides,
            max_factor_dimension=self.max_factor_dimension,
        )

    def create(
        self,
        stack_set: StackSet,
        options: GroupOptions,
        grafting: GraftingConfig | None,
        refresh: RefreshPolicy,
    ) -> Shampoo:
        """See `PreconditionerConfig`.

        Raises:
            ValueError: The refresh policy tests eigenvectors and the solver finds none, or it cannot do
                an exponent that a block needs.
        """
        whole = stack_set.whole
        check_default_exponents(
            "ShampooConfig", self.solver, whole, self.axes(whole), self.exponent, self.sides
        )
        if refresh.tolerance > 0.0 and not self.solver.finds_eigenvectors:
            raise ValueError(
                f"ShampooConfig: refresh={refresh!r} tests old eigenvectors, which "
                f"solver={self.solver!r} does not find; use EighSolver or another refresh"
            )
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
        axes = config.axes(stack_set)
        options = replace(options, storage=config.storage)
        self.filter = GradientFilter(stack_set, options)
        self.grafting = None if grafting is None else grafting.create(stack_set, options)
        self.factors = KroneckerFactors(
            stack_set,
            axes,
            options.betas[1] if config.factor_decay is None else config.factor_decay,
            bias_correction=options.bias_correction,
            interval=config.statistics_interval,
            companion=None if self.grafting is None else self.grafting.second_moment,
            storage=config.storage,
            all_axes=config.axes(stack_set.whole),
        )
        exponents = inverse_exponents(stack_set, axes, config.exponent, config.sides)
        create = partial(
            FactorMatrices,
            stack_set,
            self.factors,
            exponents,
            storage=config.storage,
            portion_numel=options.portion_numel,
            limits=root_limits(stack_set, axes, exponents),
        )
        self._root_exponents = exponents
        self.roots = create(kind="roots")
        self.bases: FactorMatrices | None = None
        """What the roots were made in; kept only where the refresh policy tests it or the solver
        continues from it."""
        if refresh.tolerance > 0.0 or config.solver.warm_starts:
            self.bases = create(kind="bases")

    def step(self, gradients: StackedGradients, step: int) -> Direction:
        """See `Preconditioner`."""
        self.factors.absorb(gradients, step, self._rows_of)
        due = self.factors.due(self._refresh, step)
        # A large refresh needs memory of its own, before the direction takes any.
        ahead = self.factors.are_few(due)
        filtered = absorb(self.grafting, gradients, self.filter, ahead=ahead)
        if due:
            self._refresh_roots(due, first=step <= self._refresh.settled_step)
        grafted = filtered if self.grafting is None else self.grafting.direction(filtered)
        if step < self._refresh.first_step:
            return grafted
        ready, by_stack = self._tested.ready, self.roots.by_stack()
        return precondition(self._stack_set, filtered, grafted, ready, by_stack, _multiply)

    @property
    def _tested(self) -> FactorMatrices:
        """What a refresh asks which factors are due; bases are accepted with their roots."""
        return self.roots if self.bases is None else self.bases

    def _rows_of(self, gradients: StackedGradients) -> RowsOf | None:
        """What the factors are measured on; None for the gradients themselves."""
        if self._config.statistics == "gram":
            return None

        def whitened_rows(axis: FactorAxis) -> Tensor:
            others = self.roots.of_stack(axis.stack)
            others[axis.axis] = None
            rows = unfold(multiply_along_axes(gradients.stacks[axis.stack], others), axis.axis)
            means = self._config.statistics == "whitened_mean"
            return rows * rows.shape[-1] ** -0.5 if means else rows

        return whitened_rows

    def _refresh_roots(self, due: list[FactorSlice], *, first: bool) -> None:
        solver = self._config.solver
        stale = self._tested.stale(
            due,
            self._refresh.tolerance,
            new_too=True,
            first=first,
            asks=True,
            too_old=self._wakes if self._truncates else None,
        )
        if not stale.may_wait:
            solver = solver.without_fallback()
        for portion, continued in self._tested.rounds(stale, warm_starts=solver.warm_starts):
            if self.bases is None:
                self.roots.refresh(portion, partial(self._solve, solver))
            else:
                self._refresh_with_bases(self.bases, portion, solver, continued=continued)

    @property
    def _truncates(self) -> bool:
        """Whether roots are zero along directions that had no gradient."""
        return self._relative_ridge == 0.0 and self._config.ridge == 0.0

    @property
    def _relative_ridge(self) -> float:
        """The setting's; whitening by roots that are zero somewhere would never see a gradient there."""
        config = self._config
        if config.statistics == "gram" or config.ridge > 0.0 or config.relative_ridge > 0.0:
            return config.relative_ridge
        return WHITENING_RIDGE

    def _wakes(self, where: FactorSlice, basis: Tensor, diagonals: Tensor) -> Tensor:
        """Whether gradients have come along directions that the root dropped: see `TooOld`.

        A root that nobody renews would keep weights still there for good.
        """
        exponent = self._root_exponents[where.stack]
        tolerance = self._config.rank_tolerance
        if tolerance is None:
            tolerance = basis.shape[-1] * torch.finfo(basis.dtype).eps
        along = (basis * torch.bmm(self.roots.read_slice(where), basis)).sum(-2)
        # What is kept is at least this much of what the root has along the smallest eigenvalue.
        least = 0.5 * tolerance**exponent * along.amax(-1, keepdim=True)
        is_there = diagonals > tolerance * diagonals.amax(-1, keepdim=True)
        return ((along < least) & is_there).any(-1)

    def _refresh_with_bases(
        self,
        bases: FactorMatrices,
        due: list[FactorSlice],
        solver: RootSolver,
        *,
        continued: bool,
    ) -> None:
        solved: list[Solution] = []

        def solve_in_basis(batches: list[Batch]) -> list[Solution]:
            starts = [batch.read_old() for batch in batches] if continued else None
            results = self._inverse_roots(solver, batches, starts)
            solved.extend(Solution(result.roots, result.accepted) for result in results)
            return [
                Solution(result.eigenvectors, result.accepted)
                for result in results
                if result.eigenvectors is not None
            ]

        known = bases.refresh(due, solve_in_basis)
        self.roots.write(due, solved, known)

    def _solve(self, solver: RootSolver, batches: list[Batch]) -> list[Solution]:
        results = self._inverse_roots(solver, batches, None)
        return [Solution(result.roots, result.accepted) for result in results]

    def _inverse_roots(
        self, solver: RootSolver, batches: list[Batch], starts: Sequence[Tensor] | None
    ) -> list[RootResult]:
        config = self._config
        factors = [batch.factors for batch in batches]
        if config.trace_scaling > 0.0:
            factors = [scale_by_trace(factor, config.trace_scaling) for factor in factors]
        results = solver.inverse_roots(
            factors,
            [batch.exponent for batch in batches],
            rank_tolerance=config.rank_tolerance,
            ridge=config.ridge,
            relative_ridge=self._relative_ridge,
            warm_starts=starts,
            overwrite=True,
        )
        lent = self.grafting is not None
        return [
            limited(result, batch.limit, rescale=lent)
            for batch, result in zip(batches, results, strict=True)
        ]

    def state(self) -> StackState:
        """See `Preconditioner`."""
        parts = {
            "factors": self.factors.state(),
            "": self.roots.state("roots"),
            "filter": self.filter.state(),
        }
        if self.bases is not None:
            parts["basis"] = self.bases.state("matrix")
        if self.grafting is not None:
            parts["grafting"] = self.grafting.state()
        return merge_states(len(self._stack_set), parts)


def _multiply(index: int, stack: Tensor, roots: Matrices, out: Tensor | None) -> Tensor:
    del index
    return multiply_along_axes(stack, roots, out)
