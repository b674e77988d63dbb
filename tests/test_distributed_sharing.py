"""What ranks send, how it is rounded, what they have to agree on, and what happens where they do not."""

from __future__ import annotations

import copy
import itertools
import pickle
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from quadratic import gradient, parameters
from ranks import assert_equal_on_ranks, on_ranks
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.placement_types import Placement

from shampoo_core import (
    AdamConfig,
    DistributedShampoo,
    Distribution,
    FixedRefresh,
    HeavyBall,
    WeightEMA,
)
from shampoo_core.exchange.pieces import pieces_of
from shampoo_core.exchange.traffic import all_gather_bytes, all_to_all_bytes

ALL_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"


SHARDED_RULES: dict[str, dict[str, Any]] = {
    "no decay": {"weight_decay": 0.0},
    "decay": {"weight_decay": 0.1},
    "L2 decay": {"weight_decay": 0.1, "weight_decay_kind": "l2"},
    "decay and momentum": {"weight_decay": 0.1, "averaging": HeavyBall()},
    "momentum": {"weight_decay": 0.0, "averaging": HeavyBall()},
    "decay and average": {"weight_decay": 0.1, "averaging": WeightEMA(interval=10)},
}


@contextmanager
def counted() -> Iterator[list[tuple[str, torch.dtype, int]]]:
    """Collectives of tensors while this is open: name, dtype, bytes that this rank sends to others."""
    calls: list[tuple[str, torch.dtype, int]] = []
    gather, to_all = getattr(dist, ALL_GATHER), dist.all_to_all_single

    def counting_gather(output: Tensor, message: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append(("all-gather", message.dtype, output.nbytes - message.nbytes))
        return gather(output, message, *args, **kwargs)

    def counting_to_all(output: Tensor, message: Tensor, into: Any, out: Any, group: Any) -> Any:
        kept = out[dist.get_rank(group)] * message.itemsize
        calls.append(("all-to-all", message.dtype, message.nbytes - kept))
        return to_all(output, message, into, out, group=group)

    setattr(dist, ALL_GATHER, counting_gather)
    dist.all_to_all_single = counting_to_all
    try:
        yield calls
    finally:
        setattr(dist, ALL_GATHER, gather)
        dist.all_to_all_single = to_all


def stepped(
    params: list[torch.nn.Parameter], optimizer: DistributedShampoo, steps: int = 1
) -> None:
    for step in range(1, steps + 1):
        for index, parameter in enumerate(params):
            whole = parameter.detach()
            whole = whole.full_tensor() if isinstance(whole, DTensor) else whole
            grad = gradient(whole, step, index)
            if isinstance(parameter, DTensor):
                grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
            parameter.grad = grad
        optimizer.step()


def optimizer_of(params: Any, **options: Any) -> DistributedShampoo:
    return DistributedShampoo(params, **{"lr": 0.01, "max_block_size": 16, **options})


def error_of(action: Callable[[], object]) -> str:
    try:
        action()
    except (TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing raised"


# --- on each rank ---------------------------------------------------------------------------------


def everything() -> dict[str, Any]:
    torch.manual_seed(0)
    return {
        "replicated traffic": replicated_traffic(),
        "overlapping": overlapping(),
        "two dtypes": of_two_dtypes(),
        "sharded traffic": sharded_traffic(),
        "rounded": {dtype: rounded(dtype) for dtype in (torch.bfloat16, torch.float16, None)},
        "mistakes": mistakes(),
        "alone": alone(),
        "uneven gradients": uneven_gradients(),
        "copy": has_a_copy_of_its_own(),
    }


def replicated_traffic() -> dict[str, Any]:
    """A step and an evaluation: one all-gather each, of what the model says."""
    found: dict[str, Any] = {}
    for dtype in (None, torch.bfloat16):
        params = parameters(dtype=torch.float32)
        groups = [{"params": params[:3]}, {"params": params[3:], "preconditioner": AdamConfig()}]
        optimizer = optimizer_of(
            groups, averaging=WeightEMA(), distributed=Distribution(communication_dtype=dtype)
        )
        stepped(params, optimizer)
        with counted() as step:
            stepped(params, optimizer)
        with counted() as evaluation:
            optimizer.eval()
        engines = list(itertools.chain.from_iterable(optimizer._engines))
        numbers = [
            sum(engine.division.by_rank[rank].numel for engine in engines)
            for rank in range(dist.get_world_size())
        ]
        found[str(dtype)] = {
            "step": step,
            "evaluation": evaluation,
            "modelled": all_gather_bytes(numbers, 4 if dtype is None else 2),
            "numbers": numbers,
        }
    return found


def overlapping() -> dict[str, int]:
    """All-gathers of a step of two groups, of parameters that are plain or on a mesh."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    found = {}
    for kind in ("plain", "on a mesh"):
        params = parameters([(20, 30), (33, 9)])
        if kind == "on a mesh":
            wholes = (distribute_tensor(p.detach(), mesh, [Replicate()]) for p in params)
            params = [torch.nn.Parameter(whole) for whole in wholes]
        groups = [{"params": [parameter]} for parameter in params]
        optimizer = optimizer_of(groups, distributed=Distribution(overlap=True))
        stepped(params, optimizer)
        with counted() as calls:
            stepped(params, optimizer)
        found[kind] = len(calls)
    return found


def with_two_dtypes() -> list[torch.nn.Parameter]:
    coarse, fine = parameters(dtype=torch.float32), parameters([(24, 18), (30,)], seed=1)
    return [coarse[0], fine[0], *coarse[1:], fine[1]]


def of_two_dtypes() -> list[Tensor]:
    params = with_two_dtypes()
    stepped(params, optimizer_of(params, refresh=FixedRefresh(2)), 3)
    return [p.detach() for p in params]


def sharded_traffic() -> dict[str, Any]:
    """With decay, which is left to holders or not, and without."""
    found: dict[str, Any] = {}
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for name, options in SHARDED_RULES.items():
        params = [
            torch.nn.Parameter(distribute_tensor(p.detach(), mesh, [Shard(0)]))
            for p in parameters([(20, 30), (7,), (33, 9)], dtype=torch.float32)
        ]
        optimizer = optimizer_of(params, **options)
        stepped(params, optimizer)
        with counted() as calls:
            stepped(params, optimizer)
        (engine,) = optimizer._engines[0]
        shapes = {index: tuple(p.shape) for index, p in enumerate(params)}
        numbers: Counter[tuple[int, int]] = Counter()
        blocks: Counter[tuple[int, int]] = Counter()
        for piece in pieces_of(engine.division, shapes, dist.get_world_size()):
            numbers[piece.holder, piece.owner] += piece.numel
            blocks[piece.holder, piece.owner] += piece.num_blocks
        by_rank = all_to_all_bytes(numbers, dist.get_world_size(), 4)
        there, back = (sent[dist.get_rank()] for sent in by_rank)
        moves = all_to_all_bytes(blocks, dist.get_world_size(), 4)[1][dist.get_rank()]
        found[name] = {"calls": calls, "there": there, "back": back, "moves": moves}
    return found


def rounded(dtype: torch.dtype | None) -> list[Tensor]:
    params = parameters()  # in double precision, which resolves such small changes
    distributed = Distribution(communication_dtype=dtype)
    optimizer = optimizer_of(params, refresh=FixedRefresh(2), distributed=distributed, lr=1e-6)
    before = [p.detach().clone() for p in params]
    stepped(params, optimizer, 3)
    assert_equal_on_ranks(list(params), str(dtype))
    return [p.detach() - old for p, old in zip(params, before, strict=True)]


def mistakes() -> dict[str, str]:
    """Errors of ranks that differ; every rank gets each of them."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def spread(*placements: Placement) -> torch.nn.Parameter:
        where = mesh if len(placements) == 1 else init_device_mesh("cpu", (2, 1))
        return torch.nn.Parameter(distribute_tensor(torch.ones(4, 4), where, placements))

    found = {
        "rate": error_of(lambda: optimizer_of(parameters(), lr=0.01 * (rank + 1))),
        "refresh": error_of(lambda: optimizer_of(parameters(), refresh=FixedRefresh(2 + rank))),
        "shape": error_of(lambda: optimizer_of(parameters([(4, 4 + rank)]))),
        "number": error_of(lambda: optimizer_of(parameters([(4, 4)] * (rank + 1)))),
        "groups": error_of(
            lambda: optimizer_of([{"params": [p]} for p in parameters([(4, 4)] * (rank + 1))])
        ),
        "columns": error_of(lambda: optimizer_of([spread(Shard(1))])),
        "rows twice": error_of(lambda: optimizer_of([spread(Shard(0), Shard(0))])),
        "alone": error_of(lambda: optimizer_of([spread(Replicate())], distributed=None)),
        "part": error_of(
            lambda: optimizer_of(parameters(), distributed=Distribution(ranks_per_group=3))
        ),
    }
    params = parameters([(4, 4), (3, 3)])
    params[1].data.add_(rank)
    optimizer = optimizer_of(params)
    found["values"] = error_of(lambda: stepped(params, optimizer))
    found["pickled"] = error_of(lambda: pickle.dumps(optimizer))
    wire = Distribution(communication_dtype=torch.bfloat16 if rank else None)
    found["wire"] = error_of(lambda: optimizer_of(parameters([(4, 4)]), distributed=wire))
    late = optimizer_of(parameters([(4, 4)]))
    new = parameters([(3, 3 + rank)])
    found["late"] = error_of(lambda: late.add_param_group({"params": new}))
    return found


def alone() -> list[Tensor]:
    """Ranks that train models of their own, though there is a group."""
    params = parameters([(6, 5)], seed=dist.get_rank())
    stepped(params, optimizer_of(params, distributed=None), 2)
    return [p.detach() for p in params]


def uneven_gradients() -> tuple[list[Tensor], list[Tensor]]:
    """A gradient that is missing, or not finite, on one rank alone: nobody hangs, all agree."""
    params = parameters([(20, 30), (7,), (9, 9)])
    optimizer = optimizer_of(params)
    stepped(params, optimizer, 2)
    before = [p.detach().clone() for p in params]
    for index, parameter in enumerate(params):
        parameter.grad = gradient(parameter, 3, index)
    if dist.get_rank() == 1:
        params[0].grad = torch.full_like(params[0], torch.inf)
        params[2].grad = None
    optimizer.step()
    assert_equal_on_ranks(list(params), "uneven gradients")
    if dist.get_rank() == 1:
        for parameter in params:
            parameter.grad = None
    optimizer.step()  # rank 1 has none at all
    assert_equal_on_ranks(list(params), "no gradients")
    return before, [p.detach() for p in params]


def has_a_copy_of_its_own() -> bool:
    params = parameters()
    optimizer = optimizer_of(params)
    stepped(params, optimizer, 2)
    other_params, other = copy.deepcopy((params, optimizer))
    stepped(params, optimizer, 1)
    stepped(other_params, other, 1)
    return all(torch.equal(a, b) for a, b in zip(params, other_params, strict=True))


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, tmp_path_factory.mktemp("two"), everything)


# --- what was seen --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_replicated_parameters_take_one_all_gather_a_step(
    dtype: torch.dtype | None, two_ranks: list[dict[str, Any]]
) -> None:
    for found in two_ranks:
        of_dtype = found["replicated traffic"][str(dtype)]
        wire = dtype or torch.float32
        assert of_dtype["step"] == [("all-gather", wire, of_dtype["modelled"])]
        assert sum(of_dtype["numbers"]) == sum(p.numel() for p in parameters())
        # Weights to evaluate are sent as they are.
        factor = wire.itemsize // 4 if dtype is None else 2
        assert of_dtype["evaluation"] == [
            ("all-gather", torch.float32, of_dtype["modelled"] * max(factor, 1))
        ]


