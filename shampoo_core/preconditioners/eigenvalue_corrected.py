"""Eigenvalue-corrected Shampoo (SOAP): Adam in the eigenbasis of Shampoo's factors.

    A_i <- beta2 A_i + (1 - beta2) Gram_i(G)
    Q_i  = eigenvectors of A_i                                     at refreshes
    g    = G x_1 Q_1 x_2 Q_2 ...
    M, D <- averages of g and g^2                                  in the eigenbasis
    P    = (M / (sqrt(D) + eps)) x_1 Q_1^T x_2 Q_2^T ...

The averages live in the eigenbasis, so that a step costs three two-sided products instead of four.
They are carried over when the basis turns, see `shampoo_core.preconditioners.basis_change`.

Source: Vyas et al. 2024 (arXiv 2409.11321), Algorithm 3; Eschenhagen et al. 2025 (arXiv 2506.03595).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import partial

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
from shampoo_core.grafting import GraftingConfig, SecondMomentScaling
from shampoo_core.preconditioners.axes import (
    SIDES,
    Sides,
    axes_with_factor,
    preconditioned_axes,
)
from shampoo_core.preconditioners.basis_change import (
    SECOND_MOMENTS,
    SecondMoments,
    turn_first_moment,
    turn_second_moment,
)
from shampoo_core.preconditioners.batches import Solve
from shampoo_core.preconditioners.checks import check_basis_solver, refuse_grafting
from shampoo_core.preconditioners.eigenbases import eigenbases
from shampoo_core.preconditioners.factor_matrices import FactorMatrices
from shampoo_core.refresh import FactorSlice, RefreshPolicy, whole_stacks
from shampoo_core.solvers import BasisSolver, EighSolver
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states
from shampoo_core.statistics import KroneckerFactors


@dataclass(frozen=True)
class EigenvalueCorrectedConfig:
    """Adam in the eigenbasis of Shampoo's factors.

    Args:
        solver: Computes the eigenbases, by descending eigenvalue.
        exponent: Of the second moment in the eigenbasis; 1/2 is Adam's root.
        second_moments: What becomes of D when the basis turns: ``"transport"`` carries it into the
            new basis, ``"permute"`` lets its numbers follow their columns, ``"keep"`` leaves them.
        lagged: Whether factors and bases know past gradients only, as in the published SOAP code:
            the group's first gradients make the first bases and no step, and later ones reach the
            factors after their own step. A parameter that starts later moves at once, as by Adam until
            its first refresh.
        factor_decay: Decay of the factors per step, 1 sums; None takes ``betas[1]``.
        statistics_interval: Steps from one update of the factors to the next; a parameter's first
            gradient counts at any step.
        precondition_vectors: Whether blocks with one axis get a basis too; by default they are
            stepped by Adam.
        sides: Which axes of a block with several get a factor: ``"all"``, or one-sided on its
            ``"first"`` or ``"last"``.
        max_factor_dimension: Longer axes get no factor; for ``max_block_size=None``.
        storage: How factors, bases and moments are kept: ``"dense"``; ``"packed"``, symmetric matrices in
            half the memory without loss; ``"8bit"`` or ``"4bit"``, rounded; see
            `shampoo_core.storage`.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number is out of range.
    """

    solver: BasisSolver = field(default_factory=EighSolver)
    exponent: float = 0.5
    second_moments: SecondMoments = "transport"
    lagged: bool = False
    factor_decay: float | None = None
    statistics_interval: int = 1
    precondition_vectors: bool = False
    sides: Sides = "all"
    max_factor_dimension: int | None = None
    storage: Storage = "dense"

    def __post_init__(self) -> None:
        owner = "EigenvalueCorrectedConfig"
        check_flags(self)
        check_basis_solver(owner, self.solver)
        check_range(owner, "exponent", self.exponent, low=0.0, high=1.0, low_open=True)
        check_choice(owner, "second_moments", self.second_moments, SECOND_MOMENTS)
        if self.factor_decay is not None:
            check_range(owner, "factor_decay", self.factor_decay, low=0.0, high=1.0)
        check_count(owner, "statistics_interval", self.statistics_interval)
        check_choice(owner, "sides", self.sides, SIDES)
        check_count(owner, "max_factor_dimension", self.max_factor_dimension, optional=True)
        check_choice(owner, "storage", self.storage, STORAGES)

    @property
    def default_grafting(self) -> GraftingConfig | None:
        """None: the length is right already."""
        return None

    def block_flops(self, block_shape: Shape, refresh_interval: int) -> float:
        """See `PreconditionerConfig`: Gram matrices, and products into the basis and back."""
        axes = axes_with_factor(
            block_shape,
            precondition_vectors=self.precondition_vectors,
            sides=self.sides,
            max_factor_dimension=self.max_factor_dimension,
        )
        return method_flops(block_shape, [block_shape[a] for a in axes], 3.0, refresh_interval)

    def create(
        self,
        stack_set: StackSet,
        options: GroupOptions,
        grafting: GraftingConfig | None,
        refresh: RefreshPolicy,
    ) -> EigenvalueCorrected:
        """See `PreconditionerConfig`.

        Raises:
            ValueError: Grafting was asked for.
        """
        refuse_grafting(
            self, grafting, "the second moments of the eigenbasis set the length already"
        )
        return EigenvalueCorrected(self, stack_set, options, refresh)


class EigenvalueCorrected:
    """State and step of eigenvalue-corrected Shampoo for one set of stacks."""

    def __init__(
        self,
        config: EigenvalueCorrectedConfig,
        stack_set: StackSet,
        options: GroupOptions,
        refresh: RefreshPolicy,
    ) -> None:
        """Allocate factors (zero), bases (identity), and both moments (zero)."""
        self._config = config
        self._stack_set = stack_set
        self._refresh = refresh
        axes_of = partial(
            preconditioned_axes,
            precondition_vectors=config.precondition_vectors,
            sides=config.sides,
            max_factor_dimension=config.max_factor_dimension,
        )
        axes = axes_of(stack_set)
        self.factors = KroneckerFactors(
            stack_set,
            axes,
            options.betas[1] if config.factor_decay is None else config.factor_decay,
            bias_correction=options.bias_correction,
            interval=config.statistics_interval,
            storage=config.storage,
            all_axes=axes_of(stack_set.whole),
        )
        self.bases = FactorMatrices(
            stack_set,
            self.factors,
            [1.0] * len(axes),
            kind="bases",
            storage=config.storage,
            portion_numel=options.portion_numel,
        )
        self.filter = GradientFilter(stack_set, replace(options, storage=config.storage))
        self.scaling = SecondMomentScaling(
            stack_set,
            options.betas[1],
            options.eps,
            bias_correction=options.bias_correction,
            exponent=config.exponent,
            storage=config.storage,
        )

    def step(self, gradients: StackedGradients, step: int) -> Direction | None:
        """See `Preconditioner`."""
        self.factors.absorb(gradients, step)
        tolerance, lagged = self._refresh.tolerance, self._config.lagged
        if lagged and step == 1:
            self._turn(whole_stacks(self.factors.sizes), 0.0, first=True)
            return None
        if lagged:
            direction = self._direction(gradients)
            self._turn(self.factors.due(self._refresh, step - 1), tolerance, first=False)
            return direction
        first = step <= self._refresh.settled_step
        self._turn(self.factors.due(self._refresh, step), tolerance, first=first)
        return self._direction(gradients)

    def _direction(self, gradients: StackedGradients) -> Direction:
        """Adam's in the eigenbasis, rotated back; in the memory of the gradients as far as that goes."""
        rotated = replace(gradients, stacks=self.bases.multiply(gradients.stacks, in_place=True))
        gradients.free_stacks()
        scaled = self._scaled(rotated)
        stacks = self.bases.multiply(scaled.stacks, transposed=True, in_place=True)
        return scaled._replace(stacks=stacks)

    def _scaled(self, rotated: StackedGradients) -> Direction:
        filtered = self.scaling.absorb(rotated, self.filter, in_place=True)
        rotated.free_stacks()
        return self.scaling.direction(filtered)

    def _turn(self, due: list[FactorSlice], tolerance: float, *, first: bool) -> None:
        """Recompute bases and carry the moments into them."""
        solver = self._config.solver
        stale = self.bases.stale(due, tolerance, first=first, asks=solver.warm_starts)
        for portion, continued in self.bases.rounds(stale, warm_starts=solver.warm_starts):
            solve = eigenbases(solver, continued=continued, may_wait=stale.may_wait)
            self._turn_portion(portion, solve)

    def _turn_portion(self, due: list[FactorSlice], solve: Solve) -> None:
        for change in self.bases.replace(due, solve):
            axis = self.factors.axes[change.where.stack]
            if self.filter.moment is not None:
                turn_first_moment(self.filter.moment, axis, change)
            second_moment = self.scaling.second_moment
            turn_second_moment(second_moment, axis, change, self._config.second_moments)

    def state(self) -> StackState:
        """See `Preconditioner`."""
        return merge_states(
            len(self._stack_set),
            {
                "factors": self.factors.state(),
                "": self.bases.state("bases"),
                "filter": self.filter.state(),
                "second_moment": self.scaling.state(),
            },
        )
