"""Blocks cut up by owner: every block once, schedules as for all, state spread over ranks."""

from __future__ import annotations

import dataclasses
from functools import partial
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_assignment import MODELS, NAMES

from shampoo_core import (
    DistributedShampoo,
    Distribution,
    EigenvalueCorrectedConfig,
    ShampooConfig,
    StaggeredRefresh,
)
from shampoo_core.blocking import Shape, merge_dimensions, tiles_of
from shampoo_core.config import GroupOptions
from shampoo_core.engine import Engine
from shampoo_core.exchange.distribution import neighbours, sharing_replicas
from shampoo_core.exchange.division import Division, divide
from shampoo_core.exchange.local import LocalExchange
from shampoo_core.exchange.pieces import held_rows, pieces_of
from shampoo_core.preconditioners.axes import preconditioned_axes
from shampoo_core.refresh import FactorSlice
from shampoo_core.stacks import StackSet
from shampoo_core.statistics import DueFactors

SHAPES = st.lists(
    st.lists(st.integers(1, 9), min_size=1, max_size=3).map(tuple), min_size=1, max_size=4
)
METHODS = {"shampoo": ShampooConfig(), "eigenvalue-corrected": EigenvalueCorrectedConfig()}


def whole_of(shapes: list[Shape], block: int, device: str = "cpu") -> StackSet:
    tiles = []
    for index, shape in enumerate(shapes):
        tiles += tiles_of(index, merge_dimensions(shape, block), block)
    return StackSet(tiles, dtype=torch.float64, device=torch.device(device))


def divided(whole: StackSet, num_ranks: int) -> Division:
    cost_of = partial(ShampooConfig().block_flops, refresh_interval=10)
    return divide(whole, cost_of, [0.0] * num_ranks, rank=0)


@given(shapes=SHAPES, block=st.integers(1, 5), num_ranks=st.integers(1, 5))
def test_every_number_belongs_to_one_rank(shapes: list[Shape], block: int, num_ranks: int) -> None:
    """Adding 1 to all blocks of all ranks adds 1 to every number of every parameter."""
    division = divided(whole_of(shapes, block), num_ranks)
    tensors = [torch.zeros(shape, dtype=torch.float64) for shape in shapes]
    for own in division.by_rank:
        if own.num_blocks:
            own.add_to(tensors, [torch.ones_like(stack) for stack in own.zeros()])
    assert all(torch.equal(tensor, torch.ones_like(tensor)) for tensor in tensors)


def test_what_comes_later_goes_to_who_has_least() -> None:
    """Groups, and parameters that come late, are divided one after the other."""
    whole = whole_of([(4, 4)], 4)
    cost_of = partial(ShampooConfig().block_flops, refresh_interval=10)
    loads = [0.0] * 3
    owners = []
    for _ in range(6):
        division = divide(whole, cost_of, loads, rank=0)
        owners += [rank for rank, own in enumerate(division.by_rank) if own.num_blocks]
    assert sorted(owners[:3]) == sorted(owners[3:]) == [0, 1, 2]
    assert loads == [2 * cost_of((4, 4))] * 3


def test_ranks_compare_every_choice_of_how_they_share() -> None:
    usual = Distribution()
    for field in dataclasses.fields(Distribution):
        if field.name == "process_group":
            continue  # each rank has its own
        value = {"communication_dtype": torch.bfloat16, "ranks_per_group": 2}.get(
            field.name, not getattr(usual, field.name)
        )
        assert Distribution(**{field.name: value}).facts() != usual.facts(), field.name


@given(shapes=SHAPES, num_ranks=st.integers(2, 4), step=st.integers(1, 12), ranks=st.integers(1, 4))
def test_ranks_refresh_what_one_process_would(
    shapes: list[Shape], num_ranks: int, step: int, ranks: int
) -> None:
    policy = StaggeredRefresh(interval=4, start=2, ranks=ranks)
    whole = whole_of(shapes, 3)
    expected = due_blocks(whole, policy, step)
    found = [
        block
        for own in divided(whole, num_ranks).by_rank
        for block in due_blocks(own, policy, step)
    ]
    assert sorted(found) == sorted(expected)


@pytest.mark.parametrize("num_ranks", [4, 8])
@pytest.mark.parametrize(
    ("name", "bound"),
    [
        ("wmt", 1.01),
        ("imagenet_vit", 1.25),
        ("ogbg", 1.2),
        ("librispeech_conformer", 1.4),
        ("imagenet_resnet", 2.0),
    ],
)
def test_ranks_have_work_at_the_same_steps(name: str, bound: float, num_ranks: int) -> None:
    """All wait for the slowest one, so that work of single ranks in turn is no faster than one rank's."""
    shapes = [tuple(shape) for _, shape, _ in MODELS[name]["params"] if max(shape) < 65536]
    division = divided(whole_of(shapes, 1024, "meta"), num_ranks)
    interval = 100

    def waited_for(policy: StaggeredRefresh) -> float:
        """Of the slowest rank at every step, in units of the busiest rank's work."""
        work = []
        for own in division.by_rank:
            axes, all_axes = (
                preconditioned_axes(some, precondition_vectors=False) for some in (own, own.whole)
            )
            due = DueFactors(own, axes, all_axes)
            work.append(
                [
                    sum(
                        (item.stop - item.start) * float(axes[item.stack].dimension) ** 3
                        for item in due.at(policy, step)
                    )
                    for step in range(interval + 1, 2 * interval + 1)
                ]
            )
        return sum(map(max, zip(*work, strict=True))) / max(map(sum, work))

    assert waited_for(StaggeredRefresh(interval, ranks=num_ranks)) < bound
    assert waited_for(StaggeredRefresh(interval)) > 1.5 * bound


