"""What the solvers refuse."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from solver_cases import BASIS_SOLVERS, each_solver
from torch import Tensor

from shampoo_core.solvers import (
    BasisSolver,
    ChebyshevSolver,
    CoupledNewtonSolver,
    EighSolver,
    HigherOrderNewtonSolver,
    NewtonDBSolver,
    OrthogonalIterationSolver,
    RootSolver,
)


@each_solver
@pytest.mark.parametrize(
    ("matrices", "arguments", "error", "message"),
    [
        (torch.eye(3), {}, ValueError, r"shape \(N, d, d\) with d >= 1, got \(3, 3\)"),
        (torch.zeros(1, 2, 3), {}, ValueError, r"got \(1, 2, 3\); stack"),
        (torch.zeros(1, 0, 0), {}, ValueError, r"got \(1, 0, 0\)"),
        (torch.eye(3)[None].bfloat16(), {}, TypeError, r"got torch.bfloat16; convert with .float"),
        (torch.eye(3)[None], {"exponent": 0.0}, ValueError, r"exponent .* > 0, got 0.0"),
        (torch.eye(3)[None], {"exponent": float("nan")}, ValueError, r"exponent .* got nan"),
        (torch.eye(3)[None], {"ridge": -1.0}, ValueError, r"ridge must .* >= 0, got -1.0"),
        (
            torch.eye(3)[None],
            {"relative_ridge": float("inf")},
            ValueError,
            r"relative_ridge .* inf",
        ),
        (torch.eye(3)[None], {"rank_tolerance": 1.0}, ValueError, r"rank_tolerance .* got 1.0"),
        (
            torch.eye(3)[None],
            {"rank_tolerance": 1e-3, "ridge": 1e-3},
            ValueError,
            r"rank_tolerance=0.001 together with ridge=0.001, .* give one of them",
        ),
    ],
)
def test_bad_arguments(
    solver: RootSolver,
    matrices: Tensor,
    arguments: dict[str, float],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        solver.inverse_root(matrices, **({"exponent": 0.25} | arguments))


@pytest.mark.parametrize("solver", BASIS_SOLVERS, ids=lambda solver: type(solver).__name__)
def test_a_warm_start_of_another_size_is_refused(solver: BasisSolver) -> None:
    with pytest.raises(ValueError, match=r"warm_start .* \(2, 3, 3\), got \(1, 3, 3\)"):
        solver.basis(torch.zeros(2, 3, 3), torch.eye(3)[None])


@pytest.mark.parametrize(
    ("solver", "exponent", "message"),
    [
        (CoupledNewtonSolver(), 0.2512345, r"q/p with p <= 32 .* got 0.2512345; use EighSolver"),
        (HigherOrderNewtonSolver(), 1e-3, r"q/p with p <= 32 .* HigherOrderNewtonSolver"),
        (ChebyshevSolver(), 0.377, r"q/p with p <= 32 .* ChebyshevSolver"),
        (NewtonDBSolver(), 1 / 6, r"q/2\^k .* got 0.1666\d* = 1/6; use CoupledNewtonSolver"),
    ],
)
def test_exponents_a_method_cannot_do(solver: RootSolver, exponent: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        solver.inverse_root(torch.eye(3)[None], exponent)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EighSolver(residual_bound=0.5), r"residual_bound .* got 0.5"),
        (lambda: OrthogonalIterationSolver(max_iterations=0), r"max_iterations .* got 0"),
        (lambda: OrthogonalIterationSolver(tolerance=2.0), r"tolerance .* \[0.0, 1.0\], got 2.0"),
        (lambda: CoupledNewtonSolver(max_iterations=0), r"max_iterations .* got 0"),
        (lambda: CoupledNewtonSolver(relative_ridge_floor=0.0), r"relative_ridge_floor .* got 0.0"),
        (lambda: CoupledNewtonSolver(tolerance=-1.0), r"tolerance .* got -1.0"),
        (lambda: HigherOrderNewtonSolver(order=1), r"^HigherOrderNewtonSolver: order .* got 1"),
        (lambda: NewtonDBSolver(max_iterations=-3), r"max_iterations .* got -3"),
        (lambda: HigherOrderNewtonSolver(order=9), r"order .* \[2, 8\], got 9"),
        (lambda: HigherOrderNewtonSolver(tolerance=2.0), r"^HigherOrderNewtonSolver: tolerance"),
        (lambda: ChebyshevSolver(degree=1), r"degree .* got 1"),
        (lambda: ChebyshevSolver(degree=1025), r"degree .* 1024\], got 1025"),
        (lambda: ChebyshevSolver(residual_bound=float("nan")), r"residual_bound .* got nan"),
    ],
)
def test_settings_out_of_range(make: Callable[[], RootSolver], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("solver", "setting", "message"),
    [
        (CoupledNewtonSolver, {"tolerance": "x"}, "tolerance must be a number, got 'x'"),
        (
            CoupledNewtonSolver,
            {"max_iterations": 1.5},
            "max_iterations must be a whole number or None, got 1",
        ),
        (
            NewtonDBSolver,
            {"max_iterations": True},
            "max_iterations must be a whole number or None, got True",
        ),
        (
            OrthogonalIterationSolver,
            {"max_iterations": float("inf")},
            "must be a whole number, got inf",
        ),
        (
            OrthogonalIterationSolver,
            {"residual_bound": None},
            "residual_bound must be a number, got N",
        ),
        (HigherOrderNewtonSolver, {"order": 2.0}, "order must be a whole number, got 2.0"),
        (ChebyshevSolver, {"degree": "20"}, "degree must be a whole number, got '20'"),
        (ChebyshevSolver, {"relative_ridge_floor": True}, "relative_ridge_floor must be a number"),
        (EighSolver, {"residual_bound": "1"}, "residual_bound must be a number, got '1'"),
    ],
)
def test_settings_of_the_wrong_type(solver: Any, setting: dict[str, Any], message: str) -> None:
    """At the door, not at the first refresh."""
    with pytest.raises(TypeError, match=message):
        solver(**setting)
