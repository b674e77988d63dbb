"""What travels between ranks in a step: bytes on the wire, and the memory that it takes for a while.

Replicated parameters: every rank sends the updates of its blocks to all others. Sharded ones: holders send
pieces of gradients, and of weights where a step reads them, to the owners of their blocks, and get pieces
of updates back, with a number per block where weights decay, which they pass on to other replicas.
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
    """On the wire in a step, among ranks that have all there is together."""
    passed_on: list[int]
    """On the wire in a step, of sharded parameters from one replica to the others."""
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
    total = Travel(*([0 for _ in ranks] for _ in Travel._fields))
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
            total.passed_on[rank] += of_wave.passed_on[rank]
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
    return Travel([sent] * len(owned), [0] * len(owned), alive, [0] * len(owned))


def _sharded(
    pieces: Pieces, placement: Placement, reads_weights: bool, holders_decay: bool
) -> Travel:
    num_shards, num_replicas = placement.num_shards, placement.num_replicas
    num_tensors = 2 if reads_weights else 1
    own = [0] * placement.num_owners
    replicas = [_Replica(num_shards) for _ in range(num_replicas)]
    for (holder, owner), numbers in pieces.numbers.items():
        own[owner] += FLOAT32 * numbers
        moves = pieces.blocks[holder, owner] if holders_decay else 0
        replicas[owner // num_shards].add(holder, owner % num_shards, numbers, moves)
    longest = [max(replica.back[holder] for replica in replicas) for holder in range(num_shards)]
    found = Travel(*([] for _ in Travel._fields))
    there = [all_to_all_bytes(r.numbers, num_shards, FLOAT32)[0] for r in replicas]
    back = [all_to_all_bytes(r.with_moves, num_shards, FLOAT32)[1] for r in replicas]
    for owner, of_owner in enumerate(own):
        place, holder = divmod(owner, num_shards)
        replica = replicas[place]
        found.sent.append(num_tensors * there[place][holder] + back[place][holder])
        found.passed_on.append((num_replicas - 1) * longest[holder])
        weights = (num_tensors - 1) * of_owner
        # What a message is made of and it, it and one that comes, or that and what is made of it. Updates
        # as computed, as multiplied and as sent; what came beside what it came in, one message of every
        # replica; and beside weights twice, in two orders.
        here, everything = replica.held[holder], sum(r.held[holder] for r in replicas)
        collecting = num_tensors * max(2 * here, here + of_owner, 2 * of_owner)
        came = num_replicas * longest[holder]
        delivering = max(
            3 * of_owner,
            of_owner + longest[holder],
            longest[holder] + came if num_replicas > 1 else 0,
            came + everything,
            (3 if holders_decay else 2) * everything,
        )
        found.alive.append(max(collecting, weights + delivering))
        found.weights.append(weights)
    return found


class _Replica:
    """What belongs to the owners in one replica."""

    def __init__(self, num_shards: int) -> None:
        self.numbers = Pairs()
        self.with_moves = Pairs()
        """And a number per block, whether it moves."""
        self.held = [0] * num_shards
        """Bytes by holder, of one tensor."""
        self.back = [0] * num_shards
        """Bytes that come to a holder, its own among them."""

    def add(self, holder: int, owner: int, numbers: int, moves: int) -> None:
        """Add pieces; both ranks are counted within the replica."""
        self.numbers[holder, owner] += numbers
        self.with_moves[holder, owner] += numbers + moves
        self.held[holder] += FLOAT32 * numbers
        self.back[holder] += FLOAT32 * (numbers + moves)


def _held(tile: Tile, shape: Shape, num_shards: int) -> list[tuple[int, int]]:
    """Who holds how many numbers of a block, when rows are dealt out in equal runs."""
    rows = shape[0] if shape else 1
    run_of_rows = -(-rows // num_shards)
    if tile.merged_shape and tile.merged_shape[0] == rows:
        return _held_rows(tile, run_of_rows)
    run = run_of_rows * math.prod(shape[1:])
    last = [start + size - 1 for start, size in zip(tile.starts, tile.sizes, strict=True)]
    first_holder = _flat(tile.merged_shape, tile.starts) // run
    last_holder = _flat(tile.merged_shape, last) // run
    held = []
    for holder in range(first_holder, last_holder + 1):
        numbers = _before(tile, (holder + 1) * run) - _before(tile, holder * run)
        if numbers:
            held.append((holder, numbers))
    return held


def _held_rows(tile: Tile, run: int) -> list[tuple[int, int]]:
    """The same where rows of the parameter are rows of the block's matrix, as they nearly always are."""
    start, stop = tile.starts[0], tile.starts[0] + tile.sizes[0]
    per_row = math.prod(tile.sizes[1:])
    return [
        (holder, (min(stop, (holder + 1) * run) - max(start, holder * run)) * per_row)
        for holder in range(start // run, (stop - 1) // run + 1)
    ]


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
