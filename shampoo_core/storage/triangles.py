"""Where the upper triangle of a matrix stands in the flat matrix, and the other way round.

The tables are made once for every side and device, are shared by all optimizers of a process, and stay:
6 MiB for matrices of side 1024.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor


class Triangle(NamedTuple):
    """Tables of indices for one side; int32, which holds any position in a factor that fits in memory."""

    fold: Tensor
    """(d (d + 1) / 2,), or (d (d - 1) / 2,): where the triangle's rows stand in a flat matrix."""
    unfold: Tensor
    """(d * d,): where a flat matrix's entries stand in the triangle."""


Tables = dict[tuple[int, torch.device, bool], Triangle]
_tables: Tables = {}


def triangle_indices(side: int, device: torch.device, *, with_diagonal: bool) -> Triangle:
    """Indices that fold (d, d) matrices to upper triangles and unfold them.

    Args:
        side: d.
        device: Of the indices.
        with_diagonal: Whether the triangle has the diagonal; without it the diagonal unfolds to the
            first entry of the triangle, to be overwritten.
    """
    key = (side, device, with_diagonal)
    if key not in _tables:
        _tables[key] = _made(*key)
    return _tables[key]


@contextlib.contextmanager
def tables_apart() -> Iterator[Tables]:
    """Within, tables are made anew and kept in what is yielded: what somebody needs, for counting."""
    global _tables
    before, _tables = _tables, {}
    try:
        yield _tables
    finally:
        _tables = before


def _made(side: int, device: torch.device, with_diagonal: bool) -> Triangle:
    rows, columns = torch.triu_indices(side, side, 0 if with_diagonal else 1, device=device)
    fold = (rows * side + columns).to(torch.int32)
    places = torch.arange(len(fold), dtype=torch.int32, device=device)
    unfold = torch.zeros(side, side, dtype=torch.int32, device=device)
    unfold[rows, columns] = places
    unfold[columns, rows] = places
    return Triangle(fold, unfold.flatten())
