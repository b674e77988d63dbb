"""Every solver on every hard matrix: finite, accepted where there is a root, and accurate.

The bound on the relative error of a root (Frobenius norm, against numpy in float64) is
``c * condition * eps``, where condition counts the regularised spectrum. The constants c are those
of ALGORITHMS.md 5.1, the larger of its two columns: the table gives c * 1e3 * eps and
c * 1e6 * eps. Two rows differ:

- eigh in native float32: the table's row was computed by numpy, which works in float64 inside. True
  float32 routines leave errors of some eps * lambda_max in the eigenvalues, c = 0.5; the row
  belongs to ``double_precision=True``.
- Chebyshev: its error is that of the polynomial, whatever the precision.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hard_matrices import (
    Matrix,
    hard_matrices,
    hopeless_matrices,
    reference_root,
    relative_error,
    singular_factor,
    with_spectrum,
)
from torch import Tensor

from shampoo_core.solvers import (
    ChebyshevSolver,
    CoupledNewtonSolver,
    EighSolver,
    HigherOrderNewtonSolver,
    NewtonDBSolver,
    OrthogonalIterationSolver,
    RootSolver,
)
from shampoo_core.solvers.matrix_products import MatrixProductSolver
from shampoo_core.solvers.spectral_bounds import eigenvalue_bound, largest_eigenvalue

SOLVERS: dict[str, tuple[RootSolver, float]] = {
    "eigh": (EighSolver(), 0.5),
    "eigh in double": (EighSolver(double_precision=True), 0.005),
    "orthogonal iteration": (OrthogonalIterationSolver(), 0.5),
    "coupled Newton": (CoupledNewtonSolver(eigh_fallback=False), 0.08),
    "higher order": (HigherOrderNewtonSolver(eigh_fallback=False), 0.13),
    "Newton-DB": (NewtonDBSolver(eigh_fallback=False), 0.05),
    "Chebyshev": (ChebyshevSolver(eigh_fallback=False), 0.0),
}
TRUNCATING = ("eigh", "eigh in double", "orthogonal iteration")
PRODUCTS = tuple(name for name in SOLVERS if name not in TRUNCATING)
DTYPES = (torch.float32, torch.float64)
CHEBYSHEV_ERROR = 1e-2
CORPORA = {dtype: hard_matrices(torch.finfo(dtype).eps) for dtype in DTYPES}


def bound_on_error(constant: float, condition: float, exponent: float, dtype: torch.dtype) -> float:
    """As the module says; in units of p = 4, whose errors are half as large as those of p = 2."""
    if dtype == torch.float64:  # not in the table; the double-precision row has no meaning there
        constant = 0.5 if constant == 0.005 else 4 * constant
    floor = 32 if dtype == torch.float32 else 128
    return (4 * exponent * constant * condition + floor) * torch.finfo(dtype).eps


def stacked(matrices: list[Matrix], dtype: torch.dtype) -> Tensor:
    return torch.from_numpy(np.stack(matrices)).to(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("exponent", [0.25, 0.5, 0.3])
@pytest.mark.parametrize("name", TRUNCATING)
def test_truncated_roots(name: str, exponent: float, dtype: torch.dtype) -> None:
    solver, constant = SOLVERS[name]
    matrices = stacked([hard.matrix for hard in CORPORA[dtype].values()], dtype)
    epsilon = torch.finfo(dtype).eps
    cutoff = matrices.shape[-1] * epsilon

    result = solver.inverse_root(matrices, exponent)
    assert result.accepted.all()
    assert result.roots.isfinite().all()
    for (key, hard), matrix, root in zip(
        CORPORA[dtype].items(), matrices, result.roots, strict=True
    ):
        array, actual = matrix.double().numpy(), root.double().numpy()
        expected = reference_root(array, exponent, cutoff=cutoff)
        condition = hard.condition
        if condition > 1 / cutoff:
            # What is kept mixes with what is dropped where they meet: compare at a distance, and
            # see that nothing that was to be dropped is there.
            assert np.linalg.norm(actual, 2) < 1.5 * np.linalg.norm(expected, 2), key
            eigenvalues, vectors = np.linalg.eigh(array)
            clear = vectors[:, eigenvalues > 30 * cutoff * eigenvalues[-1]]
            actual, expected = (clear.T @ array @ clear for array in (actual, expected))
            condition = 1 / (30 * cutoff)
        bound = bound_on_error(constant, condition, exponent, dtype)
        assert relative_error(actual, expected) <= bound, key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("exponent", "relative_ridge"), [(0.25, 1e-6), (0.5, 1e-6), (0.25, 1e-3)])
@pytest.mark.parametrize("name", SOLVERS)
def test_roots_with_a_relative_ridge(
    name: str, exponent: float, relative_ridge: float, dtype: torch.dtype
) -> None:
    solver, constant = SOLVERS[name]
    if name == "Chebyshev":
        relative_ridge = max(relative_ridge, 1e-3)
    matrices = stacked([hard.matrix for hard in CORPORA[dtype].values()], dtype)
    result = solver.inverse_root(matrices, exponent, relative_ridge=relative_ridge)
    assert result.accepted.all()
    assert result.roots.isfinite().all()
    for (key, hard), matrix, root in zip(
        CORPORA[dtype].items(), matrices, result.roots, strict=True
    ):
        array = matrix.double().numpy()
        scale = np.abs(array).max()
        largest = np.linalg.eigvalsh(array / scale)[-1]
        least = 0.0
        if isinstance(solver, MatrixProductSolver):  # documented: relative to the estimate
            largest = float(largest_eigenvalue(torch.from_numpy(array / scale).to(dtype)[None]))
            least = -np.inf  # no eigenvalue is looked at, so that none is clamped
        ridge = relative_ridge * largest * scale
        expected = reference_root(array, exponent, ridge=ridge, least=least)
        condition = 1 / relative_ridge if hard.deficient else hard.condition
        condition = min(condition, 1 / relative_ridge)
        bound = bound_on_error(constant, condition, exponent, dtype)
        bound = bound if constant else 4 * exponent * CHEBYSHEV_ERROR
        assert relative_error(root.double().numpy(), expected) <= bound, key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("name", "exponent"),
    [
        (name, exponent)
        for name in ("eigh", "coupled Newton", "higher order", "Newton-DB")
        for exponent in (1.0, 1 / 6, 0.125, 0.75)
        if (name, exponent) != ("Newton-DB", 1 / 6)  # q/2^k only; refused, see test_solvers.py
    ],
)
def test_other_exponents(name: str, exponent: float, dtype: torch.dtype) -> None:
    solver, constant = SOLVERS[name]
    ridge = 1e-4
    matrices = stacked([hard.matrix for hard in CORPORA[dtype].values()], dtype)
    result = solver.inverse_root(matrices, exponent, relative_ridge=ridge)
    assert result.accepted.all()
    for (key, _), matrix, root in zip(CORPORA[dtype].items(), matrices, result.roots, strict=True):
        array = matrix.double().numpy()
        scale = np.abs(array).max()
        largest = np.linalg.eigvalsh(array / scale)[-1] * scale
        expected = reference_root(array, exponent, ridge=ridge * largest)
        # 1e-3: the estimate of lambda_max, and with it the ridge, is that good on this corpus.
        bound = bound_on_error(constant, 1 / ridge, exponent, dtype) + 1e-3
        assert relative_error(root.double().numpy(), expected) <= bound, key


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", SOLVERS)
def test_matrices_without_a_root_are_not_accepted_and_spoil_nothing(
    name: str, dtype: torch.dtype
) -> None:
    solver, _ = SOLVERS[name]
    healthy = with_spectrum(np.arange(1, 49) ** -0.5)
    hopeless = hopeless_matrices()
    alone = solver.inverse_root(stacked([healthy], dtype), 0.25, relative_ridge=1e-3)
    mixed = [matrix for bad in hopeless.values() for matrix in (bad, healthy)]
    result = solver.inverse_root(stacked(mixed, dtype), 0.25, relative_ridge=1e-3)
    assert result.accepted.tolist() == [False, True] * len(hopeless)
    assert result.roots.isfinite().all()
    for root in result.roots[1::2]:
        torch.testing.assert_close(root, alone.roots[0])


@pytest.mark.parametrize("name", TRUNCATING)
def test_truncation_does_not_accept_hopeless_matrices_either(name: str) -> None:
    solver, _ = SOLVERS[name]
    result = solver.inverse_root(stacked(list(hopeless_matrices().values()), torch.float32), 0.25)
    assert not result.accepted.any()
    assert (result.roots == 0).all()


@pytest.mark.parametrize("name", SOLVERS)
def test_a_ridge_makes_the_zero_matrix_ordinary(name: str) -> None:
    solver, constant = SOLVERS[name]
    result = solver.inverse_root(torch.zeros(2, 5, 5), 0.25, ridge=1e-8)
    assert result.accepted.all()
    tolerance = 1e-5 if constant else CHEBYSHEV_ERROR
    torch.testing.assert_close(
        result.roots, 100 * torch.eye(5).repeat(2, 1, 1), rtol=tolerance, atol=100 * tolerance
    )


@pytest.mark.parametrize("name", SOLVERS)
def test_one_by_one(name: str) -> None:
    solver, constant = SOLVERS[name]
    values = torch.tensor([1.0, 16.0, 1e-30, 1e30, 0.0, float("nan")])
    result = solver.inverse_root(values[:, None, None], 0.25, relative_ridge=1e-3)
    assert result.accepted.tolist() == [True] * 4 + [False] * 2
    expected = (1.001 * values[:4].double()).pow(-0.25).float()
    tolerance = 1e-5 if constant else CHEBYSHEV_ERROR
    torch.testing.assert_close(result.roots[:4, 0, 0], expected, rtol=tolerance, atol=0.0)


@pytest.mark.parametrize("num_threads", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_eigh_solvers_on_the_singular_factor(num_threads: int) -> None:
    """float32 eigh returns NaN, or gives up, on this factor (ALGORITHMS.md 5.2, note 7)."""
    factor = singular_factor()
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        matrices = torch.from_numpy(factor)[None]
        root = EighSolver().inverse_root(matrices, 0.25)
        basis = EighSolver().basis(matrices)
    finally:
        torch.set_num_threads(before)
    assert root.accepted.all()
    assert basis.accepted.all()
    cutoff = 1024 * torch.finfo(torch.float32).eps
    expected = reference_root(factor.astype(np.float64), 0.25, cutoff=cutoff)
    assert relative_error(root.roots[0].double().numpy(), expected) < 2e-3
    vectors = basis.eigenvectors[0].double()
    assert (vectors.mT @ vectors - torch.eye(1024)).abs().max() < 1e-5
    rotated = vectors.mT @ matrices[0].double() @ vectors
    off_diagonal = rotated - torch.diag(rotated.diagonal())
    assert off_diagonal.norm() < 1e-5 * rotated.norm()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_estimate_of_the_largest_eigenvalue(dtype: torch.dtype) -> None:
    names = [name for name in CORPORA[dtype] if "1e-30" not in name and "1e+30" not in name]
    matrices = stacked([CORPORA[dtype][name].matrix for name in names], dtype)
    matrices /= matrices.abs().amax((1, 2), keepdim=True)
    crowded = torch.diag(torch.where(torch.arange(48) == 7, 1.0, 0.9)).to(dtype)
    matrices = torch.cat([matrices, crowded[None]])
    largest = torch.linalg.eigvalsh(matrices.double())[:, -1]
    estimates = largest_eigenvalue(matrices)
    ratios = estimates.double() / largest
    assert ratios.max() <= 1 + 1e-6
    assert ratios[:-1].min() > 0.97
    assert ratios[-1] > 0.9
    bounds = eigenvalue_bound(matrices, estimates).double() / largest
    assert bounds.min() >= 1 - 1e-6
    assert bounds.max() <= 1.25 + 1e-6
