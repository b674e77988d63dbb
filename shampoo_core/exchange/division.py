"""The blocks of all ranks, cut up by owner."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shampoo_core.blocking import Shape, Tile
from shampoo_core.exchange.assignment import assign, loads_of
from shampoo_core.stacks import StackSet


@dataclass(frozen=True, eq=False)
class Division:
    """What every rank knows about who owns which of the blocks that are stepped together."""

    whole: StackSet
    """Geometry of all blocks."""
    by_rank: tuple[StackSet, ...]
    """Geometry of the blocks that each rank owns."""
    rank: int
    """Which of these ranks this one is."""

    @property
    def own(self) -> StackSet:
        """Geometry of this rank's blocks; may be none."""
        return self.by_rank[self.rank]


def divide(
    whole: StackSet, cost_of: Callable[[Shape], float], loads: list[float], rank: int
) -> Division:
    """Give every block to a rank.

    Args:
        whole: Geometry of all blocks.
        cost_of: Modelled cost of a block by its shape.
        loads: What each rank has to do already; the new loads are added, in place.
        rank: Which of these ranks this one is.
    """
    costs = [cost_of(layout.block_shape) for layout in whole.layouts for _ in layout.blocks()]
    owners = assign(costs, len(loads), loads)
    for index, load in enumerate(loads_of(costs, owners, len(loads))):
        loads[index] += load
    tiles: list[list[Tile]] = [[] for _ in loads]
    remaining = iter(owners)
    for tile in whole.tiles:
        for owner, part in _parts(tile, list(itertools.islice(remaining, tile.num_blocks))):
            tiles[owner].append(part)
    return Division(
        whole,
        tuple(
            StackSet(own, dtype=whole.dtype, device=whole.device, whole=whole.whole)
            for own in tiles
        ),
        rank,
    )


def _parts(tile: Tile, owners: Sequence[int]) -> Iterator[tuple[int, Tile]]:
    """Cut a tile into runs of neighbours that have one owner, along the last axis of its grid."""
    if len(set(owners)) == 1:
        yield owners[0], tile
        return
    remaining = iter(owners)
    for row in itertools.product(*map(range, tile.counts[:-1])):
        column = 0
        for owner, run in itertools.groupby(itertools.islice(remaining, tile.counts[-1])):
            length = len(list(run))
            first = (*row, column)
            yield (
                owner,
                Tile(
                    parameter=tile.parameter,
                    merged_shape=tile.merged_shape,
                    starts=_plus(
                        tile.starts, (i * s for i, s in zip(first, tile.sizes, strict=True))
                    ),
                    sizes=tile.sizes,
                    counts=(*[1] * len(row), length),
                    grid_starts=_plus(tile.grid_starts, first),
                ),
            )
            column += length


def _plus(shape: Shape, offsets: Iterator[int] | Shape) -> Shape:
    return tuple(a + b for a, b in zip(shape, offsets, strict=True))
