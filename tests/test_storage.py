"""Stores of matrices: many stacks decoded together are those decoded one by one, in few operations."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from test_stacks import stack_set_of
from torch import Tensor

from shampoo_core import (
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    ShampooConfig,
)
from shampoo_core.counting import OperationCounter
from shampoo_core.live_memory import LiveMemory
from shampoo_core.model_shapes import workload_shapes
from shampoo_core.refresh import FactorSlice, FactorStackSize
from shampoo_core.stacks import StackSet
from shampoo_core.storage import factor_store, matrix_store
from shampoo_core.storage.base import batches

SIZES = tuple(itertools.starmap(FactorStackSize, [(3, 24), (1, 9), (2, 24), (4, 1), (2, 70)]))
"""Sides that repeat and that need a part of a group, one, and many."""
LIMITS = [1, 3000, 10**6]
"""Numbers of the stack set: one stack at a time, some, all."""


def stacks_of(numel: int) -> StackSet:
    return stack_set_of([torch.zeros(numel)], numel)


def stores(kind: str, storage: Any, limit: int) -> tuple[Any, list[Any]]:
    """One store of all stacks, and one for each alone."""

    def make(sizes: tuple[FactorStackSize, ...]) -> Any:
        if kind == "factors":
            return factor_store(stacks_of(limit), sizes, storage)
        return matrix_store(stacks_of(limit), sizes, storage, kind)  # type: ignore[arg-type]

    return make(SIZES), [make((size,)) for size in SIZES]


def grams(seed: int) -> list[Tensor]:
    """Rows to form Gram matrices of, (N, d, 5) per stack."""
    torch.manual_seed(seed)
    return [torch.randn(size.num_factors, size.dimension, 5) for size in SIZES]


def same(together: Any, alone: list[Any]) -> None:
    """All that is kept, and all that is read, bit for bit."""
    for entries, one in zip(together.tensors, alone, strict=True):
        (own,) = one.tensors
        assert set(entries) == set(own)
        assert all(torch.equal(entries[name], own[name]) for name in own)
    for matrices, one in zip(together.read_all(), alone, strict=True):
        assert torch.equal(matrices, next(iter(one.read_all())))


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("storage", ["dense", "packed", "8bit", "4bit"])
def test_factors_of_many_stacks_are_those_of_each(storage: str, limit: int) -> None:
    together, alone = stores("factors", storage, limit)
    for step in range(4):
        rows = grams(step)
        together.add_grams(iter(rows), decay=0.9, gain=0.1)
        for one, own in zip(alone, rows, strict=True):
            one.add_grams([own], decay=0.9, gain=0.1)
        if step == 1:
            factors = [torch.rand(size.num_factors) for size in SIZES]
            together.scale(factors)
            for one, own in zip(alone, factors, strict=True):
                one.scale([own])
        same(together, alone)


@pytest.mark.parametrize("limit", LIMITS)
@pytest.mark.parametrize("storage", ["dense", "packed", "8bit", "4bit"])
@pytest.mark.parametrize("kind", ["roots", "bases"])
def test_matrices_of_many_stacks_are_those_of_each(kind: str, storage: str, limit: int) -> None:
    """Slices in any order, some of their matrices refused."""
    together, alone = stores(kind, storage, limit)
    same(together, alone)
    identities = [torch.eye(size.dimension).expand(len(m), -1, -1)
                  for size, m in zip(SIZES, together.read_all(), strict=True)]  # fmt: skip
    assert all(map(torch.equal, together.read_all(), identities))
    where = [FactorSlice(4, 1, 2), FactorSlice(0, 0, 1), FactorSlice(0, 2, 3), FactorSlice(2, 0, 2)]
    rows = grams(0)
    new = [rows[i.stack][i.start : i.stop] @ rows[i.stack][i.start : i.stop].mT for i in where]
    weights = [torch.ones(1), torch.ones(1), torch.zeros(1), torch.tensor([0.0, 1.0])]
    together.blend(where, new, weights)
    for item, matrices, weight in zip(where, new, weights, strict=True):
        alone[item.stack].blend([item._replace(stack=0)], [matrices], [weight])
    same(together, alone)
    for item, read in zip(where, together.read(where), strict=True):
        (own,) = alone[item.stack].read([item._replace(stack=0)])
        assert torch.equal(read, own)
    untouched = together.read([FactorSlice(0, 2, 3), FactorSlice(2, 0, 1)])
    assert all(map(torch.equal, untouched, [identities[0][2:3], identities[2][:1]]))


@pytest.mark.parametrize(("storage", "error"), [("8bit", 0.02), ("4bit", 0.1)])
def test_a_correlation_that_is_none_does_not_set_the_scale(storage: Any, error: float) -> None:
    """Rounding leaves off-diagonal numbers where the diagonal has next to nothing."""
    (size,) = sizes = (FactorStackSize(1, 16),)
    store = factor_store(stacks_of(16**2), sizes, storage)
    torch.manual_seed(0)
    matrix = torch.corrcoef(torch.randn(15, 40))
    whole = torch.zeros(1, 16, 16)
    whole[0, :15, :15] = matrix
    whole[0, 15, 15] = 1e-20
    whole[0, 0, 15] = whole[0, 15, 0] = 1e-6  # a "correlation" of 1e4
    store.blend([FactorSlice(0, 0, size.num_factors)], [whole], [torch.ones(1)])
    (read,) = store.read([FactorSlice(0, 0, 1)])
    assert (read[0, :15, :15] - matrix).abs().max() < error


@pytest.mark.parametrize("storage", ["8bit", "4bit"])
def test_directions_without_gradients_leave_the_others_as_they_are(storage: Any) -> None:
    """Rows of zeros have no correlations, and a batch of such matrices none at all."""
    (size,) = sizes = (FactorStackSize(2, 16),)
    store = factor_store(stacks_of(16**2), sizes, storage)
    torch.manual_seed(0)
    whole = torch.zeros(2, 16, 16)
    whole[0, 3:, 3:] = torch.corrcoef(torch.randn(13, 40))
    store.blend([FactorSlice(0, 0, size.num_factors)], [whole.clone()], [torch.ones(2)])
    (read,) = store.read([FactorSlice(0, 0, 2)])
    torch.testing.assert_close(read, whole, rtol=0.0, atol=1e-3)
    assert not read[0, :3].any() and not read[0, :, :3].any() and not read[1].any()


@given(st.lists(st.integers(1, 50), max_size=12), st.integers(1, 60))
@example([2, 3, 4], 5)  # the first two fill a batch
def test_batches_hold_every_stack_once_and_no_more_than_the_limit(
    numels: list[int], limit: int
) -> None:
    made = batches(numels, limit)
    assert [stack for batch in made for stack in batch] == list(range(len(numels)))
    sums = [sum(numels[stack] for stack in batch) for batch in made]
    assert all(total <= limit or len(batch) == 1 for total, batch in zip(sums, made, strict=True))
    # No batch has room for the first stack of the next.
    assert all(
        total + numels[after[0]] > limit for total, after in zip(sums, made[1:], strict=False)
    )


@pytest.mark.parametrize("storage", ["8bit", "4bit"])
def test_dense_copies_of_one_batch_exist_at_a_time(storage: Any) -> None:
    """A batch and what decodes it; whoever reads on may still hold the batch before."""
    sizes = (FactorStackSize(4, 64),) * 10
    numel = 2 * 4 * 64**2
    store = factor_store(stacks_of(numel), sizes, storage)
    rows = [torch.randn(4, 64, 8) for _ in sizes]
    store.add_grams(rows, decay=0.9, gain=0.1)  # makes the indices
    with LiveMemory() as memory:
        store.add_grams(rows, decay=0.9, gain=0.1)
    assert memory.peak <= 2.5 * numel * 4
    with LiveMemory() as memory:
        for _ in store.read_all():
            pass
    assert memory.peak <= 3.1 * numel * 4


@pytest.mark.parametrize("storage", ["8bit", "4bit"])
@pytest.mark.parametrize("config", [ShampooConfig, EigenvalueCorrectedConfig])
def test_few_bits_take_few_operations(config: Any, storage: Any) -> None:
    """On ResNet-50, whose blocks have 25 shapes and 41 axes."""
    params = []
    for parameter in workload_shapes("imagenet_resnet"):
        params.append(torch.nn.Parameter(torch.zeros(parameter.shape, device="meta")))
        params[-1].grad = torch.zeros(parameter.shape, device="meta")
    optimizer = DistributedShampoo(
        params, preconditioner=config(storage=storage), refresh=FixedRefresh(10**6)
    )
    optimizer.step()
    with OperationCounter() as counter:
        optimizer.step()
    assert counter.num_operations <= 400


@pytest.mark.parametrize("storage", ["8bit", "4bit"])
def test_a_stack_is_decoded_whatever_its_length_in_the_same_operations(storage: Any) -> None:
    counts = []
    for copies in (2, 5):
        params = [torch.nn.Parameter(torch.zeros(24, 40, device="meta")) for _ in range(copies)]
        for parameter in params:
            parameter.grad = torch.zeros(24, 40, device="meta")
        config = ShampooConfig(storage=storage)
        optimizer = DistributedShampoo(params, preconditioner=config, refresh=FixedRefresh(3, 2))
        steps = []
        for _ in range(6):
            with OperationCounter() as counter:
                optimizer.step()
            steps.append((counter.num_operations, counter.num_synchronisations))
        counts.append(steps)
    assert counts[0] == counts[1]
    # The second refresh asks whether all factors have been refreshed, once for all.
    assert [waits for _, waits in counts[0]] == [0, 1, 2, 0, 0, 1]
