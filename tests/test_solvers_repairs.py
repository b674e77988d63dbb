"""When the eigendecomposition fails, and when it must not be thought to have failed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hard_matrices import SIDE, hard_matrices, hopeless_matrices
from solver_cases import batch, each_solver
from torch import Tensor

from shampoo_core.solvers import (
    CoupledNewtonSolver,
    EighSolver,
    OrthogonalIterationSolver,
    RootSolver,
    decomposition,
)

Decompose = Callable[[Tensor], tuple[Tensor, Tensor]]
REAL_EIGH = torch.linalg.eigh


class FakeEigh:
    """Stands in for ``torch.linalg.eigh`` and fails on marked matrices, of some dtypes only."""

    def __init__(self, fail: Decompose, dtypes: tuple[torch.dtype, ...]) -> None:
        self._fail = fail
        self._dtypes = dtypes
        self.calls: list[tuple[torch.dtype, int]] = []

    def __call__(self, matrices: Tensor) -> tuple[Tensor, Tensor]:
        self.calls.append((matrices.dtype, matrices.shape[0]))
        values, vectors = REAL_EIGH(matrices)
        bad = matrices[:, 0, 0] == matrices[:, 1, 1]  # the mark; random matrices have no such pair
        if matrices.dtype in self._dtypes and bad.any():
            values[bad], vectors[bad] = self._fail(matrices[bad])
        return values, vectors


def marked_batch() -> Tensor:
    """Five matrices, of which number 2 will fail."""
    matrices = batch(5)
    matrices[2, 0, 0] = matrices[2, 1, 1] = 0.25
    return matrices


def returns_nan(bad: Tensor) -> tuple[Tensor, Tensor]:
    return bad[:, 0] * float("nan"), bad * float("nan")


def returns_a_basis_that_is_not_orthogonal(bad: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = REAL_EIGH(bad)
    return values, vectors * 1.001


def returns_the_basis_of_another_matrix(bad: Tensor) -> tuple[Tensor, Tensor]:
    values, _ = REAL_EIGH(bad)
    return values, torch.eye(bad.shape[-1]).expand_as(bad)


def returns_one_pair_of_vectors_turned_a_little(bad: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = REAL_EIGH(bad)
    angle = torch.tensor(1e-2)
    first, last = vectors[..., 3].clone(), vectors[..., -2].clone()
    vectors[..., 3] = angle.cos() * first - angle.sin() * last
    vectors[..., -2] = angle.sin() * first + angle.cos() * last
    return values, vectors


def returns_one_vector_that_is_too_long(bad: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = REAL_EIGH(bad)
    vectors[..., 7] *= 1.001
    return values, vectors


def returns_one_eigenvalue_that_is_off(bad: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = REAL_EIGH(bad)
    values[..., 5] += 1e-3 * values.abs().amax()
    return values, vectors


def gives_up(bad: Tensor) -> tuple[Tensor, Tensor]:
    raise torch.linalg.LinAlgError("the algorithm failed to converge")


def reports_a_cusolver_status(bad: Tensor) -> tuple[Tensor, Tensor]:
    raise RuntimeError("cusolver error: CUSOLVER_STATUS_INVALID_VALUE, when calling cusolverDn")


@pytest.mark.parametrize(
    "fail",
    [
        returns_nan,
        returns_the_basis_of_another_matrix,
        returns_a_basis_that_is_not_orthogonal,
        returns_one_pair_of_vectors_turned_a_little,
        returns_one_vector_that_is_too_long,
        returns_one_eigenvalue_that_is_off,
        gives_up,
        reports_a_cusolver_status,
    ],
)
def test_a_failed_matrix_alone_is_solved_in_float64(
    fail: Decompose, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = marked_batch()
    expected = EighSolver().inverse_root(matrices, 0.25)
    basis = EighSolver().basis(matrices)
    fake = FakeEigh(fail, (torch.float32,))
    monkeypatch.setattr(torch.linalg, "eigh", fake)
    result = EighSolver().inverse_root(matrices, 0.25)
    assert [count for dtype, count in fake.calls if dtype == torch.float64] == [1]
    assert result.accepted.all()
    torch.testing.assert_close(result.roots, expected.roots, rtol=1e-4, atol=1e-4)
    repaired = EighSolver().basis(matrices)
    assert repaired.accepted.all()
    torch.testing.assert_close(repaired.eigenvalues, basis.eigenvalues, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("fail", [returns_nan, gives_up])
def test_a_failed_matrix_that_is_all_of_its_batch_is_solved_in_float64(
    fail: Decompose, overwrite: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = marked_batch()[2:3]
    (expected,) = EighSolver().bases([matrices])
    (root,) = EighSolver().inverse_roots([matrices], [0.25])
    monkeypatch.setattr(torch.linalg, "eigh", FakeEigh(fail, (torch.float32,)))
    (basis,) = EighSolver().bases([matrices.clone()], overwrite=overwrite)
    assert basis.accepted.all()
    torch.testing.assert_close(basis.eigenvalues, expected.eigenvalues, rtol=1e-4, atol=1e-6)
    (repaired,) = EighSolver().inverse_roots([matrices.clone()], [0.25], overwrite=overwrite)
    torch.testing.assert_close(repaired.roots, root.roots, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fail", [returns_nan, gives_up, returns_a_basis_that_is_not_orthogonal])
def test_a_hopeless_matrix_is_not_accepted_and_the_others_are(
    fail: Decompose, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrices = marked_batch()
    expected = EighSolver().inverse_root(matrices, 0.25)
    old = torch.eye(24).expand(5, 24, 24)
    monkeypatch.setattr(torch.linalg, "eigh", FakeEigh(fail, (torch.float32, torch.float64)))
    result = EighSolver().inverse_root(matrices, 0.25, ridge=1e-6)
    assert result.accepted.tolist() == [True, True, False, True, True]
    assert result.roots.isfinite().all()
    expected_roots = expected.roots[result.accepted]
    torch.testing.assert_close(result.roots[result.accepted], expected_roots, rtol=1e-2, atol=1e-2)
    basis = EighSolver().basis(matrices, old)
    assert basis.accepted.tolist() == [True, True, False, True, True]
    assert torch.equal(basis.eigenvectors[2], old[2])
    assert (basis.eigenvalues[2] == 0).all()


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("cusolver error: CUSOLVER_STATUS_ALLOC_FAILED"),
        RuntimeError("CUDA error: device-side assert triggered"),
    ],
    ids=str,
)
@each_solver
def test_errors_of_memory_and_device_pass_through(
    solver: RootSolver, error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(matrices: Tensor) -> None:
        raise error

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    # Negative: what makes the product solvers turn to the eigendecomposition.
    with pytest.raises(type(error), match=str(error).split("'")[0]):
        solver.inverse_root(-batch(1), 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("side", [1, 2, 3, 8, 24, 100, 256])
def test_healthy_decompositions_are_far_from_the_bound(side: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(side)
    spectra = [
        torch.ones(side),
        torch.linspace(1.0, 0.0, side),
        torch.logspace(0.0, -12.0, side),
        (torch.arange(side) <= side // 4).double(),
    ]
    matrices = []
    for spectrum in spectra * 3:
        noise = torch.randn(side, side, generator=generator, dtype=torch.float64)
        basis = torch.linalg.qr(noise).Q
        matrices.append((basis * spectrum) @ basis.mT)
    solver = EighSolver(residual_bound=12.0, double_fallback=False)
    assert solver.basis(torch.stack(matrices).to(dtype)).accepted.all()
    assert EighSolver().residual_bound >= 5 * solver.residual_bound


def test_matrices_without_a_root_stay_on_the_happy_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """They never reach the eigendecomposition, which may hang on them, but zeros in their place."""
    matrices = torch.from_numpy(np.stack(list(hopeless_matrices().values()))).float()
    fake = FakeEigh(returns_nan, ())
    monkeypatch.setattr(torch.linalg, "eigh", fake)
    assert not EighSolver().inverse_root(matrices, 0.25).accepted.any()
    assert fake.calls == [(torch.float32, len(matrices))]


def test_exactly_singular_factors_stay_on_the_float32_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that saw no gradient: without the shift LAPACK gives up on every second such factor."""
    factors = []
    for seed in range(8):
        generator = torch.Generator().manual_seed(seed)
        factor = torch.zeros(256, 256)
        seen = torch.randperm(256, generator=generator)[:70]
        for step in range(8):
            gradient = torch.zeros(256, 64)
            rows = seen[torch.rand(70, generator=generator) < 0.5]
            size = 10.0 ** -(step % 5)
            gradient[rows] = size * torch.randn(len(rows), 64, generator=generator)
            factor = 0.99 * factor + 0.01 * gradient @ gradient.T
        factors.append(factor)
    fake = FakeEigh(returns_nan, ())
    monkeypatch.setattr(torch.linalg, "eigh", fake)
    assert EighSolver().inverse_root(torch.stack(factors), 0.25).accepted.all()
    assert fake.calls == [(torch.float32, 8)]


