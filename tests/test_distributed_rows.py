"""Sharded blocks on two ranks: rows in any order, weights to evaluate, mistakes that all hear of."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.distributed as dist
from quadratic import parameters
from ranks import on_ranks
from test_distributed_sharing import error_of, optimizer_of, stepped
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from shampoo_core import (
    AdamConfig,
    DistributedShampoo,
    Distribution,
    KLShampooConfig,
    StaggeredRefresh,
    WeightEMA,
)

# --- on each rank ---------------------------------------------------------------------------------


def others() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "evaluated": {
            name: evaluated(is_sharded=name == "sharded") for name in ("held", "sharded")
        },
        "layouts": in_layouts(),
        "first steps": first_steps(),
        "mistakes": other_mistakes(),
        "warnings": warnings_of_waiting(),
    }


def rows_of(tensor: Tensor) -> torch.nn.Parameter:
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    return torch.nn.Parameter(distribute_tensor(tensor.detach(), mesh, [Shard(0)]))


def evaluated(*, is_sharded: bool) -> list[float]:
    """How far the weights to evaluate are from the averages, of blocks that this rank owns."""
    params = parameters([(16, 12), (9, 7), (7,), (10, 16)])
    params = [rows_of(p) for p in params] if is_sharded else params
    wire = Distribution(communication_dtype=torch.bfloat16)
    optimizer = optimizer_of(params, averaging=WeightEMA(0.9), distributed=wire)
    stepped(params, optimizer, 3)
    optimizer.eval()
    distances = []
    for parameter in params:
        whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
        for name, entry in optimizer.state[parameter].items():
            if name.endswith("averaging.weights"):
                distances.append((entry - whole.detach().view(entry.shape)).abs().max().item())
    return distances


def in_layouts() -> list[Tensor]:
    """The same convolution, its rows on each rank in memory one way or the other."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    ends = []
    for layout in (torch.contiguous_format, torch.channels_last):
        (whole,) = parameters([(8, 4, 3, 3)])
        part = whole.detach().chunk(dist.get_world_size())[dist.get_rank()]
        part = part.contiguous(memory_format=layout)
        parameter = torch.nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)]))
        stepped([parameter], optimizer_of([parameter]), 3)
        ends.append(parameter.detach().full_tensor())
    return ends


def first_steps() -> list[bool]:
    """Whether parameters move at the first two steps, one of a matrix alone and one of a vector."""
    params = parameters([(8, 6), (7,)])
    lagged = KLShampooConfig(lagged=True)
    optimizer = optimizer_of(params, preconditioner=lagged, weight_decay=0.0)
    moved = []
    for _ in range(2):
        before = [p.detach().clone() for p in params]
        stepped(params, optimizer)
        moved += [not torch.equal(p, old) for p, old in zip(params, before, strict=True)]
    return moved


def other_mistakes() -> dict[str, str]:
    (held,) = frozen = parameters([(4, 4)])
    held.requires_grad_(dist.get_rank() == 0)
    half = Distribution(communication_dtype=torch.float16)
    return {
        "frozen": error_of(lambda: optimizer_of(frozen)),
        "half": error_of(lambda: optimizer_of([rows_of(torch.ones(4, 4))], distributed=half)),
    }


def warnings_of_waiting() -> list[int]:
    """How often a staggered refresh is warned of: for one rank, for two, of a small model, of Adam."""
    counts = []
    for side, options in (
        (600, {"refresh": StaggeredRefresh()}),
        (600, {"refresh": StaggeredRefresh(ranks=2)}),
        (60, {"refresh": StaggeredRefresh()}),
        (600, {"refresh": StaggeredRefresh(), "preconditioner": AdamConfig()}),
    ):
        messages: list[str] = []
        handler = logging.Handler()
        handler.emit = lambda record, found=messages: found.append(record.getMessage())  # type: ignore
        logging.getLogger("shampoo_core").addHandler(handler)
        DistributedShampoo(parameters([(side, side)]), lr=0.1, **options)
        logging.getLogger("shampoo_core").removeHandler(handler)
        counts.append(sum("give it ranks=2" in message for message in messages))
    return counts


@pytest.fixture(scope="module")
def others_on_two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, tmp_path_factory.mktemp("two"), others)


# --- what was seen --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["held", "sharded"])
def test_weights_to_evaluate_are_not_rounded(
    kind: str, others_on_two_ranks: list[dict[str, Any]]
) -> None:
    """Whatever updates are sent in."""
    distances = [d for found in others_on_two_ranks for d in found["evaluated"][kind]]
    assert len(distances) == 4
    assert max(distances) < 1e-14


def test_rows_may_lie_in_memory_in_any_order(others_on_two_ranks: list[dict[str, Any]]) -> None:
    for found in others_on_two_ranks:
        plain, last = found["layouts"]
        assert torch.equal(plain, last)
        assert not torch.equal(plain, parameters([(8, 4, 3, 3)])[0])


def test_a_rank_without_a_matrix_sits_out_the_first_step_of_a_lagged_method(
    others_on_two_ranks: list[dict[str, Any]],
) -> None:
    """The other one does, so that one of a vector alone would be ahead."""
    for found in others_on_two_ranks:
        assert found["first steps"] == [False, False, True, True]


def test_ranks_that_would_wait_for_one_are_warned_of(
    others_on_two_ranks: list[dict[str, Any]],
) -> None:
    assert [found["warnings"] for found in others_on_two_ranks] == [[1, 0, 0, 0], [0, 0, 0, 0]]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("frozen", "(4, 4) torch.float64 on rank 0 and (4, 4) torch.float64, frozen on rank 1"),
        ("half", "communication_dtype float16 is for replicated parameters"),
    ],
)
def test_every_rank_hears_of_other_mistakes(
    mistake: str, message: str, others_on_two_ranks: list[dict[str, Any]]
) -> None:
    assert all(message in found["mistakes"][mistake] for found in others_on_two_ranks)
