"""Parameters whose pieces travel together, and where their numbers are at either end.

Rows of matrices go in long chunks, found by an index. What has shorter runs, such as vectors of which every
rank holds a few numbers, would spoil that and has a lane of its own.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_core.blocking import Shape, Tile
from shampoo_core.exchange.division import Division
from shampoo_core.exchange.orders import SHORTEST_CHUNK, Order, View
from shampoo_core.exchange.pieces import Piece, pieces_of

LONG_STRETCH = 2**16
"""Numbers in neighbouring blocks of one length that are worth a kernel of their own."""


@dataclass(frozen=True)
class Crew:
    """The ranks that share the work on sharded parameters, and which of them this one is."""

    num_holders: int
    """That hold a parameter together: those of a replica."""
    num_replicas: int
    holder: int
    replica: int

    @property
    def num_owners(self) -> int:
        """Owners are numbered replica by replica."""
        return self.num_holders * self.num_replicas

    @property
    def owner(self) -> int:
        """Number of this rank as an owner."""
        return self.replica * self.num_holders + self.holder


class Stretch(NamedTuple):
    """Neighbouring blocks of a message."""

    blocks: slice
    """Of numbers, one for each."""
    part: slice
    """Of the message."""
    chunks: Tensor | None
    """In each block; None where all are of one length. To repeat numbers takes an index, three times the
    bytes of what is made of chunks of one, as conv kernels are: long blocks go without."""


@dataclass(frozen=True)
class Lane:
    """The pieces of some parameters that this rank holds, and those that it owns."""

    spans: dict[int, slice]
    """By parameter: the numbers that this rank holds of the rows that have blocks of the division."""
    held: Order
    """In these spans, one after the other: by owner, of all replicas."""
    held_here: Order
    """The same, by owner in this replica."""
    owned: Order
    """In this rank's stacks: by holder."""
    held_blocks: list[int]
    """By owner: how many numbers come if there is one for every block of a piece."""
    owned_blocks: list[int]
    """By holder: how many go."""
    blocks: Tensor
    """Where these are in a block vector."""
    stretches: list[Stretch]
    """Of ``held``, one after the other: which of those that come are for which numbers."""

    @property
    def numel(self) -> int:
        """Numbers in all spans."""
        return sum(span.stop - span.start for span in self.spans.values())

    def flat(self, tensors: Mapping[int, Tensor | None], like: Tensor) -> Tensor:
        """Spans of some tensors, one after the other.

        Args:
            tensors: What this rank holds by parameter, None for zeros.
            like: Has the dtype and device of zeros.
        """
        parts: list[Tensor] = []
        for index, span in self.spans.items():
            tensor = tensors[index]
            if tensor is None:
                parts.append(like.new_zeros(span.stop - span.start))
            else:
                parts.append(tensor.reshape(-1)[span])
        return torch.cat(parts)

    def spread(self, message: Tensor) -> list[Tensor]:
        """The spans of a message, zero where it has nothing; by parameter."""
        is_full = len(message) == self.numel
        flat = torch.empty_like(message) if is_full else message.new_zeros(self.numel)
        self.held.write(message, flat)
        return list(flat.split([span.stop - span.start for span in self.spans.values()]))

    def add_decay(self, message: Tensor, flat: Tensor, numbers: Tensor) -> None:
        """``message += number * weight``, in place.

        Args:
            message: Updates, in the order of ``held``.
            flat: Weights that this rank holds, one after the other.
            numbers: One for every block of a piece.
        """
        weights = self.held.read(flat)
        for blocks, part, chunks in self.stretches:
            growth, shape = numbers[blocks], (blocks.stop - blocks.start, -1)
            if chunks is not None:
                shape = -1, self.held.chunk
                output_size = (part.stop - part.start) // self.held.chunk
                growth = growth.repeat_interleave(chunks, output_size=output_size)
            message[part].view(shape).addcmul_(weights[part].view(shape), growth[:, None])


def lanes_of(division: Division, shapes: Mapping[int, Shape], crew: Crew) -> list[Lane]:
    """All parameters of a division, in one lane or two; the same on all ranks.

    Args:
        division: Who owns what.
        shapes: Of parameters, before merging.
        crew: The ranks.
    """
    narrow = {tile.parameter for tile in division.whole.tiles if not _has_long_runs(tile)}
    held = list(pieces_of(division, shapes, crew.num_holders, holder=crew.holder))
    owned = list(pieces_of(division, shapes, crew.num_holders, owner=crew.owner))
    lanes = []
    for is_narrow in (False, True):
        chosen = [index for index in division.whole.parameters if (index in narrow) == is_narrow]
        if chosen:
            some = set(chosen)
            lanes.append(
                _lane(
                    division,
                    chosen,
                    [piece for piece in held if piece.tile.parameter in some],
                    [piece for piece in owned if piece.tile.parameter in some],
                    crew,
                )
            )
    return lanes