def test_double_precision_is_what_the_input_allows() -> None:
    hard = hard_matrices(1e-7)["condition 1e6"].matrix
    matrices = torch.from_numpy(hard).float()[None]
    double = EighSolver(double_precision=True).inverse_root(matrices, 0.25, ridge=1e-6)
    exact = EighSolver().inverse_root(matrices.double(), 0.25, ridge=1e-6)
    assert double.roots.dtype == torch.float32
    assert double.roots.shape == (1, SIDE, SIDE)
    torch.testing.assert_close(double.roots, exact.roots.float(), rtol=1e-5, atol=1e-4)


def test_a_root_too_large_for_float32_is_not_accepted() -> None:
    matrices = torch.stack([1e-30 * torch.eye(3), torch.eye(3)])
    for solver in (EighSolver(), EighSolver(double_precision=True), CoupledNewtonSolver()):
        result = solver.inverse_root(matrices, 1.5)
        assert result.accepted.tolist() == [False, True]
        assert result.roots.isfinite().all()


@pytest.mark.parametrize("has_start", [False, True])
@pytest.mark.parametrize("falls_back", [False, True])
def test_roots_in_a_basis_that_could_not_be_found_are_not_accepted(
    has_start: bool, falls_back: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(0)
    vectors, _ = torch.linalg.qr(torch.randn(2, 6, 6, generator=generator))
    matrix = (vectors[:1] * torch.logspace(0, -3, 6)) @ vectors[:1].mT

    def fail(*_: Any, **__: Any) -> None:
        raise torch.linalg.LinAlgError("no")

    monkeypatch.setattr(torch.linalg, "eigh", fail)
    solver = OrthogonalIterationSolver(eigh_fallback=falls_back)
    result = solver.inverse_root(matrix, 0.25, warm_start=vectors[1:] if has_start else None)
    assert result.accepted.tolist() == [False]
    assert torch.isfinite(result.roots).all()


def returns_one_eigenvalue_that_is_hardly_off(bad: Tensor) -> tuple[Tensor, Tensor]:
    values, vectors = REAL_EIGH(bad)
    values[..., 5] += 1e-4 * values.abs().amax()
    return values, vectors


def test_an_error_of_a_few_hundred_epsilons_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices = marked_batch()
    fake = FakeEigh(returns_one_eigenvalue_that_is_hardly_off, (torch.float32,))
    monkeypatch.setattr(torch.linalg, "eigh", fake)
    assert EighSolver().basis(matrices).accepted.all()
    assert fake.calls == [(torch.float32, 5), (torch.float64, 1)]


def test_a_first_basis_without_fallback_is_not_solved_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fake = FakeEigh(returns_nan, (torch.float32,))
    monkeypatch.setattr(torch.linalg, "eigh", fake)
    for solver in (OrthogonalIterationSolver(eigh_fallback=False), OrthogonalIterationSolver()):
        fake.calls.clear()
        basis = solver.basis(marked_batch())
        assert basis.accepted.tolist() == [True, True, solver.eigh_fallback, True, True]
        assert (torch.float64, 1) in fake.calls or not solver.eigh_fallback


def test_a_ridge_too_small_for_a_number_leaves_a_finite_root() -> None:
    matrices = torch.diag(torch.tensor([1.0, 0.0]))[None]
    result = EighSolver().inverse_root(matrices, 0.25, relative_ridge=1e-50)
    assert result.accepted.all()
    assert result.roots.isfinite().all()
    assert result.roots[0, 0, 0] == pytest.approx(1.0)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e20])
