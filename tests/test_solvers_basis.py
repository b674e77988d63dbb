"""Eigenbases: eigendecomposition, warm-started orthogonal iteration, and the criterion."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hard_matrices import hard_matrices, hopeless_matrices, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shampoo_core.solvers import (
    BasisSolver,
    EighSolver,
    OrthogonalIterationSolver,
    off_diagonal_ratio,
    orthogonal_iteration,
)

DTYPES = (torch.float32, torch.float64)
SIDE = 256
DECAY = torch.arange(1, SIDE + 1, dtype=torch.float64) ** -1.5
SOLVERS: list[BasisSolver] = [
    EighSolver(),
    EighSolver(double_precision=True),
    OrthogonalIterationSolver(),
    OrthogonalIterationSolver(max_iterations=5, tolerance=0.01),
]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=str)


@pytest.fixture(params=["reflections", "products"])
def each_factorisation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bases are made orthonormal as on a CPU, and as on a GPU."""
    products = request.param == "products"
    monkeypatch.setattr(orthogonal_iteration, "prefers_products", lambda _: products)


def identity(matrices: Tensor) -> Tensor:
    return torch.eye(matrices.shape[-1], dtype=matrices.dtype).repeat(matrices.shape[0], 1, 1)


def orthogonality_error(basis: Tensor) -> float:
    return float((basis.mT @ basis - identity(basis)).abs().max())


def random_basis(side: int) -> Tensor:
    # A product of two: a factor that LAPACK made reproduces its own signs when factored again.
    first, _ = torch.linalg.qr(torch.randn(side, side, dtype=torch.float64))
    second, _ = torch.linalg.qr(torch.randn(side, side, dtype=torch.float64))
    return first @ second


def slow_drift(num_steps: int, rate: float) -> list[Tensor]:
    """Exact bases of a spectrum that turns by ``rate`` radians (in its fastest plane) a step."""
    basis = random_basis(SIDE)
    skew = torch.randn(SIDE, SIDE, dtype=torch.float64)
    skew = skew - skew.mT
    turn = torch.linalg.matrix_exp(rate * skew / torch.linalg.matrix_norm(skew, 2))
    bases = [basis]
    for _ in range(num_steps):
        bases.append(turn @ bases[-1])
    return bases


def factor(basis: Tensor, eigenvalues: Tensor = DECAY) -> Tensor:
    return ((basis * eigenvalues) @ basis.mT).float()[None]


# --- bases of hard matrices ---


@pytest.mark.usefixtures("each_factorisation")
@pytest.mark.parametrize("dtype", DTYPES)
@each_solver
def test_bases_of_hard_matrices(solver: BasisSolver, dtype: torch.dtype) -> None:
    """Orthogonal within 1e-5 (ALGORITHMS.md 5.9), descending, and exact when started exactly."""
    hard = hard_matrices(torch.finfo(dtype).eps)
    matrices = torch.from_numpy(np.stack([item.matrix for item in hard.values()])).to(dtype)
    exact = EighSolver().basis(matrices)
    result = solver.basis(matrices, exact.eigenvectors)
    assert result.accepted.all()
    assert orthogonality_error(result.eigenvectors) < 1e-5
    assert (result.eigenvalues.diff() <= 0).all()
    assert (off_diagonal_ratio(matrices, result.eigenvectors) < 1e-5).all()
    scales = matrices.abs().amax((1, 2))
    expected = torch.linalg.eigvalsh(matrices.double() / scales.double()[:, None, None]).flip(-1)
    actual = result.eigenvalues.double() / scales.double()[:, None]
    tolerance = 100 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=3 * tolerance)


@pytest.mark.usefixtures("each_factorisation")
@each_solver
def test_hopeless_matrices_keep_the_warm_start(solver: BasisSolver) -> None:
    matrices = torch.from_numpy(np.stack(list(hopeless_matrices().values()))).float()
    old = random_basis(matrices.shape[-1]).float().expand_as(matrices)
    result = solver.basis(matrices, old)
    assert not result.accepted.any()
    assert torch.equal(result.eigenvectors, old)
    assert (result.eigenvalues == 0).all()
    cold = solver.basis(matrices)
    assert torch.equal(cold.eigenvectors, identity(matrices))


