"""Sharded parameters: results are those of one process, however the rows are shared."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_cases import CASES, Case, assert_close, build, tolerance_of, trajectory
from distributed_cases import run as run_case
from ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

SCALAR = 4  # the parameter without a first dimension, which nobody shards
NAMES = [name for name in CASES if name != "overlap"]


def placements_of(index: int, mesh: DeviceMesh, kind: str) -> list[Placement]:
    """``"sharded"`` rows; ``"hybrid"`` on the last axis of a mesh; ``"mixed"`` half of them."""
    placements: list[Placement] = [Replicate()] * mesh.ndim
    if index != SCALAR and not (kind == "mixed" and index % 2):
        placements[-1] = Shard(0)
    return placements


def distributed(
    params: list[torch.nn.Parameter], mesh: DeviceMesh, kind: str
) -> list[torch.nn.Parameter]:
    return [
        torch.nn.Parameter(
            distribute_tensor(p.detach(), mesh, placements_of(index, mesh, kind)),
            requires_grad=p.requires_grad,
        )
        for index, p in enumerate(params)
    ]


def follow_all(names: list[str], kind: str) -> dict[str, list[list[Tensor]]]:
    """On each rank: step sharded parameters, and return them whole."""
    size = dist.get_world_size()
    if kind == "hybrid":
        mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (size,))
    return {name: follow(CASES[name], mesh, kind) for name in names}


def follow(case: Case, mesh: DeviceMesh, kind: str) -> list[list[Tensor]]:
    plain, optimizer = build(case, lambda params: distributed(params, mesh, kind))
    seen: list[list[Tensor]] = []

    def after_step(step: int, params: list[torch.nn.Parameter]) -> None:
        seen.append([whole(p) for p in params])

    run_case(case, plain, optimizer, range(1, 10), after_step)
    return seen


def whole(parameter: Tensor) -> Tensor:
    assert isinstance(parameter, DTensor)
    return parameter.detach().full_tensor().clone()


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[list[Tensor]]]:
    names = ["l2", "two groups", "weight average", "missing gradients", "not finite", "waves"]
    folder = tmp_path_factory.mktemp("two")
    return on_ranks(2, folder, follow_all, names, "mixed")[0]


def test_two_processes_follow_one(two_ranks: dict[str, list[list[Tensor]]]) -> None:
    for name, found in two_ranks.items():
        assert_close(name, found, trajectory(CASES[name]), tolerance_of(CASES[name]))


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes on few cores
@pytest.mark.parametrize(
    ("num_ranks", "kind"),
    [(1, "sharded"), (2, "sharded"), (3, "mixed"), (4, "hybrid"), (8, "sharded")],
)
def test_any_sharding_follows_one_process(num_ranks: int, kind: str, tmp_path: Path) -> None:
    """Eight ranks hold nothing of parameters with fewer rows."""
    for name, found in on_ranks(num_ranks, tmp_path, follow_all, NAMES, kind)[0].items():
        assert_close(name, found, trajectory(CASES[name]), tolerance_of(CASES[name]))
