"""State and groups in the hands of others: schedulers, torch's own helpers, users who edit them."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from quadratic import assert_same, optimizer_for, parameters, run
from test_state import saved
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.optim.lr_scheduler import CyclicLR, LambdaLR, LRScheduler, OneCycleLR
from torch.optim.swa_utils import SWALR

from shampoo_core import (
    AdamConfig,
    AdamGrafting,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    HeavyBall,
    ScheduleFree,
    SGDConfig,
    WeightEMA,
)
from shampoo_core.groups import facts

SCHEDULERS: dict[str, Callable[[DistributedShampoo], LRScheduler]] = {
    "one cycle": lambda o: OneCycleLR(o, max_lr=0.2, total_steps=12),
    "cyclic": lambda o: CyclicLR(o, base_lr=0.01, max_lr=0.1, step_size_up=3),
    "averaging": lambda o: SWALR(o, swa_lr=0.02, anneal_epochs=4),
}


def copies(params: list[torch.nn.Parameter]) -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(p.detach().clone()) for p in params]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_that_keep_numbers_in_a_group_can_be_resumed(name: str) -> None:
    params = parameters()
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    scheduler = SCHEDULERS[name](optimizer)
    for step in range(1, 5):
        run(optimizer, params, range(step, step + 1))
        scheduler.step()
    resumed = copies(params)
    other = optimizer_for(resumed, refresh=FixedRefresh(2))
    other_scheduler = SCHEDULERS[name](other)
    other.load_state_dict(saved(optimizer))
    other_scheduler.load_state_dict(scheduler.state_dict())
    for step in range(5, 9):
        run(optimizer, params, range(step, step + 1))
        run(other, resumed, range(step, step + 1))
        scheduler.step()
        other_scheduler.step()
        assert optimizer.param_groups[0]["lr"] == other.param_groups[0]["lr"]
    assert_same(params, resumed, 0.0)


def test_a_cycled_momentum_changes_nothing_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    params, plain = parameters(), parameters()
    optimizer, other = optimizer_for(params), optimizer_for(plain)
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=12)
    for step in range(1, 5):
        other.param_groups[0]["lr"] = optimizer.param_groups[0]["lr"]
        with caplog.at_level(logging.WARNING):
            run(optimizer, params, range(step, step + 1))
        run(other, plain, range(step, step + 1))
        scheduler.step()
    assert_same(params, plain, 0.0)
    assert optimizer.state_dict()["param_groups"][0]["betas"] == [0.9, 0.999]
    warnings = [record.getMessage() for record in caplog.records]
    assert len(warnings) == 1
    assert "betas of a parameter group was set to (0.95, 0.999) and stays (0.9" in warnings[0]
    assert "cycle_momentum=False" in warnings[0]


def test_a_scheduler_may_come_after_the_checkpoint_and_another_rate_may_be_given() -> None:
    params = parameters()
    optimizer = optimizer_for(params, lr=0.01, weight_decay_kind="corrected", weight_decay=0.1)
    run(optimizer, params, range(1, 4))
    other = optimizer_for(copies(params), lr=0.02, weight_decay_kind="corrected", weight_decay=0.1)
    OneCycleLR(other, max_lr=0.2, total_steps=12)
    other.load_state_dict(saved(optimizer))
    assert other.param_groups[0]["max_lr"] == 0.2
    assert (other.param_groups[0]["lr"], other.param_groups[0]["peak_lr"]) == (0.01, 0.01)


def test_the_rate_may_be_a_tensor() -> None:
    params, plain = parameters(), parameters()
    optimizer = optimizer_for(params, lr=torch.tensor(0.1, dtype=torch.float64))
    other = optimizer_for(plain, lr=0.1)
    run(optimizer, params, range(1, 4))
    run(other, plain, range(1, 4))
    assert_same(params, plain, 1e-15)
    assert optimizer.param_groups[0]["peak_lr"] == 0.1
    with pytest.raises(ValueError, match="lr must lie in"):
        optimizer_for(parameters(), lr=torch.tensor(-1.0))


@pytest.mark.parametrize("kind", ["decoupled", "corrected", "independent", "decoupled_after"])
@pytest.mark.parametrize("averaging", [None, HeavyBall(), ScheduleFree()])
def test_the_rate_may_be_a_tensor_with_a_dimension(kind: Any, averaging: Any) -> None:
    """As torch's optimizers take it."""
    params, plain = parameters(), parameters()
    options: dict[str, Any] = {
        "averaging": averaging,
        "weight_decay": 0.1,
        "weight_decay_kind": kind,
        "betas": (0.0, 0.99),
    }
    optimizer = optimizer_for(params, lr=torch.tensor([0.1], dtype=torch.float64), **options)
    other = optimizer_for(plain, lr=0.1, **options)
    run(optimizer, params, range(1, 4))
    run(other, plain, range(1, 4))
    assert_same(params, plain, 1e-14)


