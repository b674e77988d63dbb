"""Momentum and averaging against the references; which weights are trained and which evaluated."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import reference
import torch
from quadratic import assert_same, gradient, optimizer_for, parameters, run
from test_state import saved

from shampoo_core import (
    AdamConfig,
    FixedRefresh,
    HeavyBall,
    LatestWeightAverage,
    PrimalAveraging,
    ScheduleFree,
    ShampooConfig,
    WeightEMA,
)

AVERAGING: dict[str, Any] = {
    "schedule-free": ScheduleFree(),
    "primal": PrimalAveraging(),
    "ema": WeightEMA(0.8, interval=2),
    "latest": LatestWeightAverage(3, interval=1),
}
SHAMPOO: dict[str, Any] = {"lr": 0.05, "betas": (0.9, 0.95), "eps": 1e-9, "weight_decay": 0.1}


def plain(parameter: torch.Tensor, **changes: Any) -> reference.Shampoo:
    options = {**SHAMPOO, "eps": 0.0, "grafting": "adam", "grafting_beta2": 0.95, **changes}
    return reference.Shampoo(
        parameter.detach().numpy(), interval=3, start=4, ridge="truncate", rtol=1e-9,
        grafting_eps=1e-9, **options,
    )  # fmt: skip


def ours(parameter: torch.nn.Parameter, **changes: Any) -> Any:
    options = {**SHAMPOO, "max_block_size": 64, **changes}
    return optimizer_for(
        [parameter],
        refresh=FixedRefresh(3, 4),
        preconditioner=ShampooConfig(rank_tolerance=1e-9),
        **options,
    )


def rates(step: int) -> float:
    return 0.05 * min(1.0, step / 5)


def compare(ours_: Any, parameter: torch.nn.Parameter, oracle: Any, steps: int = 25) -> None:
    for step in range(1, steps + 1):
        parameter.grad = gradient(parameter, step, 0)
        ours_.param_groups[0]["lr"] = rates(step)
        ours_.step()
        oracle.step(parameter.grad.numpy(), rates(step))
    np.testing.assert_allclose(parameter.detach().numpy(), oracle.parameter, rtol=0, atol=1e-9)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dampening", [0.0, 0.9])
def test_heavy_ball_follows_the_reference(nesterov: bool, dampening: float) -> None:
    (parameter,) = parameters([(6, 9)])
    oracle = plain(parameter, momentum=0.9, dampening=dampening, nesterov=nesterov)
    compare(ours(parameter, averaging=HeavyBall(0.9, dampening, nesterov)), parameter, oracle)


@pytest.mark.parametrize("decay_at", ["y", "z", "z_holding_y"])
@pytest.mark.parametrize("step_power", [0.0, 1.0])
def test_schedule_free_follows_the_reference(decay_at: str, step_power: float) -> None:
    (parameter,) = parameters([(6, 9)])
    base = plain(parameter, betas=(0.0, 0.95))
    oracle = reference.ScheduleFree(base, weight_r=step_power, decay_at=decay_at)
    rule = ScheduleFree(step_power=step_power, decay_at=decay_at)
    optimizer = ours(parameter, betas=(0.0, 0.95), averaging=rule)
    compare(optimizer, parameter, oracle)
    optimizer.eval()
    np.testing.assert_allclose(parameter.detach().numpy(), oracle.evaluation, rtol=0, atol=1e-9)


@pytest.mark.parametrize("decay_at", ["y", "z", "z_holding_y"])
def test_primal_averaging_follows_the_reference(decay_at: str) -> None:
    (parameter,) = parameters([(6, 9)])
    oracle = reference.PrimalAveraging(plain(parameter), decay_at=decay_at)
    optimizer = ours(parameter, averaging=PrimalAveraging(decay_at=decay_at))
    compare(optimizer, parameter, oracle)
    optimizer.eval()
    np.testing.assert_allclose(parameter.detach().numpy(), oracle.evaluation, rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["ema", "latest"])
@pytest.mark.parametrize("steps", [2, 8, 20])
def test_weight_averages_follow_the_reference_and_training_does_not_notice(
    kind: str, steps: int
) -> None:
    (averaged,), (alone,) = parameters([(6, 9)]), parameters([(6, 9)])
    oracle: Any = reference.LatestWeightAverage(length=4, every=3)
    rule: Any = LatestWeightAverage(4, interval=3)
    if kind == "ema":
        oracle = reference.WeightEMA(averaged.detach().numpy(), beta=0.8, every=3)
        rule = WeightEMA(0.8, interval=3)
    optimizer = ours(averaged, averaging=rule)
    other = ours(alone)
    expected = averaged.detach().numpy().copy()
    for step in range(1, steps + 1):
        averaged.grad = gradient(averaged, step, 0)
        alone.grad = gradient(alone, step, 0)
        optimizer.step()
        other.step()
        expected = oracle.update(averaged.detach().numpy())
    assert_same([averaged], [alone], 1e-12)
    optimizer.eval()
    np.testing.assert_allclose(averaged.detach().numpy(), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("name", AVERAGING)
def test_evaluating_in_between_changes_nothing(name: str) -> None:
    options = {"averaging": AVERAGING[name], "refresh": FixedRefresh(3)}
    straight, interrupted = parameters(), parameters()
    first, second = optimizer_for(straight, **options), optimizer_for(interrupted, **options)
    run(first, straight, range(1, 13))
    for step in range(1, 13):
        run(second, interrupted, range(step, step + 1))
        training = [parameter.detach().clone() for parameter in interrupted]
        second.eval()
        evaluated = [parameter.detach().clone() for parameter in interrupted]
        second.eval()
        assert_same(interrupted, evaluated)
        second.train()
        second.train()
        assert_same(interrupted, training)
        assert step < 2 or not torch.equal(training[0], evaluated[0])
    assert_same(straight, interrupted)


@pytest.mark.parametrize("name", AVERAGING)
def test_a_checkpoint_taken_in_evaluation_resumes_from_the_training_weights(name: str) -> None:
    options = {"averaging": AVERAGING[name], "refresh": FixedRefresh(3)}
    params = parameters()
    optimizer = optimizer_for(params, **options)
    run(optimizer, params, range(1, 6))
    optimizer.eval()
    state = saved(optimizer)
    resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in params]
    other = optimizer_for(resumed, **options)
    other.load_state_dict(state)
    for each, weights in ((optimizer, params), (other, resumed)):
        each.train()
        run(each, weights, range(6, 10))
    assert_same(params, resumed)


@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("name", AVERAGING)
def test_a_resumed_run_evaluates_the_same_weights(name: str, late: bool) -> None:
    """All that an average consists of is saved, at whichever of its copies it is."""
    options = {"averaging": AVERAGING[name], "refresh": FixedRefresh(3)}
    params = parameters([(20, 30), (7,)])
    params[1].requires_grad_(not late)
    optimizer = optimizer_for(params, **options)
    for step in range(1, 9):
        if step == 3:
            params[1].requires_grad_(True)
        used = [parameter for parameter in params if parameter.requires_grad]
        run(optimizer, used, range(step, step + 1))
        resumed = [torch.nn.Parameter(parameter.detach().clone()) for parameter in params]
        other = optimizer_for(resumed, **options)
        if step < 3 and late:
            continue
        other.load_state_dict(saved(optimizer))
        for more in (0, 2):
            here, there = copy.deepcopy((params, optimizer)), (resumed, other)
            for weights, one in (here, there):
                one.train()
                run(one, weights, range(step + 1, step + 1 + more))
                one.eval()
            assert_same(here[0], there[0])


def test_a_step_on_evaluated_weights_is_refused() -> None:
    params = parameters([(4, 4)])
    optimizer = optimizer_for(params, averaging=ScheduleFree())
    run(optimizer, params, range(1, 3))
    optimizer.eval()
    with pytest.raises(RuntimeError, match=r"call optimizer\.train\(\) before the next step"):
        run(optimizer, params, range(3, 4))


def test_without_averaging_evaluation_costs_nothing() -> None:
    params = parameters([(4, 4)])
    optimizer = optimizer_for(params)
    run(optimizer, params, range(1, 3))
    before, names = params[0].detach().clone(), set(optimizer.state[params[0]])
    optimizer.eval()
    assert torch.equal(params[0], before)
    assert set(optimizer.state[params[0]]) == names


@pytest.mark.parametrize("averaging", [ScheduleFree(), PrimalAveraging(), WeightEMA(0.9)])
def test_weights_too_coarse_to_be_extrapolated_are_warned_of(
    averaging: Any, caplog: pytest.LogCaptureFixture
) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        caplog.clear()
        optimizer_for(parameters([(4, 4)], dtype=dtype), averaging=averaging, betas=(0.0, 0.9))
        is_warned = dtype == torch.bfloat16 and not isinstance(averaging, WeightEMA)
        assert ("torch.bfloat16" in caplog.text) == is_warned


@pytest.mark.parametrize(
    "averaging",
    [
        HeavyBall(0.9),
        HeavyBall(0.8, dampening=0.5, nesterov=True),
        ScheduleFree(step_power=1.0),
        ScheduleFree(decay_at="z_holding_y"),
        PrimalAveraging(),
    ],
)
def test_steps_without_a_gradient_do_not_count(averaging: Any) -> None:
    """Rates of these, the largest of all, neither: as in an optimizer that is not called then."""
    options: dict[str, Any] = {"averaging": averaging, "betas": (0.0, 0.9), "weight_decay": 0.1}
    params, alone = parameters([(6, 4), (3,)]), parameters([(6, 4)])
    options["preconditioner"] = AdamConfig()
    optimizer, other = optimizer_for(params, **options), optimizer_for(alone, **options)
    for step in range(1, 10):
        is_missing = step in (3, 4, 7)
        rate = 0.5 if is_missing else 0.05 / step
        optimizer.param_groups[0]["lr"] = other.param_groups[0]["lr"] = rate
        grad = gradient(params[0], step, 0)
        params[0].grad = None if is_missing else grad
        params[1].grad = gradient(params[1], step, 1)
        optimizer.step()
        if not is_missing:
            alone[0].grad = grad.clone()
            other.step()
        assert_same(params[:1], alone, 1e-13)
    optimizer.eval()
    other.eval()
    assert_same(params[:1], alone, 1e-13)


@pytest.mark.parametrize("name", AVERAGING)
def test_a_parameter_that_was_never_stepped_is_evaluated_as_it_is(name: str) -> None:
    params = parameters([(6, 4), (3,)])
    optimizer = optimizer_for(params, averaging=AVERAGING[name], betas=(0.0, 0.9))
    before = [parameter.detach().clone() for parameter in params]
    optimizer.eval()
    assert_same(params, before)
    optimizer.train()
    run(optimizer, params[:1], range(1, 5))
    optimizer.eval()
    assert_same(params[1:], before[1:])


def test_all_of_a_schedule_free_average_is_saved() -> None:
    """Weights of steps hang on their number and on the largest rate of all."""
    options: dict[str, Any] = {"averaging": ScheduleFree(step_power=1.0), "betas": (0.0, 0.9)}
    params, resumed = parameters([(6, 4)]), parameters([(6, 4)])
    optimizer, other = optimizer_for(params, **options), optimizer_for(resumed, **options)
    optimizer.param_groups[0]["lr"] = 0.5
    run(optimizer, params, range(1, 5))
    other.load_state_dict(saved(optimizer))
    resumed[0].data.copy_(params[0])
    for own, weights in ((optimizer, params), (other, resumed)):
        own.param_groups[0]["lr"] = 0.01
        run(own, weights, range(5, 8))
        own.eval()
    assert_same(params, resumed)
