"""Plans against what ranks hold and send: bytes of state and of communication on 1, 2 and 4 processes."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from test_distributed_sharing import counted, stepped
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from shampoo_core import DistributedShampoo, EigenvalueCorrectedConfig, FixedRefresh, ShampooConfig
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
SHARDINGS: tuple[Sharding, ...] = ("ddp", "fsdp2")


def measured() -> dict[tuple[Sharding, str, int | None], tuple[int, int]]:
    """By sharding, method and size of waves: bytes of state of this rank, and of what a step sends."""
    torch.manual_seed(0)
    found = {}
    for sharding, name, wave in itertools.product(SHARDINGS, METHODS, WAVES):
        params = [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]
        if sharding == "fsdp2":
            mesh = init_device_mesh("cpu", (dist.get_world_size(),))
            params = [
                torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)])) for p in params
            ]
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
    for case in itertools.product(SHARDINGS, METHODS, WAVES):
        sharding, name, wave = case
        request = Request(
            parameters,
            Placement(ranks, sharding),
            config=METHODS[name],
            max_block_size=BLOCK_SIZE,
            max_wave_numel=wave,
        )
        plan = make_plan(request)
        assert plan.state_bytes_per_rank == [of_rank[case][0] for of_rank in found], case
        assert plan.sent_bytes_per_rank == [of_rank[case][1] for of_rank in found], case
