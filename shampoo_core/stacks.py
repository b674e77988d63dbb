"""All blocks of one shape live in one tensor; this file moves blocks in and out of such stacks.

A `StackSet` is the geometry of the stacks that are processed together: which tiles of which
parameters make up which stack, and where a block's scalars stand in the vectors that hold one number
per block. Every method is a handful of operations for the whole set, never one per block.

Vocabulary used in all of ``shampoo_core``:

- a *stack* is a tensor of shape (N, *block shape); the list of all of a set's stacks is written
  ``stacks``;
- a *block vector* is a tensor of shape (B,), one number for each of the B blocks of the set.
"""

from __future__ import annotations

import functools
import itertools
import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_core.blocking import Shape, Tile

ByParameter = Sequence[Tensor] | Mapping[int, Tensor]
"""Parameter-shaped tensors, indexed by `Tile.parameter`; those of the tiles at hand are enough."""
MaybeByParameter = ByParameter | Sequence[Tensor | None] | Mapping[int, Tensor | None]
"""The same, None where there is none."""


@dataclass(frozen=True)
class StackLayout:
    """One stack: the shape of its blocks and the tiles it is filled from, in order."""

    block_shape: Shape
    tiles: tuple[Tile, ...]

    @functools.cached_property
    def num_blocks(self) -> int:
        """N, the length of the stack."""
        return sum(tile.num_blocks for tile in self.tiles)

    @property
    def shape(self) -> Shape:
        """(N, *block shape)."""
        return (self.num_blocks, *self.block_shape)

    @functools.cached_property
    def count_strides(self) -> tuple[Shape, ...]:
        """Per tile, how many blocks lie between neighbours along each axis of its grid."""
        return tuple(
            tuple(math.prod(tile.counts[axis + 1 :]) for axis in range(len(tile.counts)))
            for tile in self.tiles
        )

    def blocks(self) -> list[tuple[int, Shape]]:
        """Parameter and grid position of each block, in the order of the stack."""
        return [(tile.parameter, index) for tile in self.tiles for index in tile.grid_indices()]