def _has_long_runs(tile: Tile) -> bool:
    """Whether rows of a tile's blocks, and what lies between them, are whole chunks."""
    lengths = tile.sizes[-1], tile.starts[-1], tile.merged_shape[-1]
    return len(tile.sizes) > 1 and all(length % SHORTEST_CHUNK == 0 for length in lengths)


def _lane(
    division: Division,
    parameters: Sequence[int],
    held: Sequence[Piece],
    owned: Sequence[Piece],
    crew: Crew,
) -> Lane:
    own, device = division.own, division.own.device
    spans = {index: slice(0, 0) for index in parameters}
    for piece in held:
        index, row = piece.tile.parameter, math.prod(piece.tile.merged_shape[1:])
        start, stop = piece.held_from * row, (piece.held_from + piece.stop - piece.start) * row
        known = spans[index]
        is_first = known.start == known.stop
        spans[index] = slice(start if is_first else min(start, known.start), max(stop, known.stop))
    lengths = [span.stop - span.start for span in spans.values()]
    behind = {
        index: start - span.start
        for (index, span), start in zip(
            spans.items(), itertools.accumulate(lengths, initial=0), strict=False
        )
    }
    slots = own.tile_slots(own.views(_on_meta(own.numel)))
    of_blocks = [piece.numel // piece.num_blocks for piece in held]
    all_held: list[list[View]] = [[] for _ in range(crew.num_owners)]
    held_blocks, owned_blocks = [0] * crew.num_owners, [0] * crew.num_holders
    for piece in held:
        index = piece.tile.parameter
        rows = _on_meta(spans[index].stop).view(-1, *piece.tile.merged_shape[1:])
        all_held[piece.owner].append(View.of(piece.in_shard(rows), behind=behind[index]))
        held_blocks[piece.owner] += piece.num_blocks
    all_owned: list[list[View]] = [[] for _ in range(crew.num_holders)]
    by_holder = sorted(owned, key=lambda piece: piece.holder)
    for piece in by_holder:
        all_owned[piece.holder].append(View.of(piece.in_slot(slots[piece.slot])))
        owned_blocks[piece.holder] += piece.num_blocks
    order = Order(all_held, device, units=of_blocks)
    first = crew.replica * crew.num_holders
    here = all_held[first : first + crew.num_holders]
    return Lane(
        spans=spans,
        held=order,
        held_here=order if crew.num_replicas == 1 else Order(here, device),
        owned=Order(all_owned, device),
        held_blocks=held_blocks,
        owned_blocks=owned_blocks,
        blocks=_numbers(
            (piece.first_block + i for piece in by_holder for i in range(piece.num_blocks)), device
        ),
        stretches=_stretches(
            [n for piece, n in zip(held, of_blocks, strict=True) for _ in range(piece.num_blocks)],
            order.chunk,
            device,
        ),
    )


def _stretches(lengths: Sequence[int], chunk: int, device: torch.device) -> list[Stretch]:
    """Blocks of a message by how they are multiplied: all by their chunks, where these are long."""
    ends = list(itertools.accumulate(lengths, initial=0))

    def stretch(start: int, stop: int, *, equal: bool) -> Stretch:
        chunks = None if equal else _numbers((n // chunk for n in lengths[start:stop]), device)
        return Stretch(slice(start, stop), slice(ends[start], ends[stop]), chunks)

    found: list[Stretch] = []
    begun = stop = 0
    for length, run in itertools.groupby(lengths if chunk == 1 else ()):
        start, stop = stop, stop + len(list(run))
        if (stop - start) * length < LONG_STRETCH:
            continue
        if begun < start:
            found.append(stretch(begun, start, equal=False))
        found.append(stretch(start, stop, equal=True))
        begun = stop
    if begun < len(lengths):
        found.append(stretch(begun, len(lengths), equal=False))
    return found


def _on_meta(numel: int) -> Tensor:
    return torch.empty(numel, device="meta")


def _numbers(numbers: Iterable[int], device: torch.device) -> Tensor:
    return torch.tensor(list(numbers), dtype=torch.int64).to(device)
