"""Which blocks a model is cut into, and which rank owns each."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from shampoo_core.blocking import Shape, Tile, merge_dimensions, tiles_of
from shampoo_core.config import check_choice, check_count
from shampoo_core.exchange.assignment import imbalance, loads_of
from shampoo_core.exchange.division import Division, divide
from shampoo_core.groups import wave_limit
from shampoo_core.model_shapes import NamedShape
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.preconditioners.diagonal import AdamConfig
from shampoo_core.stacks import StackSet

Sharding = Literal["ddp", "fsdp2", "hsdp"]
TABLE_ROWS = 65_536
"""A parameter with a side this long is taken for a lookup table, by default."""
DIAGONAL_BLOCK_SIZE = 2**20
MOST_RANKS = 65_536


@dataclass(frozen=True)
class Placement:
    """How parameters lie on ranks.

    Args:
        world_size: Number of ranks, at least 1 and at most 65536.
        sharding: ``"ddp"`` every rank holds all parameters; ``"fsdp2"`` each holds a slice of the rows
            of every parameter; ``"hsdp"`` the ranks of a group do, and groups are replicas, which share
            the work.
        group_size: Ranks of a group under ``"hsdp"``; has to divide ``world_size``.
        ranks_per_group: As of `Distribution`: neighbouring ranks that share the work, a divisor of
            ``world_size``, and under ``"hsdp"`` a number of whole replicas; None means all.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number is out of range.
    """

    world_size: int = 1
    sharding: Sharding = "ddp"
    group_size: int = 8
    ranks_per_group: int | None = None

    def __post_init__(self) -> None:
        check_count("Placement", "world_size", self.world_size)
        if self.world_size > MOST_RANKS:
            raise ValueError(
                f"Placement: world_size must be at most {MOST_RANKS}, for a plan goes through all ranks, "
                f"got {self.world_size}"
            )
        check_count("Placement", "group_size", self.group_size)
        check_choice("Placement", "sharding", self.sharding, get_args(Sharding))
        if self.sharding == "hsdp" and self.world_size % self.group_size:
            raise ValueError(
                f"Placement: group_size must divide world_size={self.world_size}, "
                f"got {self.group_size}"
            )
        self._check_ranks_per_group()

    def _check_ranks_per_group(self) -> None:
        sharing = self.ranks_per_group
        check_count("Placement", "ranks_per_group", sharing, optional=True)
        if sharing is None:
            return
        if self.world_size % sharing:
            raise ValueError(
                f"Placement: ranks_per_group must divide world_size={self.world_size}, got {sharing}"
            )
        if sharing % self.num_shards:
            raise ValueError(
                f"Placement: ranks_per_group must be a multiple of the {self.num_shards} ranks that hold "
                f"a parameter together, got {sharing}"
            )

    @property
    def num_owners(self) -> int:
        """Ranks that share the blocks among them; other groups of as many do the same again."""
        return self.world_size if self.ranks_per_group is None else self.ranks_per_group

    @property
    def num_messages(self) -> int:
        """As of the exchange between these ranks."""
        if self.num_owners == 1:
            return 0
        return self.num_replicas

    @property
    def num_shards(self) -> int:
        """Slices that every parameter is held in; 1 if each rank holds all of it."""
        return {"ddp": 1, "fsdp2": self.world_size, "hsdp": self.group_size}[self.sharding]

    @property
    def num_replicas(self) -> int:
        """Ranks that hold the same and share its work."""
        return self.num_owners // self.num_shards


@dataclass(frozen=True)
class MethodBlocks:
    """The blocks that one method steps, and their owners."""

    config: PreconditionerConfig
    tiles: list[Tile]
    """One tile for each block."""
    owners: list[int]
    costs: list[float]
    stacks: list[tuple[Shape, list[int]]]
    """The blocks of all ranks as they are stacked for the schedule of refreshes: a shape, and owners."""
    max_wave_numel: int | None = None
    """Most numbers that a rank steps and sends at once; None is all, together with other methods."""
    option: int | Literal["auto"] | None = None
    """What one rank with its own blocks is to be given as the optimizer's ``max_wave_numel``."""

    def of_rank(self, rank: int) -> list[Tile]:
        """The blocks of one rank."""
        return [tile for tile, owner in zip(self.tiles, self.owners, strict=True) if owner == rank]


def blocks_by_method(
    parameters: Sequence[NamedShape],
    config: PreconditionerConfig,
    placement: Placement,
    *,
    max_block_size: int,
    refresh_interval: int,
    max_wave_numel: int | Literal["auto"] | None = None,
    table_rows: int | None = TABLE_ROWS,
) -> list[MethodBlocks]:
    """Cut parameters into blocks, lookup tables apart, and give each an owner as the optimizer does.

    Args:
        parameters: Of the model.
        config: Steps everything but lookup tables, which are a group of their own, stepped by Adam.
        placement: Ranks.
        max_block_size: Longest side of a block.
        refresh_interval: Weighs the cost of refreshes against that of steps.
        max_wave_numel: As of the optimizer.
        table_rows: A parameter with a side of as many or more is a lookup table; None takes none for one.
    """
    found = tables_of(parameters, table_rows)
    loads = [0.0] * placement.num_owners
    methods = []
    for method, tables in ((config, False), (AdamConfig(), True)):
        tiles = []
        for index, parameter in enumerate(parameters):
            if (index in found) == tables:
                tiles += _tiles(index, parameter.shape, max_block_size, whole=tables)
        if tiles:
            options = refresh_interval, max_wave_numel, placement
            methods.append(_divided(method, tiles, loads, *options))
    return methods


