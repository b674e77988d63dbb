"""What travels between ranks in a step: bytes on the wire, and the memory that it takes for a while.

Replicated parameters: every rank sends the updates of its blocks to all others. Sharded ones: holders send
pieces of gradients, and of weights where a step reads them, to the owners of their blocks, and get pieces
of updates back, with a number per block where weights decay.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

from shampoo_core.blocking import Shape, Tile
from shampoo_core.exchange.division import wave_labels
from shampoo_core.exchange.traffic import all_gather_bytes, all_to_all_bytes
from shampoo_core.model_shapes import NamedShape
from shampoo_core.plan.layout import MethodBlocks, Placement

FLOAT32 = 4
"""Bytes of a number, also of one that travels."""

Wave = list[tuple[Tile, int]]
"""Blocks that are stepped and sent together, and the owner of each."""
Pairs = Counter[tuple[int, int]]
"""Counts by (holder, owner)."""


class Pieces(NamedTuple):
    """What is held by one rank of blocks owned by another."""

    numbers: Pairs
    blocks: Pairs
    """A block that several ranks hold rows of counts for each of them."""


class Travel(NamedTuple):
    """Bytes by owner."""

    sent: list[int]
    """On the wire in a step."""
    alive: list[int]
    """Temporary, most while blocks travel: messages, and stacks they are filled from and emptied to."""
    weights: list[int]
    """Temporary, of weights that have come and stay while a step computes, most in a wave."""


def travel(
    parameters: Sequence[NamedShape],
    methods: Sequence[MethodBlocks],
    placement: Placement,
    *,
    reads_weights: bool = False,
    holders_decay: bool = True,
) -> Travel:
    """Work out what a step's messages take.

    Args:
        parameters: Of the model.
        methods: Their blocks.
        placement: Ranks.
        reads_weights: Whether a step needs the weights of its blocks, as for L2 decay.
        holders_decay: Whether there is decay that is left to the ranks that hold the weights.
    """
    ranks = range(placement.num_owners)
    total = Travel([0 for _ in ranks], [0 for _ in ranks], [0 for _ in ranks])
    if placement.num_owners == 1:
        return total
    for wave in waves(methods):
        if placement.sharding == "ddp":
            of_wave = _replicated(wave, placement)
        else:
            pieces = pieces_of(wave, parameters, placement)
            of_wave = _sharded(pieces, placement, reads_weights, holders_decay)
        for rank in ranks:
            total.sent[rank] += of_wave.sent[rank]
            total.alive[rank] = max(total.alive[rank], of_wave.alive[rank])
            total.weights[rank] = max(total.weights[rank], of_wave.weights[rank])
    return total


def waves(methods: Sequence[MethodBlocks]) -> list[Wave]:
    """What is stepped and sent together: methods without limit all at once, others by themselves."""
    together: Wave = []
    apart: list[Wave] = []
    for method in methods:
        blocks = list(zip(method.tiles, method.owners, strict=True))
        if method.max_wave_numel is None:
            together += blocks
            continue
        by_label: dict[int, Wave] = {}
        for owner in dict.fromkeys(method.owners):
            own = method.of_rank(owner)
            labels = wave_labels([math.prod(tile.sizes) for tile in own], method.max_wave_numel)
            for tile, label in zip(own, labels, strict=True):
                by_label.setdefault(label, []).append((tile, owner))
        apart += by_label.values()
    return [together, *apart] if together else apart


def pieces_of(wave: Wave, parameters: Sequence[NamedShape], placement: Placement) -> Pieces:
    """Who holds how much of whose blocks."""
    pieces = Pieces(Counter(), Counter())
    for tile, owner in wave:
        for holder, numbers in _held(tile, parameters[tile.parameter].shape, placement.num_shards):
            pieces.numbers[holder, owner] += numbers
            pieces.blocks[holder, owner] += 1
    return pieces


def _replicated(wave: Wave, placement: Placement) -> Travel:
    owned = [0] * placement.num_owners
    for tile, owner in wave:
        owned[owner] += math.prod(tile.sizes)
    sent = all_gather_bytes(owned, FLOAT32)
    # The message of a rank and those of all; updates as they were computed, and as they are sent.
    messages = (len(owned) + 1) * max(owned)
    alive = [FLOAT32 * (messages + 2 * own) for own in owned]
    return Travel([sent] * len(owned), alive, [0] * len(owned))


def _sharded(
    pieces: Pieces, placement: Placement, reads_weights: bool, holders_decay: bool
) -> Travel:
    held, owned = [0] * placement.num_owners, [0] * placement.num_owners
    for (holder, owner), numbers in pieces.numbers.items():
        held[holder] += FLOAT32 * numbers
        owned[owner] += FLOAT32 * numbers
    num_tensors = 2 if reads_weights else 1
    found = Travel([], [], [])
    to_owners, to_holders = all_to_all_bytes(pieces.numbers, placement.num_owners, FLOAT32)
    _, moves = all_to_all_bytes(pieces.blocks, placement.num_owners, FLOAT32)
    by_rank = zip(to_owners, to_holders, moves, held, owned, strict=True)
    for there, back, whether_it_moves, of_holder, own in by_rank:
        found.sent.append(num_tensors * there + back + holders_decay * whether_it_moves)
        weights = (num_tensors - 1) * own
        # Messages out and in, and stacks to fill; later updates as computed and as sent, and messages.
        collecting = num_tensors * (of_holder + 2 * own)
        delivering = weights + 2 * own + own + of_holder
        found.alive.append(max(collecting, delivering))
        found.weights.append(weights)
    return found


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