def due_blocks(
    stack_set: StackSet, policy: StaggeredRefresh, step: int
) -> list[tuple[int, Shape, int]]:
    """Parameter, grid position and axis of every factor that is due."""
    axes = preconditioned_axes(stack_set, precondition_vectors=True)
    all_axes = preconditioned_axes(stack_set.whole, precondition_vectors=True)
    due: list[FactorSlice] = DueFactors(stack_set, axes, all_axes).at(policy, step)
    return [
        (*block, axes[item.stack].axis)
        for item in due
        for block in stack_set.layouts[axes[item.stack].stack].blocks()[item.start : item.stop]
    ]


@given(
    shapes=SHAPES,
    block=st.integers(1, 5),
    num_holders=st.integers(1, 5),
    num_replicas=st.integers(1, 3),
)
def test_every_number_of_a_shard_is_in_one_piece(
    shapes: list[Shape], block: int, num_holders: int, num_replicas: int
) -> None:
    """Numbers written to the shards arrive at their place in the owners' stacks."""
    division = divided(whole_of(shapes, block), num_holders * num_replicas)
    everything = list(pieces_of(division, dict(enumerate(shapes)), num_holders))
    tensors = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    stacks = [[torch.full_like(s, torch.nan) for s in own.empty()] for own in division.by_rank]
    slots = [own.tile_slots(of_rank) for own, of_rank in zip(division.by_rank, stacks, strict=True)]
    for holder in range(num_holders):
        found = pieces_of(division, dict(enumerate(shapes)), num_holders, holder=holder)
        assert list(found) == [piece for piece in everything if piece.holder == holder]
    for owner in range(num_holders * num_replicas):
        found = pieces_of(division, dict(enumerate(shapes)), num_holders, owner=owner)
        assert list(found) == [piece for piece in everything if piece.owner == owner]
    for piece in everything:
        index = piece.tile.parameter
        held = held_rows(shapes[index][0], piece.holder, num_holders)
        shard = tensors[index][held.start : held.stop].reshape(-1, *piece.tile.merged_shape[1:])
        view = piece.in_shard(shard)
        assert view.shape == piece.shape
        piece.in_slot(slots[piece.owner][piece.slot]).copy_(view)
    for own, of_rank in zip(division.by_rank, stacks, strict=True):
        for expected, actual in zip(own.gather(tensors), of_rank, strict=True):
            assert torch.equal(actual, expected)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "criteo1tb"])
def test_state_is_spread_over_ranks(name: str, method: str) -> None:
    """At most 1.1 of an equal share, and the state of one block."""
    shapes = [tuple(shape) for _, shape, _ in MODELS[name]["params"]]
    tiles = [
        tile
        for index, shape in enumerate(shapes)
        for tile in tiles_of(index, merge_dimensions(shape, 1024), 1024)
    ]
    whole = StackSet(tiles, dtype=torch.float32, device=torch.device("meta"))
    single = sum(sum(blocks) for blocks in state_bytes(METHODS[method], whole))
    largest = max(blocks[0] for blocks in state_bytes(METHODS[method], whole))
    for num_ranks in (2, 4, 8):
        for own in divided(whole, num_ranks).by_rank:
            mine = sum(sum(blocks) for blocks in state_bytes(METHODS[method], own))
            assert mine <= 1.1 * single / num_ranks + largest


def state_bytes(method: Any, stack_set: StackSet) -> list[list[int]]:
    """Per stack the bytes of the state of each of its blocks."""
    options = GroupOptions((0.9, 0.99), None, 1e-8, True, "exact")
    division = cast(Division, SimpleNamespace(own=stack_set))
    engine = Engine(
        LocalExchange(),
        division,
        lambda own: method.create(own, options, method.default_grafting, StaggeredRefresh(100)),
        None,
    )
    return [
        [sum(entry[0].nbytes for entry in entries.values())] * layout.num_blocks
        for entries, layout in zip(engine.state(), stack_set.layouts, strict=True)
    ]


@pytest.mark.parametrize("wrong", [True, "all", 8])
def test_distributed_is_checked(wrong: Any) -> None:
    parameter = torch.nn.Parameter(torch.ones(2, 2))
    with pytest.raises(TypeError, match="distributed must be a Distribution, 'auto' or None"):
        DistributedShampoo([parameter], distributed=wrong)


def test_distribution_is_checked() -> None:
    with pytest.raises(ValueError, match="communication_dtype must be one of"):
        Distribution(communication_dtype=torch.float64)
    with pytest.raises(ValueError, match="ranks_per_group must be at least 1"):
        Distribution(ranks_per_group=0)


@pytest.mark.parametrize(
    ("find", "sides", "asked", "message"),
    [
        (neighbours, (2, 4), 3, r"that 4 ranks of a mesh hold in full: give a divisor of 4"),
        (sharing_replicas, (3, 2), 3, r"2 ranks hold together, in 3 replicas: give 2 times a div"),
        (sharing_replicas, (3, 2), 4, r"2 ranks hold together, in 3 replicas: give 2 times a div"),
    ],
)
def test_groups_that_do_not_fit_a_mesh_are_named(
    find: Any, sides: tuple[int, int], asked: int, message: str
) -> None:
    """Though they may divide the number of all ranks."""
    mesh = SimpleNamespace(ndim=2, size=lambda axis: sides[axis])
    with pytest.raises(
        ValueError, match=rf"owner: .*ranks_per_group={asked}\) does not .*{message}"
    ):
        find("owner", Distribution(ranks_per_group=asked), mesh, 1)