@pytest.mark.usefixtures("each_factorisation")
@each_solver
def test_a_basis_does_not_depend_on_its_neighbours(solver: BasisSolver) -> None:
    matrix = factor(random_basis(SIDE))[:, :40, :40]
    broken = torch.full_like(matrix, float("nan"))
    old = identity(matrix)
    alone = solver.basis(matrix, old)
    mixed = solver.basis(torch.cat([broken, matrix, torch.zeros_like(matrix)]), old.repeat(3, 1, 1))
    assert mixed.accepted.tolist() == [False, True, False]
    torch.testing.assert_close(mixed.eigenvectors[1], alone.eigenvectors[0])
    torch.testing.assert_close(mixed.eigenvalues[1], alone.eigenvalues[0])


# --- orthogonal iteration ---


@pytest.mark.usefixtures("each_factorisation")
def test_single_iterations_converge_on_a_static_matrix() -> None:
    """Ascending order, as in facebookresearch/optimizers, stays near 0.98 (ALGORITHMS.md 3.5 a)."""
    matrix = factor(random_basis(SIDE))
    solver = OrthogonalIterationSolver()
    basis = identity(matrix)
    ratios = []
    for _ in range(10):
        basis = solver.basis(matrix, basis).eigenvectors
        ratios.append(off_diagonal_ratio(matrix, basis).item())
    assert ratios[0] < 0.4
    assert ratios == sorted(ratios, reverse=True)
    assert ratios[-1] < 1e-2
    assert orthogonality_error(basis) < 1e-5


@pytest.mark.usefixtures("each_factorisation")
@pytest.mark.parametrize("tolerance", [0.0, 0.01])
def test_a_slow_drift_is_followed(tolerance: float) -> None:
    """Ascending order leaves a ratio of 0.5 and more on this drift (ALGORITHMS.md 3.5 a)."""
    bases = slow_drift(40, 1e-3)
    solver = OrthogonalIterationSolver(tolerance=tolerance)
    basis = bases[0].float()[None]
    worst = 0.0
    for exact in bases[1:]:
        matrix = factor(exact)
        basis = solver.basis(matrix, basis).eigenvectors
        worst = max(worst, off_diagonal_ratio(matrix, basis).item())
    never = off_diagonal_ratio(factor(bases[-1]), bases[0].float()[None]).item()
    assert never > 0.02
    assert worst <= (tolerance or 1e-4)
    assert orthogonality_error(basis) < 1e-5


@pytest.mark.usefixtures("each_factorisation")
@pytest.mark.parametrize("tolerance", [0.0, 1e-9, 0.5])
def test_order_says_which_column_a_column_came_from(tolerance: float) -> None:
    """From exact but shuffled eigenvectors: columns only change places, and keep their signs."""
    exact = random_basis(12)
    eigenvalues = 2.0 ** -torch.arange(12, dtype=torch.float64)
    matrix = ((exact * eigenvalues) @ exact.mT)[None]
    shuffle = torch.randperm(12)
    old = exact[:, shuffle][None]
    solver = OrthogonalIterationSolver(max_iterations=2, tolerance=tolerance)
    result = solver.basis(matrix, old)
    assert result.order is not None
    assert torch.equal(shuffle[result.order[0]], torch.arange(12))
    moved = old.gather(-1, result.order[:, None, :].expand_as(old))
    torch.testing.assert_close(result.eigenvectors, moved)
    if tolerance == 0.5:  # nothing but the order has changed
        assert torch.equal(result.eigenvectors, moved)


@pytest.mark.usefixtures("each_factorisation")
def test_each_matrix_stops_at_its_own_tolerance() -> None:
    bases = slow_drift(1, 0.05)
    matrices = torch.cat([factor(bases[0]), factor(bases[1])])
    old = bases[0].float().expand(2, -1, -1)
    tolerance = 0.2 * off_diagonal_ratio(matrices, old)[1].item()
    result = OrthogonalIterationSolver(max_iterations=20, tolerance=tolerance).basis(matrices, old)
    assert torch.equal(result.eigenvectors[0], old[0])
    ratios = off_diagonal_ratio(matrices, result.eigenvectors)
    # It stops soon after it may: twenty iterations would have gone far below.
    assert 0.01 * tolerance < ratios[1] <= tolerance
    alone = OrthogonalIterationSolver(max_iterations=20, tolerance=tolerance).basis(
        matrices[1:], old[1:]
    )
    torch.testing.assert_close(result.eigenvectors[1], alone.eigenvectors[0])


