"""Kronecker factors: for each axis of a block, the running second moment of its gradient along it.

    A_i <- decay * A_i + (1 - decay) * Gram_i(G),      Gram_i contracts G with itself over all other axes

For a matrix G (m x n) these are G G^T (m x m) and G^T G (n x n).

Source: Gupta et al. 2018 (arXiv 1802.09568), Algorithms 1 and 2.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_core.blocking import Shape
from shampoo_core.config import Storage
from shampoo_core.gradients import StackedGradients
from shampoo_core.moments import MovingAverage, absorb_weight, nonzero_weight
from shampoo_core.refresh import FactorSlice, FactorStackSize, RefreshPolicy
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, stacked_state
from shampoo_core.storage import MatrixStore, factor_store

SEEN = 1e-30
"""Weight of factors all of whose gradients were closed so far; it vanishes beside a real one."""


class FactorAxis(NamedTuple):
    """One preconditioned axis of one stack; its factors are one (N, d, d) tensor."""

    stack: int
    """Index of the stack in its set."""
    axis: int
    """Axis of the block, counted from 0."""
    dimension: int
    """d, the length of that axis."""
    order: int
    """Number of axes of the block."""


RowsOf = Callable[[FactorAxis], Tensor]
"""What the Gram matrices of an axis are formed from, (N, d, any number); zero for closed blocks."""


class KroneckerFactors:
    """Factors of all preconditioned axes of a set of stacks."""

    def __init__(
        self,
        stack_set: StackSet,
        axes: Sequence[FactorAxis],
        decay: float,
        *,
        bias_correction: bool = True,
        interval: int = 1,
        companion: MovingAverage | None = None,
        storage: Storage = "dense",
        all_axes: Sequence[FactorAxis] | None = None,
    ) -> None:
        """Start from zero.

        Args:
            stack_set: Geometry.
            axes: The preconditioned axes, at most one entry per stack and axis.
            decay: In [0, 1] per step; 1 sums.
            bias_correction: Whether `corrected` divides by the weight of the average.
            interval: Gradients are absorbed every so many steps, with ``decay ** interval``.
            companion: An average that absorbs the same gradients before any refresh; if its decay is
                the same too, its weight is the factors' weight and none is kept here.
            storage: How the factors are kept.
            all_axes: The preconditioned axes of ``stack_set.whole``; None where that is the set.
        """
        self.axes = tuple(axes)
        self.sizes = _sizes(stack_set, self.axes)
        self._due = DueFactors(stack_set, self.axes, self.axes if all_axes is None else all_axes)
        self._store = factor_store(stack_set, self.sizes, storage)
        self._stack_set = stack_set
        self._interval = interval
        self._decay = decay**interval
        self._gain = 1.0 if decay == 1.0 else 1.0 - self._decay
        self._corrects = bias_correction and decay < 1.0
        shares = companion is not None and interval == 1 and companion.decay == decay
        self._companion = companion if shares else None
        self._own_weight = stack_set.block_vector()
        self._seen: set[int] = set()
        """Parameters whose first gradient has counted, as far as the host knows."""

    def absorb(
        self,
        gradients: StackedGradients,
        step: int,
        rows_of: Callable[[StackedGradients], RowsOf | None] | None = None,
    ) -> StackedGradients | None:
        """Add the Gram matrices of the gradients, if this step is one of every ``interval``.

        The first gradient of a parameter counts at any step, so that there is something to go by at a
        refresh before the next of these.

        Args:
            gradients: Of this step.
            step: Counted from 1.
            rows_of: Given the gradients that count, what to form Gram matrices from; None takes the
                gradients, unfolded along the axis.

        Returns:
            The gradients that counted, None if none did.
        """
        counting = gradients if self.axes else None
        if counting is not None and self._interval > 1:
            counting = self._counting(counting, step)
        if counting is not None:
            self._add(counting, None if rows_of is None else rows_of(counting))
        return counting

    @torch.compiler.disable
    def _counting(self, gradients: StackedGradients, step: int) -> StackedGradients | None:
        """The gradients that count at a step: all, the first ones alone, or None.

        The host waits where it meets a parameter for the first time between steps that count, and once
        for all of a run that was resumed.
        """
        all_count = (step - 1) % self._interval == 0
        newcomers = set(self._stack_set.parameters).difference(self._seen, gradients.missing)
        if not newcomers:
            return gradients if all_count else None
        self._seen |= newcomers
        flags = [p in newcomers or None for p in range(max(self._stack_set.parameters) + 1)]
        first = self._stack_set.presence(flags) * (self._own_weight == 0)
        self._own_weight.add_(first, alpha=SEEN)
        if all_count:
            return gradients
        if not first.any().item():
            return None
        stacks = torch._foreach_mul(gradients.stacks, self._stack_set.split(first))
        return StackedGradients(list(stacks), gradients.is_open * first, first)

    def _add(self, gradients: StackedGradients, rows_of: RowsOf | None) -> None:
        decay = self._decay
        decaying = gradients.decaying(corrected=self._corrects or decay == 1.0)
        if decaying is not None:
            self._decay_some(decaying)
            decay = 1.0

        def gradient_rows(axis: FactorAxis) -> Tensor:
            return unfold(gradients.stacks[axis.stack], axis.axis)

        rows = map(rows_of or gradient_rows, self.axes)
        self._store.add_grams(rows, decay=decay, gain=self._gain)
        if self._companion is None:
            absorb_weight(self._own_weight, self._decay, self._gain, gradients)

    def due(self, policy: RefreshPolicy, step: int) -> list[FactorSlice]:
        """The factors of this set that a policy, asked about the whole set, makes due."""
        return self._due.at(policy, step)

    def are_few(self, due: Sequence[FactorSlice]) -> bool:
        """Whether a refresh of some factors takes less memory than the stacks, whichever way it is done.

        Up to six times their bytes, of double-precision eigendecompositions and of matrix iterations.
        """
        numel = sum((stop - start) * self.sizes[i].dimension ** 2 for i, start, stop in due)
        return 8 * numel <= self._stack_set.numel

    def turn(self, where: FactorSlice, turn: Tensor) -> None:
        """``A <- S^T A S`` for factors that are kept in a basis which has turned by S, (K, d, d)."""
        (old,) = self._store.read([where])
        turned = torch.bmm(turn.mT, torch.bmm(old, turn))
        self._store.blend([where], [turned], [torch.ones_like(turned[:, 0, 0])])

    def corrected(self, where: Sequence[FactorSlice]) -> list[Tensor]:
        """Bias-corrected copies of some slices of factors, (K, d, d) each."""
        factors = self._store.read(where)
        if not self._corrects:
            return [factor.clone() for factor in factors]
        per_stack = self._nonzero_weights().split(self._stack_set.sizes)
        weights = [
            per_stack[self.axes[item.stack].stack][item.start : item.stop].view(-1, 1, 1)
            for item in where
        ]
        return list(torch._foreach_div(factors, weights))

    def diagonals(self, bases: Iterable[Tensor]) -> list[Tensor]:
        """Diagonals of ``Q^T A Q``, A the bias-corrected factors.

        Args:
            bases: Q, (N, d, d) for every factor stack in turn.

        Returns:
            (N, d) each: what A has along each column, its eigenvalues if the columns are eigenvectors.
        """
        raw = [
            (basis * torch.bmm(factors, basis)).sum(-2)
            for factors, basis in zip(self._store.read_all(), bases, strict=True)
        ]
        if not self._corrects or not raw:
            return raw
        per_stack = self._nonzero_weights().split(self._stack_set.sizes)
        weights = [per_stack[axis.stack].view(-1, 1) for axis in self.axes]
        return list(torch._foreach_div(raw, weights))

    def _weights(self) -> Tensor:
        return self._own_weight if self._companion is None else self._companion.raw_weight

    def _nonzero_weights(self) -> Tensor:
        return nonzero_weight(self._weights())

    def state(self) -> StackState:
        """The factors, one name per axis, and their weight unless it is the companion's."""
        self._store.complete()
        self._seen.clear()  # whoever asks for the weights may write to them
        per_stack = {}
        if self._companion is None:
            per_stack["weight"] = self._own_weight.split(self._stack_set.sizes)
        count = len(self._stack_set)
        matrices = matrices_by_axis(count, self.axes, "axis", self._store)
        state = stacked_state(count, per_stack)
        for stack, entries in zip(state, matrices, strict=True):
            stack.update(entries)
        return state

    def _decay_some(self, decaying: Tensor) -> None:
        per_stack = (1.0 - (1.0 - self._decay) * decaying).split(self._stack_set.sizes)
        self._store.scale([per_stack[axis.stack] for axis in self.axes])


