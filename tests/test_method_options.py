"""Every option of every method reaches what it is said to decide."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from quadratic import gradient, optimizer_for, parameters, run

from shampoo_core import (
    EigenvalueCorrectedConfig,
    EighSolver,
    FixedRefresh,
    KLShampooConfig,
    KLSOAPConfig,
    NewtonDBSolver,
    OrthogonalIterationSolver,
    PerFactorCorrectedConfig,
    ShampooConfig,
    SpectralConfig,
)

SHAPES = ((12, 9), (7,))
OF_FACTORS: dict[str, Any] = {
    "factor_decay": 0.5,
    "statistics_interval": 3,
    "precondition_vectors": True,
    "storage": "packed",
}
OF_KL: dict[str, Any] = {
    **OF_FACTORS,
    "solver": EighSolver(),
    "second_moments": "keep",
    "lagged": True,
    "initial_eigenvalue": 0.3,
    "largest_scale": 1.0,
}
OTHERS: dict[type, dict[str, Any]] = {
    ShampooConfig: {
        **OF_FACTORS,
        "solver": NewtonDBSolver(),
        "exponent": 0.5,
        "rank_tolerance": 0.5,
        "ridge": 0.1,
        "relative_ridge": 0.1,
        "trace_scaling": 0.5,
        "statistics": "whitened",
        "sides": "first",
        "max_factor_dimension": 10,
    },
    EigenvalueCorrectedConfig: {
        **OF_FACTORS,
        "solver": OrthogonalIterationSolver(),
        "exponent": 0.4,
        "second_moments": "keep",
        "lagged": True,
        "sides": "first",
        "max_factor_dimension": 10,
    },
    PerFactorCorrectedConfig: {
        **OF_FACTORS,
        "solver": OrthogonalIterationSolver(),
        "exponent": 0.5,
        "rank_tolerance": 0.5,
        "ridge": 0.1,
        "relative_ridge": 0.1,
    },
    KLShampooConfig: {**OF_KL, "second_moments": "permute"},
    KLSOAPConfig: OF_KL,
    SpectralConfig: {
        "momentum": 0.5,
        "nesterov": False,
        "scale": "none",
        "method": "svd",
        "num_iterations": 3,
        "product_dtype": torch.bfloat16,
    },
}
CASES = [(method, name) for method, values in OTHERS.items() for name in values]


def trained(config: Any) -> tuple[list[torch.Tensor], int]:
    """Weights, and bytes of state."""
    weights = parameters(SHAPES)
    optimizer = optimizer_for(weights, preconditioner=config, refresh=FixedRefresh(3, 4))
    run(optimizer, weights, range(1, 12))
    tensors = [tensor for weight in weights for tensor in optimizer.state[weight].values()]
    return [weight.detach() for weight in weights], sum(tensor.nbytes for tensor in tensors)


@pytest.fixture(scope="module")
def by_default() -> dict[type, tuple[list[torch.Tensor], int]]:
    return {method: trained(method()) for method in OTHERS}


def test_no_option_is_left_out() -> None:
    for method, values in OTHERS.items():
        assert set(values) == {field.name for field in dataclasses.fields(method)}, method


@pytest.mark.parametrize(("method", "name"), CASES, ids=[f"{m.__name__} {n}" for m, n in CASES])
def test_every_option_changes_something(
    method: Any, name: str, by_default: dict[type, tuple[list[torch.Tensor], int]]
) -> None:
    value = OTHERS[method][name]
    assert value != getattr(method(), name)
    weights, num_bytes = trained(method(**{name: value}))
    usual, usual_bytes = by_default[method]
    vectors_differ = not torch.equal(weights[1], usual[1])
    matrices_differ = not torch.equal(weights[0], usual[0])
    if name == "storage":
        assert num_bytes < usual_bytes
        torch.testing.assert_close(weights, usual)
    elif name == "precondition_vectors":
        assert (matrices_differ, vectors_differ) == (False, True)
    else:
        assert matrices_differ


@pytest.mark.parametrize(
    "method",
    [ShampooConfig, EigenvalueCorrectedConfig, PerFactorCorrectedConfig, KLSOAPConfig],
)
def test_factors_have_their_own_decay_and_second_moments_the_groups(method: Any) -> None:
    """Before the first basis factors and moments are plain averages."""
    (weight,) = parameters([(12, 9)])
    optimizer = optimizer_for(
        [weight],
        betas=(0.9, 0.8),
        preconditioner=method(factor_decay=0.6),
        refresh=FixedRefresh(50, 50),
        bias_correction=False,
    )
    factor, squares = torch.zeros(12, 12, dtype=torch.float64), torch.zeros_like(weight)
    for step in range(1, 5):
        weight.grad = gradient(weight, step, 0)
        factor = 0.6 * factor + 0.4 * weight.grad @ weight.grad.T
        squares = 0.8 * squares + 0.2 * weight.grad.square()
        optimizer.step()
    state = optimizer.state[weight]
    if method is not KLSOAPConfig:  # whose factors are whitened
        torch.testing.assert_close(state["block.0.0.factors.axis0"], factor, check_dtype=False)
    if "block.0.0.second_moment.average" in state:
        torch.testing.assert_close(
            state["block.0.0.second_moment.average"], squares.detach(), check_dtype=False
        )


@pytest.mark.parametrize("method", [ShampooConfig, EigenvalueCorrectedConfig])
def test_a_side_as_long_as_the_limit_has_a_factor(method: Any) -> None:
    for limit, has_factors in ((12, [True, True]), (11, [False, True]), (8, [False, False])):
        weights = parameters([(12, 9)])
        config = method(max_factor_dimension=limit)
        optimizer = optimizer_for(weights, preconditioner=config)
        run(optimizer, weights, range(1, 2))
        state = optimizer.state[weights[0]]
        assert [f"block.0.0.factors.axis{axis}" in state for axis in range(2)] == has_factors
