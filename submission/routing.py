"""Which method a parameter gets, by its shape alone.

    at most one side longer than 1    diagonal: a bias or scale has no matrix structure
    a side of TABLE_ROWS or more      table: its rows are looked up, most of them rarely, and a
                                      factor over them would mean nothing
    everything else                   matrix: the method the setting asks for

The benchmark's parameter types add nothing to that: biases and norms are vectors, and the largest
tables call themselves weights.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable

from torch import nn

#: From this many rows on a tensor is a lookup table.
TABLE_ROWS = 65_536


class Route(enum.Enum):
    """The kinds of treatment."""

    MATRIX = "matrix"
    DIAGONAL = "diagonal"
    TABLE = "table"


def route(shape: Iterable[int]) -> Route:
    """Return the treatment of a parameter with these sides."""
    sides = [side for side in shape if side != 1]
    if len(sides) < 2:
        return Route.DIAGONAL
    return Route.TABLE if max(sides) >= TABLE_ROWS else Route.MATRIX


def routed(model: nn.Module) -> dict[Route, list[nn.Parameter]]:
    """Sort the trainable parameters of `model` by route; routes without parameters are left out."""
    groups: dict[Route, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            groups.setdefault(route(parameter.shape), []).append(parameter)
    return groups
