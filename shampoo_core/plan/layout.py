"""Which blocks a model is cut into, which rank owns each, and what that makes ranks send."""

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
from shampoo_core.exchange.assignment import imbalance
from shampoo_core.exchange.division import divide, wave_labels
from shampoo_core.exchange.traffic import all_gather_bytes, all_to_all_bytes
from shampoo_core.groups import wave_limit
from shampoo_core.model_shapes import NamedShape
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.preconditioners.diagonal import AdamConfig
from shampoo_core.stacks import StackSet

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
    max_wave_numel: int | None = None
    """Most numbers that a rank steps and sends at once; None is all, together with other methods."""

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
) -> list[MethodBlocks]:
    """Cut parameters into blocks, lookup tables apart, and give each an owner as the optimizer does.

    Args:
        parameters: Of the model.
        config: Steps everything but lookup tables.
        placement: Ranks.
        max_block_size: Longest side of a block.
        refresh_interval: Weighs the cost of refreshes against that of steps.
        max_wave_numel: As of the optimizer.
    """
    is_table = [max(parameter.shape, default=1) >= TABLE_ROWS for parameter in parameters]
    loads = [0.0] * placement.num_owners
    methods = []
    for method, tables in ((config, False), (AdamConfig(), True)):
        tiles = []
        for index, parameter in enumerate(parameters):
            if is_table[index] == tables:
                tiles += _tiles(index, parameter.shape, max_block_size, whole=tables)
        if tiles:
            methods.append(_divided(method, tiles, loads, refresh_interval, max_wave_numel))
    return methods


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
) -> MethodBlocks:
    """Give the blocks to ranks with some loads, to which theirs are added."""
    whole = StackSet(tiles, dtype=torch.float32, device=torch.device("meta"))
    division = divide(whole, lambda shape: config.block_flops(shape, interval), loads, 0)
    owned = [
        (block, owner)
        for owner, stack_set in enumerate(division.by_rank)
        for tile in stack_set.tiles
        for block in _single_blocks(tile)
    ]
    costs = [config.block_flops(block.sizes, interval) for block, _ in owned]
    most = max(own.numel for own in division.by_rank)
    limit = wave_limit(max_wave_numel, whole.device, sends=len(loads) > 1, numel=most)
    blocks, owners = [block for block, _ in owned], [owner for _, owner in owned]
    return MethodBlocks(config, blocks, owners, costs, limit)


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


def numbers_owned(methods: Sequence[MethodBlocks], placement: Placement) -> list[list[int]]:
    """Numbers in the blocks that each owner steps and sends together, for every wave."""
    waves: list[list[int]] = []
    together = [0] * placement.num_owners
    for method in methods:
        by_rank = [
            [math.prod(tile.sizes) for tile in method.of_rank(rank)]
            for rank in range(placement.num_owners)
        ]
        if method.max_wave_numel is None:
            together = [sum(own, start) for own, start in zip(by_rank, together, strict=True)]
            continue
        sums: list[Counter[int]] = []
        for own in by_rank:
            sums.append(Counter())
            for wave, numel in zip(wave_labels(own, method.max_wave_numel), own, strict=True):
                sums[-1][wave] += numel
        waves += [[of_rank[wave] for of_rank in sums] for wave in range(max(map(len, sums)))]
    return [*waves, together] if any(together) else waves


def sent_bytes(
    parameters: Sequence[NamedShape],
    methods: Sequence[MethodBlocks],
    placement: Placement,
    *,
    reads_weights: bool = True,
    bytes_per_number: int = 4,
) -> list[int]:
    """Bytes that each owner puts on the wire in a step.

    Args:
        parameters: Of the model.
        methods: Their blocks.
        placement: Ranks.
        reads_weights: Whether a step needs the weights of its blocks, as for weight decay.
        bytes_per_number: Of the communication dtype.
    """
    if placement.num_owners == 1:
        return [0]
    if placement.sharding == "ddp":
        waves = numbers_owned(methods, placement)
        sent_by_all = sum(all_gather_bytes(numbers, bytes_per_number) for numbers in waves)
        return [sent_by_all] * placement.num_owners
    pieces = travelling_pieces(parameters, methods, placement)
    sent = []
    for rank in range(placement.num_owners):
        there, back = all_to_all_bytes(pieces, rank, bytes_per_number)
        sent.append(there * (2 if reads_weights else 1) + back)
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
