"""Geometry of sharded parameters: which part of which block is held by which rank.

Every rank of a shard group holds some neighbouring rows of a parameter, so also of its merged view, and
blocks are cut from the merged view of the whole parameter. A *piece* is what one rank holds of a run of
blocks that one rank owns:

    parameter, 10 rows       blocks of 4 rows            pieces
    rank 0 holds 0..4        block 0: rows 0..3          0: 0..3 of rank 0
    rank 1 holds 5..9        block 1: rows 4..7          1: 0..0 of rank 0, 1..3 of rank 1
                             block 2: rows 8..9          2: 0..1 of rank 1
"""

from __future__ import annotations

import math
import operator
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from shampoo_core.blocking import Shape, Tile
from shampoo_core.exchange.division import Division
from shampoo_core.stacks import StackSet


class Piece(NamedTuple):
    """Rows ``start`` to ``stop`` (exclusive) of the blocks in one row of a tile's grid."""

    holder: int
    owner: int
    tile: Tile
    slot: int
    """Index of the tile among the owner's."""
    grid_row: int
    """Row of the tile's grid."""
    start: int
    stop: int
    held_from: int
    """Where the piece starts in the rows that the holder has."""
    first_block: int
    """Index of the first of its blocks among the owner's, as in a block vector."""

    @property
    def shape(self) -> Shape:
        """Shape in which the piece travels: (blocks along axes 1.., rows, sides along axes 1..)."""
        return (*self.tile.counts[1:], self.stop - self.start, *self.tile.sizes[1:])

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    @property
    def num_blocks(self) -> int:
        """Blocks that it has rows of."""
        return math.prod(self.tile.counts[1:])

    def in_shard(self, shard: Tensor) -> Tensor:
        """View of the piece in the holder's rows of the merged parameter."""
        tile, order = self.tile, len(self.tile.sizes)
        view = shard.narrow(0, self.held_from, self.stop - self.start)
        for axis in reversed(range(1, order)):
            length = tile.sizes[axis] * tile.counts[axis]
            view = view.narrow(axis, tile.starts[axis], length)
            view = view.unflatten(axis, (tile.counts[axis], tile.sizes[axis]))
        # (rows, count_1, size_1, count_2, ...) -> (count_1, count_2, ..., rows, size_1, size_2, ...)
        return view.permute(*range(1, 2 * order - 1, 2), 0, *range(2, 2 * order - 1, 2))

    def in_slot(self, slot: Tensor) -> Tensor:
        """View of the piece in the owner's tile, see `StackSet.tile_slots`."""
        row_axis = len(self.tile.sizes) - 1
        slot = slot.view(*self.tile.counts, *self.tile.sizes)
        return slot[self.grid_row].narrow(row_axis, self.start, self.stop - self.start)


def held_rows(rows: int, rank: int, num_ranks: int) -> range:
    """The rows of a tensor that a rank holds: as `torch.chunk` cuts it, the last ones maybe none."""
    length = -(-rows // num_ranks)
    start = min(rank * length, rows)
    return range(start, min(start + length, rows))


def pieces_of(
    division: Division,
    shapes: Mapping[int, Shape],
    num_holders: int,
    *,
    holder: int | None = None,
    owner: int | None = None,
) -> Iterator[Piece]:
    """Pieces of all blocks, in the order in which everybody sends and receives them.

    Args:
        division: Who owns what.
        shapes: Shape of every parameter of the division, before merging.
        num_holders: Ranks that hold a parameter together.
        holder: Whose pieces alone are wanted; None means everybody's.
        owner: Likewise.
    """
    # Of a large model on a thousand ranks there are millions of pieces, few of which concern any one.
    holders = range(num_holders) if holder is None else range(holder, holder + 1)
    held: dict[int, list[range]] = {}
    for tile in division.whole.tiles:
        if tile.parameter not in held:
            shape = shapes[tile.parameter]
            held[tile.parameter] = [
                _merged_rows(shape, tile.merged_shape, rank, num_holders) for rank in holders
            ]
    for number, stack_set in enumerate(division.by_rank):
        if owner in (None, number):
            for piece in _pieces_of_owner(number, stack_set, held):
                yield piece._replace(holder=holders[piece.holder])


def _pieces_of_owner(
    owner: int, stack_set: StackSet, held: Mapping[int, Sequence[range]]
) -> Iterator[Piece]:
    """Pieces of an owner's blocks, with indices into ``held`` for holders."""
    first_block = 0
    for slot, tile in enumerate(stack_set.tiles):
        rows_of = held[tile.parameter]
        for grid_row in range(tile.counts[0]):
            first = tile.starts[0] + grid_row * tile.sizes[0]
            last = first + tile.sizes[0]
            for index in _overlapping(rows_of, first, last):
                rows = rows_of[index]
                start, stop = max(first, rows.start), min(last, rows.stop)
                where = (start - first, stop - first, start - rows.start, first_block)
                yield Piece(index, owner, tile, slot, grid_row, *where)
            first_block += tile.num_blocks // tile.counts[0]


def _overlapping(runs: Sequence[range], first: int, last: int) -> Iterator[int]:
    """Which of some ascending runs have rows from ``first`` to ``last`` (exclusive)."""
    for index in range(bisect_right(runs, first, key=operator.attrgetter("stop")), len(runs)):
        if runs[index].start >= last:
            return
        yield index


def _merged_rows(shape: Shape, merged_shape: Shape, rank: int, num_ranks: int) -> range:
    """Rows of the merged view that a rank holds: shards start and end between rows of both views."""
    held = held_rows(shape[0], rank, num_ranks)
    numbers, row = math.prod(shape[1:]), math.prod(merged_shape[1:])
    return range(held.start * numbers // row, held.stop * numbers // row)