def test_a_state_taken_in_evaluation_keeps_the_training_weights() -> None:
    """As where a file is written later, by another thread."""
    params = parameters()
    optimizer = optimizer_for(params, averaging=WeightEMA(0.9, interval=1))
    run(optimizer, params, range(1, 4))
    optimizer.eval()
    evaluated, state = copies(params), optimizer.state_dict()
    optimizer.train()
    other = optimizer_for(evaluated, averaging=WeightEMA(0.9, interval=1))
    other.load_state_dict(state)
    other.train()
    assert_same(params, evaluated, 0.0)


def test_numbers_of_numpy_are_plain_in_a_file() -> None:
    params = parameters()
    optimizer = optimizer_for(params)
    scheduler = LambdaLR(optimizer, lambda step: np.cos(step / 100))
    run(optimizer, params, range(1, 3))
    scheduler.step()
    assert isinstance(optimizer.param_groups[0]["lr"], np.float64)
    optimizer.param_groups[0]["cycle"] = np.int64(3)  # as schedulers keep numbers in a group
    (group,) = saved(optimizer)["param_groups"]
    assert group["lr"] == optimizer.param_groups[0]["lr"]
    assert group["cycle"] == 3


def test_rates_in_tensors_are_compared_by_value() -> None:
    def said() -> dict[str, str]:
        return facts([{"params": [], "lr": torch.tensor(1e-3)}])

    before = said()
    torch.set_printoptions(precision=8)
    try:
        assert said() == before
    finally:
        torch.set_printoptions(profile="default")
    assert facts([{"params": [], "lr": torch.tensor(1.00001e-3)}]) != before


@pytest.mark.parametrize("flatten", [False, True])
def test_the_helpers_of_torch_bring_the_state_back(flatten: bool) -> None:
    def built() -> tuple[torch.nn.Module, DistributedShampoo]:
        torch.manual_seed(0)
        model = torch.nn.Sequential(torch.nn.Linear(12, 8), torch.nn.Linear(8, 4)).double()
        return model, optimizer_for(
            list(model.parameters()), refresh=FixedRefresh(2), averaging=WeightEMA(0.9)
        )

    options = StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = built()
    run(optimizer, list(model.parameters()), range(1, 4))
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))
    resumed, other = built()
    resumed.load_state_dict(model.state_dict())
    set_optimizer_state_dict(resumed, other, state, options=options)
    run(optimizer, list(model.parameters()), range(4, 8))
    run(other, list(resumed.parameters()), range(4, 8))
    assert_same(list(model.parameters()), list(resumed.parameters()), 0.0)


