"""What holders and owners of shards make of each other's messages, all ranks in one process."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from unittest.mock import patch

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_division import divided, whole_of
from torch import Tensor

from shampoo_core.blocking import Shape
from shampoo_core.counting import OperationCounter
from shampoo_core.exchange import lanes, orders
from shampoo_core.exchange.division import Division
from shampoo_core.exchange.lanes import Crew, Lane, lanes_of
from shampoo_core.exchange.orders import Order, View
from shampoo_core.exchange.pieces import held_rows
from shampoo_core.exchange.sharded import StackedWeights
from shampoo_core.live_memory import LiveMemory

SIDES = st.sampled_from([1, 2, 3, 5, 8, 12, 16, 24, 32])
SHAPES = st.lists(st.lists(SIDES, min_size=1, max_size=3).map(tuple), min_size=1, max_size=3)
CREWS = st.tuples(st.integers(1, 4), st.integers(1, 3))
SHORTEST = st.sampled_from([2, 8, 10**9])
"""Of the chunks that an index is made for; the last one has none."""
LONG = st.sampled_from([1, 40, lanes.LONG_STRETCH])
"""Numbers in blocks of one length that decay by themselves."""


class Ranks:
    """Every rank's lanes, and shards of some tensors."""

    def __init__(
        self,
        shapes: Sequence[Shape],
        block: int,
        num_holders: int,
        num_replicas: int,
        wave: int = 0,
        shortest_chunk: int = orders.SHORTEST_CHUNK,
        long_stretch: int = lanes.LONG_STRETCH,
    ) -> None:
        self.shapes = dict(enumerate(shapes))
        self.num_holders = num_holders
        self.crews = [
            Crew(num_holders, num_replicas, holder, replica)
            for replica in range(num_replicas)
            for holder in range(num_holders)
        ]
        whole = divided(whole_of(list(shapes), block), len(self.crews))
        waves = whole.waves(wave) if wave else [whole]
        self.division = waves[min(1, len(waves) - 1)]  # not the first, if there are several
        with (
            patch.object(orders, "SHORTEST_CHUNK", shortest_chunk),
            patch.object(lanes, "SHORTEST_CHUNK", shortest_chunk),
            patch.object(lanes, "LONG_STRETCH", long_stretch),
        ):
            self.lanes = [lanes_of(self._seen_by(crew), self.shapes, crew) for crew in self.crews]

    def _seen_by(self, crew: Crew) -> Division:
        return Division(self.division.whole, self.division.by_rank, crew.owner)

    def shards(self, tensors: Sequence[Tensor], crew: Crew) -> dict[int, Tensor]:
        found = {}
        for index, tensor in enumerate(tensors):
            rows = held_rows(len(tensor), crew.holder, self.num_holders)
            found[index] = tensor[rows.start : rows.stop]
        return found


def parts(message: Tensor, sizes: Sequence[int]) -> tuple[Tensor, ...]:
    assert len(message) == sum(sizes)
    return message.split(list(sizes))


@given(SHAPES, st.integers(2, 16), CREWS, SHORTEST, st.sampled_from([0, 100]))
def test_owners_get_their_blocks(
    shapes: list[Shape], block: int, crew: tuple[int, int], shortest: int, wave: int
) -> None:
    ranks = Ranks(shapes, block, *crew, wave, shortest)
    tensors = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    for number in range(len(ranks.lanes[0])):
        sent = []
        for rank, of_rank in zip(ranks.crews, ranks.lanes, strict=True):
            lane = of_rank[number]
            flat = lane.flat(ranks.shards(tensors, rank), tensors[0])
            sent.append(parts(lane.held_here.read(flat), lane.held_here.sizes))
        for rank, of_rank in zip(ranks.crews, ranks.lanes, strict=True):
            own = ranks.division.by_rank[rank.owner]
            if not own.num_blocks:
                continue
            stacks = own.empty()
            for stack in stacks:
                stack.fill_(math.nan)
            first = rank.replica * rank.num_holders
            come = [sent[first + peer][rank.holder] for peer in range(rank.num_holders)]
            lane = of_rank[number]
            assert [len(part) for part in come] == lane.owned.sizes
            lane.owned.write(torch.cat(come), own.flat(stacks))
            for stack, expected, layout in zip(
                stacks, own.gather(tensors), own.layouts, strict=True
            ):
                blocks = [index for index, (p, _) in enumerate(layout.blocks()) if p in lane.spans]
                assert torch.equal(stack[blocks], expected[blocks])
                others = [i for i in range(layout.num_blocks) if i not in blocks]
                assert stack[others].isnan().all()