class DueFactors:
    """What is due of some of the factors that a schedule was made for.

    The schedule is that of one process, whoever owns which blocks. A slice of neighbours among all
    blocks is a slice of neighbours among any of them, for both are in the same order.
    """

    def __init__(
        self, stack_set: StackSet, axes: Sequence[FactorAxis], all_axes: Sequence[FactorAxis]
    ) -> None:
        """Find the factors' places among all.

        Args:
            stack_set: Geometry of the blocks at hand.
            axes: Their preconditioned axes.
            all_axes: The preconditioned axes of the whole set.
        """
        self._all_sizes = _sizes(stack_set.whole, all_axes)
        positions = stack_set.positions()
        names = {_name(stack_set, axis): index for index, axis in enumerate(axes)}
        self._here: dict[int, tuple[int, list[int]]] = {}
        for index, axis in enumerate(all_axes):
            here = names.get(_name(stack_set.whole, axis))
            if here is not None:
                self._here[index] = here, positions[axes[here].stack]

    @torch.compiler.disable
    def at(self, policy: RefreshPolicy, step: int) -> list[FactorSlice]:
        """Slices of the factors at hand that are due at ``step``."""
        due = []
        for item in policy.due(step, self._all_sizes):
            if item.stack not in self._here:
                continue
            index, positions = self._here[item.stack]
            start, stop = bisect_left(positions, item.start), bisect_left(positions, item.stop)
            if start < stop:
                due.append(FactorSlice(index, start, stop))
        return due


