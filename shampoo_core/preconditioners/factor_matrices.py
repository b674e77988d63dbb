"""One matrix per Kronecker factor that is recomputed from it now and then: its root, or its basis.

A refresh hands all due factors to the solver in one call, those of one size and exponent as one batch,
keeps the old matrix where the new one was not accepted, and counts both. Nothing here depends on what
the matrices are used for.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_core.config import Storage
from shampoo_core.refresh import FactorSlice
from shampoo_core.solvers import BasisSolver, off_diagonal_ratio
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states
from shampoo_core.statistics import (
    KroneckerFactors,
    by_axis,
    matrices_by_axis,
    multiply_along_axes,
)
from shampoo_core.storage import MatrixKind, matrix_store


class Solution(NamedTuple):
    """The new matrices of a batch of K factors."""

    matrices: Tensor
    """(K, d, d)."""
    accepted: Tensor
    """(K,) bool; the old matrix stays where it is false."""
    order: Tensor | None = None
    """(K, d): the old column that a new one continues; None where columns are not continued."""


class Batch(NamedTuple):
    """Due factors of one size and exponent."""

    factors: Tensor
    """(K, d, d), bias-corrected."""
    exponent: float
    old: Tensor | None
    """(K, d, d): the matrices so far, where these were asked for."""


class Stale(NamedTuple):
    """What a test of due factors found."""

    due: list[FactorSlice]
    """The factors to solve."""
    may_wait: bool
    """Whether the solver may ask the host what failed, to fall back on safer means."""


Solve = Callable[[list[Batch]], list[Solution]]
"""Computes new matrices, batch by batch."""


class Replacement(NamedTuple):
    """What a refresh did to one slice of factors."""

    where: FactorSlice
    old: Tensor
    new: Tensor
    order: Tensor | None
    """See `Solution`."""


class FactorMatrices:
    """Matrices that belong to the factors of a set of stacks, the identity at first."""

    def __init__(
        self,
        stack_set: StackSet,
        factors: KroneckerFactors,
        exponents: Sequence[float],
        *,
        kind: MatrixKind,
        storage: Storage = "dense",
    ) -> None:
        """Allocate one identity per factor.

        Args:
            stack_set: Geometry.
            factors: What the matrices are computed from.
            exponents: Per preconditioned axis; handed to the solver, factors of one size and
                exponent are solved together.
            kind: Of the matrices, ``"roots"`` or ``"bases"``.
            storage: How the matrices are kept.
        """
        self._stack_set = stack_set
        self._factors = factors
        self._exponents = tuple(exponents)
        self._store = matrix_store(stack_set, factors.sizes, storage, kind)
        self.num_refreshes = self._counters()
        """Per factor, how many refreshes gave it a new matrix."""
        self.num_failures = self._counters()
        """Per factor, how many refreshes kept the old matrix because the new one was no good."""

    def read(self, stack: int) -> Tensor:
        """The matrices of a factor stack, (N, d, d); maybe a view, so not to be written to."""
        return self.read_slice(FactorSlice(stack, 0, self._factors.sizes[stack].num_factors))

    def read_slice(self, where: FactorSlice) -> Tensor:
        """Some matrices of a factor stack, (K, d, d); maybe a view, so not to be written to."""
        return self._store.read([where])[0]

    @torch.compiler.disable
    def refresh(self, due: Sequence[FactorSlice], solve: Solve) -> None:
        """Recompute the matrices of the due factors in place.

        Args:
            due: Slices of factor stacks.
            solve: Computes all batches; is not given the old matrices.
        """
        self._replace(self._grouped(due), solve, give_old=False)

    @torch.compiler.disable
    def continue_from_old(self, due: Sequence[FactorSlice], solve: Solve) -> list[Replacement]:
        """As `refresh`, for solvers or averages that go on from the old matrices.

        Returns:
            The old and the new matrices of every slice.
        """
        groups = self._grouped(due)
        replacements = []
        for group, batch, solution in self._replace(groups, solve, give_old=True):
            assert batch.old is not None
            counts = [item.stop - item.start for item in group]
            new = torch.cat(self._store.read(group))  # what was accepted, as it is kept
            order = solution.order
            orders = [None] * len(group) if order is None else order.split(counts)
            replacements += [
                Replacement(*one)
                for one in zip(
                    group, batch.old.split(counts), new.split(counts), orders, strict=True
                )
            ]
        return replacements

    def _replace(
        self, groups: list[tuple[float, list[FactorSlice]]], solve: Solve, *, give_old: bool
    ) -> list[tuple[list[FactorSlice], Batch, Solution]]:
        """Solve the groups and write back what was accepted."""
        due = [item for _, group in groups for item in group]
        if not due:
            return []
        factors = iter(self._factors.corrected(due))
        batches = [
            Batch(
                torch.cat([next(factors) for _ in group]),
                exponent,
                torch.cat(self._store.read(group)) if give_old else None,
            )
            for exponent, group in groups
        ]
        solutions = solve(batches)
        counts = [item.stop - item.start for item in due]
        accepted = torch.cat([solution.accepted for solution in solutions])
        weights = accepted.to(solutions[0].matrices.dtype).split(counts)
        new: list[Tensor] = []
        for (_, group), solution in zip(groups, solutions, strict=True):
            new += solution.matrices.split([item.stop - item.start for item in group])
        self._store.blend(due, new, weights)
        torch._foreach_add_(_slices(self.num_refreshes, due), list(accepted.split(counts)))
        torch._foreach_add_(_slices(self.num_failures, due), list((~accepted).split(counts)))
        return [
            (group, batch, solution)
            for (_, group), batch, solution in zip(groups, batches, solutions, strict=True)
        ]

    @torch.compiler.disable
    def stale(
        self,
        due: Sequence[FactorSlice],
        tolerance: float,
        basis_of: Callable[[FactorSlice], Tensor] | None = None,
    ) -> Stale:
        """The due factors that their bases no longer diagonalise; one host synchronisation.

        It is to be the refresh's only one, so that the solver leaves alone what fails: the old matrix
        stays, and does for an interval more. A factor that has ever failed lets the solver fall back,
        which is learnt together with the result of the test.

        Args:
            due: Slices to test.
            tolerance: Largest relative off-diagonal norm of Q^T A Q that passes; 0 passes nothing,
                and needs no test.
            basis_of: (K, d, d) bases of a slice; None takes the matrices themselves.
        """
        if tolerance <= 0.0 or not due:
            return Stale(list(due), may_wait=True)
        bases = map(basis_of or self.read_slice, due)
        ratios = [
            off_diagonal_ratio(factors, basis)
            for factors, basis in zip(self._factors.corrected(due), bases, strict=True)
        ]
        exceeds = ~(torch.cat(ratios) <= tolerance)
        has_failed = torch.cat(_slices(self.num_failures, due)) > 0
        candidates = [
            FactorSlice(item.stack, i, i + 1) for item in due for i in range(item.start, item.stop)
        ]
        answers = zip(candidates, *torch.stack([exceeds, has_failed]).tolist(), strict=True)
        stale = [(candidate, failed) for candidate, exceeding, failed in answers if exceeding]
        return Stale(_joined([item for item, _ in stale]), any(failed for _, failed in stale))

    def ready_blocks(self) -> Tensor:
        """Block vector: 1 where every factor of the block has been refreshed once, else 0."""
        ready = self._stack_set.block_vector(1.0)
        per_stack = ready.split(self._stack_set.sizes)
        for axis, count in zip(self._factors.axes, self.num_refreshes, strict=True):
            per_stack[axis.stack].mul_(count > 0)
        return ready

    def read_all(self) -> Iterator[Tensor]:
        """The matrices of every factor stack in turn; maybe views, so not to be written to."""
        return self._store.read_all()

    def by_stack(self) -> Iterator[tuple[int, list[Tensor | None]]]:
        """Every stack that has factors, and its matrices, one entry per axis of its blocks.

        Read on the way: what is not kept densely should not be dense all at once.
        """
        axes = zip(self._factors.axes, self.read_all(), strict=True)
        for stack, own in itertools.groupby(axes, key=lambda pair: pair[0].stack):
            matrices: list[Tensor | None] = []
            for axis, matrix in own:
                matrices = matrices or [None] * axis.order
                matrices[axis.axis] = matrix
            yield stack, matrices

    def of_stack(self, stack: int) -> list[Tensor | None]:
        """The matrices of one stack that has factors, as `by_stack` gives them."""
        matrices: list[Tensor | None] = []
        for index, axis in enumerate(self._factors.axes):
            if axis.stack == stack:
                matrices = matrices or [None] * axis.order
                matrices[axis.axis] = self.read(index)
        return matrices

    def multiply(self, stacks: Sequence[Tensor], *, transposed: bool = False) -> list[Tensor]:
        """Multiply every stack by its matrices, or their transposes, along all axes that have one.

        For eigenbases: rotate the stacks into the eigenbasis, or back. Stacks without factors are
        returned as they are.
        """
        result = list(stacks)
        for index, matrices in self.by_stack():
            if transposed:
                matrices = [None if matrix is None else matrix.mT for matrix in matrices]
            result[index] = multiply_along_axes(result[index], matrices)
        return result

    def state(self, name: str) -> StackState:
        """Matrices under ``name``, and the counters."""
        count, axes = len(self._stack_set), self._factors.axes
        return merge_states(
            count,
            {
                name: matrices_by_axis(count, axes, "axis", self._store),
                "refreshes": by_axis(count, axes, "axis", self.num_refreshes),
                "failures": by_axis(count, axes, "axis", self.num_failures),
            },
        )

    def _grouped(self, due: Sequence[FactorSlice]) -> list[tuple[float, list[FactorSlice]]]:
        """Due slices that can be one batch: same dimension and same exponent."""
        groups: dict[tuple[int, float], list[FactorSlice]] = {}
        for item in due:
            key = (self._factors.sizes[item.stack].dimension, self._exponents[item.stack])
            groups.setdefault(key, []).append(item)
        return [(exponent, group) for (_, exponent), group in groups.items()]

    def _counters(self) -> list[Tensor]:
        return [
            torch.zeros(size.num_factors, dtype=torch.int64, device=self._stack_set.device)
            for size in self._factors.sizes
        ]


def eigenbases(solver: BasisSolver, *, continued: bool, may_wait: bool = True) -> Solve:
    """Recompute matrices as eigenbases of their factors.

    Args:
        solver: Computes them.
        may_wait: See `Stale`.
        continued: Whether the old matrices are eigenbases to start from; a first basis is made from
            scratch, for one iteration from the identity would be a poor start.
    """

    def solve(batches: list[Batch]) -> list[Solution]:
        starts = [batch.old for batch in batches if batch.old is not None] if continued else None
        chosen = solver if may_wait else solver.without_fallback()
        results = chosen.bases([batch.factors for batch in batches], starts)
        return [Solution(r.eigenvectors, r.accepted, r.order) for r in results]

    return solve


def _slices(tensors: Sequence[Tensor], due: Sequence[FactorSlice]) -> list[Tensor]:
    """Views of the due parts of tensors that exist once per factor stack."""
    return [tensors[item.stack][item.start : item.stop] for item in due]


def _joined(singles: Sequence[FactorSlice]) -> list[FactorSlice]:
    """Join neighbouring slices of one stack."""
    joined: list[FactorSlice] = []
    for item in singles:
        if joined and joined[-1].stack == item.stack and joined[-1].stop == item.start:
            joined[-1] = FactorSlice(item.stack, joined[-1].start, item.stop)
        else:
            joined.append(item)
    return joined
