"""HSDP: replicas that hold the same shards share the work, and hold the same bits after every step."""

from __future__ import annotations

import dataclasses
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from distributed_cases import CASES, assert_close, build, tolerance_of, trajectory
from distributed_cases import run as run_case
from quadratic import parameters
from ranks import assert_equal_on_ranks, on_ranks
from test_distributed_checkpoints import state_bytes
from test_distributed_sharded import distributed, whole
from test_distributed_sharing import counted, error_of, optimizer_of, stepped
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from shampoo_core import DistributedShampoo, Distribution
from shampoo_core.exchange.division import divide
from shampoo_core.exchange.pieces import pieces_of
from shampoo_core.exchange.traffic import all_gather_bytes, all_to_all_bytes

SHARINGS = {"all": None, "each replica alone": 2}
SHAPES = [(20, 30), (7,), (33, 9)]


def mesh_of(num_replicas: int) -> DeviceMesh:
    shape = (num_replicas, dist.get_world_size() // num_replicas)
    return init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))


def sharded(mesh: DeviceMesh) -> list[torch.nn.Parameter]:
    return [
        torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Replicate(), Shard(0)]))
        for p in parameters(SHAPES, dtype=torch.float32)
    ]


# --- on each rank ---------------------------------------------------------------------------------


def followed(names: list[str], num_replicas: int, ranks_per_group: int | None) -> dict[str, Any]:
    mesh = mesh_of(num_replicas)
    found = {}
    for name in names:
        case = CASES[name]
        options = {**case.options, "distributed": Distribution(ranks_per_group=ranks_per_group)}
        params, optimizer = build(
            dataclasses.replace(case, options=options),
            lambda params: distributed(params, mesh, "hybrid"),
        )
        seen: list[list[torch.Tensor]] = []

        def after_step(
            step: int, params: list[torch.nn.Parameter], seen: list[list[torch.Tensor]] = seen
        ) -> None:
            seen.append([whole(p) for p in params])

        run_case(case, params, optimizer, range(1, 10), after_step)
        assert_equal_on_ranks(seen[-1], name)
        found[name] = seen
    return found


def everything() -> dict[str, Any]:
    torch.manual_seed(0)
    mesh = mesh_of(2)
    return {
        "sharing": {name: shared(mesh, asked) for name, asked in SHARINGS.items()},
        "unequal replicas": unequal_replicas(mesh),
    }


def shared(mesh: DeviceMesh, ranks_per_group: int | None) -> dict[str, Any]:
    """State of this rank, what a step sends, and what it should."""
    params = sharded(mesh)
    distribution = Distribution(ranks_per_group=ranks_per_group)
    optimizer = optimizer_of(params, weight_decay=0.1, distributed=distribution)
    stepped(params, optimizer)
    with counted() as calls:
        stepped(params, optimizer)
    blocks = [
        (index, key)
        for index, parameter in enumerate(params)
        for key in optimizer.state[parameter]
        if key.startswith("block.")
    ]
    own_bytes = state_bytes(optimizer)
    (engine,) = optimizer._engines[0]
    return {
        "calls": calls,
        "tiles": [own.tiles for own in engine.division.by_rank],
        "modelled": modelled(optimizer, [tuple(p.shape) for p in params]),
        "blocks": blocks,
        "bytes": own_bytes,
        "gathered": optimizer.gather_state(),
        "complete": optimizer.state_dict()["complete"],
    }


