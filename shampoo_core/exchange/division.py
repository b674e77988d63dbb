"""The blocks of all ranks, cut up by owner, and into waves that are stepped one after the other."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shampoo_core.blocking import Shape, Tile, cut_tile
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

    @property
    def is_shared(self) -> bool:
        """Whether several ranks own blocks; the same on all ranks."""
        return sum(own.num_blocks > 0 for own in self.by_rank) > 1

    def waves(self, max_numel: int | None) -> list[Division]:
        """The same owners, with few blocks of each at a time.

        Args:
            max_numel: Most numbers of one rank in a wave, unless a single block has more; None makes
                one wave of everything.

        Returns:
            As many waves as the rank with most of them has; late ones may have nothing of a rank.
        """
        if max_numel is None:
            return [self]
        by_rank = [_wave_tiles(own, max_numel) for own in self.by_rank]
        waves = []
        for tiles in itertools.zip_longest(*by_rank, fillvalue=()):
            owned = tuple(_some_of(self.whole, own) for own in tiles)
            # With one rank its blocks are all there are.
            everyone = list(itertools.chain.from_iterable(tiles))
            whole = owned[0] if len(owned) == 1 else _some_of(self.whole, everyone)
            waves.append(Division(whole, owned, self.rank))
        return waves


def divide(
    whole: StackSet,
    cost_of: Callable[[Shape], float],
    loads: list[float],
    rank: int,
    *,
    num_replicas: int = 1,
) -> Division:
    """Give every block to a rank.

    Args:
        whole: Geometry of all blocks.
        cost_of: Modelled cost of a block by its shape.
        loads: What each rank has to do already; the new loads are added, in place.
        rank: Which of these ranks this one is.
        num_replicas: In how many replicas these ranks hold shards, one after the other. What a rank of a
            replica gets back for its shard is passed on to the others, in messages of equal length, so
            that every replica is given as much of every shard where loads allow.
    """
    num_holders = len(loads) // num_replicas
    parts = list(_shards_of_blocks(whole, num_holders)) if num_replicas > 1 else None
    costs = [cost_of(layout.block_shape) for layout in whole.layouts for _ in layout.blocks()]
    owners = assign(costs, len(loads), loads, num_teams=num_replicas, parts=parts)
    for index, load in enumerate(loads_of(costs, owners, len(loads))):
        loads[index] += load
    tiles: list[list[Tile]] = [[] for _ in loads]
    remaining = iter(owners)
    for tile in whole.tiles:
        for owner, part in cut_tile(tile, list(itertools.islice(remaining, tile.num_blocks))):
            tiles[owner].append(part)
    return Division(whole, tuple(_some_of(whole, own) for own in tiles), rank)


def _shards_of_blocks(whole: StackSet, num_shards: int) -> Iterator[dict[int, int]]:
    """Per block, how many of its rows are about in which shard, as if rows were those before merging."""
    for tile in whole.tiles:
        run = -(-tile.merged_shape[0] // num_shards)
        for index in range(tile.counts[0]):
            first = tile.starts[0] + index * tile.sizes[0]
            last = first + tile.sizes[0]
            rows = {
                shard: min(last, (shard + 1) * run) - max(first, shard * run)
                for shard in range(first // run, (last - 1) // run + 1)
            }
            yield from itertools.repeat(rows, tile.num_blocks // tile.counts[0])


def _wave_tiles(own: StackSet, max_numel: int) -> list[list[Tile]]:
    """Deal blocks out to waves in the order of the stacks, so that few stacks are cut in two."""
    numels = [math.prod(tile.sizes) for tile in own.tiles for _ in range(tile.num_blocks)]
    labels = wave_labels(numels, max_numel)
    waves: list[list[Tile]] = [[] for _ in range(max(labels, default=0) + 1)]
    remaining = iter(labels)
    for tile in own.tiles:
        for wave, part in cut_tile(tile, list(itertools.islice(remaining, tile.num_blocks))):
            waves[wave].append(part)
    return waves


def wave_labels(numels: Sequence[int], max_numel: int) -> list[int]:
    """Number of the wave of each block: a wave ends where the next block would make it too large."""
    labels = []
    wave = filled = 0
    for numel in numels:
        if filled and filled + numel > max_numel:
            wave, filled = wave + 1, 0
        filled += numel
        labels.append(wave)
    return labels


def _some_of(whole: StackSet, tiles: Sequence[Tile]) -> StackSet:
    return StackSet(tiles, dtype=whole.dtype, device=whole.device, whole=whole.whole)
