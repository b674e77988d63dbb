"""Where the upper triangle of a matrix stands in the flat matrix, and the other way round."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


@functools.cache
def triangle_indices(
    side: int, device: torch.device, *, with_diagonal: bool
) -> tuple[Tensor, Tensor]:
    """Indices that fold (d, d) matrices to upper triangles, row by row, and unfold them.

    32 bits hold any position of a factor that fits in memory, at half the memory of 64.

    Args:
        side: d.
        device: Of the indices.
        with_diagonal: Whether the triangle has the diagonal; without it the diagonal unfolds to the
            first entry of the triangle, to be overwritten.

    Returns:
        Where the triangle's entries stand in a flat matrix, and a flat matrix's in the triangle.
    """
    rows, columns = torch.triu_indices(side, side, 0 if with_diagonal else 1, device=device)
    fold = (rows * side + columns).to(torch.int32)
    places = torch.arange(len(fold), dtype=torch.int32, device=device)
    unfold = torch.zeros(side, side, dtype=torch.int32, device=device)
    unfold[rows, columns] = places
    unfold[columns, rows] = places
    return fold, unfold.flatten()