def test_hooks_of_loading_and_saving_are_called_once_each() -> None:
    params = parameters()
    optimizer = optimizer_for(params)
    run(optimizer, params, range(1, 3))
    state = saved(optimizer)
    calls: list[str] = []

    def with_other_rate(_: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        calls.append("before")
        groups = [{**group, "lr": 0.5} for group in state_dict["param_groups"]]
        return {**state_dict, "param_groups": groups}

    handle = optimizer.register_load_state_dict_pre_hook(with_other_rate)
    optimizer.register_load_state_dict_pre_hook(lambda *_: calls.append("first"), prepend=True)
    optimizer.register_load_state_dict_post_hook(lambda _: calls.append("after"))
    optimizer.register_state_dict_pre_hook(lambda _: calls.append("saving"))
    optimizer.load_state_dict(state)
    assert calls == ["first", "before", "after"]
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert state["param_groups"][0]["lr"] == 0.01
    handle.remove()
    optimizer.load_state_dict(state)
    assert optimizer.param_groups[0]["lr"] == 0.01


def test_hooks_behind_saving_are_given_a_complete_state_and_may_replace_it() -> None:
    params = parameters()
    optimizer = optimizer_for(params)
    run(optimizer, params, range(1, 3))
    given: list[set[str]] = []
    optimizer.register_state_dict_post_hook(lambda _, state: given.append(set(state)))
    handle = optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": "mine"})
    state = optimizer.state_dict()
    assert given == [{"state", "param_groups", "complete", "evaluates", "format_version"}]
    assert state["note"] == "mine"
    handle.remove()
    assert set(optimizer.state_dict()) == given[0]


def test_a_state_of_another_optimizer_is_refused() -> None:
    params = parameters()
    adamw = torch.optim.AdamW(params)
    run(adamw, params, range(1, 2))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="not a state of this optimizer: it has no evaluates"):
        optimizer_for(parameters()).load_state_dict(adamw.state_dict())


def test_a_refused_group_leaves_nothing_behind() -> None:
    params, late = parameters(), torch.nn.Parameter(torch.ones(4, 4, dtype=torch.float64))
    optimizer = optimizer_for(params, preconditioner=EigenvalueCorrectedConfig())
    with pytest.raises(ValueError, match="grafting must be None or 'auto'"):
        optimizer.add_param_group({"params": [late], "grafting": AdamGrafting()})
    assert len(optimizer.param_groups) == 1
    assert late not in optimizer.state
    run(optimizer, params, range(1, 3))
    optimizer.add_param_group({"params": [late]})
    run(optimizer, [*params, late], range(3, 5))
    assert late in optimizer.state


def test_a_tensor_that_is_there_twice_is_refused() -> None:
    (parameter,) = parameters([(4, 4)])
    with (
        pytest.raises(ValueError, match="parameters 0 and 2 of the group are the same tensor"),
        pytest.warns(UserWarning, match="duplicate"),
    ):
        optimizer_for([parameter, *parameters([(3, 3)]), parameter])


def remove_a_group(optimizer: DistributedShampoo) -> None:
    del optimizer.param_groups[0]


def replace_a_parameter(optimizer: DistributedShampoo) -> None:
    group = optimizer.param_groups[1]
    group["params"][0] = torch.nn.Parameter(group["params"][0].detach().clone())


def replace_a_group(optimizer: DistributedShampoo) -> None:
    optimizer.param_groups[0] = dict(optimizer.param_groups[0])


@pytest.mark.parametrize("edit", [remove_a_group, replace_a_parameter, replace_a_group])
def test_edited_groups_are_refused(edit: Callable[[DistributedShampoo], None]) -> None:
    first, second = parameters([(4, 4)]), parameters([(3, 3)])
    optimizer = optimizer_for(
        [
            {"params": first, "preconditioner": AdamConfig()},
            {"params": second, "preconditioner": SGDConfig()},
        ]
    )
    run(optimizer, first + second, range(1, 3))
    edit(optimizer)
    before = [p.detach().clone() for p in first + second]
    with pytest.raises(RuntimeError, match="was removed or replaced"):
        run(optimizer, first + second, range(3, 4))
    with pytest.raises(RuntimeError, match="was removed or replaced"):
        optimizer.state_dict()
    assert_same(first + second, before, 0.0)


def test_entries_of_state_that_were_replaced_or_cleared_are_those_of_the_engines_again() -> None:
    params, plain = parameters(), parameters()
    optimizer, other = optimizer_for(params), optimizer_for(plain)
    run(optimizer, params, range(1, 3))
    run(other, plain, range(1, 3))
    for entries in optimizer.state.values():
        for name, tensor in entries.items():
            entries[name] = torch.zeros_like(tensor)
    run(optimizer, params, range(3, 4))
    optimizer.state.clear()
    run(optimizer, params, range(4, 6))
    run(other, plain, range(3, 6))
    assert_same(params, plain, 0.0)
    own, expected = optimizer.state_dict()["state"], other.state_dict()["state"]
    assert own.keys() == expected.keys()
    for index, entries in expected.items():
        assert own[index].keys() == entries.keys()
        assert all(torch.equal(own[index][name], entries[name]) for name in entries)