def _sizes(stack_set: StackSet, axes: Sequence[FactorAxis]) -> tuple[FactorStackSize, ...]:
    return tuple(
        FactorStackSize(stack_set.layouts[axis.stack].num_blocks, axis.dimension) for axis in axes
    )


def _name(stack_set: StackSet, axis: FactorAxis) -> tuple[Shape, int]:
    return stack_set.layouts[axis.stack].block_shape, axis.axis


def by_axis(
    num_stacks: int,
    axes: Sequence[FactorAxis],
    name: str,
    per_axis: Sequence[Tensor],
) -> StackState:
    """State of tensors that exist once per preconditioned axis, named ``<name><axis>``."""
    state: StackState = [{} for _ in range(num_stacks)]
    for axis, tensor in zip(axes, per_axis, strict=True):
        state[axis.stack][f"{name}{axis.axis}"] = tensor
    return state


def matrices_by_axis(
    num_stacks: int, axes: Sequence[FactorAxis], name: str, store: MatrixStore
) -> StackState:
    """State of matrices that exist once per preconditioned axis: ``<name><axis>[.<part>]``."""
    state: StackState = [{} for _ in range(num_stacks)]
    for axis, parts in zip(axes, store.tensors, strict=True):
        for part, tensor in parts.items():
            suffix = f".{part}" if part else ""
            state[axis.stack][f"{name}{axis.axis}{suffix}"] = tensor
    return state


def unfold(stack: Tensor, axis: int) -> Tensor:
    """Matrices whose rows run along one axis: (N, d_0, ..., d_k) -> (N, d_axis, product of the rest).

    A view for the first and the last axis; a copy for those between.
    """
    last = stack.dim() - 2
    if axis == 0:
        return stack.reshape(stack.shape[0], stack.shape[1], -1)
    if axis == last:
        return stack.reshape(stack.shape[0], -1, stack.shape[-1]).mT
    return stack.movedim(axis + 1, 1).reshape(stack.shape[0], stack.shape[axis + 1], -1)


def multiply_along_axes(
    stack: Tensor, matrices: Sequence[Tensor | None], out: Tensor | None = None
) -> Tensor:
    """Multiply a stack by a matrix along each axis: ``G x_1 X_1 x_2 X_2 ...``.

    Args:
        stack: (N, d_0, ..., d_k).
        matrices: One (N, d_i, d_i) tensor per axis; its first index is contracted. None leaves the axis.
        out: Memory that products, the last one above all, may be put into: contiguous, of the stack's
            shape, the stack itself or nothing that is read here.

    Returns:
        A tensor of the same shape. For matrices: ``X_0^T G X_1`` per block.
    """
    if len(matrices) == 2:
        # Without transposed operands, some per cent faster than the way for any order below.
        first, last = matrices
        if out is stack and (first is None or last is None):
            out = None  # a product cannot be put into the place of what it is made from
        if last is not None:
            stack = torch.bmm(stack, last, out=out if first is None else None)
        return stack if first is None else torch.bmm(first.mT, stack, out=out)
    shape = stack.shape
    products_to_come = sum(matrix is not None for matrix in matrices)
    is_in_out = stack is out
    for matrix in matrices:
        # Contract the leading axis and append the result as the last one: after all axes the order
        # is restored, and each product is one batched matrix product on views.
        rest = result = stack.reshape(shape[0], stack.shape[1], -1).mT
        if matrix is not None:
            # Every other product, so that the last is one of them.
            products_to_come -= 1
            is_in_out = out is not None and products_to_come % 2 == 0 and not is_in_out
            place = out.view(rest.shape) if out is not None and is_in_out else None
            result = torch.bmm(rest, matrix, out=place)
        stack = result.reshape(shape[0], *stack.shape[2:], stack.shape[1])
    return stack


def multiply_along_axis(stack: Tensor, axis: int, matrices: Tensor) -> Tensor:
    """Multiply a stack by one matrix per block along one axis: ``G x_axis X``.

    Args:
        stack: (N, d_0, ..., d_k).
        axis: Of the block, counted from 0.
        matrices: (N, d_axis, d_axis); the first index is contracted.

    Returns:
        A tensor of the same shape.
    """
    if axis == stack.dim() - 2:
        # Without a transposed copy on the way in and another on the way out.
        rows = stack.reshape(stack.shape[0], -1, stack.shape[-1])
        return torch.bmm(rows, matrices).view(stack.shape)
    moved = stack.movedim(axis + 1, 1)
    product = torch.bmm(matrices.mT, moved.reshape(moved.shape[0], moved.shape[1], -1))
    return product.view(moved.shape).movedim(1, axis + 1)
