"""Options of Shampoo, and weight decay, against one plain float64 matrix at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
from quadratic import gradient, optimizer_for, parameters

from shampoo_core import (
    AdaGradGrafting,
    AdaptiveRefresh,
    FixedRefresh,
    HeavyBall,
    NewtonDBSolver,
    RMSpropGrafting,
    SGDGrafting,
    ShampooConfig,
)

SHAPE = (12, 9)
TRUNCATED: dict[str, Any] = {"ridge": "truncate", "rtol": 1e-9, "eps": 0.0}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sum": ({"factor_decay": 1.0}, {"betas": (0.9, 1.0)}),
    "trace scaling": ({"trace_scaling": 0.5}, {"trace_scaling": 0.5}),
    "one exponent": ({"exponent": 0.4}, {"exponent": 0.4}),
    "exponent per order": ({"exponent": {2: 0.5, 3: 1.0}}, {"exponent": 0.5}),
}
GRAFTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sgd": (SGDGrafting(), {"grafting": "sgd"}),
    "adagrad": (AdaGradGrafting(1e-8), {"grafting": "adagrad", "grafting_eps": 1e-8}),
    "rmsprop": (
        RMSpropGrafting(0.97, 1e-8),
        {"grafting": "rmsprop", "grafting_beta2": 0.97, "grafting_eps": 1e-8},
    ),
}


def compare(ours: dict[str, Any], theirs: dict[str, Any], *, steps: int = 15) -> None:
    """Step both with the same gradients and a learning rate that falls."""
    (parameter,) = parameters([SHAPE])
    options = {"lr": 0.02, "betas": (0.9, 0.95)}
    optimizer = optimizer_for(
        [parameter], **{"refresh": FixedRefresh(3), "weight_decay": 0.0, **options, **ours}
    )
    plain = reference.Shampoo(
        parameter.detach().numpy().copy(), **{**TRUNCATED, "interval": 3, **options, **theirs}
    )
    for step in range(1, steps + 1):
        lr = 0.02 / step
        optimizer.param_groups[0]["lr"] = plain.lr = lr
        parameter.grad = gradient(parameter, step, 0)
        plain.step(parameter.grad.numpy())
        optimizer.step()
    np.testing.assert_allclose(parameter.detach().numpy(), plain.parameter, rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", CASES)
def test_options_of_factors_and_roots(name: str) -> None:
    ours, theirs = CASES[name]
    config = ShampooConfig(rank_tolerance=1e-9, **ours)
    compare({"preconditioner": config, "grafting": None}, {"grafting": None, **theirs})


@pytest.mark.parametrize("name", GRAFTS)
def test_every_graft(name: str) -> None:
    graft, theirs = GRAFTS[name]
    compare({"preconditioner": ShampooConfig(rank_tolerance=1e-9), "grafting": graft}, theirs)


@pytest.mark.parametrize("kind", ["l2", "decoupled", "corrected", "independent"])
@pytest.mark.parametrize("momentum", [0.0, 0.8])
def test_every_weight_decay_with_a_falling_learning_rate(kind: Any, momentum: float) -> None:
    averaging = HeavyBall(momentum, dampening=0.3, nesterov=True) if momentum else None
    theirs: dict[str, Any] = {"weight_decay": 0.1, "weight_decay_type": kind, "grafting": "sgd"}
    if momentum:
        theirs.update(momentum=momentum, dampening=0.3, nesterov=True)
    compare(
        {
            "preconditioner": ShampooConfig(rank_tolerance=1e-9),
            "grafting": SGDGrafting(),
            "weight_decay": 0.1,
            "weight_decay_kind": kind,
            "averaging": averaging,
        },
        theirs,
    )


def test_statistics_of_every_third_step_weigh_what_three_steps_would() -> None:
    """The same gradient three times in a row: looking once is looking three times."""
    ends = []
    for interval in (1, 3):
        (parameter,) = parameters([SHAPE])
        config = ShampooConfig(rank_tolerance=1e-9, statistics_interval=interval)
        optimizer = optimizer_for(
            [parameter], preconditioner=config, grafting=None, refresh=FixedRefresh(3, start=3)
        )
        for step in range(12):
            parameter.grad = gradient(parameters([SHAPE])[0], step // 3, 0)
            optimizer.step()
        ends.append(parameter.detach().numpy())
    np.testing.assert_allclose(ends[1], ends[0], rtol=0, atol=1e-9)


def test_a_test_of_eigenvectors_needs_a_solver_that_finds_them() -> None:
    with pytest.raises(ValueError, match=r"NewtonDBSolver.*use EighSolver"):
        optimizer_for(
            parameters([(4, 4)]),
            preconditioner=ShampooConfig(solver=NewtonDBSolver()),
            refresh=AdaptiveRefresh(4),
        )