def test_roots_in_an_old_basis_are_judged_whatever_their_scale(scale: float) -> None:
    """One basis is as good as exact, the other turned where eigenvalues are far apart."""
    values = torch.logspace(0, -3, 6)
    matrices = scale * torch.diag(values).expand(2, -1, -1)
    starts = torch.eye(6).repeat(2, 1, 1)
    angle = torch.tensor(0.3)
    starts[1, :2, :2] = torch.stack(
        [torch.stack([angle.cos(), -angle.sin()]), torch.stack([angle.sin(), angle.cos()])]
    )
    solver = OrthogonalIterationSolver(eigh_fallback=False)
    result = solver.inverse_root(matrices, 0.25, warm_start=starts)
    assert result.accepted.tolist() == [True, False]


@pytest.mark.parametrize("at_once", [1, 3 * 40**2, 2**22])
def test_what_a_gpu_would_solve_by_jacobi_rotations_is_solved_in_float64(
    at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where all that is float32 and not small is."""
    monkeypatch.setattr(decomposition, "JACOBI_NUMEL", at_once)
    rows = torch.randn(7, 40, 60)
    matrices = torch.bmm(rows, rows.mT)
    values, vectors = decomposition.solved_in_double(matrices)
    assert values.dtype == vectors.dtype == torch.float32
    exact = torch.linalg.eigh(matrices.double())
    assert torch.equal(values, exact.eigenvalues.float())
    assert torch.equal(vectors, exact.eigenvectors.float())