def tables_of(parameters: Sequence[NamedShape], table_rows: int | None) -> set[int]:
    """Indices of the parameters that are lookup tables; see `blocks_by_method`."""
    if table_rows is None:
        return set()
    return {i for i, own in enumerate(parameters) if max(own.shape, default=1) >= table_rows}


def _tiles(index: int, shape: Shape, max_block_size: int, *, whole: bool) -> list[Tile]:
    if whole:
        return tiles_of(index, (math.prod(shape),), DIAGONAL_BLOCK_SIZE)
    return tiles_of(index, merge_dimensions(shape, max_block_size), max_block_size)


def _divided(
    config: PreconditionerConfig,
    tiles: Sequence[Tile],
    loads: list[float],
    interval: int,
    max_wave_numel: int | Literal["auto"] | None,
    placement: Placement,
) -> MethodBlocks:
    """Give the blocks to ranks with some loads, to which theirs are added."""
    whole = StackSet(tiles, dtype=torch.float32, device=torch.device("meta"))
    replicas = 1 if placement.sharding == "ddp" else placement.num_replicas
    division = divide(
        whole, lambda shape: config.block_flops(shape, interval), loads, 0, num_replicas=replicas
    )
    owned = [
        (block, owner)
        for owner, stack_set in enumerate(division.by_rank)
        for tile in stack_set.tiles
        for block in _single_blocks(tile)
    ]
    costs = [config.block_flops(block.sizes, interval) for block, _ in owned]
    most = max(own.numel for own in division.by_rank)
    messages = placement.num_messages
    limit = wave_limit(max_wave_numel, whole.device, num_messages=messages, numel=most)
    blocks, owners = [block for block, _ in owned], [owner for _, owner in owned]
    option = max_wave_numel if limit is None else limit
    return MethodBlocks(config, blocks, owners, costs, _owners_of_stacks(division), limit, option)


def _owners_of_stacks(division: Division) -> list[tuple[Shape, list[int]]]:
    owner_of = {
        block: rank
        for rank, own in enumerate(division.by_rank)
        for layout in own.layouts
        for block in layout.blocks()
    }
    return [
        (layout.block_shape, [owner_of[block] for block in layout.blocks()])
        for layout in division.whole.layouts
    ]


def _single_blocks(tile: Tile) -> list[Tile]:
    """The blocks of a tile as tiles of one block each."""
    per_axis = (
        range(start, start + size * count, size)
        for start, size, count in zip(tile.starts, tile.sizes, tile.counts, strict=True)
    )
    ones = (1,) * len(tile.sizes)
    return [
        Tile(tile.parameter, tile.merged_shape, starts, tile.sizes, ones, position)
        for position, starts in zip(tile.grid_indices(), itertools.product(*per_axis), strict=True)
    ]


def stack_sizes(methods: Sequence[MethodBlocks]) -> dict[str, int]:
    """Block shape -> number of blocks of all ranks, most numbers first."""
    by_size = sorted(_counts(methods).items(), key=lambda item: -item[1] * math.prod(item[0]))
    return {"x".join(map(str, shape)): count for shape, count in by_size}


def largest_stack(methods: Sequence[MethodBlocks]) -> int:
    """Numbers in the blocks of one shape that have most, of all ranks."""
    return max(count * math.prod(shape) for shape, count in _counts(methods).items())


def _counts(methods: Sequence[MethodBlocks]) -> Counter[Shape]:
    return Counter(tile.sizes for method in methods for tile in method.tiles)


def held_numbers(parameters: Sequence[NamedShape], placement: Placement) -> int:
    """Of one rank: all, or slices of the rows, each as long as the longest."""
    numbers = 0
    for parameter in parameters:
        rows = parameter.shape[0] if parameter.shape else 1
        numbers += -(-rows // placement.num_shards) * math.prod(parameter.shape[1:])
    return numbers


def balance(methods: Sequence[MethodBlocks], placement: Placement) -> float:
    """Largest modelled load of a rank over the mean load."""
    return imbalance(*_costs_and_owners(methods), placement.num_owners)


def loads(methods: Sequence[MethodBlocks], placement: Placement) -> list[float]:
    """Modelled load of each owner."""
    return loads_of(*_costs_and_owners(methods), placement.num_owners)


def _costs_and_owners(methods: Sequence[MethodBlocks]) -> tuple[list[float], list[int]]:
    costs = [cost for method in methods for cost in method.costs]
    return costs, [owner for method in methods for owner in method.owners]