class StackSet:
    """The stacks that are stepped together, and how blocks travel between them and parameters."""

    def __init__(
        self,
        tiles: Sequence[Tile],
        *,
        dtype: torch.dtype,
        device: torch.device,
        whole: StackSet | None = None,
    ) -> None:
        """Group tiles by block shape.

        Args:
            tiles: Tiles of any number of parameters; blocks of equal shape share a stack.
            dtype: Of the state and of all arithmetic.
            device: Of the state.
            whole: The set that these blocks are some of, in the same order; None where they are all.
        """
        self.whole = self if whole is None else whole
        """Geometry of the blocks of all ranks, or more; schedules are made for all of these."""
        by_shape: dict[Shape, list[Tile]] = {}
        for tile in tiles:
            by_shape.setdefault(tile.sizes, []).append(tile)
        self.layouts = [StackLayout(shape, tuple(group)) for shape, group in by_shape.items()]
        self.dtype = dtype
        self.device = device
        self.sizes = [layout.num_blocks for layout in self.layouts]
        self.num_blocks = sum(self.sizes)
        self._broadcast = [(-1, *[1] * len(layout.block_shape)) for layout in self.layouts]
        self.numel = sum(math.prod(layout.shape) for layout in self.layouts)
        self.parameters = sorted({tile.parameter for tile in tiles})
        self.tiles = [tile for layout in self.layouts for tile in layout.tiles]
        """In the order of the stacks."""

    def __len__(self) -> int:
        """Number of stacks."""
        return len(self.layouts)

    def positions(self) -> list[list[int]]:
        """Per stack, where its blocks stand in the whole set's stack of that shape; ascending."""
        if self.whole is self:
            return [list(range(size)) for size in self.sizes]
        places: dict[tuple[int, Shape], int] = {}
        for layout in self.whole.layouts:
            places.update({block: place for place, block in enumerate(layout.blocks())})
        return [[places[block] for block in layout.blocks()] for layout in self.layouts]

    # --- allocation -------------------------------------------------------------------------------

    def empty(self) -> list[Tensor]:
        """Uninitialised stacks, all views of one flat tensor."""
        return self.views(torch.empty(self.numel, dtype=self.dtype, device=self.device))

    def views(self, flat: Tensor) -> list[Tensor]:
        """Stacks that are views of a flat tensor of `numel` numbers, one after the other."""
        pieces = flat.split([math.prod(layout.shape) for layout in self.layouts])
        return [
            piece.view(layout.shape) for piece, layout in zip(pieces, self.layouts, strict=True)
        ]

    def flat(self, stacks: Sequence[Tensor]) -> Tensor:
        """The flat tensor that `views` made stacks of, (numel,); a view."""
        first = stacks[0]
        return first.as_strided((self.numel,), (1,), first.storage_offset())

    def zeros(self) -> list[Tensor]:
        """One zero tensor per stack, each with its own storage."""
        return [
            torch.zeros(layout.shape, dtype=self.dtype, device=self.device)
            for layout in self.layouts
        ]

    def block_vector(self, value: float = 0.0) -> Tensor:
        """A block vector filled with ``value``."""
        return torch.full((self.num_blocks,), value, dtype=self.dtype, device=self.device)

    # --- block vectors ----------------------------------------------------------------------------

    def split(self, block_vector: Tensor) -> list[Tensor]:
        """Views of a block vector, one per stack, shaped (N, 1, ..., 1) to broadcast over it."""
        pieces = torch.split_with_sizes(block_vector, self.sizes)
        return [piece.view(shape) for piece, shape in zip(pieces, self._broadcast, strict=True)]

    def norms(self, stacks: Sequence[Tensor], order: float = 2) -> Tensor:
        """Vector norm of every block, as a block vector."""
        # unbind gives views; the list goes to one operation, which torch fuses on a GPU.
        blocks = list(itertools.chain.from_iterable(stack.unbind() for stack in stacks))
        return torch.stack(torch._foreach_norm(blocks, order))

    def presence(self, tensors: Sequence[object | None]) -> Tensor:
        """Block vector with 1 where the block's parameter has something in ``tensors``, else 0."""
        flags = [
            [0.0 if tensors[tile.parameter] is None else 1.0] * tile.num_blocks
            for tile in self.tiles
        ]
        return torch.tensor(
            list(itertools.chain.from_iterable(flags)), dtype=self.dtype, device=self.device
        )

    # --- moving blocks ----------------------------------------------------------------------------

    def gather(self, tensors: MaybeByParameter) -> list[Tensor]:
        """Copy parameter-shaped tensors into new stacks; blocks of a missing tensor are zero.

        Args:
            tensors: Of any floating dtype.

        Returns:
            One (N, *block shape) tensor per stack.
        """
        stacks = self.empty()
        if any(tensors[parameter] is None for parameter in self.parameters):
            torch._foreach_zero_(stacks)
        merged: dict[int, Tensor] = {}
        tiles, sources, targets = [], [], []
        for tile, target in zip(self.tiles, self.tile_slots(stacks), strict=True):
            tensor = tensors[tile.parameter]
            if tensor is None:
                continue
            tiles.append(tile)
            if tile.parameter not in merged:
                merged[tile.parameter] = _merged(tensor, tile.merged_shape)
            sources.append(_tile_view(merged[tile.parameter], tile))
            targets.append(target)
        for some_targets, some_sources in _by_contiguity(tiles, targets, sources):
            torch._foreach_copy_(some_targets, some_sources)
        return stacks

    def add_from(self, stacks: Sequence[Tensor], tensors: ByParameter, scale: float) -> None:
        """``stack <- stack + scale * block``, in place.

        Args:
            stacks: What to add to.
            tensors: Where the blocks are taken from.
            scale: One number for all blocks.
        """
        merged: dict[int, Tensor] = {}
        sources = []
        for tile in self.tiles:
            if tile.parameter not in merged:
                merged[tile.parameter] = _merged(tensors[tile.parameter], tile.merged_shape)
            sources.append(_tile_view(merged[tile.parameter], tile))
        for slots, some_sources in _by_contiguity(self.tiles, self.tile_slots(stacks), sources):
            torch._foreach_add_(slots, some_sources, alpha=scale)

    def add_to(
        self,
        tensors: ByParameter,
        stacks: Sequence[Tensor],
        scale: Tensor | None = None,
        growth: Tensor | None = None,
    ) -> None:
        """``tensor <- tensor + growth * tensor + scale * stack`` for every block in its place.

        Args:
            tensors: Changed in place.
            stacks: What is added.
            scale: Block vector; None is 1.
            growth: Block vector; None is 0.
        """
        add_tiles(
            tensors,
            self.tiles,
            self.tile_slots(stacks),
            None if scale is None else self._spread(scale),
            None if growth is None else self._spread(growth),
        )

    def _spread(self, block_vector: Tensor) -> list[Tensor]:
        """A block vector as views, one per tile, of the shape of the tile's slot."""
        start = block_vector.storage_offset()
        return [
            block_vector.as_strided(shape, strides, start + place)
            for shape, strides, place in self._numbers_of_tiles
        ]

    @functools.cached_property
    def _numbers_of_tiles(self) -> list[tuple[Shape, Shape, int]]:
        """Per tile, shape, strides and place of its slot, every block of which is one number."""
        found: list[tuple[Shape, Shape, int]] = []
        place = 0
        for layout in self.layouts:
            inner = (0,) * len(layout.block_shape)
            for tile, counts in zip(layout.tiles, layout.count_strides, strict=True):
                outer = () if tile.num_blocks == 1 else counts
                found.append((tile.view_shape, (*outer, *inner), place))
                place += tile.num_blocks
        return found

    def tile_slots(self, stacks: Sequence[Tensor]) -> list[Tensor]:
        """Views of the stacks, one per tile, of its `Tile.view_shape`."""
        slots: list[Tensor] = []
        for layout, stack in zip(self.layouts, stacks, strict=True):
            if layout.num_blocks == len(layout.tiles):  # a quarter of the time, and most common
                slots += stack.unbind()
                continue
            step, *inner = stack.stride()
            place = stack.storage_offset()
            for tile, counts in zip(layout.tiles, layout.count_strides, strict=True):
                outer = () if tile.num_blocks == 1 else tuple(step * count for count in counts)
                slots.append(stack.as_strided(tile.view_shape, (*outer, *inner), place))
                place += step * tile.num_blocks
        return slots