def modelled(optimizer: DistributedShampoo, shapes: list[tuple[int, ...]]) -> tuple[int, int, int]:
    """Bytes of this rank: gradients to owners, updates to holders, and on to replicas."""
    (engine,) = optimizer._engines[0]
    num_holders, rank = 2, dist.get_rank()
    num_owners = len(engine.division.by_rank)
    replica = rank // num_holders if num_owners == 4 else 0
    numbers: Counter[tuple[int, int]] = Counter()
    blocks: Counter[tuple[int, int]] = Counter()
    to_pass_on = [0] * (num_owners // num_holders)
    for piece in pieces_of(engine.division, dict(enumerate(shapes)), num_holders):
        way = piece.holder, piece.owner % num_holders
        if piece.owner // num_holders == replica:
            numbers[way] += piece.numel
            blocks[way] += piece.num_blocks
        if piece.holder == rank % num_holders:
            to_pass_on[piece.owner // num_holders] += piece.numel + piece.num_blocks
    there, back = (sent[rank % num_holders] for sent in all_to_all_bytes(numbers, num_holders, 4))
    moves = all_to_all_bytes(blocks, num_holders, 4)[1][rank % num_holders]
    return there, back + moves, all_gather_bytes(to_pass_on, 4)


def unequal_replicas(mesh: DeviceMesh) -> str:
    params = sharded(mesh)
    other = params[1].detach()
    assert isinstance(other, DTensor)
    if dist.get_rank() == 3:
        other.to_local().add_(1.0)
    optimizer = optimizer_of(params)
    return error_of(lambda: stepped(params, optimizer))


def uneven_group() -> str:
    """Three replicas of two ranks each; three ranks are one and a half of them."""
    uneven = Distribution(ranks_per_group=3)
    return error_of(lambda: optimizer_of(sharded(mesh_of(3)), distributed=uneven))


# --- tests ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(4, tmp_path_factory.mktemp("four"), everything)


def test_state_is_shared_by_replicas(four_ranks: list[dict[str, Any]]) -> None:
    """Every block has one owner among all ranks, or one in every replica where these do not share."""
    params = parameters(SHAPES, dtype=torch.float32)
    optimizer = optimizer_of(params, weight_decay=0.1, distributed=None)
    stepped(params, optimizer)
    in_all = state_bytes(optimizer)
    for name, owners in (("all", 1), ("each replica alone", 2)):
        found = [of_rank["sharing"][name] for of_rank in four_ranks]
        counts = Counter(block for of_rank in found for block in of_rank["blocks"])
        assert set(counts.values()) == {owners}
        assert sum(of_rank["bytes"] for of_rank in found) == owners * in_all
        assert found[0]["complete"]
        assert found[0]["gathered"] == in_all - found[0]["bytes"]


def test_replicas_are_given_as_much_of_every_shard(four_ranks: list[dict[str, Any]]) -> None:
    """Blocks are dealt out to replicas, not to ranks whatever they hold, as the plan has it."""
    optimizer = optimizer_of(parameters(SHAPES, dtype=torch.float32), distributed=None)
    (engine,), (group,) = optimizer._engines[0], optimizer.param_groups
    method, interval = group["preconditioner"], group["refresh"].interval
    expected, otherwise = (
        divide(
            engine.division.whole,
            lambda shape: method.block_flops(shape, interval),
            [0.0] * 4,
            0,
            num_replicas=replicas,
        ).by_rank
        for replicas in (2, 1)
    )
    for of_rank in four_ranks:
        tiles = of_rank["sharing"]["all"]["tiles"]
        assert tiles == [own.tiles for own in expected]
        assert tiles != [own.tiles for own in otherwise]


@pytest.mark.parametrize("sharing", SHARINGS)
def test_a_step_sends_what_the_model_says(sharing: str, four_ranks: list[dict[str, Any]]) -> None:
    for of_rank in four_ranks:
        found = of_rank["sharing"][sharing]
        there, back, on = found["modelled"]
        expected = [("all-to-all", torch.float32, there), ("all-to-all", torch.float32, back)]
        if sharing == "all":
            expected.append(("all-gather", torch.float32, on))
            assert on > 0
        assert found["calls"] == expected


def test_replicas_that_differ_are_refused_on_all_ranks(four_ranks: list[dict[str, Any]]) -> None:
    expected = (
        "parameter 1 of shape (7,) has other values on rank 3 of the process group than on rank 1"
    )
    for of_rank in four_ranks:
        assert expected in of_rank["unequal replicas"]


@pytest.mark.slow
def test_a_group_is_a_whole_number_of_replicas(tmp_path: Path) -> None:
    for error in on_ranks(6, tmp_path, uneven_group):
        assert "ranks_per_group=3" in error
        assert "give 2 times a divisor of 3" in error


NAMES = ["eigenvalue-corrected", "not finite"]
MORE_NAMES = [
    "staggered", "weight average", "waves", "missing gradients", "schedule-free", "momentum",
    "two groups", "l2",
]  # fmt: skip


def test_four_ranks_in_two_replicas_follow_one_process(tmp_path: Path) -> None:
    found = on_ranks(4, tmp_path, followed, NAMES, 2, None)[0]
    for name, seen in found.items():
        assert_close(name, seen, trajectory(CASES[name]), tolerance_of(CASES[name]))


@pytest.mark.slow
@pytest.mark.timeout(900)  # many processes on few cores
@pytest.mark.parametrize(
    ("num_ranks", "num_replicas", "ranks_per_group"),
    [(4, 2, None), (4, 4, None), (6, 3, None), (4, 2, 2), (8, 4, 4), (8, 2, None)],
)
def test_any_replicas_follow_one_process(
    num_ranks: int, num_replicas: int, ranks_per_group: int | None, tmp_path: Path
) -> None:
    names = [*NAMES, *MORE_NAMES]
    found = on_ranks(num_ranks, tmp_path, followed, names, num_replicas, ranks_per_group)[0]
    for name, seen in found.items():
        assert_close(name, seen, trajectory(CASES[name]), tolerance_of(CASES[name]))
