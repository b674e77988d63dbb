"""Shampoo in an old eigenbasis with the eigenvalues of today, factor by factor.

    A_i      <- beta2 A_i + (1 - beta2) Gram_i(G)
    Q_i       = eigenvectors of A_i                                 at refreshes
    lambda_i  = diag(Q_i^T A_i Q_i) / weight                        every step
    P         = f x_i Q_i diag(lambda_i^(-e)) Q_i^T,  e = 1 / (2 order)

with the length of P taken, block by block, from a diagonal method (grafting). It lies between Shampoo,
whose eigenvalues are as old as its roots, and eigenvalue-corrected Shampoo, which measures one
number per element: here a factor of side d has d numbers, and none of them is state. A step costs four
two-sided products (of m x n matrices by m x m and n x n ones), a refresh eigenvectors alone.

Source: the observation that stale eigenvalues hurt more than stale bases is that of Eschenhagen et al.
2025 (arXiv 2506.03595); measuring them per factor is our own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace

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
    ExponentOverride,
    axes_with_factor,
    check_exponents,
    inverse_exponents,
    preconditioned_axes,
    root_limits,
)
from shampoo_core.preconditioners.checks import check_basis_solver, check_regularizers
from shampoo_core.preconditioners.eigenbases import eigenbases
from shampoo_core.preconditioners.factor_matrices import FactorMatrices
from shampoo_core.preconditioners.grafted import Matrices, absorb, precondition
from shampoo_core.refresh import FactorSlice, RefreshPolicy
from shampoo_core.solvers import BasisSolver, EighSolver
from shampoo_core.solvers.base import Regularization
from shampoo_core.solvers.scaling import spectral_power
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states
from shampoo_core.statistics import KroneckerFactors, multiply_along_axes


@dataclass(frozen=True)
class PerFactorCorrectedConfig:
    """Shampoo with eigenvalues measured at every step in the last eigenbasis.

    Args:
        solver: Computes the eigenbases.
        exponent: e of lambda^(-e): one number, or a number per order of the block; None means
            1 / (2 order).
        rank_tolerance: Eigenvalues up to this times the largest are dropped (pseudo-inverse); None
            means dimension times machine epsilon.
        ridge: Added to every (bias-corrected) eigenvalue.
        relative_ridge: As ``ridge``, in units of the factor's largest eigenvalue.
        factor_decay: Decay of the factors per step, 1 sums; None takes ``betas[1]``.
        statistics_interval: Steps from one update of the factors to the next; a parameter's first
            gradient counts at any step.
        precondition_vectors: Whether blocks with one axis get a full matrix too; by default they
            follow the grafting method.
        storage: How factors, bases and moments are kept: ``"dense"``; ``"packed"``, symmetric matrices in
            half the memory without loss; ``"8bit"`` or ``"4bit"``, rounded; see
            `shampoo_core.storage`.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number is out of range.
    """

    solver: BasisSolver = field(default_factory=EighSolver)
    exponent: ExponentOverride = None
    rank_tolerance: float | None = None
    ridge: float = 0.0
    relative_ridge: float = 0.0
    factor_decay: float | None = None
    statistics_interval: int = 1
    precondition_vectors: bool = False
    storage: Storage = "dense"

    def __post_init__(self) -> None:
        owner = "PerFactorCorrectedConfig"
        check_flags(self)
        check_exponents(owner, self.exponent)
        check_basis_solver(owner, self.solver)
        check_regularizers(owner, self.rank_tolerance, self.ridge, self.relative_ridge)
        if self.factor_decay is not None:
            check_range(owner, "factor_decay", self.factor_decay, low=0.0, high=1.0)
        check_count(owner, "statistics_interval", self.statistics_interval)
        check_choice(owner, "storage", self.storage, STORAGES)

    @property
    def default_grafting(self) -> GraftingConfig | None:
        """Adam: without a graft the step length would depend on the dimensions."""
        return AdamGrafting()

    def block_flops(self, block_shape: Shape, refresh_interval: int) -> float:
        """See `PreconditionerConfig`: Gram matrices, products into the basis and back; eigenvalues."""
        axes = axes_with_factor(block_shape, precondition_vectors=self.precondition_vectors)
        sides = [block_shape[axis] for axis in axes]
        eigenvalues = sum(2.0 * side**3 for side in sides)
        return method_flops(block_shape, sides, 3.0, refresh_interval) + eigenvalues

    def create(
        self,
        stack_set: StackSet,
        options: GroupOptions,
        grafting: GraftingConfig | None,
        refresh: RefreshPolicy,
    ) -> PerFactorCorrected:
        """See `PreconditionerConfig`."""
        return PerFactorCorrected(self, stack_set, options, grafting, refresh)


class PerFactorCorrected:
    """State and step of per-factor corrected Shampoo for one set of stacks."""

    def __init__(
        self,
        config: PerFactorCorrectedConfig,
        stack_set: StackSet,
        options: GroupOptions,
        grafting: GraftingConfig | None,
        refresh: RefreshPolicy,
    ) -> None:
        """Allocate factors (zero), bases (identity), the filter and the grafting method."""
        self._config = config
        self._stack_set = stack_set
        self._refresh = refresh
        options = replace(options, storage=config.storage)
        vectors = config.precondition_vectors
        axes = preconditioned_axes(stack_set, precondition_vectors=vectors)
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
            all_axes=preconditioned_axes(stack_set.whole, precondition_vectors=vectors),
        )
        self.bases = FactorMatrices(
            stack_set,
            self.factors,
            [1.0] * len(axes),
            kind="bases",
            storage=config.storage,
            portion_numel=options.portion_numel,
        )
        exponents = inverse_exponents(stack_set, axes, config.exponent, "all")
        self._exponents = self._per_factor(exponents)
        limits = root_limits(stack_set, axes, exponents)
        self._limits: Tensor | None = None
        """(number of all factors, 1); None where powers stay below by themselves."""
        if min(limits, default=math.inf) < math.inf:
            self._limits = self._per_factor(limits)
        sides = self._per_factor([float(axis.dimension) for axis in axes])
        default_tolerance = sides * torch.finfo(stack_set.dtype).eps
        self._regularization = Regularization(
            default_tolerance if config.rank_tolerance is None else config.rank_tolerance,
            config.ridge,
            config.relative_ridge,
        )
        widest = max((axis.dimension for axis in axes), default=0)
        self._padding = torch.arange(widest, device=stack_set.device) >= sides

    def step(self, gradients: StackedGradients, step: int) -> Direction:
        """See `Preconditioner`."""
        self.factors.absorb(gradients, step)
        due = self.factors.due(self._refresh, step)
        # A large refresh needs memory of its own, before the direction takes any.
        ahead = self.factors.are_few(due)
        filtered = absorb(self.grafting, gradients, self.filter, ahead=ahead)
        if due:
            self._refresh_bases(due, first=step <= self._refresh.settled_step)
        grafted = filtered if self.grafting is None else self.grafting.direction(filtered)
        if step < self._refresh.first_step:
            return grafted
        return self._precondition(filtered, grafted)

    def _refresh_bases(self, due: list[FactorSlice], *, first: bool) -> None:
        solver = self._config.solver
        stale = self.bases.stale(
            due,
            self._refresh.tolerance,
            new_too=True,  # until then the block follows the grafting method
            first=first,
            asks=True,
        )
        for portion, continued in self.bases.rounds(stale, warm_starts=solver.warm_starts):
            solve = eigenbases(solver, continued=continued, may_wait=stale.may_wait)
            self.bases.refresh(portion, solve)

    def _precondition(self, filtered: Direction, grafted: Direction) -> Direction:
        powers = self._inverse_powers()

        def multiply(index: int, stack: Tensor, bases: Matrices, out: Tensor | None) -> Tensor:
            rotated = multiply_along_axes(stack, bases, out)
            return multiply_along_axes(rotated, self._scaled(index, bases, powers), rotated)

        ready, by_stack = self.bases.ready, self.bases.by_stack()
        return precondition(self._stack_set, filtered, grafted, ready, by_stack, multiply)

    def _scaled(
        self, stack: int, bases: list[Tensor | None], powers: list[Tensor]
    ) -> list[Tensor | None]:
        """``diag(lambda_i^(-e)) Q_i^T`` per axis of a stack: scales in the eigenbasis and rotates back."""
        scaled: list[Tensor | None] = [None] * len(bases)
        for axis, power in zip(self.factors.axes, powers, strict=True):
            basis = bases[axis.axis] if axis.stack == stack else None
            if basis is not None:
                scaled[axis.axis] = (basis * power[:, None, :]).mT
        return scaled

    def _inverse_powers(self) -> list[Tensor]:
        """``lambda^(-e)``, (N, d) per preconditioned axis, one for factors that hold nothing yet."""
        diagonals = self.factors.diagonals(self.bases.read_all())
        if not diagonals:
            return []
        # Side by side, filled up with zeros: a few operations for all axes instead of a dozen each.
        sizes = self.factors.sizes
        counts = [size.num_factors for size in sizes]
        together = self._padding.new_zeros(self._padding.shape, dtype=self._stack_set.dtype)
        slots = [
            part[:, : size.dimension]
            for part, size in zip(together.split(counts), sizes, strict=True)
        ]
        torch._foreach_copy_(slots, diagonals)
        powers, accepted = spectral_power(
            together,
            torch.ones_like(together[:, 0]),
            self._exponents,
            self._regularization,
            padding=self._padding,
        )
        powers = self._limited(torch.where(accepted[:, None], powers, 1.0))
        return [
            part[:, : size.dimension]
            for part, size in zip(powers.split(counts), sizes, strict=True)
        ]

    def _limited(self, powers: Tensor) -> Tensor:
        """Powers with which no direction overflows: scaled down where another method lends the length."""
        if self._limits is None:
            return powers
        excess = powers.amax(-1, keepdim=True) / self._limits
        if self.grafting is not None:
            return powers / excess.clamp_min_(1.0)
        return torch.where(excess < 1.0, powers, 1.0)

    def _per_factor(self, numbers: list[float]) -> Tensor:
        """(number of all factors, 1): each factor's number, given those of the factor stacks."""
        repeated = [
            number
            for number, size in zip(numbers, self.factors.sizes, strict=True)
            for _ in range(size.num_factors)
        ]
        dtype, device = self._stack_set.dtype, self._stack_set.device
        return torch.tensor(repeated, dtype=dtype, device=device).view(-1, 1)

    def state(self) -> StackState:
        """See `Preconditioner`."""
        parts = {
            "factors": self.factors.state(),
            "": self.bases.state("bases"),
            "filter": self.filter.state(),
        }
        if self.grafting is not None:
            parts["grafting"] = self.grafting.state()
        return merge_states(len(self._stack_set), parts)
