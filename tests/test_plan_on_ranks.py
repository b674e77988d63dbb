"""Plans against what ranks hold and send: bytes of state, of messages and alive, on 1, 2 and 4 of them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerator import imitate_an_accelerator
from ranks import on_ranks
from test_distributed_sharing import counted, stepped
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from shampoo_core import (
    DistributedShampoo,
    Distribution,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    ShampooConfig,
)
from shampoo_core.live_memory import LiveMemory
from shampoo_core.model_shapes import NamedShape
from shampoo_core.plan import Placement, Request, Sharding, make_plan

SHAPES = ((24, 40), (24,), (6, 5, 3, 3), (33, 9), (17, 17), (64, 12))
METHODS = {
    "shampoo": ShampooConfig(),
    "everything": ShampooConfig(precondition_vectors=True, storage="packed"),
    "eigenvalue-corrected": EigenvalueCorrectedConfig(),
    "four bits": ShampooConfig(storage="4bit"),
}
BLOCK_SIZE = 16
WAVES = (None, 300)
GROUP_SIZE = 2
GROUPED: tuple[Sharding, ...] = ("ddp", "hsdp")


def shardings(ranks: int) -> tuple[Sharding, ...]:
    return ("ddp", "fsdp2", "hsdp") if ranks >= GROUP_SIZE else ("ddp", "fsdp2")


def parameters_on_ranks(
    shapes: Sequence[tuple[int, ...]], sharding: Sharding
) -> list[torch.nn.Parameter]:
    whole = [torch.randn(shape) for shape in shapes]
    if sharding == "ddp":
        return [torch.nn.Parameter(tensor) for tensor in whole]
    world_size = dist.get_world_size()
    replicas = world_size // GROUP_SIZE if sharding == "hsdp" else 1
    mesh = init_device_mesh("cpu", (replicas, world_size // replicas))
    rows = [Replicate(), Shard(0)]
    return [torch.nn.Parameter(distribute_tensor(tensor, mesh, rows)) for tensor in whole]


def measured() -> dict[tuple[Sharding, str, int | None], tuple[int, int]]:
    """By sharding, method and size of waves: bytes of state of this rank, and of what a step sends."""
    torch.manual_seed(0)
    found = {}
    cases = itertools.product(shardings(dist.get_world_size()), METHODS, WAVES)
    for sharding, name, wave in cases:
        params = parameters_on_ranks(SHAPES, sharding)
        optimizer = DistributedShampoo(
            params,
            preconditioner=METHODS[name],
            max_block_size=BLOCK_SIZE,
            max_wave_numel=wave,
            refresh=FixedRefresh(100, start=2),
            weight_decay=0.1,
        )
        stepped(params, optimizer)
        with counted() as calls:
            stepped(params, optimizer)
        state = sum(
            tensor.nbytes for entries in optimizer.state.values() for tensor in entries.values()
        )
        found[sharding, name, wave] = state, sum(sent for _, _, sent in calls)
    return found


@pytest.mark.slow  # half a minute each
@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_bytes_are_those_of_the_ranks(ranks: int, tmp_path: Path) -> None:
    found = on_ranks(ranks, tmp_path / "ranks", measured)
    parameters = [NamedShape(str(i), shape) for i, shape in enumerate(SHAPES)]
    for case in itertools.product(shardings(ranks), METHODS, WAVES):
        sharding, name, wave = case
        request = Request(
            parameters,
            Placement(ranks, sharding, GROUP_SIZE),
            config=METHODS[name],
            max_block_size=BLOCK_SIZE,
            max_wave_numel=wave,
        )
        plan = make_plan(request)
        assert plan.state_bytes_per_rank == [of_rank[case][0] for of_rank in found], case
        assert plan.sent_bytes_per_rank == [of_rank[case][1] for of_rank in found], case


def measured_in_groups() -> dict[Sharding, tuple[int, int]]:
    torch.manual_seed(0)
    found = {}
    for sharding in GROUPED:
        params = parameters_on_ranks(SHAPES, sharding)
        optimizer = DistributedShampoo(
            params,
            max_block_size=BLOCK_SIZE,
            refresh=FixedRefresh(100, start=2),
            weight_decay=0.1,
            distributed=Distribution(ranks_per_group=GROUP_SIZE),
        )
        stepped(params, optimizer)
        with counted() as calls:
            stepped(params, optimizer)
        state = sum(
            tensor.nbytes for entries in optimizer.state.values() for tensor in entries.values()
        )
        found[sharding] = state, sum(sent for _, _, sent in calls)
    return found


@pytest.mark.slow  # a quarter of a minute
def test_bytes_are_those_of_ranks_in_groups(tmp_path: Path) -> None:
    """Two groups of two that do the same: replicas, and replicas of shards."""
    found = on_ranks(4, tmp_path / "ranks", measured_in_groups)
    parameters = [NamedShape(str(i), shape) for i, shape in enumerate(SHAPES)]
    for sharding in GROUPED:
        placement = Placement(4, sharding, GROUP_SIZE, ranks_per_group=GROUP_SIZE)
        plan = make_plan(Request(parameters, placement, max_block_size=BLOCK_SIZE))
        assert 2 * plan.state_bytes_per_rank == [of_rank[sharding][0] for of_rank in found]
        assert 2 * plan.sent_bytes_per_rank == [of_rank[sharding][1] for of_rank in found]


LARGE = ((256, 256),) * 8 + ((256,),) * 4
DECAYS = (0.01, 0.0)


def peaks(ranks: int) -> list[tuple[Sharding, str, float]]:
    return list(itertools.product(shardings(ranks), METHODS, DECAYS))


def peaks_on_ranks(sharding: Sharding, name: str, decay: float) -> list[int]:
    """Most bytes alive in a plain step and in one that refreshes everything.

    The least of eleven each: gloo's threads often let go of a message a moment after it has arrived. Of
    steps at which the host does not know that all have been refreshed, which keep more.
    """
    torch.manual_seed(0)
    params = parameters_on_ranks(LARGE, sharding)
    optimizer = DistributedShampoo(
        params,
        preconditioner=METHODS[name],
        max_block_size=128,
        refresh=FixedRefresh(2, start=1),
        weight_decay=decay,
    )
    found = []
    for _ in range(24):
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        optimizer.state_dict()  # whoever sees the state may have written to it
        with LiveMemory() as memory:
            optimizer.step()
        found.append(memory.peak)
    plain, refresh = min(found[2::2]), min(found[3::2])
    return [plain, max(plain, refresh)]


def alive() -> dict[tuple[Sharding, str, float], list[int]]:
    with pytest.MonkeyPatch.context() as patch:
        imitate_an_accelerator(patch)  # which plans are made for
        return {case: peaks_on_ranks(*case) for case in peaks(dist.get_world_size())}


@pytest.mark.slow  # a quarter of a minute each
@pytest.mark.parametrize("ranks", [2, 4])
def test_memory_is_what_is_alive_on_the_ranks(ranks: int, tmp_path: Path) -> None:
    """Up to vectors of a number per block, and what few rows of a block more a rank has than another."""
    found = on_ranks(ranks, tmp_path / "ranks", alive)
    parameters = [NamedShape(str(i), shape) for i, shape in enumerate(LARGE)]
    for case in peaks(ranks):
        sharding, name, decay = case
        request = Request(
            parameters,
            Placement(ranks, sharding, GROUP_SIZE),
            config=METHODS[name],
            weight_decay=decay,
            max_block_size=128,
            refresh_interval=2,
        )
        memory = make_plan(request).at_once_memory
        planned = [max(memory.travel, memory.plain), max(memory.travel, memory.refresh)]
        measured = [max(of_rank[case][kind] for of_rank in found) for kind in range(2)]
        assert planned == pytest.approx(measured, rel=0.02), case
