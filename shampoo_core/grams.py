"""Gram matrices without the half that symmetry gives: the upper triangle, in strips of rows.

    A[s:e, s:] <- decay A[s:e, s:] + gain R[s:e] R[s:]^T        for every strip of rows s to e

p strips of equal height take (p + 1) / (2 p) of the arithmetic of the whole product, in p operations. What
lies below the strips is out of date until it is mirrored from what lies above.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_ROWS = 96
"""Of a strip; products of fewer run at a lower rate."""


class Price(NamedTuple):
    """When it pays to cut strips in two."""

    most_strips: int
    """A power of two; 4 take 5/8 of the arithmetic, 8 take 9/16."""
    least_saving: float
    """Multiplications and additions that every strip more has to save."""


ON_ACCELERATOR = Price(4, 2e8)
"""What a V100 does while it launches a kernel: 15 microseconds at 13 TFLOP/s."""
ON_CPU = Price(8, 1e7)
"""It launches nothing, but runs small products at a lower rate."""


def strip_bounds(rows: Tensor) -> tuple[int, ...]:
    """Rows at which the strips of a batch of Gram matrices begin, and the last one ends.

    Cutting p strips in two saves 1 / (4 p) of the whole product, for p operations more.

    Args:
        rows: What the matrices are formed from, (N, d, any number).

    Returns:
        0, ..., d; (0, d) where one operation forms it all.
    """
    num_matrices, side, length = rows.shape
    whole = 2.0 * num_matrices * side**2 * length
    most, least_saving = ON_CPU if rows.device.type == "cpu" else ON_ACCELERATOR
    strips = 1
    while (
        strips < most
        and side >= 2 * strips * LEAST_ROWS
        and whole / (4 * strips**2) >= least_saving
    ):
        strips *= 2
    return tuple(index * side // strips for index in range(strips + 1))


def add_gram(
    matrices: Tensor, rows: Tensor, bounds: Sequence[int], *, decay: float, gain: float
) -> None:
    """``A <- decay A + gain R R^T`` in place, on and above the strips' diagonal blocks.

    Args:
        matrices: A, (N, d, d).
        rows: R, (N, d, any number).
        bounds: Of the strips.
        decay: Of what is there.
        gain: Of what is added.
    """
    if len(bounds) == 2:  # without views, which take a small model's time
        matrices.baddbmm_(rows, rows.mT, beta=decay, alpha=gain)
        return
    for start, stop in itertools.pairwise(bounds):
        strip = matrices[:, start:stop, start:]
        strip.baddbmm_(rows[:, start:stop], rows[:, start:].mT, beta=decay, alpha=gain)


def upper_gram(rows: Tensor) -> Tensor:
    """``R R^T``, (N, d, d), correct on and above the diagonal; R is (N, d, any number)."""
    result = rows.new_empty(len(rows), rows.shape[1], rows.shape[1])
    # A decay of zero does not read what is there, not even if it is NaN.
    add_gram(result, rows, strip_bounds(rows), decay=0.0, gain=1.0)
    return result


def mirror(batches: Sequence[Tensor], bounds: Sequence[Sequence[int]]) -> None:
    """Fill in what is out of date below the strips, of all batches in one operation.

    Args:
        batches: (N, d, d) each, from `add_gram`; changed in place.
        bounds: Of the strips of each batch; none of a batch that is symmetric already.
    """
    parts = list(itertools.chain.from_iterable(map(_mirrored_parts, batches, bounds)))
    if parts:
        targets, sources = zip(*parts, strict=True)
        torch._foreach_copy_(targets, sources)


def _mirrored_parts(matrices: Tensor, bounds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of what is out of date below the strips, each with what is to be copied there.

    Args:
        matrices: (N, d, d), from `add_gram`.
        bounds: Of the strips.
    """
    for start, stop in itertools.pairwise(bounds[:-1]):
        yield matrices[:, stop:, start:stop], matrices[:, start:stop, stop:].mT
