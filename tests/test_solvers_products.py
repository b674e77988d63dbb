"""Coupled Newton, Newton-DB and Chebyshev: stopping, ridge floor, fallback."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hard_matrices import with_spectrum
from torch import Tensor

from shampoo_core.solvers import (
    ChebyshevSolver,
    CoupledNewtonSolver,
    EighSolver,
    HigherOrderNewtonSolver,
    NewtonDBSolver,
)
from shampoo_core.solvers.chebyshev import inverse_root_coefficients
from shampoo_core.solvers.matrix_products import MatrixProductSolver, steps_forward
from shampoo_core.solvers.spectral_bounds import largest_eigenvalue

NEWTON_KINDS = [CoupledNewtonSolver, HigherOrderNewtonSolver, NewtonDBSolver]
each_kind = pytest.mark.parametrize("kind", NEWTON_KINDS)


def matrices_of(*spectra: np.ndarray, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.from_numpy(np.stack([with_spectrum(spectrum) for spectrum in spectra])).to(dtype)


EASY = np.linspace(0.5, 1, 32)
HARD = np.geomspace(1e-6, 1, 32)


@each_kind
def test_an_easy_matrix_does_not_wait_for_a_hard_one(kind: type[MatrixProductSolver]) -> None:
    """What is done is left alone: the same bits after 8 further iterations, or 30."""
    easy, hard = matrices_of(EASY), matrices_of(HARD)
    roots = [
        kind(max_iterations=n, eigh_fallback=False).inverse_root(torch.cat(pair), 0.25).roots[i]
        for n, pair, i in (
            (12, (easy, easy), 0),
            (20, (easy, hard), 0),
            (42, (hard, easy), 1),
        )
    ]
    assert torch.equal(roots[0], roots[1])
    assert torch.equal(roots[0], roots[2])


@each_kind
def test_the_best_iterate_is_kept(kind: type[MatrixProductSolver]) -> None:
    """Further iterations neither improve nor spoil, down to a tolerance of zero."""
    matrices = matrices_of(EASY, HARD, np.r_[1.0, np.zeros(31)])
    exact = EighSolver().inverse_root(matrices.double(), 0.25, relative_ridge=1e-6).roots
    errors = []
    for iterations in (30, 60, 120):
        solver = kind(max_iterations=iterations, tolerance=0.0, eigh_fallback=False)
        result = solver.inverse_root(matrices, 0.25)
        assert result.accepted.all()
        difference = result.roots.double() - exact
        errors.append(difference.norm(dim=(1, 2)) / exact.norm(dim=(1, 2)))
    assert (errors[0] < 2e-2).all()
    torch.testing.assert_close(errors[1], errors[0], rtol=0.2, atol=1e-7)
    torch.testing.assert_close(errors[2], errors[1], rtol=0.2, atol=1e-7)


def test_steps_forward() -> None:
    error = torch.tensor([1e-9, 1e-3, 1e-3, 1e-3, 3.0, 3.0, 3.0, 3.0])
    nan, inf = float("nan"), float("inf")
    new_error = torch.tensor([1e-10, 1e-6, 1e-2, nan, 2.0, 4.0, nan, inf])
    taken = steps_forward(error, new_error, tolerance=1e-6)
    assert taken.shape == (8, 1, 1)
    assert taken.flatten().tolist() == [False, True, False, False, True, True, False, False]


@each_kind
@pytest.mark.parametrize("relative_ridge", [1e-6, 1e-4, 1e-2])
@pytest.mark.parametrize("exponent", [1.0, 0.5, 0.25, 0.125])
def test_enough_iterations_are_made_by_themselves(
    kind: type[MatrixProductSolver], relative_ridge: float, exponent: float
) -> None:
    """In float64, where rounding cannot hide a lack of steps."""
    solver = kind(eigh_fallback=False, relative_ridge_floor=1e-8)
    for spectrum in (EASY, HARD, np.r_[1.0, np.zeros(31)]):
        matrix = matrices_of(spectrum, dtype=torch.float64)
        result = solver.inverse_root(matrix, exponent, relative_ridge=relative_ridge)
        assert result.accepted.all()
        size = matrix.abs().max()
        ridge = relative_ridge * float(largest_eigenvalue(matrix / size) * size)
        exact = EighSolver().inverse_root(matrix, exponent, ridge=ridge)
        atol = 1e-8 * exact.roots.abs().max().item()
        torch.testing.assert_close(result.roots, exact.roots, rtol=1e-8, atol=atol)


@each_kind
def test_the_ridge_floor(kind: type[MatrixProductSolver]) -> None:
    matrices = matrices_of(np.r_[1.0, np.zeros(31)])
    for arguments in ({}, {"relative_ridge": 1e-8}, {"rank_tolerance": 1e-3}):
        result = kind().inverse_root(matrices, 0.25, **arguments)
        largest = torch.linalg.eigvalsh(result.roots.double())[0, -1]
        assert abs(largest / 1e-6**-0.25 - 1) < 0.02
    higher = kind(relative_ridge_floor=1e-2).inverse_root(matrices, 0.25)
    largest = torch.linalg.eigvalsh(higher.roots.double())[0, -1]
    assert abs(largest / 1e-2**-0.25 - 1) < 1e-3


@each_kind
@pytest.mark.parametrize("ridge", [1e-6, 1e6])
def test_a_ridge_is_a_matrix_beside_zeros_and_numbers_far_smaller(
    kind: type[MatrixProductSolver], ridge: float
) -> None:
    """It is part of the size that matrices are divided by, which would be the smallest number else."""
    matrices = torch.stack([torch.zeros(3, 3), 1e-37 * torch.eye(3)])
    expected = ridge**-0.25 * torch.eye(3).expand(2, -1, -1)
    for solver in (kind(eigh_fallback=False), EighSolver()):
        result = solver.inverse_root(matrices, 0.25, ridge=ridge)
        assert result.accepted.all()
        torch.testing.assert_close(result.roots, expected, rtol=1e-5, atol=1e-5 * ridge**-0.25)


@pytest.mark.parametrize("kind", [*NEWTON_KINDS, ChebyshevSolver])
def test_what_does_not_converge_falls_back_or_is_reported(kind: type[MatrixProductSolver]) -> None:
    few = {"degree": 4} if kind is ChebyshevSolver else {"max_iterations": 3}
    matrices = torch.cat([matrices_of(EASY, HARD), torch.zeros(1, 32, 32)])
    reported = kind(eigh_fallback=False, **few).inverse_root(matrices, 0.25)
    assert reported.accepted[1:].tolist() == [False, False]
    assert (reported.roots[1:] == 0).all()
    result = kind(**few).inverse_root(matrices, 0.25)
    assert result.accepted.tolist() == [True, True, False]
    floor = 1e-3 if kind is ChebyshevSolver else 1e-6
    exact = EighSolver().inverse_root(matrices[1:2], 0.25, relative_ridge=floor)
    assert torch.equal(result.roots[1:2], exact.roots)


def test_an_unconverged_newton_db_can_be_had() -> None:
    """Ten steps, as DASH makes them, resolve the spectrum down to about a hundredth."""
    matrices = matrices_of(HARD)
    dash = NewtonDBSolver(max_iterations=10, residual_bound=100.0, eigh_fallback=False)
    result = dash.inverse_root(matrices, 0.25)
    exact = EighSolver().inverse_root(matrices, 0.25, relative_ridge=1e-6)
    assert result.accepted.all()
    assert 0.1 < (result.roots - exact.roots).norm() / exact.roots.norm() < 1.0
    _, vectors = torch.linalg.eigh(matrices)
    leading = vectors[..., -8:]  # eigenvalues from 0.05 up
    torch.testing.assert_close(
        leading.mT @ result.roots @ leading, leading.mT @ exact.roots @ leading, rtol=0.0, atol=1e-3
    )


def test_chebyshev_coefficients() -> None:
    """Against numpy's interpolation, and the error at points in between."""
    degree, least = 60, 1e-3
    coefficients = inverse_root_coefficients(4, least, degree)
    assert len(coefficients) == degree + 1
    points = np.geomspace(least, 1, 999)
    values = np.polynomial.chebyshev.chebval((2 * points - 1 - least) / (1 - least), coefficients)
    errors = np.abs(values * points**0.25 - 1)
    assert 1e-4 < errors.max() < 6e-3


@pytest.mark.parametrize("degree", [2, 3, 4, 30])
def test_chebyshev_of_any_degree(degree: int) -> None:
    """Clenshaw's recurrence against the polynomial of the eigenvalues."""
    matrices = matrices_of(EASY).double()
    solver = ChebyshevSolver(degree=degree, relative_ridge_floor=0.3, residual_bound=1.0)
    result = solver.inverse_root(matrices, 0.5)
    exact = EighSolver().inverse_root(matrices, 0.5, relative_ridge=0.3)
    tolerance = 3 * 0.55**degree  # the spectrum is within [0.8, 1.3], fitted on [0.2, 1]
    torch.testing.assert_close(result.roots, exact.roots, rtol=0.0, atol=max(tolerance, 2e-3))
