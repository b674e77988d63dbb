"""Optimizers that are pickled or copied go on by themselves, with the same bits."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from quadratic import assert_same, optimizer_for, parameters, run
from test_state import saved
from test_state_by_others import copies
from torch.optim.lr_scheduler import OneCycleLR

import shampoo_core.refresh
from shampoo_core import (
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLSOAPConfig,
    OrthogonalIterationSolver,
    ShampooConfig,
    StaggeredRefresh,
    WeightEMA,
)


@pytest.mark.parametrize("averaging", [None, WeightEMA(0.9, interval=2)])
def test_an_unpickled_optimizer_goes_on_and_shows_its_own_state(averaging: Any) -> None:
    params = parameters()
    optimizer = optimizer_for(params, refresh=FixedRefresh(2), averaging=averaging)
    run(optimizer, params, range(1, 4))
    resumed, other = pickle.loads(pickle.dumps((params, optimizer)))
    run(optimizer, params, range(4, 8))
    run(other, resumed, range(4, 8))
    assert_same(params, resumed, 0.0)
    own, of_other = optimizer.state_dict()["state"], other.state_dict()["state"]
    for index, entries in own.items():
        for name, tensor in entries.items():
            assert torch.equal(tensor, of_other[index][name]), name
    # What is loaded reaches what steps.
    earlier, weights = saved(optimizer), copies(params)
    run(other, resumed, range(8, 10))
    other.load_state_dict(earlier)
    with torch.no_grad():
        for parameter, weight in zip(resumed, weights, strict=True):
            parameter.copy_(weight)
    run(optimizer, params, range(8, 12))
    run(other, resumed, range(8, 12))
    assert_same(params, resumed, 0.0)


def test_copies_have_no_hooks_of_the_original() -> None:
    """As those of torch's optimizers; hooks need not be picklable."""
    params = parameters([(4, 4)])
    optimizer = optimizer_for(params)
    called: list[torch.optim.Optimizer] = []
    optimizer.register_step_post_hook(lambda which, *_: called.append(which))
    optimizer.register_load_state_dict_post_hook(called.append)
    optimizer.register_state_dict_post_hook(lambda which, _: called.append(which))
    others = [copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    state = optimizer.state_dict()
    assert called == [optimizer]
    for other in others:
        other.load_state_dict(state)
        other.step()
        other.state_dict()
    assert called == [optimizer]
    optimizer.step()
    optimizer.load_state_dict(others[0].state_dict())
    assert called == [optimizer] * 3


@pytest.mark.usefixtures("small_shares")
@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_resumed_run_keeps_the_schedules_of_parameters_that_came_late(is_frozen: bool) -> None:
    """Each arrival has a schedule of its own; resumed with all of them trainable, or frozen again."""
    options: dict[str, Any] = {"refresh": StaggeredRefresh(4), "max_block_size": 5}
    params = parameters([(12, 10), (10, 12), (9, 9)])
    for parameter in params[1:]:
        parameter.requires_grad_(False)
    optimizer = optimizer_for(params, **options)
    run(optimizer, params[:1], range(1, 2))
    for late in (1, 2):
        params[late].requires_grad_(True)
        run(optimizer, params[: late + 1], range(late + 1, late + 2))
    state, resumed = copy.deepcopy(optimizer.state_dict()), copies(params)
    for parameter in resumed[1:]:
        parameter.requires_grad_(not is_frozen)
    other = optimizer_for(resumed, **options)
    other.load_state_dict(state)
    assert state["param_groups"][0]["arrivals"] == [0, 1, 2]
    for parameter in resumed:
        parameter.requires_grad_(True)
    run(optimizer, params, range(4, 14))
    run(other, resumed, range(4, 14))
    assert_same(params, resumed, 0.0)


@pytest.fixture
def small_shares(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The refreshes of small factors are spread too; schedules are cached, so that none may stay."""
    monkeypatch.setattr(shampoo_core.refresh, "SMALLEST_SHARE", 1.0)
    shampoo_core.refresh._stagger.cache_clear()
    yield
    shampoo_core.refresh._stagger.cache_clear()


@pytest.mark.parametrize(
    "config",
    [
        ShampooConfig(),
        ShampooConfig(solver=OrthogonalIterationSolver()),
        EigenvalueCorrectedConfig(solver=OrthogonalIterationSolver()),
        KLSOAPConfig(),
    ],
)
@pytest.mark.parametrize("at", [1, 2])
@pytest.mark.usefixtures("small_shares")
def test_pickled_before_all_factors_were_refreshed(config: Any, at: int) -> None:
    """What counts refreshes and what knows of them have memory in common, a copy's as well."""
    params = parameters()
    optimizer = optimizer_for(params, preconditioner=config, refresh=StaggeredRefresh(4))
    run(optimizer, params, range(1, at + 1))
    resumed, other = pickle.loads(pickle.dumps((params, optimizer)))
    run(optimizer, params, range(at + 1, 12))
    run(other, resumed, range(at + 1, 12))
    assert_same(params, resumed, 0.0)


@pytest.mark.parametrize(
    "copied", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"]
)
def test_a_copy_of_a_scheduled_optimizer_steps_itself(copied: Callable[[Any], Any]) -> None:
    """Schedulers put a step() into the instance, which refers to it."""
    params = parameters()
    optimizer = optimizer_for(params, refresh=FixedRefresh(2))
    scheduler = OneCycleLR(optimizer, max_lr=0.2, total_steps=12)
    run(optimizer, params, range(1, 3))
    scheduler.step()
    own, other = copied((params, optimizer))
    weights = copies(params)
    run(other, own, range(3, 6))
    assert_same(params, weights, 0.0)
    assert optimizer.param_groups[0]["step"] == 2
    run(optimizer, params, range(3, 6))
    assert_same(params, own, 0.0)
