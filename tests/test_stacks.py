"""Blocks travel into stacks and back without loss, whatever the memory layout of the tensors."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shampoo_core.blocking import Cut, merge_dimensions, tiles_of
from shampoo_core.stacks import StackSet

CUTS: tuple[Cut, ...] = ("balanced", "greedy")


def stack_set_of(tensors: list[Tensor], limit: int) -> StackSet:
    tiles = []
    for index, tensor in enumerate(tensors):
        merged = merge_dimensions(tuple(tensor.shape), limit)
        tiles += tiles_of(index, merged, limit)
    return StackSet(tiles, dtype=torch.float32, device=torch.device("cpu"))


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4), st.integers(1, 8))
def test_blocks_grow_and_are_added_in_their_places(shapes: list[list[int]], limit: int) -> None:
    """Also in a layout that no view of merged dimensions has."""
    tensors = [torch.randn(shape) for shape in shapes]
    tensors = [
        tensor.to(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor
        for tensor in tensors
    ]
    added = [torch.randn(shape) for shape in shapes]
    stack_set = stack_set_of(tensors, limit)
    scale, growth = torch.randn(2, stack_set.num_blocks)
    stacks, expected = stack_set.gather(added), stack_set.gather(tensors)
    for stack, factor, rate, into in zip(
        stacks, stack_set.split(scale), stack_set.split(growth), expected, strict=True
    ):
        into += rate * into + factor * stack
    stack_set.add_to(tensors, stacks, scale, growth)
    for actual, wanted in zip(stack_set.gather(tensors), expected, strict=True):
        torch.testing.assert_close(actual, wanted)


@given(st.lists(st.lists(st.integers(1, 9), max_size=4), min_size=1, max_size=4), st.integers(1, 8))
def test_gathered_blocks_added_to_zero_give_the_tensors(
    shapes: list[list[int]], limit: int
) -> None:
    tensors = [torch.randn(shape) for shape in shapes]
    stack_set = stack_set_of(tensors, limit)
    copies = [torch.zeros_like(tensor) for tensor in tensors]
    stack_set.add_to(copies, stack_set.gather(tensors))
    for copy, tensor in zip(copies, tensors, strict=True):
        assert torch.equal(copy, tensor)
    assert stack_set.num_blocks == sum(len(stack) for stack in stack_set.zeros())


@given(st.lists(st.integers(1, 9), max_size=4), st.integers(1, 8), st.sampled_from(CUTS))
def test_tiles_know_whether_they_are_contiguous(shape: list[int], limit: int, cut: Cut) -> None:
    merged = merge_dimensions(tuple(shape), limit)
    for tile in tiles_of(0, merged, limit, cut):
        stack_set = StackSet([tile], dtype=torch.float64, device=torch.device("cpu"))
        places = torch.arange(math.prod(shape), dtype=torch.float64).view(shape)
        (stack,) = stack_set.gather([places])
        in_order = bool((stack.flatten().diff() == 1.0).all())
        # Of a block of one row a part can be contiguous too; nobody counts on that.
        assert in_order if tile.is_contiguous else not in_order or 1 in tile.sizes


def test_memory_layout_does_not_matter() -> None:
    plain = torch.randn(6, 5, 3, 3)
    channels_last = plain.clone(memory_format=torch.channels_last)
    strided = torch.randn(6, 10, 3, 3)[:, ::2].copy_(plain)
    stack_set = stack_set_of([plain], 4)
    expected = stack_set.gather([plain])
    for tensor in (channels_last, strided):
        for stack, wanted in zip(stack_set.gather([tensor]), expected, strict=True):
            assert torch.equal(stack, wanted)
    for tensor in (channels_last, strided):
        stack_set.add_to([tensor], expected)
        torch.testing.assert_close(tensor, 2 * plain)


def test_half_precision_is_widened_on_the_way_in() -> None:
    half = torch.randn(8, 8, dtype=torch.bfloat16)
    stack_set = stack_set_of([half], 4)
    stacks = stack_set.gather([half])
    assert all(stack.dtype == torch.float32 for stack in stacks)
    stack_set.add_to([half], stacks)
    assert half.dtype == torch.bfloat16


def test_a_missing_tensor_gives_zero_blocks() -> None:
    tensors = [torch.ones(4, 4), torch.ones(4, 4)]
    stack_set = stack_set_of(tensors, 4)
    (stack,) = stack_set.gather([None, tensors[1]])
    assert stack[0].abs().max() == 0
    assert torch.equal(stack[1], tensors[1])
    assert stack_set.presence([None, tensors[1]]).tolist() == [0.0, 1.0]


def test_norms_find_what_is_not_finite() -> None:
    tensors = [torch.ones(2, 2), torch.tensor([[1.0, torch.nan], [0, 0]]), torch.eye(2) * torch.inf]
    stack_set = stack_set_of(tensors, 2)
    norms = stack_set.norms(stack_set.gather(tensors), order=torch.inf)
    assert (norms < torch.inf).tolist() == [True, False, False]
