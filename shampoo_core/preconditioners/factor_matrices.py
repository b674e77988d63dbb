"""One matrix per Kronecker factor that is recomputed from it now and then: its root, or its basis.

A refresh hands due factors to the solver in one call, those of one size and exponent as one batch,
keeps the old matrix where the new one was not accepted, and counts both. Factors are many times larger
than the blocks they belong to: where memory is bounded, what is due comes in portions, each of which is
done with before the next begins. Nothing here depends on what the matrices are used for.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_core.config import Storage
from shampoo_core.preconditioners.batches import Batch, Solution, Solve, has_gradient
from shampoo_core.preconditioners.readiness import Readiness
from shampoo_core.preconditioners.turns import turn_of, turn_of_rounded
from shampoo_core.refresh import FactorSlice, joined, portions, singles
from shampoo_core.solvers.criterion import in_old_basis
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states
from shampoo_core.statistics import (
    KroneckerFactors,
    by_axis,
    matrices_by_axis,
    multiply_along_axes,
)
from shampoo_core.storage import MatrixKind, matrix_store


class Stale(NamedTuple):
    """What a test of due factors found."""

    due: list[FactorSlice]
    """The factors to solve."""
    new: list[FactorSlice]
    """Those of them that were never refreshed, as far as was asked."""
    continued: list[FactorSlice]
    """The others."""
    may_wait: bool
    """Whether the solver may ask the host what failed, to fall back on safer means."""


TooOld = Callable[[FactorSlice, Tensor, Tensor], Tensor]
"""Given a slice of factors, their bases Q (K, d, d) and the diagonals (K, d) of Q^T A Q: (K,) bool, whether
a factor needs a new matrix though its basis still diagonalises it."""


class Replacement(NamedTuple):
    """What a refresh did to one slice of factors."""

    where: FactorSlice
    turn: Tensor
    """(K, d, d), Q_old^T Q_new: what the new matrices are in the old ones."""
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
        portion_numel: int | None = None,
        limits: Sequence[float] | None = None,
    ) -> None:
        """Allocate one identity per factor.

        Args:
            stack_set: Geometry.
            factors: What the matrices are computed from.
            exponents: Per preconditioned axis; handed to the solver, factors of one size and
                exponent are solved together.
            kind: Of the matrices, ``"roots"`` or ``"bases"``.
            storage: How the matrices are kept.
            portion_numel: Numbers in the factors of a portion, see `portions`; None makes one of all.
            limits: Per preconditioned axis; handed to the solver, see `Batch`. None is no limit.
        """
        self._stack_set = stack_set
        self._portion_numel = portion_numel
        self._factors = factors
        self._exponents = tuple(exponents)
        self._limits = [math.inf] * len(exponents) if limits is None else limits
        self._store = matrix_store(stack_set, factors.sizes, storage, kind)
        self._is_rounded = storage in ("8bit", "4bit")
        self.ready = Readiness(stack_set, factors)
        self.num_failures = [count.clone() for count in self.ready.num_refreshes]
        """Per factor, how many refreshes kept the old matrix because the new one was no good."""

    def read(self, stack: int) -> Tensor:
        """The matrices of a factor stack, (N, d, d); maybe a view, so not to be written to."""
        return self.read_slice(FactorSlice(stack, 0, self._factors.sizes[stack].num_factors))

    def read_slice(self, where: FactorSlice) -> Tensor:
        """Some matrices of a factor stack, (K, d, d); maybe a view, so not to be written to."""
        return self._store.read([where])[0]

    def rounds(
        self, stale: Stale, *, warm_starts: bool
    ) -> Iterator[tuple[list[FactorSlice], bool]]:
        """Portions of what is stale, and whether the old matrices of a portion are to be continued.

        Args:
            stale: From `stale`.
            warm_starts: Whether the solver continues any: then what is new comes apart, for one iteration
                from the identity would make a poor first matrix.
        """
        parts = (
            [(stale.new, False), (stale.continued, True)] if warm_starts else [(stale.due, True)]
        )
        for due, continued in parts:
            for portion in self.portions(due):
                yield portion, continued

    @torch.compiler.disable
    def portions(self, due: Sequence[FactorSlice]) -> list[list[FactorSlice]]:
        """Cut what is due into what is to be refreshed, and done with, before the rest begins.

        Factors of one size and exponent come one after the other, so that batches are few.
        """
        if self._portion_numel is None or not due:
            return [list(due)] if due else []
        in_groups = [item for _, group in self._grouped(due) for item in group]
        return portions(in_groups, self._factors.sizes, self._portion_numel)

    @torch.compiler.disable
    def refresh(self, due: Sequence[FactorSlice], solve: Solve) -> Tensor:
        """Recompute the matrices of the due factors in place.

        Args:
            due: Slices of factor stacks, not none.
            solve: Computes all batches.

        Returns:
            (K,) bool for all slices, what `write` is to know.
        """
        batches = self._batches(due)
        known = has_gradient(batches)
        self.write(due, solve(batches), known)
        return known

    @torch.compiler.disable
    def replace(self, due: Sequence[FactorSlice], solve: Solve) -> list[Replacement]:
        """As `refresh`, for averages that are kept in the matrices, and go on in the new ones.

        Returns:
            How the matrices of every slice have turned.
        """
        groups = [group for _, group in self._grouped(due)]
        slices = list(itertools.chain.from_iterable(groups))
        batches = self._batches(due)
        known = has_gradient(batches)
        solutions = solve(batches)
        del batches
        orders = list(itertools.chain.from_iterable(map(_orders, groups, solutions)))
        old = [matrices.clone() for matrices in self._store.read(slices)]
        self.write(due, solutions, known)
        del solutions  # as large as what follows
        new = self._store.read(slices)  # what was accepted, as it is kept
        turn = turn_of_rounded if self._is_rounded else turn_of
        turns = [turn(before, after) for before, after in zip(old, new, strict=True)]
        return [Replacement(*one) for one in zip(slices, turns, orders, strict=True)]

    @torch.compiler.disable
    def write(
        self, due: Sequence[FactorSlice], solutions: Sequence[Solution], known: Tensor
    ) -> None:
        """Put what was accepted into the place of the old matrices, and count.

        Args:
            due: Slices of factor stacks.
            solutions: Of the batches that a solver was given for them.
            known: (K,) bool, batch by batch, whether a factor has any gradient in it. What has none
                has no root or basis to find, so that none failed; an absolute ridge alone would be one.
        """
        groups = [group for _, group in self._grouped(due)]
        slices = list(itertools.chain.from_iterable(groups))
        counts = [item.stop - item.start for item in slices]
        accepted = torch.cat([solution.accepted for solution in solutions]) & known
        failed = known & ~accepted
        weights = accepted.to(solutions[0].matrices.dtype).split(counts)
        new: list[Tensor] = []
        for group, solution in zip(groups, solutions, strict=True):
            new += solution.matrices.split([item.stop - item.start for item in group])
        self._store.blend(slices, new, weights)
        counters = [self.ready.num_refreshes, self.num_failures]
        torch._foreach_add_(
            [count for kind in counters for count in _slices(kind, slices)],
            [*accepted.split(counts), *failed.split(counts)],
        )
        self.ready.recount()

    def _batches(self, due: Sequence[FactorSlice]) -> list[Batch]:
        """What the solver is given."""
        groups = self._grouped(due)
        factors = iter(self._factors.corrected([item for _, group in groups for item in group]))
        return [
            Batch(
                _together([next(factors) for _ in group]),
                exponent,
                partial(self._read_together, group),
                min(self._limits[item.stack] for item in group),
            )
            for exponent, group in groups
        ]

    def _read_together(self, group: Sequence[FactorSlice]) -> Tensor:
        return _together(self._store.read(group))

    @torch.compiler.disable
    def stale(
        self,
        due: Sequence[FactorSlice],
        tolerance: float,
        basis_of: Callable[[FactorSlice], Tensor] | None = None,
        *,
        new_too: bool = False,
        first: bool = False,
        asks: bool = False,
        too_old: TooOld | None = None,
    ) -> Stale:
        """The due factors that their bases no longer diagonalise; one host synchronisation.

        With a test it is to be the refresh's only one, so that the solver leaves alone what fails: the
        old matrix stays, and does for an interval more. A factor that has ever failed lets the solver
        fall back, which is learnt together with the result of the test.

        Args:
            due: Slices to test.
            tolerance: Largest relative off-diagonal norm of Q^T A Q that passes; 0 passes nothing,
                and needs no test.
            basis_of: (K, d, d) bases of a slice; None takes the matrices themselves.
            new_too: Whether factors that were never refreshed are due whatever the test says: the identity
                may do for a basis, but not for a root.
            first: Whether the schedule comes to these factors for the first time: all are new.
            asks: Whether to wait, without a test, to learn which are new, until it is known that none is.
            too_old: What else the test is to find.
        """
        due = list(due)
        tests = tolerance > 0.0 and bool(due)
        if not tests and (first or not asks or self.ready.knows(due)):
            return Stale(due, due if first else [], [] if first else due, may_wait=True)
        if not tests:
            self.ready.ask()
            new = [one for one in singles(due) if not self.ready.knows([one])]
            continued = [one for one in singles(due) if self.ready.knows([one])]
            return Stale(due, joined(new), joined(continued), may_wait=True)
        found: list[Tensor] = []
        due_portions = self.portions(due)
        for portion in due_portions:
            found += self._exceeding(portion, tolerance, basis_of or self.read_slice, too_old)
        due = list(itertools.chain.from_iterable(due_portions))
        is_new = torch.cat(_slices(self.ready.num_refreshes, due)) == 0
        exceeds = torch.cat(found)
        if new_too:
            exceeds |= is_new
        has_failed = torch.cat(_slices(self.num_failures, due)) > 0
        told = torch.stack([exceeds, is_new, has_failed]).tolist()
        answers = list(zip(singles(due), *told, strict=True))
        self.ready.learn([one for one, _, new, _ in answers if not new])
        stale = [(one, new, failed) for one, exceeding, new, failed in answers if exceeding]
        return Stale(
            joined([one for one, _, _ in stale]),
            joined([one for one, new, _ in stale if new]),
            joined([one for one, new, _ in stale if not new]),
            may_wait=any(failed for _, _, failed in stale),
        )

    def _exceeding(
        self,
        due: Sequence[FactorSlice],
        tolerance: float,
        basis_of: Callable[[FactorSlice], Tensor],
        too_old: TooOld | None,
    ) -> list[Tensor]:
        """(K,) bool per slice: whether bases are too far from diagonalising their factors."""
        found = []
        for where, factors in zip(due, self._factors.corrected(due), strict=True):
            basis = basis_of(where)
            ratio, diagonals = in_old_basis(factors, basis, overwrite=True)
            exceeds = ~(ratio <= tolerance)
            found.append(exceeds if too_old is None else exceeds | too_old(where, basis, diagonals))
        return found

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

    def multiply(
        self, stacks: Sequence[Tensor], *, transposed: bool = False, in_place: bool = False
    ) -> list[Tensor]:
        """Multiply every stack by its matrices, or their transposes, along all axes that have one.

        For eigenbases: rotate the stacks into the eigenbasis, or back. Stacks without factors are
        returned as they are.

        Args:
            stacks: One per stack of the set.
            transposed: Whether to multiply by the transposes.
            in_place: Whether results may be put into the stacks, which nobody reads then.
        """
        result = list(stacks)
        for index, matrices in self.by_stack():
            if transposed:
                matrices = [None if matrix is None else matrix.mT for matrix in matrices]
            stack = result[index]
            free = stack if in_place and stack.is_contiguous() else None
            result[index] = multiply_along_axes(stack, matrices, free)
        return result

    def state(self, name: str) -> StackState:
        """Matrices under ``name``, and the counters; whoever asks for them may write to them."""
        self.ready.forget()
        count, axes = len(self._stack_set), self._factors.axes
        return merge_states(
            count,
            {
                name: matrices_by_axis(count, axes, "axis", self._store),
                "refreshes": by_axis(count, axes, "axis", self.ready.num_refreshes),
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


def _orders(group: Sequence[FactorSlice], solution: Solution) -> Sequence[Tensor | None]:
    """The order of columns for every slice of a batch."""
    if solution.order is None:
        return [None] * len(group)
    return solution.order.split([item.stop - item.start for item in group])


def _slices(tensors: Sequence[Tensor], due: Sequence[FactorSlice]) -> list[Tensor]:
    """Views of the due parts of tensors that exist once per factor stack."""
    return [tensors[item.stack][item.start : item.stop] for item in due]


def _together(parts: Sequence[Tensor]) -> Tensor:
    """Several tensors as one; a single one itself."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))
