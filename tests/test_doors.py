"""What the optimizer and its configurations refuse before training starts, and how they say it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from quadratic import optimizer_for, parameters, run

import shampoo_core
from shampoo_core import (
    AdamConfig,
    AdamGrafting,
    CoupledNewtonSolver,
    DistributedShampoo,
    Distribution,
    EigenvalueCorrectedConfig,
    EighSolver,
    FixedRefresh,
    HeavyBall,
    KLShampooConfig,
    LatestWeightAverage,
    NewtonDBSolver,
    PerFactorCorrectedConfig,
    PrimalAveraging,
    ScheduleFree,
    ShampooConfig,
    SpectralConfig,
    StaggeredRefresh,
    WeightEMA,
    health_report,
)

NONE: Any = None


@pytest.mark.parametrize("config", [ShampooConfig, PerFactorCorrectedConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank_tolerance": 1e-6, "ridge": 1e-12}, r"rank_tolerance=1e-06 .* give one of them"),
        ({"rank_tolerance": 0.0, "relative_ridge": 1e-12}, r".*relative_ridge=1e-12: .* give one"),
        ({"rank_tolerance": 1.0}, r"rank_tolerance must lie in \[0.0, 1.0\), got 1.0"),
        ({"ridge": float("inf")}, r"ridge must lie in \[0.0, inf\), got inf"),
        ({"exponent": float("inf")}, r"exponent must lie in \(0.0, inf\), got inf"),
    ],
)
def test_numbers_that_a_solver_would_refuse_at_the_first_refresh(
    config: Any, options: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=f"{config.__name__}: {message}"):
        config(**options)


@pytest.mark.parametrize(
    ("solver", "exponent", "message"),
    [
        (NewtonDBSolver(), 1 / 3, r"ShampooConfig: solver=NewtonDBSolver\(.*q/2\^k .* got 0.33"),
        (NewtonDBSolver(), {2: 0.25, 3: 1 / 6}, r"got 0.166\d* = 1/6; use CoupledNewtonSolver"),
        (CoupledNewtonSolver(), 0.2512345, r"q/p with p <= 32 .* use EighSolver"),
    ],
)
def test_exponents_that_a_solver_cannot_do(solver: Any, exponent: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ShampooConfig(solver=solver, exponent=exponent)


def test_a_default_exponent_that_a_solver_cannot_do_is_found_in_the_shapes() -> None:
    """Two sides take fourth roots, three take sixth roots."""
    config = ShampooConfig(solver=NewtonDBSolver())
    kernel = parameters([(4, 5, 3)])
    with pytest.raises(ValueError, match=r"q/2\^k.* blocks \(4, 5, 3\); a smaller target_order"):
        optimizer_for(kernel, preconditioner=config, target_order=None)
    shapes = [(4, 5, 3), (7,), ()]
    for solver, order in ((NewtonDBSolver(), 2), (EighSolver(), None)):
        params = parameters(shapes, dtype=torch.float32)
        optimizer = optimizer_for(
            params,
            preconditioner=ShampooConfig(solver=solver),
            target_order=order,
            refresh=FixedRefresh(1),
        )
        run(optimizer, params, range(1, 3))


def test_vectors_without_a_factor_need_no_root() -> None:
    config = ShampooConfig(solver=NewtonDBSolver(), max_factor_dimension=2)
    optimizer_for(parameters([(3, 3, 3), (7,)]), preconditioner=config, target_order=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ShampooConfig(solver="eigh"), "such as EighSolver"),
        (lambda: EigenvalueCorrectedConfig(solver="eigh"), "computes eigenbases, .* got 'eigh'"),
        (lambda: EigenvalueCorrectedConfig(solver=CoupledNewtonSolver()), "got CoupledNewton"),
        (lambda: KLShampooConfig(solver=NewtonDBSolver()), "computes eigenbases, .* got NewtonDB"),
        (lambda: PerFactorCorrectedConfig(solver=NewtonDBSolver()), "eigenbases, .* got NewtonDB"),
        (lambda: ShampooConfig(solver=EighSolver), "solver: got the class EighSolver; give an i"),
        (lambda: KLShampooConfig(solver=EighSolver), r"give an instance, EighSolver\(...\)"),
        (lambda: FixedRefresh(NONE), "interval must be a whole number, got None"),
        (lambda: StaggeredRefresh(NONE), "interval must be a whole number, got None"),
        (lambda: FixedRefresh(start="1"), "start must be a whole number or None, got '1'"),
        (lambda: WeightEMA(interval=NONE), "interval must be a whole number, got None"),
        (lambda: LatestWeightAverage(2, NONE), "interval must be a whole number, got None"),
        (lambda: ShampooConfig(statistics_interval=NONE), "statistics_interval must be a whole"),
        (lambda: SpectralConfig(num_iterations=NONE), "num_iterations must be a whole number"),
    ],
)
def test_what_is_of_the_wrong_kind(make: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        make()


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (config, option.name)
        for config in (getattr(shampoo_core, name) for name in shampoo_core.__all__)
        if isinstance(config, type) and dataclasses.is_dataclass(config)
        for option in dataclasses.fields(config)
        if isinstance(option.default, bool)
    ],
)
def test_flags_are_true_or_false(config: Any, name: str) -> None:
    """The text "False", as of a command line, would count as true."""
    for given in (1, "False", None):
        message = f"{config.__name__}: {name} must be True or False, got {given!r}"
        with pytest.raises(TypeError, match=message):
            config(**{name: given})
    for given in (True, False):
        assert getattr(config(**{name: given}), name) is given


@pytest.mark.parametrize("dtype", ["bfloat16", torch.int32, torch.complex64])
def test_products_have_a_floating_dtype(dtype: Any) -> None:
    with pytest.raises(ValueError, match=r"SpectralConfig: product_dtype must be one of \[None, "):
        SpectralConfig(product_dtype=dtype)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"refresh": FixedRefresh}, "refresh: got the class FixedRefresh; give an instance, Fixed"),
        ({"preconditioner": ShampooConfig}, "give an instance, ShampooConfig(...)"),
        ({"averaging": WeightEMA}, "averaging: got the class WeightEMA"),
        ({"grafting": AdamGrafting}, "grafting: got the class AdamGrafting"),
        ({"grafting": "adam"}, "grafting must be one of the graftings"),
        ({"grafting": AdamConfig()}, "grafting must be one of the graftings"),
        ({"grafting": WeightEMA()}, "grafting must be one of the graftings"),
        ({"averaging": AdamGrafting()}, "averaging must be one of the averagings"),
        ({"preconditioner": AdamGrafting()}, "preconditioner must be one of the methods"),
        ({"preconditioner": WeightEMA()}, "preconditioner must be one of the methods"),
        ({"bias_correction": "no"}, "bias_correction must be True or False, got 'no'"),
        ({"bias_correction": None}, "bias_correction must be True or False, got None"),
    ],
)
def test_options_of_the_wrong_kind(options: dict[str, Any], message: str) -> None:
    with pytest.raises(TypeError) as caught:
        DistributedShampoo(parameters(), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("kind", ["corrected", "independent"])
def test_decay_in_units_of_the_peak_rate_needs_one(kind: Any) -> None:
    message = rf"{kind!r} with weight_decay=0.01 divides .* lr=0.0; construct with the peak rate"
    with pytest.raises(ValueError, match=message):
        optimizer_for(parameters(), lr=0.0, weight_decay=0.01, weight_decay_kind=kind)
    params = parameters()
    optimizer = optimizer_for(params, lr=0.0, weight_decay=0.0, weight_decay_kind=kind)
    run(optimizer, params, range(1, 2))
    optimizer.param_groups[0]["weight_decay"] = 0.01
    with pytest.raises(ValueError, match=message):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"betas": (0.9, 1.5)}, ValueError, r"betas\[1\] must lie in \[0.0, 1.0\], got 1.5"),
        ({"beta3": 1.0}, ValueError, r"beta3 must lie in \[0.0, 1.0\), got 1.0"),
        ({"target_order": 0}, ValueError, "target_order must be at least 1, got 0"),
        ({"merge_direction": "up"}, ValueError, "merge_direction must be one of .* got 'up'"),
        ({"momentum_normaliser": "v05"}, ValueError, "momentum_normaliser must be one of .*'v05'"),
        ({"lr": True}, TypeError, "lr must be a number, got True"),
        ({"lr": float("inf")}, ValueError, r"lr must lie in \[0.0, inf\), got inf"),
        ({"eps": float("inf")}, ValueError, r"eps must lie in \(0.0, inf\), got inf"),
        ({"lr": torch.ones(2)}, ValueError, r"lr must be a number or a tensor of one, .* \(2,\)"),
        ({"max_block_size": True}, TypeError, "max_block_size must be a whole number .* got True"),
    ],
)
def test_options_out_of_range(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"DistributedShampoo: {message}"):
        optimizer_for(parameters(), **options)


@pytest.mark.parametrize(
    ("name", "value", "error", "message"),
    [
        ("lr", "x", TypeError, "lr must be a number, got 'x'"),
        ("lr", None, TypeError, "lr must be a number, got None"),
        ("lr", -1.0, ValueError, r"lr must lie in \[0.0, inf\), got -1.0"),
        ("lr", float("inf"), ValueError, "lr must lie in .* got inf"),
        ("weight_decay", float("inf"), ValueError, "weight_decay must lie in .* got inf"),
        ("lr", float("nan"), ValueError, "lr must lie in .* got nan"),
        ("weight_decay", -0.1, ValueError, "weight_decay must lie in .* got -0.1"),
        ("weight_decay", float("nan"), ValueError, "weight_decay must lie in .* got nan"),
    ],
)
def test_what_a_group_is_given_later_is_checked_too(
    name: str, value: Any, error: type[Exception], message: str
) -> None:
    params = parameters()
    optimizer = optimizer_for(params)
    run(optimizer, params, range(1, 2))
    before = [parameter.detach().clone() for parameter in params]
    optimizer.param_groups[0][name] = value
    with pytest.raises(error, match=f"DistributedShampoo: {message}"):
        optimizer.step()
    assert all(map(torch.equal, before, params))


def test_a_step_that_is_refused_has_moved_no_group() -> None:
    params = parameters([(3, 3), (4, 4)])
    optimizer = optimizer_for([{"params": [parameter]} for parameter in params])
    optimizer.param_groups[1]["lr"] = -1.0
    before = [parameter.detach().clone() for parameter in params]
    with pytest.raises(ValueError, match="lr must lie in"):
        run(optimizer, params, range(1, 2))
    assert all(map(torch.equal, before, params))
    assert [group["step"] for group in optimizer.param_groups] == [0, 0]


def test_numbers_of_numpy_are_numbers() -> None:
    """Schedulers with factors of NumPy leave them in the group."""
    params, others = parameters(), parameters()
    first, second = optimizer_for(params, lr=np.float32(0.5)), optimizer_for(others, lr=0.5)
    first.param_groups[0]["lr"] = np.float32(0.25)
    second.param_groups[0]["lr"] = 0.25
    run(first, params, range(1, 3))
    run(second, others, range(1, 3))
    assert all(map(torch.equal, params, others))


def test_a_parameter_that_got_another_shape_is_refused() -> None:
    """Of as many numbers as before it would be stepped by statistics of other rows."""
    weight = torch.nn.Parameter(torch.ones(4, 6))
    optimizer = optimizer_for([weight])
    weight.data = torch.ones(6, 4)
    weight.grad = torch.ones(6, 4)
    with pytest.raises(RuntimeError, match=r"parameter 0 .* shape \(6, 4\) and had \(4, 6\)"):
        optimizer.step()


def test_a_process_group_is_one() -> None:
    with pytest.raises(
        TypeError, match=r"process_group must be a group of torch.distributed .* 'x'"
    ):
        Distribution(process_group="x")  # type: ignore[arg-type]


def test_other_optimizers_have_no_health_to_report() -> None:
    with pytest.raises(TypeError, match="must be a DistributedShampoo, got SGD, which keeps no"):
        health_report(torch.optim.SGD(parameters()))


@pytest.mark.parametrize(
    ("rule", "options", "message"),
    [
        (HeavyBall, {"dampening": 1.5}, r"dampening must lie in \[0.0, 1.0\], got 1.5"),
        (ScheduleFree, {"interpolation": 1.0}, r"interpolation must lie in \(0.0, 1.0\), got 1.0"),
        (PrimalAveraging, {"interpolation": 0.0}, r"interpolation must lie in \(0.0, 1.0\], got 0"),
        (PrimalAveraging, {"evaluation_decay": 1.0}, r"evaluation_decay must lie in \[0.0, 1.0\)"),
    ],
)
def test_averagings_out_of_range(rule: Any, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=f"{rule.__name__}: {message}"):
        rule(**options)


def test_whole_numbers_cannot_be_optimized() -> None:
    counts = torch.nn.Parameter(torch.ones(3, dtype=torch.int64), requires_grad=False)
    with pytest.raises(
        TypeError, match=r"parameter 1 of the group has dtype torch\.int64; only float"
    ):
        optimizer_for([*parameters([(3, 3)]), counts])