@pytest.mark.parametrize("kind", ["plain", "on a mesh"])
def test_what_overlaps_takes_an_all_gather_a_group(
    kind: str, two_ranks: list[dict[str, Any]]
) -> None:
    assert [found["overlapping"][kind] for found in two_ranks] == [2, 2]


def test_every_dtype_travels_as_it_is(two_ranks: list[dict[str, Any]]) -> None:
    """Double precision beside single would be rounded, or single sent at double length."""
    params = with_two_dtypes()
    stepped(params, optimizer_of(params, refresh=FixedRefresh(2)), 3)
    for found in two_ranks:
        for own, parameter in zip(found["two dtypes"], params, strict=True):
            tolerance = 1e-12 if own.dtype == torch.float64 else 1e-5
            torch.testing.assert_close(own, parameter.detach(), rtol=0.0, atol=tolerance)


@pytest.mark.parametrize("rule", SHARDED_RULES)
def test_sharded_parameters_take_one_all_to_all_each_way(
    rule: str, two_ranks: list[dict[str, Any]]
) -> None:
    """Decay takes a number per block, not the weights, unless gradients or momentum have it too."""
    for found in two_ranks:
        seen = found["sharded traffic"][rule]
        tensors = 2 if rule in ("L2 decay", "decay and momentum") else 1
        moves = seen["moves"] if rule in ("decay", "decay and average") else 0
        assert seen["calls"] == [
            ("all-to-all", torch.float32, tensors * seen["there"]),
            ("all-to-all", torch.float32, seen["back"] + moves),
        ]
        assert 0 < seen["moves"] < seen["back"] / 16
        assert seen["there"] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_updates_can_be_sent_in_half_precision(
    dtype: torch.dtype, two_ranks: list[dict[str, Any]]
) -> None:
    """At a rate that float16 could not hold; ranks agree bitwise (seen on the ranks)."""
    exact, close = two_ranks[0]["rounded"][None], two_ranks[0]["rounded"][dtype]
    for a, b in zip(close, exact, strict=True):
        moved = b.abs().max()
        assert moved > 0
        assert (a - b).abs().max() <= 2 * torch.finfo(dtype).eps * moved


