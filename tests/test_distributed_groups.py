"""Groups of ranks that share the work: found whatever else is there, made once, of DTensors as well."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from quadratic import gradient, optimizer_for, parameters
from ranks import on_ranks
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from shampoo_core import DistributedShampoo, Distribution
from shampoo_core.exchange import base, distribution

SHAPES = ((12, 20), (7,), (9, 9), (16, 5))
PAIRS = Distribution(ranks_per_group=2)


def placed(mesh: DeviceMesh, placements: list[Placement]) -> list[torch.nn.Parameter]:
    wholes = (p.detach() for p in parameters(SHAPES))
    return [torch.nn.Parameter(distribute_tensor(w, mesh, placements)) for w in wholes]


def stepped(params: list[torch.nn.Parameter], optimizer: DistributedShampoo) -> list[Tensor]:
    for step in range(1, 4):
        for index, parameter in enumerate(params):
            whole = parameter.detach()
            sharded = isinstance(whole, DTensor)
            grad = gradient(whole.full_tensor() if sharded else whole, step, index)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = grad
        optimizer.step()
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in params]


def num_owners(optimizer: DistributedShampoo) -> int:
    (engine,) = optimizer._engines[0]
    return len(engine.division.by_rank)


def of_pairs() -> dict[str, Any]:
    """Four ranks, rank 0 of which is in a group more than the others."""
    dist.new_group([0])
    row, column = init_device_mesh("cpu", (4,)), init_device_mesh("cpu", (4, 1))
    kinds = {
        "plain": lambda: parameters(SHAPES),
        "replicated": lambda: placed(row, [Replicate()]),
        "hybrid": lambda: placed(column, [Replicate(), Shard(0)]),
    }
    found: dict[str, Any] = {}
    for kind, made in kinds.items():
        params = made()
        optimizer = optimizer_for(params, distributed=PAIRS)
        found[kind] = {"owners": num_owners(optimizer), "weights": stepped(params, optimizer)}
        files = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            optimizer_for(made(), distributed=PAIRS)
        found[kind]["more files"] = len(os.listdir("/proc/self/fd")) - files
    try:
        optimizer_for(kinds["replicated"](), distributed=Distribution(ranks_per_group=3))
    except ValueError as error:
        found["refused"] = str(error)
    return found


def a_mesh(*shape: int) -> Any:
    """What is asked of a mesh, without the processes; its groups are its axes."""
    return SimpleNamespace(
        ndim=len(shape),
        size=lambda axis: shape[axis],
        mesh=torch.arange(torch.Size(shape).numel()).view(shape),
        get_group=lambda axis: f"axis {axis}",
    )


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of ranks and the size asked for, in place of the group that this rank is in."""
    monkeypatch.setattr(distribution, "part_of_ranks", lambda rows, size: (rows, size))


def neighbours(asked: int | None, *shape: int) -> Any:
    last = len(shape) - 1
    return distribution.neighbours(
        "test", Distribution(ranks_per_group=asked), a_mesh(*shape), last
    )


@pytest.mark.usefixtures("parts")
def test_neighbours_are_those_along_the_last_axis() -> None:
    assert neighbours(None, 2, 4) == neighbours(4, 2, 4) == neighbours(8, 2, 4) == "axis 1"
    assert neighbours(2, 2, 4) == ([[0, 1, 2, 3], [4, 5, 6, 7]], 2)
    # Of the 6 ranks that there are 2 are a divisor, but not of the 3 along the axis.
    with pytest.raises(ValueError, match=r"ranks_per_group=2\).* give a divisor of 3"):
        neighbours(2, 2, 3)


def replicas(asked: int | None, *shape: int) -> Any:
    """Of rows that are split along the last axis."""
    sharing, last = Distribution(ranks_per_group=asked), len(shape) - 1
    return distribution.sharing_replicas("test", sharing, a_mesh(*shape), last)


@pytest.mark.usefixtures("parts")
def test_replicas_share_whole_or_not_at_all() -> None:
    assert replicas(None, 4, 3) == "axis 0"
    assert replicas(None, 4) is replicas(None, 1, 4) is None
    assert replicas(1, 4, 3) is replicas(3, 4, 3) is None
    # Ranks that hold the same rows lie across the mesh.
    assert replicas(6, 4, 3) == ([[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]], 2)
    for asked in (4, 5, 9, 15):
        with pytest.raises(ValueError, match=f"={asked}.* give 3 times a divisor of 4"):
            replicas(asked, 4, 3)


@pytest.mark.parametrize(
    ("rows", "made"),
    [
        ([[0, 1, 2, 3], [4, 5, 6, 7]], [([0, 1], {}), ([2, 3], {}), ([4, 5], {}), ([6, 7], {})]),
        # Ranks that are in none of the rows do not call: those of the group are all who do.
        ([[1, 3, 5, 7]], [([5, 7], {"use_local_synchronization": True})]),
    ],
)
def test_a_group_is_made_once_by_all_who_call(
    rows: list[list[int]], made: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    class World:
        pass

    calls: list[Any] = []

    def new_group(ranks: list[int], **options: Any) -> str:
        calls.append((ranks, options))
        return f"group {ranks}"

    stand_in = SimpleNamespace(
        get_rank=lambda: 7,
        get_world_size=lambda: 8,
        group=SimpleNamespace(WORLD=World()),
        new_group=new_group,
    )
    monkeypatch.setattr(distribution, "dist", stand_in)
    for _ in range(2):
        assert distribution.part_of_ranks(rows, 2) == f"group {made[-1][0]}"
        assert calls == made


def test_pairs_share_parameters_of_every_kind(tmp_path: Path) -> None:
    params = parameters(SHAPES)
    expected = stepped(params, optimizer_for(params))
    for found in on_ranks(4, tmp_path, of_pairs):
        for kind in ("plain", "replicated", "hybrid"):
            assert found[kind]["owners"] == 2
            assert found[kind]["more files"] == 0
            for own, weight in zip(found[kind]["weights"], expected, strict=True):
                torch.testing.assert_close(own, weight, rtol=0.0, atol=1e-12)
        assert "ranks_per_group" in found["refused"]


def sums_of_partial_gradients(max_wave_numel: int | None) -> tuple[int, list[int]]:
    """How many gradients one step sums, and of how many parameters each wave has blocks."""
    mesh = init_device_mesh("cpu", (2,))
    params = placed(mesh, [Replicate()])
    optimizer = optimizer_for(params, max_wave_numel=max_wave_numel)
    for parameter in params:
        part = torch.ones(parameter.shape, dtype=parameter.dtype)
        parameter.grad = DTensor.from_local(part, mesh, [Partial()])
    summed, place = 0, base.placed_as

    def counting(tensor: Tensor, parameter: Tensor) -> Tensor:
        nonlocal summed
        summed += 1
        return place(tensor, parameter)

    base.placed_as = counting
    optimizer.step()
    return summed, [len(wave.division.whole.parameters) for wave in optimizer._engines[0]]


@pytest.mark.parametrize("max_wave_numel", [None, 100])
def test_gradients_in_parts_are_summed_for_their_own_wave(
    max_wave_numel: int | None, tmp_path: Path
) -> None:
    for summed, waves in on_ranks(2, tmp_path, sums_of_partial_gradients, max_wave_numel):
        assert summed == sum(waves)
        assert waves == [len(SHAPES)] if max_wave_numel is None else summed < 2 * len(SHAPES)
