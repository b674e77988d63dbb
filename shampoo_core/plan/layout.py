"""Which blocks a model is cut into, which rank owns each, and what that makes ranks send."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from shampoo_core.blocking import Shape, Tile, merge_dimensions, tiles_of
from shampoo_core.config import check_choice, check_count
from shampoo_core.exchange.assignment import assign, imbalance
from shampoo_core.exchange.traffic import all_gather_bytes
from shampoo_core.model_shapes import NamedShape
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.preconditioners.diagonal import AdamConfig

Sharding = Literal["ddp", "fsdp2", "hsdp"]
TABLE_ROWS = 65_536
"""A parameter with a side this long is a lookup table and stepped by Adam."""
DIAGONAL_BLOCK_SIZE = 2**20


@dataclass(frozen=True)
class Placement:
    """How parameters lie on ranks.

    Args:
        world_size: Number of ranks, at least 1.
        sharding: ``"ddp"`` every rank holds all parameters; ``"fsdp2"`` each holds a slice of the rows
            of every parameter; ``"hsdp"`` the ranks of a group do, and groups are replicas.
        group_size: Ranks of a group under ``"hsdp"``; has to divide ``world_size``.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number is out of range.
    """

    world_size: int = 1
    sharding: Sharding = "ddp"
    group_size: int = 8

    def __post_init__(self) -> None:
        check_count("Placement", "world_size", self.world_size)
        check_count("Placement", "group_size", self.group_size)
        check_choice("Placement", "sharding", self.sharding, get_args(Sharding))
        if self.sharding == "hsdp" and self.world_size % self.group_size:
            raise ValueError(
                f"Placement: group_size must divide world_size={self.world_size}, "
                f"got {self.group_size}"
            )

    @property
    def num_owners(self) -> int:
        """Ranks that share the blocks among them: all, or those of a replica."""
        return self.group_size if self.sharding == "hsdp" else self.world_size

    @property
    def num_shards(self) -> int:
        """Slices that every parameter is held in; 1 if each rank holds all of it."""
        return 1 if self.sharding == "ddp" else self.num_owners


@dataclass(frozen=True)
class MethodBlocks:
    """The blocks that one method steps, and their owners."""

    config: PreconditionerConfig
    tiles: list[Tile]
    """One tile for each block."""
    owners: list[int]
    costs: list[float]

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
) -> list[MethodBlocks]:
    """Cut parameters into blocks, lookup tables apart, and give each an owner.

    Args:
        parameters: Of the model.
        config: Steps everything but lookup tables.
        placement: Ranks.
        max_block_size: Longest side of a block.
        refresh_interval: Weighs the cost of refreshes against that of steps.
    """
    is_table = [max(parameter.shape, default=1) >= TABLE_ROWS for parameter in parameters]
    loads = [0.0] * placement.num_owners
    methods = []
    for method, tables in ((config, False), (AdamConfig(), True)):
        tiles = []
        for index, parameter in enumerate(parameters):
            if is_table[index] == tables:
                tiles += _single_blocks(index, parameter.shape, max_block_size, whole=tables)
        if not tiles:
            continue
        costs = [method.block_flops(tile.sizes, refresh_interval) for tile in tiles]
        owners = assign(costs, placement.num_owners, loads)
        for cost, owner in zip(costs, owners, strict=True):
            loads[owner] += cost
        methods.append(MethodBlocks(method, tiles, owners, costs))
    return methods


def _single_blocks(index: int, shape: Shape, max_block_size: int, *, whole: bool) -> list[Tile]:
    """The blocks of one parameter as tiles of one block each."""
    if whole:
        tiles = tiles_of(index, (math.prod(shape),), DIAGONAL_BLOCK_SIZE)
    else:
        tiles = tiles_of(index, merge_dimensions(shape, max_block_size), max_block_size)
    ones = (1,) * len(tiles[0].sizes) if tiles else ()
    return [
        Tile(index, tile.merged_shape, starts, tile.sizes, ones, position)
        for tile in tiles
        for position, starts in zip(tile.grid_indices(), _starts(tile), strict=True)
    ]


def _starts(tile: Tile) -> list[Shape]:
    """First element of each block of a tile, along every axis, in the order of its grid."""
    per_axis = (
        range(start, start + size * count, size)
        for start, size, count in zip(tile.starts, tile.sizes, tile.counts, strict=True)
    )
    return list(itertools.product(*per_axis))


def balance(methods: Sequence[MethodBlocks], placement: Placement) -> float:
    """Largest modelled load of a rank over the mean load."""
    costs = [cost for method in methods for cost in method.costs]
    owners = [owner for method in methods for owner in method.owners]
    return imbalance(costs, owners, placement.num_owners)


def loads(methods: Sequence[MethodBlocks], placement: Placement) -> list[float]:
    """Modelled load of each owner."""
    totals = [0.0] * placement.num_owners
    for method in methods:
        for cost, owner in zip(method.costs, method.owners, strict=True):
            totals[owner] += cost
    return totals


def numbers_owned(method: MethodBlocks, placement: Placement) -> list[int]:
    """Numbers in the blocks of each owner."""
    numbers = [0] * placement.num_owners
    for tile, owner in zip(method.tiles, method.owners, strict=True):
        numbers[owner] += math.prod(tile.sizes)
    return numbers


def sent_bytes(
    parameters: Sequence[NamedShape],
    methods: Sequence[MethodBlocks],
    placement: Placement,
    bytes_per_number: int = 4,
) -> list[int]:
    """Bytes that each owner puts on the wire in a step.

    Args:
        parameters: Of the model.
        methods: Their blocks.
        placement: Ranks.
        bytes_per_number: Of the communication dtype.
    """
    if placement.num_owners == 1:
        return [0]
    if placement.sharding == "ddp":
        total = sum(
            all_gather_bytes(numbers_owned(method, placement), bytes_per_number)
            for method in methods
        )
        return [total] * placement.num_owners
    sent = [0] * placement.num_owners
    for (holder, owner), numbers in travelling_pieces(parameters, methods, placement).items():
        if holder != owner:
            sent[holder] += numbers * bytes_per_number  # gradients to the owner
            sent[owner] += numbers * bytes_per_number  # updates back
    return sent


def travelling_pieces(
    parameters: Sequence[NamedShape], methods: Sequence[MethodBlocks], placement: Placement
) -> Counter[tuple[int, int]]:
    """Numbers held by one rank in blocks owned by another, by (holder, owner)."""
    pieces: Counter[tuple[int, int]] = Counter()
    for method in methods:
        for tile, owner in zip(method.tiles, method.owners, strict=True):
            shape = parameters[tile.parameter].shape
            for holder, numbers in _held(tile, shape, placement.num_shards):
                pieces[holder, owner] += numbers
    return pieces


def _held(tile: Tile, shape: Shape, num_shards: int) -> list[tuple[int, int]]:
    """Who holds how many numbers of a block, when rows are dealt out in equal runs."""
    rows = shape[0] if shape else 1
    per_row = math.prod(shape[1:])
    run = -(-rows // num_shards) * per_row
    last = [start + size - 1 for start, size in zip(tile.starts, tile.sizes, strict=True)]
    first_holder = _flat(tile.merged_shape, tile.starts) // run
    last_holder = _flat(tile.merged_shape, last) // run
    held = []
    for holder in range(first_holder, last_holder + 1):
        numbers = _before(tile, (holder + 1) * run) - _before(tile, holder * run)
        if numbers:
            held.append((holder, numbers))
    return held


def _flat(shape: Shape, position: Sequence[int]) -> int:
    flat = 0
    for side, index in zip(shape, position, strict=True):
        flat = flat * side + index
    return flat


def _before(tile: Tile, flat: int) -> int:
    """Numbers of a block whose place in the flat parameter is before ``flat``."""
    count = 0
    for axis, (start, size) in enumerate(zip(tile.starts, tile.sizes, strict=True)):
        stride = math.prod(tile.merged_shape[axis + 1 :])
        inner = math.prod(tile.sizes[axis + 1 :])
        index, flat = divmod(flat, stride)
        if index < start:
            return count
        if index >= start + size:
            return count + size * inner
        count += (index - start) * inner
    return count
