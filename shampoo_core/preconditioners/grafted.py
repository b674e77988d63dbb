"""Preconditioning beside a grafting method: one gives every block its direction, the other its length.

    P  = matrices of the block, applied to the filtered gradient
    D  = direction of the grafting method
    P <- P |D| / |P|                                       block by block; D itself where no matrix is ready

Source: Agarwal et al. 2020 (arXiv 2002.11803); Anil et al. 2020 (arXiv 2002.09018).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from torch import Tensor

from shampoo_core.filtering import Direction, GradientFilter
from shampoo_core.gradients import StackedGradients
from shampoo_core.grafting import DiagonalMethod, lend_lengths, lengths_of
from shampoo_core.preconditioners.readiness import Readiness
from shampoo_core.stacks import StackSet

Matrices = list[Tensor | None]
"""Of one stack, (N, d, d) per axis of its blocks, None for an axis without."""
Multiply = Callable[[int, Tensor, Matrices, Tensor | None], Tensor]
"""Given the index of a stack, its filtered gradient (N, *block shape), its matrices, and None or memory
of the same shape that the result may be put into: the preconditioned stack."""


def absorb(
    grafting: DiagonalMethod | None,
    gradients: StackedGradients,
    gradient_filter: GradientFilter,
    *,
    ahead: bool,
) -> Direction:
    """Let the filter and the grafting method see the gradients of a step, for the last time.

    Args:
        grafting: None where nothing is grafted.
        gradients: Are freed.
        gradient_filter: That of the preconditioner.
        ahead: Whether the graft's direction may take its memory from now on.

    Returns:
        The filtered gradient.
    """
    if grafting is None:
        filtered = gradient_filter.filter(gradients)
    else:
        filtered = grafting.absorb(gradients, gradient_filter, ahead=ahead, in_place=True)
    gradients.free_stacks()
    return filtered


def precondition(
    stack_set: StackSet,
    filtered: Direction,
    grafted: Direction,
    ready: Readiness,
    by_stack: Iterable[tuple[int, Matrices]],
    multiply: Multiply,
) -> Direction:
    """The filtered gradient, multiplied by matrices, in the lengths of the grafting method.

    Args:
        stack_set: Geometry.
        filtered: Gradient.
        grafted: What the grafting method makes of it; ``filtered`` itself where nothing is grafted. Blocks
            whose first matrix is still to come, or a gradient to make one from, follow it.
        ready: Of the matrices.
        by_stack: Index and matrices of every stack that has any.
        multiply: Applies them.

    Returns:
        The direction: in the memory of the grafting method's where that has served, else in its own.
    """
    stacks = list(grafted.stacks)
    lengths = None if grafted is filtered else lengths_of(stack_set, grafted)
    has_served = lengths is not None and ready.all_are_known
    for index, matrices in by_stack:
        stack, other = filtered.stacks[index], stacks[index]
        # That of a method that scales nothing is the filter's own.
        is_free = has_served and other is not stack
        stacks[index] = multiply(index, stack, matrices, other if is_free else None)
    ready.stand_in(stacks, grafted.stacks)
    if lengths is None:
        return Direction(stacks, filtered.scale)
    return lend_lengths(stack_set, lengths, stacks)