@pytest.mark.usefixtures("each_factorisation")
def test_columns_keep_their_direction() -> None:
    bases = slow_drift(1, 0.01)
    old = bases[0].float()[None]
    result = OrthogonalIterationSolver().basis(factor(bases[1]), old)
    assert result.order is not None
    moved = old.gather(-1, result.order[:, None, :].expand_as(old))
    leading = (result.eigenvectors * moved).sum(-2)[0, :64]
    assert leading.min() > 0.9


def test_the_first_basis_is_an_eigendecomposition() -> None:
    matrix = factor(random_basis(SIDE))
    cold = OrthogonalIterationSolver().basis(matrix)
    assert torch.equal(cold.eigenvectors, EighSolver().basis(matrix).eigenvectors)
    assert cold.order is None


@pytest.mark.usefixtures("each_factorisation")
def test_roots_from_a_warm_start() -> None:
    """A good basis serves; a bad one is found out, and the root comes from eigh instead."""
    bases = slow_drift(1, 1e-5)
    matrices = torch.cat([factor(bases[0]), factor(bases[1]), torch.zeros(1, SIDE, SIDE)])
    exact = EighSolver().inverse_root(matrices, 0.25, relative_ridge=1e-4)
    first = OrthogonalIterationSolver().inverse_root(matrices, 0.25, relative_ridge=1e-4)
    assert first.eigenvectors is not None
    bad = random_basis(SIDE).float().expand(3, -1, -1)
    without = OrthogonalIterationSolver(eigh_fallback=False)
    for solver, warm_start, expected in (
        (without, first.eigenvectors, [True, True, False]),
        (without, bad, [False, False, False]),
        (OrthogonalIterationSolver(), bad, [True, True, False]),
    ):
        result = solver.inverse_root(matrices, 0.25, relative_ridge=1e-4, warm_start=warm_start)
        assert result.accepted.tolist() == expected
        assert result.roots.isfinite().all()
        good = result.accepted
        torch.testing.assert_close(result.roots[good], exact.roots[good], rtol=1e-2, atol=1e-2)
        assert result.eigenvectors is not None
        assert (off_diagonal_ratio(matrices, result.eigenvectors)[good] < 1e-4).all()


# --- the criterion ---


@settings(deadline=None, max_examples=30)
@given(st.integers(1, 10), st.integers(0, 2**20), st.sampled_from([1e-30, 1.0, 1e30]))
def test_the_criterion_is_that_of_the_paper(side: int, seed: int, scale: float) -> None:
    generator = np.random.default_rng(seed)
    matrix = with_spectrum(generator.random(side), seed)
    basis, _ = np.linalg.qr(generator.standard_normal((side, side)))
    rotated = basis.T @ matrix @ basis
    expected = np.linalg.norm(rotated - np.diag(np.diag(rotated))) / np.linalg.norm(rotated)
    matrices = torch.from_numpy(scale * matrix).float()[None]
    columns = generator.permutation(side)
    signs = generator.choice([-1.0, 1.0], side)
    for variant in (basis, basis * signs, basis[:, columns]):
        ratio = off_diagonal_ratio(matrices, torch.from_numpy(variant).float()[None])
        assert abs(ratio.item() - expected) < 1e-5


def test_small_ratios_are_resolved() -> None:
    """By subtraction of norms this one comes out as exactly 0, and others as 3e-4 (3.5 b)."""
    matrix = torch.diag(DECAY).float()
    matrix[0, 1] = matrix[1, 0] = 2e-6
    expected = 2e-6 * 2**0.5 / DECAY.norm().item()
    ratio = off_diagonal_ratio(matrix[None], torch.eye(SIDE)[None]).item()
    assert abs(ratio / expected - 1) < 1e-3


def test_ratios_of_hopeless_matrices() -> None:
    matrices = torch.from_numpy(np.stack(list(hopeless_matrices().values()))).float()
    ratios = off_diagonal_ratio(matrices, identity(matrices))
    assert ratios[:5].tolist() == [0.0] + 4 * [float("inf")]
    assert 0 < ratios[5] < 1
    with pytest.raises(ValueError, match=r"shape of matrices"):
        off_diagonal_ratio(matrices, identity(matrices)[:1])