MESSAGES = {
    "rate": "ranks 0 and 1 of the process group differ: lr of group 0 is 0.01 on rank 0 and 0.02",
    "refresh": "refresh of group 0 is FixedRefresh(interval=2, start=None) on rank 0",
    "shape": "parameter 0 of group 0 is (4, 4) torch.float64 on rank 0 and (4, 5) torch.float64",
    "number": "number of parameters of group 0 is 1 on rank 0 and 2 on rank 1",
    "groups": "number of parameter groups is 1 on rank 0 and 2 on rank 1",
    "columns": "has placements (Shard(dim=1),)",
    "rows twice": "has placements (Shard(dim=0), Shard(dim=0))",
    "alone": "distributed must not be None for parameters that are DTensors",
    "part": "ranks_per_group must divide the number of ranks, 2; got 3",
    "values": "parameter 1 of shape (3, 3) has other values on rank",
    "pickled": "TypeError: DistributedShampoo: an optimizer that shares its work among ranks cannot be",
    "wire": "communication_dtype of Distribution is None on rank 0 and torch.bfloat16 on rank 1",
    "late": "parameter 0 of group 1 is (3, 3) torch.float64 on rank 0 and (3, 4)",
}


@pytest.mark.parametrize("mistake", MESSAGES)
def test_every_rank_hears_how_ranks_differ(mistake: str, two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        assert MESSAGES[mistake] in found["mistakes"][mistake]


def test_ranks_can_train_models_of_their_own(two_ranks: list[dict[str, Any]]) -> None:
    for rank, found in enumerate(two_ranks):
        params = parameters([(6, 5)], seed=rank)
        stepped(params, optimizer_of(params), 2)
        assert torch.equal(found["alone"][0], params[0])


def test_gradients_of_one_rank_alone_do_not_part_the_ranks(
    two_ranks: list[dict[str, Any]],
) -> None:
    """The owner of a block decides for all. Equality was seen on the ranks."""
    before, after = two_ranks[0]["uneven gradients"]
    assert all(torch.isfinite(p).all() for p in after)
    moved = [not torch.equal(a, b) for a, b in zip(before, after, strict=True)]
    assert moved[0] and moved[1]


def test_copies_share_the_group(two_ranks: list[dict[str, Any]]) -> None:
    assert all(found["copy"] for found in two_ranks)
