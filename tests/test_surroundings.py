"""What the user's program has set around a step does not reach into it: default device, autocast."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from quadratic import assert_same, gradient, optimizer_for, parameters
from solver_cases import SOLVERS
from test_state import METHODS

from shampoo_core import (
    AdaptiveRefresh,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLShampooConfig,
    LatestWeightAverage,
    OrthogonalIterationSolver,
    ShampooConfig,
    SpectralConfig,
    health_report,
)
from shampoo_core.config import STORAGES
from shampoo_core.solvers.chebyshev import inverse_root_coefficients

CASES: dict[str, dict[str, Any]] = {
    **METHODS,
    **{
        f"{config.__name__} in {storage}": {
            "refresh": FixedRefresh(2, 1),
            "preconditioner": config(storage=storage),
        }
        for config in (ShampooConfig, EigenvalueCorrectedConfig, KLShampooConfig)
        for storage in STORAGES
    },
    **{
        f"roots by {type(solver).__name__}, {number}": {
            "refresh": FixedRefresh(2, 1),
            "preconditioner": ShampooConfig(solver=solver),
        }
        for number, solver in enumerate(SOLVERS)
    },
    "bases by orthogonal iteration": {
        "refresh": AdaptiveRefresh(2, 1),
        "preconditioner": EigenvalueCorrectedConfig(solver=OrthogonalIterationSolver()),
    },
    "exact polar factors": {"preconditioner": SpectralConfig(method="svd")},
    "latest weights": {"averaging": LatestWeightAverage(2, 2), "refresh": FixedRefresh(2, 1)},
}
SHAPES = ((20, 30), (7,), (4, 3, 3, 3))
Surroundings = Callable[[], AbstractContextManager[object]]


def meta() -> torch.device:
    return torch.device("meta")


def autocast() -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@contextmanager
def default_meta() -> Iterator[None]:
    """As a whole program has it, which reaches further than a block."""
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


def weights_after(options: dict[str, Any], surroundings: Surroundings) -> list[torch.Tensor]:
    """Training, evaluated and again training weights after some steps, and what was counted."""
    params = parameters(SHAPES, dtype=torch.float32)
    grads = [[gradient(p, step, index) for index, p in enumerate(params)] for step in range(5)]
    grads[3][0][0, 0] = float("nan")
    inverse_root_coefficients.cache_clear()
    seen = []
    with surroundings():
        optimizer = optimizer_for(params, **options)
        for own in grads:
            for parameter, grad in zip(params, own, strict=True):
                parameter.grad = grad
            optimizer.step()
        for look in (optimizer.eval, optimizer.train):
            seen += [parameter.detach().clone() for parameter in params]
            look()
        seen += [*params, torch.tensor(health_report(optimizer).refreshes, device="cpu")]
        optimizer.load_state_dict(optimizer.state_dict())
    return seen


@pytest.mark.parametrize("surroundings", [meta, default_meta, autocast])
@pytest.mark.parametrize("name", CASES)
def test_surroundings_have_no_effect(name: str, surroundings: Surroundings) -> None:
    expected = weights_after(CASES[name], nullcontext)
    assert_same(weights_after(CASES[name], surroundings), expected)


def test_a_diagonal_method_is_healthy_on_any_default_device() -> None:
    """It counts no refreshes, where there is no tensor to add up."""
    weight = torch.nn.Parameter(torch.ones(3))
    with torch.device("meta"):
        report = health_report(DistributedShampoo([weight]))
    assert report.refreshes == 0


def test_the_closure_keeps_the_autocast_that_it_was_called_in() -> None:
    (weight,) = params = parameters([(8, 6)], dtype=torch.float32)
    optimizer = optimizer_for(params, refresh=FixedRefresh(1, 1))
    dtypes = []

    def closure() -> float:
        product = weight @ weight.T
        dtypes.append(product.dtype)
        product.float().sum().backward()
        return 0.0

    with autocast():
        optimizer.step(closure)
        dtypes.append((weight @ weight.T).dtype)
    assert dtypes == [torch.bfloat16] * 2
