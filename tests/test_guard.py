"""Non-finite gradients: what is affected stays, is counted, and training goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quadratic import gradient, optimizer_for, parameters, run
from test_state import METHODS

from shampoo_core import (
    AdamConfig,
    EighSolver,
    FixedRefresh,
    KLShampooConfig,
    KLSOAPConfig,
    OrthogonalIterationSolver,
    PerFactorCorrectedConfig,
    RMSpropConfig,
    RMSpropGrafting,
    RowWiseAdaGradConfig,
    ShampooConfig,
    log_health,
)
from shampoo_core.gradients import GradientGuard, largest_gradient


def poison(params: list[torch.nn.Parameter], value: float) -> None:
    """One bad number in the first block of the first parameter."""
    for index, parameter in enumerate(params):
        parameter.grad = gradient(parameter, 5, index)
    params[0].grad[0, 0] = value  # type: ignore[index]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", METHODS)
def test_a_bad_block_stays_where_it_is_and_the_others_move(name: str, value: float) -> None:
    params = parameters()
    optimizer = optimizer_for(params, **METHODS[name])
    run(optimizer, params, range(1, 5))
    before = [parameter.detach().clone() for parameter in params]
    poison(params, value)
    optimizer.step()
    # (20, 30) is cut into 10 + 10 by 15 + 15.
    assert torch.equal(params[0][:10, :15], before[0][:10, :15])
    assert not torch.equal(params[0][10:, :15], before[0][10:, :15])
    assert all(not torch.equal(p, old) for p, old in zip(params[1:], before[1:], strict=True))
    run(optimizer, params, range(6, 14))
    assert not torch.equal(params[0][:10, :15], before[0][:10, :15])
    for parameter in params:
        assert torch.isfinite(parameter).all()
        for key, entry in optimizer.state[parameter].items():
            assert torch.isfinite(entry).all(), key
    counted = sum(
        int(entry)
        for parameter in params
        for key, entry in optimizer.state[parameter].items()
        if key.endswith("guard.non_finite")
    )
    assert counted == 1


def test_gradients_that_are_seen_to_be_good_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU, where one can look; a device masks all of them, to the same effect but for rounding."""
    ways = []
    for looks in (True, False):
        if not looks:
            monkeypatch.setattr(GradientGuard, "_are_seen_to_be_good", lambda *_: False)
        params = parameters()
        optimizer = optimizer_for(params, weight_decay=0.1, weight_decay_kind="l2")
        run(optimizer, params, range(1, 4))
        poison(params, float("inf"))
        params[3].grad = None  # l2 decay alone may not move it
        optimizer.step()
        run(optimizer, params, range(5, 7))
        ways.append(params)
    torch.testing.assert_close(*ways, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("missing", [(), (3, 6)])
def test_statistics_of_a_bad_block_keep_their_corrected_value(missing: tuple[int, ...]) -> None:
    """Whether or not other parameters have no gradient at all at that step."""
    params = parameters()
    optimizer = optimizer_for(params, betas=(0.9, 0.9), refresh=FixedRefresh(100))
    run(optimizer, params, range(1, 5))

    def corrected() -> dict[str, torch.Tensor]:
        state = {k: v for k, v in optimizer.state[params[0]].items() if k.startswith("block.0.0.")}
        second = state["block.0.0.grafting.weight"]
        return {
            "momentum": state["block.0.0.filter.average"] / state["block.0.0.filter.weight"],
            "second": state["block.0.0.grafting.average"] / second,
            "left": state["block.0.0.factors.axis0"] / second,
            "right": state["block.0.0.factors.axis1"] / second,
        }

    before = corrected()
    poison(params, float("nan"))
    for index in missing:
        params[index].grad = None
    optimizer.step()
    for key, value in corrected().items():
        torch.testing.assert_close(value, before[key], rtol=1e-12, atol=1e-14)


UNCORRECTED: dict[str, dict[str, Any]] = {
    "rmsprop": {"preconditioner": RMSpropConfig()},
    "grafted": {"grafting": RMSpropGrafting(), "refresh": FixedRefresh(3)},
    "shampoo": {"bias_correction": False, "refresh": FixedRefresh(3)},
    "adam": {"bias_correction": False, "preconditioner": AdamConfig()},
    "rows": {"bias_correction": False, "preconditioner": RowWiseAdaGradConfig(decay=0.9)},
}


@pytest.mark.parametrize("name", UNCORRECTED)
def test_averages_without_correction_are_left_as_they_were(name: str) -> None:
    """Of gradients that do not change, so that a corrected average beside them does not either."""
    options = {**UNCORRECTED[name], "betas": (0.9, 0.95), "weight_decay": 0.0}
    constant = gradient(*parameters([(6, 4)]), 1, 0)
    moved = []
    for num_bad in (0, 1, 30):
        params = parameters([(6, 4)])
        optimizer = optimizer_for(params, **options)
        for step in range(61 + num_bad):
            before = params[0].detach().clone()
            is_bad = 60 <= step < 60 + num_bad
            params[0].grad = torch.full_like(constant, torch.nan) if is_bad else constant.clone()
            optimizer.step()
        moved.append(params[0].detach() - before)
    for other in moved[1:]:
        torch.testing.assert_close(other, moved[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("solver", [EighSolver(), OrthogonalIterationSolver()])
def test_a_refresh_is_counted_once(solver: Any) -> None:
    """Also where roots are made in bases that have counters of their own."""
    params = parameters([(8, 8)])
    config = ShampooConfig(solver=solver)
    optimizer = optimizer_for(params, preconditioner=config, refresh=FixedRefresh(5, 1))
    run(optimizer, params, range(1, 3))
    assert log_health(optimizer).refreshes == 2


def test_without_a_finite_gradient_there_is_no_root_though_a_ridge_would_be_one() -> None:
    params = parameters([(6, 4), (5, 3)])
    config = ShampooConfig(ridge=1e-3)
    optimizer = optimizer_for(params, preconditioner=config, refresh=FixedRefresh(100, 1))
    poison(params, float("nan"))
    optimizer.step()
    for parameter, refreshes in zip(params, (0, 1), strict=True):
        state = optimizer.state[parameter]
        for axis in ("axis0", "axis1"):
            assert state[f"block.0.0.refreshes.{axis}"] == refreshes
            assert state[f"block.0.0.failures.{axis}"] == 0


def test_parameters_that_are_never_used_are_no_failures(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters([(8, 8), (8, 8)])
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    run(optimizer, params[:1], range(1, 9))
    assert log_health(optimizer).failed_refreshes == 0
    assert not caplog.records


def test_what_was_counted_is_reported_once(caplog: pytest.LogCaptureFixture) -> None:
    params = parameters()
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    run(optimizer, params, range(1, 5))
    first = log_health(optimizer)
    assert not caplog.records
    assert first.non_finite_gradients == first.failed_refreshes == 0
    # per refresh both sides of every matrix block; two refreshes so far
    assert first.refreshes == sum(
        int(value)
        for state in optimizer.state.values()
        for key, value in state.items()
        if ".refreshes." in key
    )
    assert first.refreshes > 0
    poison(params, float("nan"))
    optimizer.step()
    second = log_health(optimizer, first)
    assert second.since(first).non_finite_gradients == 1
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "sat out 1 steps" in caplog.text
    log_health(optimizer, second)
    assert len(caplog.records) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_squares_of_what_passes_can_be_summed(dtype: torch.dtype) -> None:
    largest = torch.tensor(largest_gradient(dtype), dtype=torch.float64)
    assert 1e6 * largest.square() < torch.finfo(dtype).max
    assert largest > 1e15


def test_a_gradient_too_large_to_be_squared_is_as_bad_as_infinity() -> None:
    """One gradient of 1e20 used to make the second moment infinite, and its block stand still for good."""
    params = parameters(dtype=torch.float32)
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    run(optimizer, params, range(1, 4))
    before = params[0].detach().clone()
    poison(params, 1e20)
    optimizer.step()
    assert torch.equal(params[0][:10, :15], before[:10, :15])
    run(optimizer, params, range(6, 10))
    assert not torch.equal(params[0][:10, :15], before[:10, :15])
    values = [v for state in optimizer.state.values() for v in state.values()]
    assert all(torch.isfinite(value).all() for value in values)


def test_everything_bad_changes_nothing() -> None:
    params = parameters()
    optimizer = optimizer_for(params, weight_decay=0.1)
    run(optimizer, params, range(1, 4))
    before = [parameter.detach().clone() for parameter in params]
    for parameter in params:
        parameter.grad = torch.full_like(parameter, float("nan"))
    optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))


def test_the_gradients_of_the_caller_are_not_touched() -> None:
    params = parameters()
    optimizer = optimizer_for(params, weight_decay_kind="l2")
    poison(params, float("nan"))
    before: list[Any] = [parameter.grad.clone() for parameter in params]  # type: ignore[union-attr]
    optimizer.step()
    for parameter, old in zip(params, before, strict=True):
        assert torch.equal(parameter.grad.nan_to_num(), old.nan_to_num())  # type: ignore[union-attr]


def test_hundreds_of_bad_steps_in_a_row_leave_a_usable_state() -> None:
    params = parameters([(4, 4), (3,)], dtype=torch.float32)
    optimizer = optimizer_for(params, refresh=FixedRefresh(50))
    run(optimizer, params, range(1, 3))
    before = [parameter.detach().clone() for parameter in params]
    for _ in range(1500):
        for parameter in params:
            parameter.grad = torch.full_like(parameter, float("nan"))
        optimizer.step()
    assert all(torch.equal(p, old) for p, old in zip(params, before, strict=True))
    run(optimizer, params, range(3, 6))
    assert all(torch.isfinite(parameter).all() for parameter in params)


@pytest.mark.parametrize("config", [KLShampooConfig(), KLSOAPConfig()])
def test_matrices_that_are_never_used_are_no_failures_beside_vectors(config: Any) -> None:
    """Which are stepped by Adam, apart from them."""
    params = parameters([(5,), (8, 8), (8, 8)])
    optimizer = optimizer_for(params, preconditioner=config, refresh=FixedRefresh(2))
    run(optimizer, params[:2], range(1, 9))
    health = log_health(optimizer)
    assert health.failed_refreshes == 0
    assert health.refreshes == 2 * 4


@pytest.mark.parametrize("name", METHODS)
def test_gradients_that_are_zero_are_no_failures(name: str) -> None:
    """As of a layer behind a weight that starts at zero."""
    params = parameters([(8, 8)])
    optimizer = optimizer_for(params, **{**METHODS[name], "refresh": FixedRefresh(2, start=1)})
    for _ in range(4):
        params[0].grad = torch.zeros_like(params[0])
        optimizer.step()
    health = log_health(optimizer)
    assert health.refreshes == health.failed_refreshes == 0
    run(optimizer, params, range(5, 9))
    health = log_health(optimizer)
    assert health.failed_refreshes == 0
    assert health.refreshes > 0 or not any(
        ".refreshes." in key for key in optimizer.state[params[0]]
    )


@pytest.mark.parametrize("make", [ShampooConfig, PerFactorCorrectedConfig])
def test_a_ridge_is_no_root_of_gradients_that_are_zero(make: Any) -> None:
    """It would be one of any length, for all gradients until the next refresh."""
    (weight,) = params = parameters([(8, 8)], dtype=torch.float32)
    config = make(ridge=1e-12)
    optimizer = optimizer_for(
        params, preconditioner=config, grafting=None, lr=1e-3, refresh=FixedRefresh(4, start=1)
    )
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    before = weight.detach().clone()
    run(optimizer, params, range(2, 4))
    assert (weight - before).abs().max() < 0.1