def add_tiles(
    tensors: ByParameter,
    tiles: Sequence[Tile],
    slots: Sequence[Tensor],
    scales: Sequence[Tensor] | None = None,
    growths: Sequence[Tensor] | None = None,
) -> None:
    """``place <- place + growth * place + scale * slot`` for every tile, in place.

    Args:
        tensors: Changed in place.
        tiles: Whose places in them are changed.
        slots: What is added, `Tile.view_shape` each.
        scales: Of the same shapes; None is 1.
        growths: Likewise; None is 0.
    """
    targets = []
    merged: dict[int, Tensor] = {}
    indirect: dict[int, Tensor] = {}
    for tile in tiles:
        if tile.parameter not in merged:
            view = _merged_view(tensors[tile.parameter].detach(), tile.merged_shape)
            if view is None:
                view = indirect[tile.parameter] = _merged(
                    tensors[tile.parameter], tile.merged_shape
                )
            merged[tile.parameter] = view
        targets.append(_tile_view(merged[tile.parameter], tile))
    if growths is not None:
        torch._foreach_addcmul_(targets, targets, list(growths))
    if scales is None:
        for some_targets, some_slots in _by_contiguity(tiles, targets, slots):
            torch._foreach_add_(some_targets, some_slots)
    else:
        torch._foreach_addcmul_(targets, list(slots), list(scales))
    for parameter, changed in indirect.items():
        tensor = tensors[parameter].detach()
        tensor.copy_(changed.view(tensor.shape))


def _by_contiguity(
    tiles: Sequence[Tile], first: Sequence[Tensor], second: Sequence[Tensor]
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Two lists with an entry per tile: those of contiguous tiles, and those of the others.

    A GPU takes a list in a few kernels, but in one for every tensor where any of them has other strides.
    """
    for is_contiguous in (True, False):
        kept = [tile.is_contiguous == is_contiguous for tile in tiles]
        if any(kept):
            yield list(itertools.compress(first, kept)), list(itertools.compress(second, kept))


def _tile_view(merged: Tensor, tile: Tile) -> Tensor:
    """View the tile's part of a merged parameter in its `Tile.view_shape`."""
    if tile.is_whole:
        return merged
    # One view instead of a cut and an unflattening per axis: there can be hundreds of tiles.
    strides = merged.stride()
    place = merged.storage_offset() + sum(map(operator.mul, tile.starts, strides))
    outer = () if tile.num_blocks == 1 else tuple(map(operator.mul, tile.sizes, strides))
    return merged.as_strided(tile.view_shape, outer + strides, place)


def _merged(tensor: Tensor, merged_shape: Shape) -> Tensor:
    """The tensor with small dimensions merged, to be read from."""
    tensor = tensor.detach() if tensor.requires_grad else tensor
    # reshape, not view: a channels-last gradient has to be copied here.
    return tensor if tensor.shape == merged_shape else tensor.reshape(merged_shape)


def _merged_view(tensor: Tensor, merged_shape: Shape) -> Tensor | None:
    """``tensor.view(merged_shape)``, or None where there is none, as for channels-last."""
    if tensor.shape == merged_shape:
        return tensor
    try:
        return tensor.view(merged_shape)
    except RuntimeError:  # torch has no question for "could this be viewed", only the attempt
        return None
