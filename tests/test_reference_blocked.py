"""Merging and cutting of the references: the document's examples and what must hold for any."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import block_slices, chunk_sizes, merge_dims
from reference.compare import assert_close, gradients, trajectory

SHAPES = st.lists(st.integers(1, 9), max_size=4).map(tuple)
DIRECTIONS = st.sampled_from(["right_to_left", "left_to_right"])
CUTS = st.sampled_from(["greedy", "balanced"])
FEW = settings(max_examples=50, deadline=None)


@pytest.mark.parametrize(
    ("shape", "threshold", "target_order", "merged"),
    [
        ((32, 3, 64, 64), 8192, 1, (96, 4096)),  # these four stand in ALGORITHMS.md 1.1
        ((1, 2, 5, 1), 10, 1, (10,)),
        ((1, 2, 5, 1), 1, 1, (2, 5)),
        ((32, 3, 64, 64), 10**6, 2, (32, 12288)),
        ((2, 3), 1024, 1, (6,)),
        ((2, 3), 1024, 2, (2, 3)),
        ((4, 0, 3), 1024, 1, (0,)),
        ((4, 0, 3), 1024, math.inf, (0,)),
        ((1, 2, 1), 1024, math.inf, (1, 2, 1)),
        ((), 1024, math.inf, ()),
        ((), 1024, 1, (1,)),
        ((1, 1), 1024, 1, (1,)),
        ((64, 3, 7, 7), 1024, 2, (64, 147)),
        ((512, 512, 3, 3), 1024, 2, (512, 512, 9)),
        ((5, 7), math.inf, 1, (35,)),
    ],
)
def test_merge_right_to_left(
    shape: tuple[int, ...], threshold: float, target_order: float, merged: tuple[int, ...]
) -> None:
    assert merge_dims(shape, threshold, target_order) == merged


@pytest.mark.parametrize(
    ("shape", "threshold", "merged"),
    [
        ((32, 3, 64, 64), 8192, (6144, 64)),
        ((64, 3, 7, 7), 1024, (192, 49)),
        ((1, 2, 5, 1), 10, (10,)),
        ((1, 2, 5, 1), 1, (2, 5)),
        ((2, 3), 3, (2, 3)),  # the v0.5 rows of section 11
        ((), 8, (1,)),
    ],
)
def test_merge_left_to_right(
    shape: tuple[int, ...], threshold: float, merged: tuple[int, ...]
) -> None:
    assert merge_dims(shape, threshold, direction="left_to_right") == merged


@FEW
@given(SHAPES, st.integers(1, 30), DIRECTIONS)
def test_merging_is_maximal_and_keeps_the_size(
    shape: tuple[int, ...], threshold: int, direction: str
) -> None:
    """Merged dims are products of neighbours, and no two that meet could still be merged."""
    merged = merge_dims(shape, threshold, direction=direction)
    assert math.prod(merged) == math.prod(shape)
    partial = {math.prod(shape[:i]) for i in range(len(shape) + 1)}
    assert {math.prod(merged[:i]) for i in range(len(merged) + 1)} <= partial | {1}
    original = [d for d in shape if d != 1]
    for d in merged:
        assert d <= threshold or d in original
    assert all(a * b > threshold for a, b in itertools.pairwise(merged))


def test_chunks() -> None:
    assert chunk_sizes(10, 4) == [4, 4, 2]
    assert chunk_sizes(10, 4, "balanced") == [4, 3, 3]
    assert chunk_sizes(8, 4) == chunk_sizes(8, 4, "balanced") == [4, 4]
    assert chunk_sizes(3, 4) == chunk_sizes(3, 4, "balanced") == [3]
    assert chunk_sizes(7, math.inf) == chunk_sizes(7, math.inf, "balanced") == [7]
    assert chunk_sizes(0, 4) == chunk_sizes(0, 4, "balanced") == []
    assert chunk_sizes(1025, 1024, "balanced") == [513, 512]


@FEW
@given(SHAPES, st.integers(1, 6), CUTS)
def test_blocks_tile_the_array(shape: tuple[int, ...], size: int, cut: str) -> None:
    covered = np.zeros(shape, dtype=int)
    for index in block_slices(shape, size, cut):
        assert all(1 <= d <= size for d in covered[index].shape)
        covered[index] += 1
    assert (covered == 1).all()
    for d in shape:
        sizes = chunk_sizes(d, size, cut)
        assert len(sizes) == math.ceil(d / size)
        assert sizes == sorted(sizes, reverse=True)
        if cut == "balanced":
            assert sizes[0] - sizes[-1] <= 1


@FEW
@given(SHAPES, st.integers(1, 6), DIRECTIONS, CUTS)
def test_a_diagonal_method_does_not_see_blocks(
    shape: tuple[int, ...], size: int, merge: str, cut: str
) -> None:
    """Assembly and orientation: Adam on blocks is Adam on the whole."""
    inputs, start = gradients(shape, 3), np.ones(shape)
    blocked = reference.Blocked(
        start,
        lambda block: reference.AdamW(block, lr=0.1),
        max_block_size=size,
        merge=merge,
        cut=cut,
    )
    assert_close(
        trajectory(blocked, inputs), trajectory(reference.AdamW(start, lr=0.1), inputs), 1e-14
    )
    assert_close(blocked.parameter, blocked.step(None))


def test_blocks_are_independent() -> None:
    """(4, 5) in blocks of at most 3 x 3: each block is what it is alone, graft norm included."""

    def make(block: np.ndarray) -> reference.Shampoo:
        return reference.Shampoo(block, lr=0.1, eps=1e-6, grafting="sgd", weight_decay=0.1)

    inputs, start = gradients((4, 5), 4), np.arange(20.0).reshape(4, 5)
    for cut, rows, cols in (("greedy", (3,), (3,)), ("balanced", (2,), (3,))):
        blocked = reference.Blocked(start, make, max_block_size=3, target_order=2, cut=cut)
        path = trajectory(blocked, inputs)
        for row in np.split(np.arange(4), rows):
            for col in np.split(np.arange(5), cols):
                index = np.ix_(row, col)
                alone = trajectory(make(start[index]), [gradient[index] for gradient in inputs])
                assert_close(path[:, row][:, :, col], alone, 1e-14)


def test_merged_convolution_and_empty_and_scalar() -> None:
    inputs, start = gradients((4, 2, 3, 3), 3), np.ones((4, 2, 3, 3))
    options: dict[str, Any] = {"lr": 0.1, "eps": 1e-6}
    blocked = reference.Blocked(
        start,
        lambda block: reference.Shampoo(block, **options),
        max_block_size=18,
        target_order=2,
    )
    assert blocked.merged_shape == (4, 18)
    flat = reference.Shampoo(start.reshape(4, 18), **options)
    expected = trajectory(flat, [gradient.reshape(4, 18) for gradient in inputs])
    assert_close(trajectory(blocked, inputs), expected.reshape(3, 4, 2, 3, 3), 1e-14)
    for shape in ((3, 0), ()):
        blocked = reference.Blocked(
            np.ones(shape),
            lambda block: reference.Shampoo(block, **options),
            max_block_size=4,
        )
        assert blocked.step(np.ones(shape)).shape == shape
        assert len(blocked.methods) == (shape == ())


def test_averaged_blocks() -> None:
    def make(block: np.ndarray) -> reference.ScheduleFree:
        return reference.ScheduleFreeAdamW(block, lr=0.1, weight_decay=0.1)

    inputs, start = gradients((4, 5), 4), np.ones((4, 5))
    blocked, whole = reference.Blocked(start, make, max_block_size=3), make(start)
    assert_close(trajectory(blocked, inputs), trajectory(whole, inputs), 1e-14)
    assert_close(blocked.evaluation, whole.evaluation, 1e-14)
