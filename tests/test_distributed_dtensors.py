"""Gradients that torch hands over in other placements or dtypes than the weights', and its full states."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Partial, Placement, Replicate, Shard, distribute_tensor

from shampoo_core import (
    AdamConfig,
    DistributedShampoo,
    FixedRefresh,
    SGDConfig,
    ShampooConfig,
)
from shampoo_core.preconditioners.base import PreconditionerConfig

HAS_GRADIENT_DTYPES = hasattr(torch.Tensor, "grad_dtype")
METHODS: dict[str, PreconditionerConfig] = {
    "sgd": SGDConfig(),
    "adam": AdamConfig(),
    "shampoo": ShampooConfig(),
}


def optimizer_of(params: Any, config: PreconditionerConfig, **options: Any) -> DistributedShampoo:
    return DistributedShampoo(
        params, lr=0.1, max_block_size=4, preconditioner=config, refresh=FixedRefresh(2), **options
    )


def gradients(steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(5)
    return [torch.randn(6, 4, generator=generator) for _ in range(steps)]


def of_partial_sums(placement: Placement) -> dict[str, tuple[Tensor, Tensor]]:
    """By method: weights after steps on sums that are still to be made, and of one process."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    rank = dist.get_rank()
    found = {}
    for name, config in METHODS.items():
        shared = nn.Parameter(distribute_tensor(torch.ones(6, 4), mesh, [placement]))
        alone = nn.Parameter(torch.ones(6, 4))
        ours, single = (
            optimizer_of([shared], config),
            optimizer_of([alone], config, distributed=None),
        )
        for gradient in gradients(4):
            alone.grad = gradient
            positive = gradient.relu()
            part = positive if rank == 0 else gradient - positive
            shared.grad = type(shared.data).from_local(part, mesh, [Partial()])
            ours.step()
            single.step()
        found[name] = shared.data.full_tensor(), alone.detach().clone()  # type: ignore[attr-defined]
    return found


def of_finer_gradients() -> dict[str, Tensor]:
    """By placement: sums of gradients in float32 of weights in bfloat16."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    placements: dict[str, list[Placement] | None] = {
        "one process": None,
        "replicated": [Replicate()],
        "sharded": [Shard(0)],
    }
    found = {}
    for name, placement in placements.items():

        def placed(tensor: Tensor, where: list[Placement] | None = placement) -> Tensor:
            return tensor if where is None else distribute_tensor(tensor, mesh, where)

        weight = nn.Parameter(placed(torch.ones(6, 4, dtype=torch.bfloat16)))
        weight.grad_dtype = torch.float32  # type: ignore[attr-defined]
        optimizer = DistributedShampoo(
            [weight],
            lr=1e-3,
            preconditioner=AdamConfig(),
            distributed="auto" if placement else None,
        )
        for gradient in gradients(3):
            weight.grad = placed(gradient)
            optimizer.step()
        optimizer.gather_state()
        entries = optimizer.state_dict()["state"][0].items()
        moments = [tensor.flatten() for key, tensor in sorted(entries) if "filter" in key]
        found[name] = torch.cat([torch.empty(0), *moments])  # nothing but on rank 0
    return found


def from_a_full_state() -> tuple[list[Tensor], list[Tensor]]:
    """Weights of a run, and of one that was resumed from what torch gathers on rank 0."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))

    def built() -> tuple[nn.Module, DistributedShampoo]:
        model = nn.Module()
        for name in ("first", "second"):
            weight = distribute_tensor(torch.ones(6, 4), mesh, [Shard(0)])
            model.register_parameter(name, nn.Parameter(weight))
        return model, optimizer_of(model.parameters(), ShampooConfig())

    def train(model: nn.Module, optimizer: DistributedShampoo, steps: slice) -> None:
        for gradient in gradients(9)[steps]:
            for factor, parameter in enumerate(model.parameters(), start=1):
                parameter.grad = distribute_tensor(factor * gradient, mesh, [Shard(0)])
            optimizer.step()

    model, optimizer = built()
    train(model, optimizer, slice(0, 5))
    optimizer.gather_state()
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed, other = built()
    with torch.no_grad():
        for own, weight in zip(resumed.parameters(), model.parameters(), strict=True):
            own.copy_(weight)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_optimizer_state_dict(resumed, other, state, options=options)
    train(model, optimizer, slice(5, 9))
    train(resumed, other, slice(5, 9))
    whole, again = (
        [p.full_tensor().detach() for p in trained.parameters()]  # type: ignore[operator]
        for trained in (model, resumed)
    )
    return whole, again


def everything() -> dict[str, Any]:
    return {
        "partial": {
            "whole": of_partial_sums(Replicate()),
            "sharded": of_partial_sums(Shard(0)),
        },
        "finer": of_finer_gradients() if HAS_GRADIENT_DTYPES else None,
        "full": from_a_full_state(),
    }


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return on_ranks(2, tmp_path_factory.mktemp("ranks"), everything)


@pytest.mark.parametrize("where", ["whole", "sharded"])
@pytest.mark.parametrize("name", METHODS)
def test_partial_sums_are_summed_first(
    name: str, where: str, two_ranks: list[dict[str, Any]]
) -> None:
    """As of torch's SequenceParallel, whose norms have whole weights and gradients in parts."""
    for found in two_ranks:
        shared, alone = found["partial"][where][name]
        assert (alone - 1.0).abs().max() > 0.1
        torch.testing.assert_close(shared, alone, atol=1e-5, rtol=0.0)


@pytest.mark.skipif(
    not HAS_GRADIENT_DTYPES, reason="torch has gradients in the weights' dtype alone"
)
@pytest.mark.parametrize("name", ["replicated", "sharded"])
def test_gradients_travel_in_their_own_dtype(name: str, two_ranks: list[dict[str, Any]]) -> None:
    found = two_ranks[0]["finer"]
    assert len(found[name]) >= 24
    assert torch.equal(found[name], found["one process"])


def test_a_full_state_goes_on(two_ranks: list[dict[str, Any]]) -> None:
    for found in two_ranks:
        for own, resumed in zip(*found["full"], strict=True):
            assert torch.equal(own, resumed)
