"""KL-Shampoo: gradients whitened by the Kronecker-factored Gaussian that fits them best.

    S_i, Q_i, lambda_i    factors, eigenbases and eigenvalues, see `shampoo_core.preconditioners.kl_factors`
    M <- average of G x_1 Q_1 x_2 Q_2 ...                          in the eigenbasis
    P  = (M / (prod_i sqrt(lambda_i) + eps)) x_1 Q_1^T x_2 Q_2^T ...

This is S_1^(-1/2) M S_2^(-1/2) for a matrix, exponent 1/2 on every axis: the product of the factors
estimates the covariance of the gradient itself, which is why no step length has to be borrowed.
A step costs three two-sided products; nothing of the size of the block is kept but M.

The variant of facebookresearch/optimizers, Shampoo with roots whose factors are whitened by each other's
stored roots, is ``ShampooConfig(statistics="whitened")``.

Source: Lin et al. 2025 (arXiv 2509.03378).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch

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
from shampoo_core.grafting import GraftingConfig
from shampoo_core.preconditioners.axes import axes_with_factor, preconditioned_axes
from shampoo_core.preconditioners.base import Preconditioner
from shampoo_core.preconditioners.basis_change import (
    SECOND_MOMENTS,
    SecondMoments,
    turn_first_moment,
)
from shampoo_core.preconditioners.checks import check_basis_solver, refuse_grafting
from shampoo_core.preconditioners.factor_matrices import Replacement
from shampoo_core.preconditioners.kl_factors import KLFactors
from shampoo_core.preconditioners.parts import with_adam_for_rest
from shampoo_core.refresh import FactorSlice, RefreshPolicy, whole_stacks
from shampoo_core.solvers import BasisSolver, OrthogonalIterationSolver
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states
from shampoo_core.statistics import FactorAxis


@dataclass(frozen=True)
class KLShampooConfig:
    """KL-Shampoo on matrices and tensors, Adam with the group's ``betas`` and ``eps`` on vectors.

    Args:
        solver: Computes the eigenbases; by default one orthogonal iteration from the last one.
        second_moments: What becomes of second moments that are kept in a basis when it turns:
            ``"transport"`` carries them into the new one, ``"permute"`` lets them follow their
            columns, ``"keep"`` leaves their numbers as they are, as the published code does.
        lagged: Whether a step knows past gradients only, as in the published code: the group's first
            gradients make the first bases and no step, and later ones reach the factors after their own
            step. A parameter that starts later moves at once, in the identity until its first refresh.
        initial_eigenvalue: Of all axes after the first gradient, positive.
        largest_scale: Limit of lambda^(-1/2), positive; None means max(10, min(d, 4000)) on an axis
            of length d.
        factor_decay: Decay of factors and eigenvalues per step, 1 sums; None takes ``betas[1]``.
        statistics_interval: Steps from one update of factors and eigenvalues to the next; a
            parameter's first gradient counts at any step.
        precondition_vectors: Whether blocks with one axis get a factor too.
        storage: How factors, bases and moments are kept: ``"dense"``; ``"packed"``, symmetric matrices in
            half the memory without loss; ``"8bit"`` or ``"4bit"``, rounded; see
            `shampoo_core.storage`.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number is out of range.
    """

    solver: BasisSolver = field(default_factory=OrthogonalIterationSolver)
    second_moments: SecondMoments = "transport"
    lagged: bool = False
    initial_eigenvalue: float = 0.1
    largest_scale: float | None = None
    factor_decay: float | None = None
    statistics_interval: int = 1
    precondition_vectors: bool = False
    storage: Storage = "dense"

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_flags(self)
        check_basis_solver(owner, self.solver)
        check_choice(owner, "second_moments", self.second_moments, SECOND_MOMENTS)
        check_range(
            owner, "initial_eigenvalue", self.initial_eigenvalue,
            low=0.0, low_open=True, high_open=True,
        )  # fmt: skip
        if self.largest_scale is not None:
            check_range(
                owner, "largest_scale", self.largest_scale,
                low=0.0, high=torch.finfo(torch.float32).max ** 0.5, low_open=True,
            )  # fmt: skip
        if self.factor_decay is not None:
            check_range(owner, "factor_decay", self.factor_decay, low=0.0, high=1.0)
        check_count(owner, "statistics_interval", self.statistics_interval)
        check_choice(owner, "storage", self.storage, STORAGES)

    @property
    def default_grafting(self) -> GraftingConfig | None:
        """None: the length is right already."""
        return None

    def block_flops(self, block_shape: Shape, refresh_interval: int) -> float:
        """See `PreconditionerConfig`: Gram matrices, and products into the basis and back."""
        axes = axes_with_factor(block_shape, precondition_vectors=self.precondition_vectors)
        return method_flops(block_shape, [block_shape[a] for a in axes], 3.0, refresh_interval)

    def create(
        self,
        stack_set: StackSet,
        options: GroupOptions,
        grafting: GraftingConfig | None,
        refresh: RefreshPolicy,
    ) -> Preconditioner:
        """See `PreconditionerConfig`.

        Raises:
            ValueError: Grafting was asked for.
        """
        refuse_grafting(self, grafting, "its eigenvalues set the length already")
        axes = preconditioned_axes(stack_set, precondition_vectors=self.precondition_vectors)
        all_axes = preconditioned_axes(
            stack_set.whole, precondition_vectors=self.precondition_vectors
        )
        return with_adam_for_rest(
            stack_set,
            [axis.stack for axis in axes],
            lambda mine: self._create_method(mine, options, refresh),
            replace(options, storage=self.storage),
            refresh,
            # A rank without a matrix does as those do that have one.
            idles_first=self.lagged and bool(all_axes),
        )

    def _create_method(
        self, stack_set: StackSet, options: GroupOptions, refresh: RefreshPolicy
    ) -> Preconditioner:
        return KLShampoo(self, stack_set, options, refresh)


class KLShampoo:
    """State and step of KL-Shampoo for one set of stacks, all of which have factors."""

    def __init__(
        self,
        config: KLShampooConfig,
        stack_set: StackSet,
        options: GroupOptions,
        refresh: RefreshPolicy,
    ) -> None:
        """Allocate factors (zero), bases (identity), eigenvalues and the momentum (zero)."""
        self._lagged = config.lagged
        self._stack_set = stack_set
        self._eps = options.eps
        self._refresh = refresh
        vectors = config.precondition_vectors
        self.factors = KLFactors(
            stack_set,
            preconditioned_axes(stack_set, precondition_vectors=vectors),
            options.betas[1] if config.factor_decay is None else config.factor_decay,
            all_axes=preconditioned_axes(stack_set.whole, precondition_vectors=vectors),
            interval=config.statistics_interval,
            initial_eigenvalue=config.initial_eigenvalue,
            largest_scale=config.largest_scale,
            second_moments=config.second_moments,
            solver=config.solver,
            storage=config.storage,
            portion_numel=options.portion_numel,
        )
        self.filter = GradientFilter(stack_set, replace(options, storage=config.storage))

    def step(self, gradients: StackedGradients, step: int) -> Direction | None:
        """See `Preconditioner`."""
        rotated = self._rotated(gradients)
        if not self._lagged:
            self.factors.absorb(rotated, step)
            first = step <= self._refresh.settled_step
            if self._turn(self._due(step), self._refresh.tolerance, first=first):
                rotated = self._rotated(gradients)
            return self._direction(rotated)
        if step == 1:
            self.factors.absorb(rotated, step)
            self._turn(whole_stacks(self.factors.factors.sizes), 0.0, first=True)
            return None
        direction = self._direction(rotated)
        self.factors.absorb(rotated, step)
        self._turn(self._due(step - 1), self._refresh.tolerance, first=False)
        return direction

    def _rotated(self, gradients: StackedGradients) -> StackedGradients:
        return replace(gradients, stacks=self.factors.bases.multiply(gradients.stacks))

    def _due(self, step: int) -> list[FactorSlice]:
        return self.factors.factors.due(self._refresh, step)

    def _turn(self, due: list[FactorSlice], tolerance: float, *, first: bool) -> bool:
        """Recompute bases, carry over what is kept in them, and say whether any has turned."""
        return bool(due) and self.factors.refresh(due, tolerance, self._carry_over, first=first)

    def _carry_over(self, axis: FactorAxis, change: Replacement) -> None:
        if self.filter.moment is not None:
            turn_first_moment(self.filter.moment, axis, change)

    def _direction(self, rotated: StackedGradients) -> Direction:
        scaled = self._scaled(rotated)
        stacks = self.factors.bases.multiply(scaled.stacks, transposed=True, in_place=True)
        return scaled._replace(stacks=stacks)

    def _scaled(self, rotated: StackedGradients) -> Direction:
        """The direction in the eigenbasis."""
        filtered = self.filter.filter(rotated)
        denominators = self.factors.root_products()
        torch._foreach_add_(denominators, self._eps)
        return filtered._replace(stacks=list(torch._foreach_div(filtered.stacks, denominators)))

    def state(self) -> StackState:
        """See `Preconditioner`."""
        parts = {"": self.factors.state(), "filter": self.filter.state()}
        return merge_states(len(self._stack_set), parts)
