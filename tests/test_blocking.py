"""Shape arithmetic: what is merged, where it is cut, that nothing is lost or counted twice."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from reference import block_slices, merge_dims

from shampoo_core.blocking import Cut, cut_side, merge_dimensions, tiles_of
from shampoo_core.stacks import StackSet

shapes = st.lists(st.integers(0, 9), max_size=4).map(tuple)


@pytest.mark.parametrize(
    ("shape", "max_size", "target_order", "expected"),
    [
        ((32, 3, 64, 64), 8192, 1, (96, 4096)),
        ((1, 2, 5, 1), 10, 1, (10,)),
        ((1, 2, 5, 1), 1, 1, (2, 5)),
        ((32, 3, 64, 64), 10**6, 2, (32, 12288)),
        ((64, 3, 7, 7), 1024, 2, (64, 147)),
        ((512, 512, 3, 3), 1024, 2, (512, 512, 9)),
        ((2, 3), 1024, 2, (2, 3)),
        ((), 8, 2, (1,)),
        ((3, 0, 2), 8, 2, (0,)),
    ],
)
def test_merging_follows_the_specification(
    shape: tuple[int, ...], max_size: int, target_order: int, expected: tuple[int, ...]
) -> None:
    assert merge_dimensions(shape, max_size, target_order=target_order) == expected


@given(shapes, st.integers(1, 40), st.sampled_from([1, 2, 3]))
def test_merging_agrees_with_the_reference(
    shape: tuple[int, ...], max_size: int, target_order: int
) -> None:
    expected = merge_dims(shape, max_size, target_order)
    assert merge_dimensions(shape, max_size, target_order=target_order) == expected
    greedy = merge_dims(shape, max_size, 1, "left_to_right")
    assert merge_dimensions(shape, max_size, direction="left_to_right") == greedy


@given(st.integers(1, 5000), st.integers(1, 1100))
def test_balanced_pieces_are_short_equal_and_few(side: int, limit: int) -> None:
    pieces = cut_side(side, limit)
    assert sum(pieces) == side
    assert max(pieces) <= limit
    assert max(pieces) - min(pieces) <= 1
    assert len(pieces) == math.ceil(side / limit) == len(cut_side(side, limit, "greedy"))


@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=3).map(tuple),
    st.integers(1, 6),
    st.sampled_from(["balanced", "greedy"]),
)
def test_tiles_hold_the_blocks_of_the_reference(
    shape: tuple[int, ...], limit: int, cut: Cut
) -> None:
    whole = torch.arange(math.prod(shape), dtype=torch.float64).reshape(shape)
    stack_set = StackSet(
        tiles_of(0, shape, limit, cut), dtype=torch.float64, device=torch.device("cpu")
    )
    positions = [
        position
        for layout in stack_set.layouts
        for tile in layout.tiles
        for position in tile.grid_indices()
    ]
    blocks = [block for stack in stack_set.gather([whole]) for block in stack]
    in_order = [
        block for _, block in sorted(zip(positions, blocks, strict=True), key=lambda p: p[0])
    ]
    expected = [whole[index] for index in block_slices(shape, limit, cut)]
    assert len(in_order) == len(expected)
    for block, reference in zip(in_order, expected, strict=True):
        assert torch.equal(block, reference)
