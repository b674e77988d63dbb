"""Resuming by torch's own means, of state that every rank sees another part of: by all or by none."""

from __future__ import annotations

import copy
import itertools
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from ranks import assert_equal_on_ranks, on_ranks
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from shampoo_core import DistributedShampoo, FixedRefresh, WeightEMA

# fully_shard of older torch needs a GPU.
SHARDS = tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 6)
KINDS = ("plain", "replicated", "sharded") if SHARDS else ("plain", "replicated")
FLOWS = ("full", "by rank", "by rank, saved", "by rank, flat", "stateful")
STOP, STEPS = 4, 7


def model_of(kind: str, frozen: bool = False) -> nn.Module:
    """Biases, norms and a small matrix: of most parameters a rank owns no block."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 4), nn.LayerNorm(4), nn.Linear(4, 4)
    ).double()
    model[4].requires_grad_(not frozen)
    if kind == "sharded":
        from torch.distributed.fsdp import fully_shard

        fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    if kind == "replicated":
        return nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    return model


def optimizer_of(model: nn.Module, **options: Any) -> DistributedShampoo:
    defaults = {"lr": 0.05, "max_block_size": 4, "refresh": FixedRefresh(4, 1)}
    return DistributedShampoo(model.parameters(), **{**defaults, **options})


def train(model: nn.Module, optimizer: DistributedShampoo, steps: range) -> None:
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        inputs = torch.randn(16, 6, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        (model(inputs) - inputs[:, :4]).square().mean().backward()
        optimizer.step()


def weights_of(model: nn.Module) -> list[Tensor]:
    whole = (p.full_tensor() if isinstance(p, DTensor) else p for p in model.parameters())
    return [weight.detach().clone() for weight in whole]


def take_weights(model: nn.Module, other: nn.Module) -> None:
    with torch.no_grad():
        for own, weight in zip(model.parameters(), other.parameters(), strict=True):
            own.copy_(weight)


def through_torch(
    folder: str, comes_late: bool
) -> dict[tuple[str, str], tuple[list[Tensor], list[Tensor]]]:
    """By kind and flow: weights of a run, and of one that torch's helpers resumed.

    With ``comes_late`` a layer is unfrozen on the way, and trainable from the beginning where it is
    resumed, so that blocks have other owners; what each rank has in memory is of no use then.
    """
    found = {}
    flows = [flow for flow in FLOWS if not comes_late or flow not in ("by rank", "by rank, flat")]
    for kind, flow in itertools.product(KINDS, flows):
        model = model_of(kind, frozen=comes_late)
        optimizer = optimizer_of(model, averaging=WeightEMA(0.9))
        train(model, optimizer, range(1, STOP - 1))
        model.requires_grad_(True)
        train(model, optimizer, range(STOP - 1, STOP))
        resumed = model_of(kind)
        take_weights(resumed, model)
        other = optimizer_of(resumed, averaging=WeightEMA(0.9))
        _hand_over(flow, model, optimizer, resumed, other, f"{folder}/{kind}, {flow}")
        numbers = [o.param_groups[0]["arrivals"] for o in (optimizer, other)]
        assert max(numbers[0]) == comes_late and max(numbers[1]) == 0
        for own, trained in ((model, optimizer), (resumed, other)):
            train(own, trained, range(STOP, STEPS))
            trained.eval()
        found[kind, flow] = weights_of(model), weights_of(resumed)
        assert_equal_on_ranks(found[kind, flow][1], f"{kind}, {flow}")
    return found


def _hand_over(
    flow: str,
    model: nn.Module,
    optimizer: DistributedShampoo,
    resumed: nn.Module,
    other: DistributedShampoo,
    folder: str,
) -> None:
    if flow == "stateful":
        dcp.save({"optimizer": optimizer}, checkpoint_id=folder)
        dcp.load({"optimizer": other}, checkpoint_id=folder)
        return
    if flow == "full":
        optimizer.gather_state()
        options = StateDictOptions(full_state_dict=True, cpu_offload=True)
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
        options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    else:
        options = StateDictOptions(flatten_optimizer_state_dict=flow == "by rank, flat")
        state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    if flow == "by rank, saved":
        dcp.save(state, checkpoint_id=folder)
        state = get_optimizer_state_dict(resumed, other, options=options)
        dcp.load(state, checkpoint_id=folder)
    set_optimizer_state_dict(resumed, other, state, options=options)


@pytest.mark.parametrize("comes_late", [False, True])
def test_helpers_of_torch_bring_all_ranks_the_same_state(comes_late: bool, tmp_path: Path) -> None:
    ranks = on_ranks(2, tmp_path / "ranks", through_torch, str(tmp_path), comes_late)
    for case, (expected, resumed) in (item for found in ranks for item in found.items()):
        for a, b in zip(expected, resumed, strict=True):
            torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12 * comes_late, msg=str(case))


def loaded_by_two(folders: list[str]) -> list[list[Tensor]]:
    found = []
    for folder in folders:
        model = model_of("plain")
        optimizer = optimizer_of(model)
        dcp.load({"model": model, "optimizer": optimizer}, checkpoint_id=folder)
        train(model, optimizer, range(STOP, STEPS))
        found.append(weights_of(model))
    return found


def test_two_ranks_go_on_from_one_process(tmp_path: Path) -> None:
    """Also with a layer that came late where it was saved, so that blocks have other owners."""
    folders, expected = [], []
    for comes_late in (False, True):
        folders.append(str(tmp_path / f"saved, {comes_late}"))
        model = model_of("plain", frozen=comes_late)
        optimizer = optimizer_of(model)
        train(model, optimizer, range(1, STOP - 1))
        model.requires_grad_(True)
        train(model, optimizer, range(STOP - 1, STOP))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's own, about one process without a group
            dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=folders[-1])
        train(model, optimizer, range(STOP, STEPS))
        expected.append(weights_of(model))
    for found in on_ranks(2, tmp_path / "ranks", loaded_by_two, folders):
        for resumed, weights in zip(found, expected, strict=True):
            for a, b in zip(weights, resumed, strict=True):
                torch.testing.assert_close(a, b, rtol=0.0, atol=1e-12)


def refusals(folder: str) -> list[str]:
    """What is said where state is missing, on every rank."""
    said = []
    # A layer that came late, and is late again where the checkpoint is read.
    model = model_of("plain", frozen=True)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(1, 3))
    model[4].requires_grad_(True)
    train(model, optimizer, range(3, STOP))
    dcp.save({"optimizer": optimizer}, checkpoint_id=folder)
    other = optimizer_of(model_of("plain", frozen=True))
    before = other.state_dict()
    try:
        dcp.load({"optimizer": other}, checkpoint_id=folder)
    except (ValueError, dcp.api.CheckpointException) as error:
        said.append(str(error))
    assert other.state_dict()["state"].keys() == before["state"].keys()
    # A full state without gather_state().
    options = StateDictOptions(full_state_dict=True)
    state = get_optimizer_state_dict(model, optimizer, options=options)
    if dist.get_rank() == 0:
        try:
            optimizer_of(model_of("plain"), distributed=None).load_state_dict(
                numbered(model, state)
            )
        except ValueError as error:
            said.append(str(error))
    return said


def owners_of_a_late_layer() -> list[list[list[int]]]:
    """By rank: parameters that it owns blocks of, without and with a load that was refused before."""
    found = []
    for is_refused in (False, True):
        model = model_of("plain", frozen=True)
        optimizer = optimizer_of(model)
        train(model, optimizer, range(1, 3))
        if is_refused:
            state = optimizer.state_dict()
            # As if all had come together, so that blocks are dealt out anew; and of another model.
            state["param_groups"][0]["arrivals"] = [0] * len(list(model.parameters()))
            state["state"][0]["block.99.of_another_model"] = torch.zeros(())
            with pytest.raises(ValueError, match="the checkpoint"):
                optimizer.load_state_dict(state)
        model.requires_grad_(True)
        train(model, optimizer, range(3, STOP))
        late = optimizer._engines[0][-1].division
        found.append([[tile.parameter for tile in own.tiles] for own in late.by_rank])
    return found


def test_a_refused_load_leaves_owners_as_they_were(tmp_path: Path) -> None:
    for expected, found in on_ranks(2, tmp_path, owners_of_a_late_layer):
        assert found == expected


def numbered(model: nn.Module, state: Any) -> dict[str, Any]:
    """As torch's helpers hand it on: parameters by number instead of by name."""
    numbers = {name: number for number, (name, _) in enumerate(model.named_parameters())}
    groups = [
        {**group, "params": [numbers[name] for name in group["params"]]}
        for group in state["param_groups"]
    ]
    return {
        "state": {numbers[name]: entries for name, entries in state["state"].items()},
        "param_groups": groups,
    }


