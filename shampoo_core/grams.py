"""Gram matrices without the half that symmetry gives: the upper triangle, in strips of rows or columns.

    A[s:e, s:] <- decay A[s:e, s:] + gain R[s:e] R[s:]^T        for every strip of rows s to e
    A[:e, s:e] <- decay A[:e, s:e] + gain R[:e] R[s:e]^T        for every strip of columns

p equal strips take (p + 1) / (2 p) of the arithmetic of the whole product, in p operations. Either way the
same blocks are left out, below those on the diagonal: out of date until they are mirrored from above.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

LEAST_ROWS = 96
"""Of a strip; products of fewer run at a lower rate."""
LEAST_COLUMNS = 32
"""Likewise, of strips of columns."""


class Price(NamedTuple):
    """When it pays to cut a product."""

    most_strips: int
    """A power of two; 4 take 5/8 of the arithmetic, 8 take 9/16."""
    least_saving: float
    """Multiplications and additions that every strip more has to save."""
    enough_tiles: int = 0
    """Of products at once, to keep the device busy: rows are cut for no more."""
    has_columns: bool = False
    """Whether strips of columns are quicker where rows lie in memory one after the other."""


ON_ACCELERATOR = Price(4, 1e9, 512)
"""What a V100 does at 13 TFLOP/s in 75 microseconds, an H200 at 50 in 20: beside a kernel, what it takes
the host to launch it, and what products of fewer rows lose. On an H200 2e9 was measured as fast as 2e8.
It has 132 processors, each of which takes some tiles at a time."""
ON_CPU = Price(8, 1e7, has_columns=True)
"""It launches nothing, but runs small products at a lower rate. With AVX-512, MKL takes up to a quarter
less time for strips of columns, more so the narrower they are, with AVX2 about as long; where rows run
across memory it takes a tenth more for them."""

TILE = 64
"""Side of the part of a product that one of a GPU's processors takes; smaller parts take as long."""
LEAST_LENGTH = 1024
"""Of the pieces of rows."""
LEAST_PIECES = 4
"""Fewer are not worth three more kernels."""


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
    price = _price(rows)
    least = LEAST_COLUMNS if _in_columns(rows) else LEAST_ROWS
    strips = 1
    while (
        strips < price.most_strips
        and side >= 2 * strips * least
        and whole / (4 * strips**2) >= price.least_saving
    ):
        strips *= 2
    return tuple(index * side // strips for index in range(strips + 1))


def _in_columns(rows: Tensor) -> bool:
    """Whether strips are cut from columns."""
    return _price(rows).has_columns and rows.stride(2) == 1


def _price(rows: Tensor) -> Price:
    return ON_CPU if rows.device.type == "cpu" else ON_ACCELERATOR


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
    if len(bounds) > 2:
        _add_strips(matrices, rows, bounds, decay, gain)
    elif (pieces := num_pieces(rows)) > 1:
        _add_pieces(matrices, rows, pieces, decay, gain)
    else:  # without views, which take a small model's time
        matrices.baddbmm_(rows, rows.mT, beta=decay, alpha=gain)


def _add_strips(
    matrices: Tensor, rows: Tensor, bounds: Sequence[int], decay: float, gain: float
) -> None:
    in_columns = _in_columns(rows)
    for start, stop in itertools.pairwise(bounds):
        if in_columns:
            left, right = rows[:, :stop], rows[:, start:stop]
            strip = matrices[:, :stop, start:stop]
        else:
            left, right = rows[:, start:stop], rows[:, start:]
            strip = matrices[:, start:stop, start:]
        strip.baddbmm_(left, right.mT, beta=decay, alpha=gain)


def num_pieces(rows: Tensor) -> int:
    """Into how many pieces of equal length rows had better be cut, 1 where a device is busy without.

    Args:
        rows: (N, d, length).
    """
    num_matrices, side, length = rows.shape
    tiles = max(1, num_matrices) * math.ceil(side / TILE) ** 2
    most = min(length // LEAST_LENGTH, _price(rows).enough_tiles // tiles)
    for pieces in range(most, LEAST_PIECES - 1, -1):
        if length % pieces == 0:
            return pieces
    return 1


def _add_pieces(matrices: Tensor, rows: Tensor, pieces: int, decay: float, gain: float) -> None:
    """The same by the sum of the products of pieces of rows; the whole of each matrix."""
    num_matrices, side, length = rows.shape
    # A view where rows run across memory, as those of the axes that are short in models do.
    apart = rows.unflatten(2, (pieces, length // pieces)).movedim(2, 1)
    apart = apart.reshape(num_matrices * pieces, side, length // pieces)
    sums = torch.bmm(apart, apart.mT).view(num_matrices, pieces, side, side).sum(1)
    if decay == 0.0:  # what was there is not read, not even if it is NaN
        torch.mul(sums, gain, out=matrices)
    else:
        matrices.mul_(decay).add_(sums, alpha=gain)


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
