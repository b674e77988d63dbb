"""Where the numbers of a message lie in the memory of the rank that sends or receives it.

A message is pieces one after the other, by peer. In memory each is some rows of a larger matrix: runs of
numbers that lie apart. Copied piece by piece they would take a kernel each, thousands of them for a large
model; in chunks of equal length, found by an index, all take one:

    memory   | a a b b | a a b b | c c c c |     chunks of 2:  0 1  2 3  4 5
    message  | a a a a | c c c c | b b b b |     index:        0 2  4 5  1 3
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from shampoo_core.blocking import Shape

SHORTEST_CHUNK = 8
"""Of shorter ones the index, of eight bytes for each, would be half as large as the message or larger."""


class View(NamedTuple):
    """Where a part of a tensor lies."""

    shape: Shape
    strides: Shape
    place: int
    """Of its first number."""

    @classmethod
    def of(cls, part: Tensor, *, behind: int = 0) -> View:
        """How a view lies in the memory that it was made of, ``behind`` other numbers."""
        return cls(tuple(part.shape), part.stride(), int(part.storage_offset()) + behind)

    @property
    def numel(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)

    def on(self, flat: Tensor) -> Tensor:
        """The part of a flat tensor."""
        return flat.as_strided(self.shape, self.strides, flat.storage_offset() + self.place)

    def runs(self) -> tuple[int, list[tuple[int, int]]]:
        """Length of its runs of neighbouring numbers, and number and stride of runs along outer axes."""
        length = 1
        outer: list[tuple[int, int]] = []
        for side, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if side == 1:
                continue
            if not outer and stride == length:
                length *= side
            else:
                outer.append((side, stride))
        return length, outer[::-1]


class Order:
    """The parts of a flat tensor that make a message, in order."""

    def __init__(
        self,
        views_by_peer: Sequence[Sequence[View]],
        device: torch.device,
        *,
        units: Sequence[int] = (),
    ) -> None:
        """Work out an index, if the runs allow one.

        Args:
            views_by_peer: Parts of the flat tensor, by whom they go to or come from.
            device: Of the flat tensor.
            units: Lengths of what is not to share a chunk.
        """
        self.sizes = [sum(view.numel for view in views) for views in views_by_peer]
        """Numbers in the message, by peer."""
        self._views = [view for views in views_by_peer for view in views]
        self.chunk = _longest_chunk(self._views, units)
        """Numbers that lie side by side in both; 1 where an index would be too large."""
        self._index: Tensor | None = None
        if self.chunk > 1:
            parts = [_chunks(view, self.chunk) for view in self._views]
            self._index = torch.cat(parts).to(device)

    def read(self, flat: Tensor) -> Tensor:
        """The message, made of a flat tensor."""
        if self._index is not None:
            return self._in_chunks(flat).index_select(0, self._index).view(-1)
        message = flat.new_empty(sum(self.sizes))
        self._copy(message, flat, back=False)
        return message

    def write(self, message: Tensor, flat: Tensor) -> None:
        """Put a message into its parts of a flat tensor."""
        if self._index is not None:
            self._in_chunks(flat).index_copy_(0, self._index, message.view(-1, self.chunk))
        else:
            self._copy(message, flat, back=True)

    def _in_chunks(self, flat: Tensor) -> Tensor:
        return flat[: len(flat) - len(flat) % self.chunk].view(-1, self.chunk)

    def _copy(self, message: Tensor, flat: Tensor, *, back: bool) -> None:
        slots = message.split([view.numel for view in self._views])
        dense: list[tuple[Tensor, Tensor]] = []
        apart: list[tuple[Tensor, Tensor]] = []
        for slot, view in zip(slots, self._views, strict=True):
            pair = slot.view(view.shape), view.on(flat)
            # One tensor that is not contiguous makes a GPU take a kernel for every one of a list.
            (dense if pair[1].is_contiguous() else apart).append(pair)
        for pairs in (dense, apart):
            if pairs:
                in_message, in_memory = map(list, zip(*pairs, strict=True))
                to, source = (in_memory, in_message) if back else (in_message, in_memory)
                torch._foreach_copy_(to, source)


def _longest_chunk(views: Sequence[View], units: Sequence[int]) -> int:
    """The longest chunks that all views consist of, each a multiple of their length behind the start."""
    chunk = math.gcd(*units)
    for view in views:
        length, outer = view.runs()
        chunk = math.gcd(chunk, length, view.place, *(stride for _, stride in outer))
    return chunk if chunk >= SHORTEST_CHUNK else 1


def _chunks(view: View, chunk: int) -> Tensor:
    """Numbers of a view's chunks, in its order."""
    length, outer = view.runs()
    starts = torch.tensor([view.place // chunk])
    for side, stride in [*outer, (length // chunk, chunk)]:
        starts = (starts[:, None] + torch.arange(side) * (stride // chunk)).view(-1)
    return starts
