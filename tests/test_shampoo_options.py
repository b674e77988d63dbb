"""Options of Shampoo, and weight decay, against one plain float64 matrix at a time."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference
import torch
from quadratic import gradient, optimizer_for, parameters

from shampoo_core import (
    AdaGradGrafting,
    AdaptiveRefresh,
    EighSolver,
    FixedRefresh,
    HeavyBall,
    NewtonDBSolver,
    OrthogonalIterationSolver,
    RMSpropGrafting,
    SGDGrafting,
    ShampooConfig,
)
from shampoo_core.blocking import tiles_of
from shampoo_core.preconditioners.axes import (
    SIDES,
    axes_with_factor,
    inverse_exponents,
    preconditioned_axes,
    root_limits,
)
from shampoo_core.refresh import FactorSlice
from shampoo_core.stacks import StackSet

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


@pytest.mark.parametrize("storage", ["dense", "packed"])
@pytest.mark.parametrize("missing", [(), (3, 4)])
@pytest.mark.parametrize("interval", [1, 3])
def test_corrected_factors_are_means_of_what_counted(
    interval: int, missing: tuple[int, ...], storage: Any
) -> None:
    """Divided by the weight of the gradients in them, not by that of the grafting method's."""
    shape = (6, 4, 3)
    params = parameters([shape, (5, 4, 3)])
    config = ShampooConfig(statistics_interval=interval, storage=storage)
    optimizer = optimizer_for(params, preconditioner=config, betas=(0.9, 0.8), target_order=None)
    (engine,) = optimizer._engines[0]
    factors = engine.preconditioner.factors
    sums, weight, decay = [np.zeros((d, d)) for d in shape], 0.0, 0.8**interval
    for step in range(1, 8):
        for index, parameter in enumerate(params):
            parameter.grad = gradient(parameter, step, index)
        if step == 1:
            params[1].grad = None  # its first one counts at step 2, and is nothing to the other
        if step in missing:
            params[0].grad = None
        elif step % interval == 1 % interval:
            assert params[0].grad is not None
            counted = params[0].grad.numpy().astype(np.float64)
            for axis, old in enumerate(sums):
                others = [other for other in range(3) if other != axis]
                gram = np.tensordot(counted, counted, axes=(others, others))
                sums[axis] = decay * old + (1 - decay) * gram
            weight = decay * weight + 1 - decay
        optimizer.step()
        found = factors.corrected([FactorSlice(axis, 0, 1) for axis in range(3)])
        for factor, expected in zip(found, sums, strict=True):
            np.testing.assert_allclose(factor[0], expected / weight, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sums", [True, False])
def test_factors_that_are_not_corrected_are_copied_for_the_solver(sums: bool) -> None:
    (parameter,) = parameters([(6, 4)])
    config = ShampooConfig(factor_decay=1.0 if sums else None)
    optimizer = optimizer_for([parameter], preconditioner=config, bias_correction=sums)
    parameter.grad = gradient(parameter, 1, 0)
    optimizer.step()
    factors = optimizer._engines[0][0].preconditioner.factors
    where = [FactorSlice(0, 0, 1)]
    factors.corrected(where)[0].zero_()
    torch.testing.assert_close(
        factors.corrected(where)[0][0], (1.0 if sums else 1e-3) * parameter.grad @ parameter.grad.T
    )


def test_a_test_of_eigenvectors_needs_a_solver_that_finds_them() -> None:
    with pytest.raises(ValueError, match=r"NewtonDBSolver.*use EighSolver"):
        optimizer_for(
            parameters([(4, 4)]),
            preconditioner=ShampooConfig(solver=NewtonDBSolver()),
            refresh=AdaptiveRefresh(4),
        )


@pytest.mark.parametrize(
    "options",
    [
        {"refresh": AdaptiveRefresh(5, 1)},
        {"refresh": FixedRefresh(5, 1), "solver": OrthogonalIterationSolver()},
    ],
)
@pytest.mark.parametrize("grafting", ["auto", None])
def test_roots_are_limited_in_whatever_basis_they_are_made(options: Any, grafting: Any) -> None:
    """At an exponent that makes numbers of a tiny gradient that float32 cannot hold."""

    def steps(refresh: Any, solver: Any = None) -> list[float]:
        parameter = torch.nn.Parameter(torch.zeros(8, 8))
        config = ShampooConfig(exponent=1.0, solver=EighSolver() if solver is None else solver)
        optimizer = optimizer_for(
            [parameter], preconditioner=config, refresh=refresh, grafting=grafting, weight_decay=0.0
        )
        generator = torch.Generator().manual_seed(0)
        lengths = []
        for _ in range(8):
            before = parameter.detach().clone()
            parameter.grad = torch.randn(8, 8, generator=generator) * 1e-10
            optimizer.step()
            lengths.append((parameter.detach() - before).norm().item())
        return lengths

    expected = steps(FixedRefresh(5, 1))
    for length, wanted in zip(steps(**options), expected, strict=True):
        assert 0.5 * wanted <= length <= 2.0 * wanted
    assert min(expected) > (1e-5 if grafting else 0.0)


@pytest.mark.parametrize("shape", [(4,), (4, 4), (4, 4, 4)])
def test_roots_at_their_limits_together_make_no_number_infinite(shape: tuple[int, ...]) -> None:
    """1.8e19, the root of float32's largest number, times as many roots as there are axes."""
    whole = StackSet(tiles_of(0, shape, 4), dtype=torch.float32, device=torch.device("cpu"))
    axes = preconditioned_axes(whole, precondition_vectors=True)
    largest = torch.finfo(torch.float32).max
    limits = root_limits(whole, axes, [1.0] * len(axes))
    assert len(limits) == len(shape)
    assert largest**0.5 * math.prod(limits) == pytest.approx(largest)
    by_themselves = root_limits(whole, axes, [0.5 / len(shape)] * len(axes))
    assert set(by_themselves) == {math.inf}


def test_one_side_has_its_own_exponent_in_blocks_with_axes_of_length_one() -> None:
    tiles = tiles_of(0, (100, 1025), 1024, "greedy")
    stack_set = StackSet(tiles, dtype=torch.float32, device=torch.device("cpu"))
    found = {}
    for sides in SIDES:
        axes = preconditioned_axes(stack_set, precondition_vectors=False, sides=sides)
        exponents = inverse_exponents(stack_set, axes, None, sides)
        shapes = [stack_set.layouts[axis.stack].block_shape for axis in axes]
        found[sides] = set(zip(shapes, exponents, strict=True))
    assert found["all"] == {((100, 1024), 0.25), ((100, 1), 0.25)}
    assert found["first"] == {((100, 1024), 0.5), ((100, 1), 0.5)}
    assert found["last"] == {((100, 1024), 0.5)}


@pytest.mark.parametrize(
    ("shape", "of_vectors", "expected"),
    [
        ((5,), False, []),
        ((5,), True, [0]),
        ((1,), True, [0]),
        ((1, 5), True, [1]),
        ((1, 1), True, []),
        ((4, 5), False, [0, 1]),
    ],
)
def test_an_axis_of_length_one_has_a_factor_only_where_it_is_all(
    shape: tuple[int, ...], of_vectors: bool, expected: list[int]
) -> None:
    assert axes_with_factor(shape, precondition_vectors=of_vectors) == expected