@pytest.mark.parametrize("averaging", [None, ScheduleFree()])
def test_what_was_frozen_when_all_was_saved_starts_as_it_did_then(averaging: Any) -> None:
    """Resumed in a fresh optimizer where it is frozen no more, and rolled back behind its unfreezing."""
    options: dict[str, Any] = {"refresh": FixedRefresh(2), "averaging": averaging}
    if averaging is not None:
        options["betas"] = (0.0, 0.99)
    params = parameters()
    params[0].requires_grad_(False)
    optimizer = optimizer_for(params, **options)
    run(optimizer, params[1:], range(1, 4))
    state, weights = saved(optimizer), copies(params)
    params[0].requires_grad_(True)
    run(optimizer, params, range(4, 8))

    resumed = copies(weights)
    other = optimizer_for(resumed, **options)
    other.load_state_dict(state)
    run(other, resumed, range(4, 8))
    assert_same(params, resumed, 1e-12)

    with torch.no_grad():
        for parameter, weight in zip(resumed, weights, strict=True):
            parameter.copy_(weight)
    other.load_state_dict(state)
    run(other, resumed, range(4, 8))
    assert_same(params, resumed, 1e-12)


def test_a_state_of_before_any_step_starts_averages_of_parameters_that_came_late_here() -> None:
    params = parameters()
    options: dict[str, Any] = {"averaging": WeightEMA(0.9)}
    optimizer = optimizer_for(params, **options)
    resumed = parameters()
    resumed[0].requires_grad_(False)
    other = optimizer_for(resumed, **options)
    run(other, resumed[1:], range(1, 4))
    resumed[0].requires_grad_(True)
    run(other, resumed, range(4, 5))
    other.load_state_dict(saved(optimizer))
    with torch.no_grad():
        for parameter, origin in zip(resumed, params, strict=True):
            parameter.copy_(origin)
    for own, weights in ((optimizer, params), (other, resumed)):
        run(own, weights, range(1, 4))
        own.eval()
    assert_same(params, resumed, 1e-12)


def test_a_refused_state_allocates_nothing() -> None:
    params = parameters([(4, 4), (6, 3)])
    optimizer = optimizer_for(params)
    run(optimizer, params, range(1, 3))
    frozen = parameters([(4, 4), (6, 2)])
    frozen[0].requires_grad_(False)
    other = optimizer_for(frozen)
    before = saved(other)
    with pytest.raises(ValueError, match="parameter 1"):
        other.load_state_dict(saved(optimizer))
    assert saved(other)["state"].keys() == before["state"].keys()
    assert frozen[0] not in other.state


def test_a_replaced_parameter_is_neither_evaluated_nor_loaded() -> None:
    params = parameters([(4, 4), (3, 3)])
    optimizer = optimizer_for(params, averaging=WeightEMA(0.9))
    run(optimizer, params, range(1, 3))
    state = saved(optimizer)
    new = torch.nn.Parameter(params[0].detach().clone())
    optimizer.param_groups[0]["params"][0] = new
    before = [p.detach().clone() for p in (new, params[1])]
    with pytest.raises(RuntimeError, match="was removed or replaced"):
        optimizer.eval()
    with pytest.raises(RuntimeError, match="was removed or replaced"):
        optimizer.load_state_dict(state)
    assert_same([new, params[1]], before)


def test_objects_without_a_name_of_their_own_are_not_compared_by_address() -> None:
    """Ranks hold the same one at different places in memory."""

    class Kept:
        pass

    first, second = Kept(), Kept()
    assert repr(first) != repr(second)
    assert facts([{"params": [], "refresh": first}]) == facts([{"params": [], "refresh": second}])
