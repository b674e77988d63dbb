"""State: complete, plain, exact at every phase, refused where it does not fit."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from quadratic import assert_same, optimizer_for, parameters, run

from shampoo_core import (
    AdamConfig,
    AdamGrafting,
    AdaptiveRefresh,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    HeavyBall,
    KLShampooConfig,
    KLSOAPConfig,
    PerFactorCorrectedConfig,
    PrimalAveraging,
    RowWiseAdaGradConfig,
    ScheduleFree,
    SGDGrafting,
    ShampooConfig,
    SpectralConfig,
    StaggeredRefresh,
    WeightEMA,
)
from shampoo_core.checkpoint import changed_entries

METHODS: dict[str, dict[str, Any]] = {
    "shampoo": {"refresh": FixedRefresh(4)},
    "staggered": {"refresh": StaggeredRefresh(4)},
    "look-ahead": {"refresh": FixedRefresh(4), "betas": (0.9, 0.99), "beta3": 0.81},
    "look-ahead without momentum": {
        "refresh": FixedRefresh(4),
        "betas": (0.0, 0.99),
        "beta3": 0.5,
    },
    "sgd-grafted momentum": {
        "refresh": FixedRefresh(4),
        "betas": (0.0, 0.99),
        "grafting": SGDGrafting(),
        "averaging": HeavyBall(0.9, nesterov=True),
    },
    "statistics interval": {
        "refresh": FixedRefresh(4),
        "preconditioner": ShampooConfig(statistics_interval=3, factor_decay=0.9),
    },
    "eigenvalue-corrected": {
        "refresh": FixedRefresh(4, 1),
        "preconditioner": EigenvalueCorrectedConfig(),
    },
    "lagged": {
        "refresh": FixedRefresh(2),
        "preconditioner": EigenvalueCorrectedConfig(lagged=True),
    },
    "whitened statistics": {
        "refresh": FixedRefresh(4, 1),
        "preconditioner": ShampooConfig(statistics="whitened_mean", exponent=0.5),
    },
    "per-factor corrected": {
        "refresh": FixedRefresh(4),
        "preconditioner": PerFactorCorrectedConfig(),
    },
    "kl-shampoo": {"refresh": FixedRefresh(4, 1), "preconditioner": KLShampooConfig()},
    "kl-shampoo, lagged": {
        "refresh": StaggeredRefresh(4),
        "preconditioner": KLShampooConfig(
            lagged=True, second_moments="permute", statistics_interval=2
        ),
    },
    "kl-soap": {"refresh": AdaptiveRefresh(2), "preconditioner": KLSOAPConfig()},
    "four bits": {
        "refresh": StaggeredRefresh(4),
        "preconditioner": ShampooConfig(storage="4bit"),
    },
    "eigenvalue-corrected in eight bits": {
        "refresh": AdaptiveRefresh(2),
        "preconditioner": EigenvalueCorrectedConfig(storage="8bit"),
    },
    "kl-soap in four bits": {
        "refresh": FixedRefresh(4, 1),
        "preconditioner": KLSOAPConfig(storage="4bit"),
    },
    "spectral": {"preconditioner": SpectralConfig()},
    "adam": {"preconditioner": AdamConfig()},
    "row-wise adagrad": {"preconditioner": RowWiseAdaGradConfig(decay=0.9)},
    "schedule-free": {
        "refresh": FixedRefresh(4),
        "averaging": ScheduleFree(),
        "betas": (0.0, 0.99),
    },
    "primal averaging": {"refresh": FixedRefresh(4), "averaging": PrimalAveraging()},
    "weight average": {"refresh": FixedRefresh(4), "averaging": WeightEMA(0.9, interval=3)},
}


def saved(optimizer: DistributedShampoo) -> dict[str, Any]:
    """What comes back from a file that holds tensors and plain values only."""
    buffer = io.BytesIO()
    torch.save(optimizer.state_dict(), buffer)
    buffer.seek(0)
    loaded: dict[str, Any] = torch.load(buffer, weights_only=True)
    return loaded


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("steps_before", [0, 1, 3, 4, 6])
def test_a_resumed_run_continues_bitwise(name: str, steps_before: int) -> None:
    params = parameters()
    optimizer = optimizer_for(params, **METHODS[name])
    run(optimizer, params, range(1, steps_before + 1))
    state = saved(optimizer)
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in params]
    other = optimizer_for(resumed, **METHODS[name])
    other.load_state_dict(state)
    run(optimizer, params, range(steps_before + 1, steps_before + 10))
    run(other, resumed, range(steps_before + 1, steps_before + 10))
    assert_same(params, resumed)
    for left, right in zip(params, resumed, strict=True):
        for key, value in optimizer.state[left].items():
            assert torch.equal(value, other.state[right][key]), key


def test_a_deep_copy_is_a_snapshot() -> None:
    params = parameters()
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    run(optimizer, params, range(1, 4))
    weights = [parameter.detach().clone() for parameter in params]
    snapshot = copy.deepcopy(optimizer.state_dict())
    run(optimizer, params, range(4, 9))
    expected = [parameter.detach().clone() for parameter in params]
    for parameter, old in zip(params, weights, strict=True):
        parameter.data.copy_(old)
    optimizer.load_state_dict(snapshot)
    run(optimizer, params, range(4, 9))
    assert_same(params, expected)


@pytest.mark.parametrize("name", METHODS)
def test_a_copy_of_model_and_optimizer_goes_its_own_way(name: str) -> None:
    params = parameters()
    optimizer = optimizer_for(params, **METHODS[name])
    run(optimizer, params, range(1, 6))
    copied_params, copied = copy.deepcopy((params, optimizer))
    run(copied, copied_params, range(6, 10))
    run(optimizer, params, range(6, 10))
    assert_same(params, copied_params)
    run(copied, copied_params, range(10, 11))
    assert not torch.equal(params[0], copied_params[0])


def test_learning_rate_decay_and_step_come_from_the_checkpoint() -> None:
    params = parameters()
    optimizer = optimizer_for(params, lr=0.5, weight_decay=0.1)
    run(optimizer, params, range(1, 4))
    optimizer.param_groups[0]["lr"] = 0.25
    other = optimizer_for(parameters(), lr=0.5, weight_decay=0.1)
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["lr"] == 0.25
    assert other.param_groups[0]["step"] == 3
    assert other.param_groups[0]["betas"] == (0.9, 0.999)


def test_a_scheduler_can_be_used_and_resumed() -> None:
    params = parameters()
    optimizer = optimizer_for(params, lr=0.5, weight_decay_kind="corrected")
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.9**step)
    for step in range(1, 4):
        run(optimizer, params, range(step, step + 1))
        scheduler.step()
    other = optimizer_for(parameters(), lr=0.5, weight_decay_kind="corrected")
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["initial_lr"] == 0.5
    assert other.param_groups[0]["peak_lr"] == 0.5


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"max_block_size": 8}, "max_block_size is 8 here and 16 in the checkpoint"),
        ({"betas": (0.8, 0.999)}, "betas is [0.8, 0.999] here and [0.9, 0.999] in the checkpoint"),
        ({"grafting": AdamGrafting()}, "grafting is {'type': 'AdamGrafting'"),
        ({"preconditioner": EigenvalueCorrectedConfig()}, "preconditioner is {'type': 'Eigenvalue"),
        ({"refresh": StaggeredRefresh(4)}, "refresh is {'type': 'StaggeredRefresh'"),
        ({"averaging": ScheduleFree()}, "averaging is {'type': 'ScheduleFree'"),
    ],
)
def test_another_configuration_is_refused_and_nothing_changes(
    changed: dict[str, Any], message: str
) -> None:
    params = parameters()
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    run(optimizer, params, range(1, 4))
    other_params = parameters()
    other = optimizer_for(other_params, **{"refresh": FixedRefresh(2), **changed})
    run(other, other_params, range(1, 3))
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match="of another configuration") as caught:
        other.load_state_dict(saved(optimizer))
    assert message in str(caught.value)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for index, entries in before["state"].items():
        for key, value in entries.items():
            assert torch.equal(after["state"][index][key], value)


def test_the_number_of_ranks_of_a_refresh_is_not_in_checkpoints_of_before() -> None:
    """An option that came later is described where it is not at its default."""
    params, other_params = parameters(), parameters()
    optimizer = optimizer_for(params, refresh=StaggeredRefresh(4))
    run(optimizer, params, range(1, 3))
    state = saved(optimizer)
    described = {"type": "StaggeredRefresh", "interval": 4, "start": None}
    assert state["param_groups"][0]["refresh"] == described
    optimizer_for(other_params, refresh=StaggeredRefresh(4)).load_state_dict(state)
    other = optimizer_for(parameters(), refresh=StaggeredRefresh(4, ranks=2))
    with pytest.raises(ValueError, match=r"refresh is \{.*'ranks': 2\} here and "):
        other.load_state_dict(state)


def test_another_model_is_refused() -> None:
    params = parameters([(4, 4), (6,)])
    optimizer = optimizer_for(params)
    run(optimizer, params, range(1, 2))
    state = saved(optimizer)
    with pytest.raises(ValueError, match="group 0 has 2 parameters in the checkpoint and 1 here"):
        optimizer_for(parameters([(4, 4)])).load_state_dict(state)
    with pytest.raises(ValueError, match=r"parameter 0: .* has shape \(4, 4\) in the checkpoint"):
        optimizer_for(parameters([(5, 4), (6,)])).load_state_dict(state)
    with pytest.raises(ValueError, match="parameter 1: the checkpoint does not fit: missing"):
        optimizer_for(parameters([(4, 4), (6, 2)])).load_state_dict(state)
    with pytest.raises(ValueError, match="has 1 parameter groups, this optimizer 2"):
        groups = [{"params": parameters([(4, 4)])}, {"params": parameters([(6,)])}]
        optimizer_for(groups).load_state_dict(state)


def test_state_of_a_parameter_that_was_unfrozen_is_restored() -> None:
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    run(optimizer, params[1:], range(1, 3))
    params[0].requires_grad_(True)
    run(optimizer, params, range(3, 6))
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in params]
    resumed[0].requires_grad_(False)
    other = optimizer_for(resumed, refresh=FixedRefresh(2))
    other.load_state_dict(saved(optimizer))
    resumed[0].requires_grad_(True)
    run(optimizer, params, range(6, 10))
    run(other, resumed, range(6, 10))
    assert_same(params, resumed, 1e-12)


def test_state_tensors_are_the_live_ones_and_few_bytes_are_spent_on_them() -> None:
    params = parameters([(32, 48)], dtype=torch.float32)
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    entries = optimizer.state_dict()["state"][0]
    storages = {
        v.untyped_storage().data_ptr(): v.untyped_storage().nbytes() for v in entries.values()
    }
    blocks, side = 6, 16
    # two factors and two roots, momentum and second moment, in float32
    matrices = 4 * blocks * (4 * side**2 + 2 * side**2)
    # two weights (float32), four refresh counters and one guard counter (int64) per block
    scalars = blocks * (2 * 4 + 5 * 8)
    assert sum(storages.values()) == matrices + scalars


def test_a_state_loaded_in_evaluation_forgets_the_training_weights_of_before() -> None:
    """Those of the checkpoint are in the parameters; nothing is put back over them."""
    params = parameters()
    optimizer = optimizer_for(params, averaging=WeightEMA(0.9))
    run(optimizer, params, range(1, 4))
    state, weights = saved(optimizer), [p.detach().clone() for p in params]
    run(optimizer, params, range(4, 8))
    optimizer.eval()
    optimizer.load_state_dict(state)
    for parameter, weight in zip(params, weights, strict=True):
        parameter.data.copy_(weight)
    optimizer.train()
    assert_same(params, weights)
    assert not any("training_weights" in entries for entries in optimizer.state.values())


def test_a_state_of_a_longer_parameter_is_refused() -> None:
    """Its first blocks are of the same shapes as those here."""
    (longer,), (own,) = parameters([(32, 16)]), parameters([(16, 16)])
    optimizer = optimizer_for([longer])
    run(optimizer, [longer], range(1, 3))
    with pytest.raises(ValueError, match=r"does not fit: missing \[\], unknown \['block\.1\.0\."):
        optimizer_for([own]).load_state_dict(saved(optimizer))


def test_what_was_saved_as_a_description_is_not_loaded() -> None:
    """What schedulers keep in a group is, unless it is here of another type than in the checkpoint."""
    here = {"lr": 0.1, "step": 3, "warm": 2, "kept": torch.float32, "betas": (0.9, 0.99)}
    saved = {
        "lr": torch.tensor(0.2),
        "step": 7,
        "warm": 5,
        "new": [1],
        "kept": "torch.float32",
        "betas": [0.5, 0.5],
        "params": [0],
        "arrivals": [0],
    }
    found = changed_entries(here, ("betas",), saved)
    assert found == {"lr": torch.tensor(0.2), "step": 7, "warm": 5, "new": [1]}
    assert found["new"] is not saved["new"]
