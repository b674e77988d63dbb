"""Whose state a checkpoint has: what is missing is refused, what is frozen may be; status and copies."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from quadratic import gradient, optimizer_for, parameters, run
from test_state import saved
from torch.distributed.checkpoint.state_dict import (
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)

from shampoo_core import WeightEMA


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda state: state.clear(), "missing"),
        (lambda state: state.pop(0), "missing"),
        (
            lambda state: state.update({"0": state.pop(0)}),
            "state of '0', which is the number of no",
        ),
        (lambda state: state.update({99: {}}), "state of 99, which is the number of no"),
    ],
)
def test_a_state_without_that_of_a_parameter_is_refused(
    edit: Callable[[dict[Any, Any]], Any], message: str
) -> None:
    params = parameters([(4, 4), (3,)])
    optimizer = optimizer_for(params)
    run(optimizer, params, range(1, 3))
    state = saved(optimizer)
    edit(state["state"])
    with pytest.raises(ValueError, match=message):
        optimizer_for(parameters([(4, 4), (3,)])).load_state_dict(state)


@pytest.mark.parametrize("step", [None, -1, "3"])
def test_a_step_that_cannot_be_is_refused_before_anything_is_changed(step: Any) -> None:
    saved, loading = parameters([(4, 4)]), parameters([(4, 4)])
    run(optimizer := optimizer_for(saved), saved, range(1, 4))
    state = optimizer.state_dict()
    if step is None:
        del state["param_groups"][0]["step"]
    else:
        state["param_groups"][0]["step"] = step
    other = optimizer_for(loading)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=f"step of group 0 .* got {step!r}"):
        other.load_state_dict(state)
    after = other.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for name, tensor in before["state"][0].items():
        assert torch.equal(after["state"][0][name], tensor), name


@pytest.mark.parametrize("arrivals", [[0], [0, -2], [[0], [1]], [0, 0, 1]])
def test_arrivals_that_cannot_be_are_refused(arrivals: Any) -> None:
    optimizer = optimizer_for(parameters([(4, 4), (3,)]))
    state = saved(optimizer)
    state["param_groups"][0]["arrivals"] = arrivals
    with pytest.raises(ValueError, match="arrivals of group 0"):
        optimizer.load_state_dict(state)


def test_arrivals_are_numbered_in_the_order_of_allocation() -> None:
    params = parameters([(4, 4), (3,), (2, 5)])
    for parameter in params[1:]:
        parameter.requires_grad_(False)
    optimizer = optimizer_for(params)
    (group,) = optimizer.param_groups
    assert group["arrivals"] == [0, -1, -1]
    for step, (come, expected) in enumerate([([0, 2], [0, -1, 1]), ([0, 1, 2], [0, 2, 1])], 1):
        for index in come:
            params[index].requires_grad_()
            params[index].grad = gradient(params[index], step, index)
        optimizer.step()
        assert group["arrivals"] == expected
        assert [engine.stack_set.parameters for engine in optimizer._engines[0]] == [
            [expected.index(number)] for number in range(max(expected) + 1)
        ]


def test_a_wrapper_that_shares_attributes_shares_the_status() -> None:
    """As those of Lightning and Fabric do: an instance of a class made for the occasion."""
    params = parameters([(4, 4), (3,)])
    optimizer = optimizer_for(params, averaging=WeightEMA(0.9))
    wrapper = object.__new__(type("Wrapper", (type(optimizer),), {}))
    wrapper.__dict__.update(optimizer.__dict__)
    run(optimizer, params, range(1, 3))
    wrapper.eval()
    assert optimizer.state_dict()["evaluates"]
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        optimizer.step()
    wrapper.train()
    optimizer.step()


def test_what_is_loaded_is_a_copy() -> None:
    """Schedulers change a rate that is a tensor in place."""
    params = parameters([(4, 4)])
    optimizer = optimizer_for(params, lr=torch.tensor(0.1))
    state = saved(optimizer)
    for _ in range(2):
        optimizer.load_state_dict(state)
        optimizer.param_groups[0]["lr"].mul_(0.5)
    assert optimizer.param_groups[0]["lr"] == 0.05
    assert state["param_groups"][0]["lr"] == pytest.approx(0.1)


def test_helpers_of_torch_leave_out_what_is_frozen() -> None:
    """A layer that was trained before: nothing of it is there to load, and nothing is asked for."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4))
    optimizer = optimizer_for(list(model.parameters()))
    run(optimizer, list(model.parameters()), range(1, 3))
    model[0].requires_grad_(False)
    state = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    set_optimizer_state_dict(model, optimizer, state)
    assert optimizer.param_groups[0]["arrivals"] == [-1, -1, 0, 0]
    run(optimizer, list(model[1].parameters()), range(3, 5))