def test_state_that_is_missing_is_named(tmp_path: Path) -> None:
    first, second = on_ranks(2, tmp_path / "ranks", refusals, str(tmp_path / "saved"))
    assert len(first) == 2
    # The small layer is owned by one rank, which is the one that lacks it.
    assert any(
        "that had state when saved needs it before they load" in text for text in [*first, *second]
    )
    assert "needs gather_state() before it is made" in first[1]


def in_evaluation_and_back() -> dict[str, Any]:
    """A state gathered in evaluation and made when training goes on, and the other way round."""
    model = model_of("sharded")
    optimizer = optimizer_of(model, averaging=WeightEMA(0.9))
    train(model, optimizer, range(1, STOP))
    optimizer.eval()
    optimizer.gather_state()
    optimizer.train()
    after = optimizer.state_dict()
    optimizer.gather_state()
    optimizer.eval()
    return {"after": after, "before": optimizer.state_dict()["complete"]}


@pytest.mark.skipif(not SHARDS, reason="fully_shard of this torch needs a GPU")
def test_training_weights_are_in_a_file_only_where_it_was_made_in_evaluation(
    tmp_path: Path,
) -> None:
    first, _ = on_ranks(2, tmp_path / "ranks", in_evaluation_and_back)
    assert first["after"]["complete"]
    assert not any("training_weights" in entries for entries in first["after"]["state"].values())
    assert not first["before"]
    model = model_of("plain")
    optimizer = optimizer_of(model, averaging=WeightEMA(0.9), distributed=None)
    poisoned = first["after"]
    poisoned["state"][0]["training_weights"] = torch.zeros(8, 6, dtype=torch.float64)
    optimizer.load_state_dict(poisoned)
    expected = weights_of(model)
    optimizer.train()
    for own, weight in zip(weights_of(model), expected, strict=True):
        assert torch.equal(own, weight)