@given(SHAPES, st.integers(2, 16), CREWS, SHORTEST, st.sampled_from([0, 100]), LONG)
def test_holders_get_updates_and_let_decay_what_moves(
    shapes: list[Shape], block: int, crew: tuple[int, int], shortest: int, wave: int, long: int
) -> None:
    """As if every owner added to whole tensors."""
    ranks = Ranks(shapes, block, *crew, wave, shortest, long)
    weights = [torch.rand(shape, dtype=torch.float64) for shape in shapes]
    expected = [weight.clone() for weight in weights]
    found = [weight.clone() for weight in weights]
    updates, growths = [], []
    for own in ranks.division.by_rank:
        updates.append([torch.rand_like(stack) for stack in own.empty()])
        growths.append(torch.rand(own.num_blocks, dtype=torch.float64))
        if own.num_blocks:
            ones = torch.ones_like(growths[-1])
            own.add_to(expected, updates[-1], ones, growths[-1])
    for number in range(len(ranks.lanes[0])):
        going = [
            _sent_by_owner(of_rank[number], updates[rank.owner], growths[rank.owner])
            for rank, of_rank in zip(ranks.crews, ranks.lanes, strict=True)
        ]
        for rank, of_rank in zip(ranks.crews, ranks.lanes, strict=True):
            lane = of_rank[number]
            come = [numbers[rank.holder] for numbers, _ in going]
            moves = [numbers[rank.holder] for _, numbers in going]
            assert [len(part) for part in come] == lane.held.sizes
            assert [len(part) for part in moves] == lane.held_blocks
            message = torch.cat(come)
            flat = lane.flat(ranks.shards(weights, rank), weights[0])
            lane.add_decay(message, flat, torch.cat(moves))
            if rank.replica:
                continue  # holds the same
            shards = ranks.shards(found, rank)
            for (index, span), part in zip(lane.spans.items(), lane.spread(message), strict=True):
                shards[index].reshape(-1)[span] += part
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, other, rtol=1e-12, atol=0.0)


def test_decay_of_conv_kernels_takes_no_index() -> None:
    """Most is alive where weights are put in order."""
    ranks = Ranks([(512, 4607)], 1024, 2, 1)
    (lane,) = ranks.lanes[0]
    assert lane.held.chunk == 1
    message, flat = torch.rand(sum(lane.held.sizes)), torch.rand(lane.numel)
    with LiveMemory() as memory:
        lane.add_decay(message, flat, torch.rand(sum(lane.held_blocks)))
    assert memory.peak <= 1.01 * flat.nbytes


def _sent_by_owner(
    lane: Lane, updates: list[Tensor], growth: Tensor
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    if not updates:
        empty = torch.empty(0, dtype=torch.float64)
        return parts(empty, lane.owned.sizes), parts(empty, lane.owned_blocks)
    flat = torch.cat([stack.reshape(-1) for stack in updates])
    numbers = growth.index_select(0, lane.blocks)
    return parts(lane.owned.read(flat), lane.owned.sizes), parts(numbers, lane.owned_blocks)


@pytest.mark.parametrize(
    ("shape", "strides", "place", "chunk"),
    [
        ((4, 32), (64, 1), 64, 32),  # half of the columns of a matrix
        ((4, 32), (32, 1), 96, 32),  # whole rows: a run of 128 that begins at 96
        ((2, 3, 16), (16, 48, 1), 0, 16),
        ((4, 12), (24, 1), 0, 1),  # chunks of 12, but 8 behind the start of the next view
        ((7,), (1,), 0, 1),
    ],
)
def test_chunks(shape: Shape, strides: Shape, place: int, chunk: int) -> None:
    views = [View(shape, strides, place)]
    if shape == (4, 12):
        views.append(View((8,), (1,), 104))
    order = Order([views], torch.device("cpu"))
    assert order.chunk == chunk
    flat = torch.arange(512.0)
    message = order.read(flat)
    assert message.tolist() == list(
        itertools.chain(*(v.on(flat).reshape(-1).tolist() for v in views))
    )
    back = torch.full_like(flat, -1.0)
    order.write(message, back)
    assert torch.equal(back[back >= 0], message.sort().values)
    assert torch.equal(order.read(back), message)


def test_pieces_take_a_few_operations_whatever_their_number() -> None:
    """An index for the matrices, and copies of contiguous tensors for vectors."""
    shapes = [(1024, 512)] * 4 + [(512,)] * 4
    ranks = Ranks(shapes, 128, 4, 1)
    wide, narrow = ranks.lanes[1]
    assert set(wide.spans) == {0, 1, 2, 3}
    assert wide.held.chunk >= 128
    assert wide.owned.chunk >= 128
    assert set(narrow.spans) == {4, 5, 6, 7}
    flat = torch.rand(wide.numel)
    with OperationCounter() as counter:
        message = wide.held.read(flat)
        wide.held.write(message, flat)
    names = [operation.name for operation in counter.operations]
    assert names == ["aten::index_select", "aten::index_copy_"]


def test_weights_that_came_are_copied_for_whoever_asks() -> None:
    """As those that a rank holds are: a rule of averaging changes what it is given."""
    came = torch.ones(2, 3)
    (stack,) = StackedWeights([came]).stacks()
    stack.zero_()
    assert torch.equal(came, torch.ones(2, 3))
