"""Orthonormal columns by matrix products: what reflections give, on spectra that spoil Cholesky factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from shampoo_core.counting import OperationCounter
from shampoo_core.solvers import OrthogonalIterationSolver, orthogonal_iteration
from shampoo_core.solvers.orthonormal import are_orthogonal, by_products, by_reflections

SIDE = 128
SPECTRA = {
    "flat": torch.linspace(1.0, 0.1, SIDE),
    "condition 1e9": torch.logspace(0, -9, SIDE),
    "half of full rank": torch.logspace(0, -3, SIDE) * (torch.arange(SIDE) < SIDE // 2),
    "rank 1": torch.eye(SIDE)[0],
    "zero": torch.zeros(SIDE),
}


@pytest.fixture(autouse=True)
def _products(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(orthogonal_iteration, "prefers_products", lambda _: True)


def turned(basis: Tensor, angle: float) -> Tensor:
    """A basis whose fastest plane is turned by some radians."""
    skew = torch.randn(SIDE, SIDE, dtype=torch.float64)
    skew = skew - skew.mT
    return basis @ torch.linalg.matrix_exp(angle * skew / torch.linalg.matrix_norm(skew, 2))


def problem(name: str, angle: float, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A factor and a basis that its eigenvectors have turned away from, (1, d, d) each."""
    exact, _ = torch.linalg.qr(torch.randn(SIDE, SIDE, dtype=torch.float64))
    matrix = (exact * SPECTRA[name].double()) @ exact.mT
    return matrix.to(dtype)[None], turned(exact, angle).to(dtype)[None]


def as_they_are(vectors: Tensor) -> Tensor:
    return torch.arange(SIDE).expand(len(vectors), SIDE)


@pytest.mark.parametrize("name", [name for name in SPECTRA if name != "zero"])
@pytest.mark.parametrize("angle", [0.01, 1.0, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_are_as_orthogonal_as_rounding_allows(
    name: str, angle: float, dtype: torch.dtype
) -> None:
    matrix, start = problem(name, angle, dtype)
    basis = by_products(matrix @ start, start, as_they_are(start))
    error = (basis.mT @ basis - torch.eye(SIDE, dtype=dtype)).abs().max()
    assert error < 4 * SIDE**0.5 * torch.finfo(dtype).eps
    assert are_orthogonal(basis).all()


@pytest.mark.parametrize("name", ["flat", "condition 1e9"])
def test_they_are_those_of_reflections(name: str) -> None:
    """Where eigenvalues are far above rounding, Q is unique."""
    matrix, start = problem(name, 0.3, torch.float64)
    order = torch.randperm(SIDE)[None]
    expected = by_reflections(matrix @ start, start, order)
    torch.testing.assert_close(
        by_products(matrix @ start, start, order), expected, rtol=0.0, atol=1e-5
    )


def test_null_directions_stay_what_they_were() -> None:
    matrix, start = problem("rank 1", 0.0, torch.float32)
    basis = by_products(matrix @ start, start, as_they_are(start))
    torch.testing.assert_close(basis, start, rtol=0.0, atol=0.1)
    aligned = (basis * start).sum(-2)
    assert aligned.min() > 0.99


@pytest.mark.parametrize("name", SPECTRA)
def test_an_iteration_diagonalises_as_well_as_by_reflections(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    matrix, start = problem(name, 0.5, torch.float32)
    found = OrthogonalIterationSolver().basis(matrix, start)
    monkeypatch.setattr(orthogonal_iteration, "prefers_products", lambda _: False)
    expected = OrthogonalIterationSolver().basis(matrix, start)
    assert torch.equal(found.accepted, expected.accepted)
    # In units of the largest eigenvalue: directions of eigenvalues near rounding converge otherwise.
    torch.testing.assert_close(found.eigenvalues, expected.eigenvalues, rtol=0.0, atol=5e-5)
    if name == "zero":
        assert torch.equal(found.eigenvectors, start)


@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_matrices_are_taken_some_at_a_time(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, starts = three()
    expected = OrthogonalIterationSolver(max_iterations=2).basis(matrices, starts)
    monkeypatch.setattr(orthogonal_iteration, "NUMEL_AT_ONCE", at_once * SIDE**2)
    sizes = []

    def noted(*arguments: Tensor) -> Tensor:
        sizes.append(len(arguments[0]))
        return by_products(*arguments)

    monkeypatch.setattr(orthogonal_iteration, "by_products", noted)
    found = OrthogonalIterationSolver(max_iterations=2).basis(matrices, starts)
    assert sizes[::2] == [len(part) for part in matrices.split(at_once)]
    for left, right in zip(found, expected, strict=True):
        assert left is not None and right is not None
        torch.testing.assert_close(left, right, rtol=0.0, atol=1e-6)


def some_fail(monkeypatch: pytest.MonkeyPatch, *, last: bool = False) -> None:
    """The second matrix, or the last one, is beyond Cholesky factors."""
    honest = by_products

    def spoilt(*arguments: Tensor) -> Tensor:
        basis = honest(*arguments)
        basis[-1 if last else 1] = torch.nan
        return basis

    monkeypatch.setattr(orthogonal_iteration, "by_products", spoilt)


def three() -> tuple[Tensor, Tensor]:
    pairs = [problem("condition 1e9", 0.1, torch.float32) for _ in range(3)]
    matrices, starts = (torch.cat(side) for side in zip(*pairs, strict=True))
    return matrices, starts


def test_what_fails_alone_is_made_by_reflections(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, starts = three()
    solver = OrthogonalIterationSolver()
    expected = solver.basis(matrices, starts)
    some_fail(monkeypatch)
    with OperationCounter() as counter:
        found = solver.basis(matrices, starts)
    assert counter.num_synchronisations >= 1
    assert found.accepted.all() and are_orthogonal(found.eigenvectors).all()
    assert torch.equal(found.eigenvectors[::2], expected.eigenvectors[::2])
    monkeypatch.setattr(orthogonal_iteration, "prefers_products", lambda _: False)
    by_lapack = solver.basis(matrices[1:2], starts[1:2])
    assert torch.equal(found.eigenvectors[1:2], by_lapack.eigenvectors)
    assert torch.equal(found.order[1:2], by_lapack.order)  # type: ignore[index, arg-type]


@pytest.mark.parametrize("at_once", [1, 2, 3])
@pytest.mark.parametrize("fallback", [True, False])
def test_results_can_lie_in_the_memory_of_the_matrices(
    at_once: int, fallback: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is solved again has not been overwritten."""
    monkeypatch.setattr(orthogonal_iteration, "NUMEL_AT_ONCE", at_once * SIDE**2)
    some_fail(monkeypatch, last=True)
    matrices, starts = three()
    before = matrices.clone()
    solver = OrthogonalIterationSolver(eigh_fallback=fallback)
    (expected,) = solver.bases([matrices], [starts])
    assert torch.equal(matrices, before)
    (found,) = solver.bases([matrices], [starts], overwrite=True)
    assert found.eigenvectors.data_ptr() == matrices.data_ptr()
    for left, right in zip(found, expected, strict=True):
        assert left is not None and right is not None and torch.equal(left, right)
    assert found.accepted.all() == fallback


def test_without_fallback_it_keeps_its_warm_start(monkeypatch: pytest.MonkeyPatch) -> None:
    matrices, starts = three()
    some_fail(monkeypatch)
    with OperationCounter() as counter:
        found = OrthogonalIterationSolver(eigh_fallback=False).basis(matrices, starts)
    assert counter.num_synchronisations == 0
    assert found.accepted.tolist() == [True, False, True]
    assert torch.equal(found.eigenvectors[1], starts[1])
    assert found.order is not None and found.order[1].tolist() == list(range(SIDE))
    assert not found.eigenvalues[1].any()


@pytest.mark.parametrize(("error", "is_accepted"), [(1e-6, True), (1e-3, False)])
def test_a_basis_that_is_not_orthogonal_is_found(
    error: float, is_accepted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Finite, but too far from orthogonal: a Cholesky factor can be that bad without a sign of it."""
    matrices, starts = three()
    monkeypatch.setattr(
        orthogonal_iteration, "by_products", lambda *a: (1.0 + error / 2) * by_products(*a)
    )
    found = OrthogonalIterationSolver(eigh_fallback=False).basis(matrices, starts)
    assert found.accepted.tolist() == [is_accepted] * 3
    assert is_accepted or torch.equal(found.eigenvectors, starts)
    assert are_orthogonal(OrthogonalIterationSolver().basis(matrices, starts).eigenvectors).all()


@pytest.mark.parametrize("scale", [1e-38, 1.0, 2e37])
def test_only_what_has_a_basis_is_made_again(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not matrices that are zero or not finite, whatever the scale of the others."""
    matrices, starts = three()
    hopeless = torch.zeros_like(matrices)
    hopeless[1, 0, 1] = torch.nan
    hopeless[2] = torch.inf
    both, both_starts = torch.cat([scale * matrices, hopeless]), torch.cat([starts, starts])
    repaired = []

    def reflected(products: Tensor, vectors: Tensor, order: Tensor) -> Tensor:
        repaired.append(len(products))
        return by_reflections(products, vectors, order)

    monkeypatch.setattr(orthogonal_iteration, "by_reflections", reflected)
    found = OrthogonalIterationSolver().basis(both, both_starts)
    assert found.accepted.tolist() == [True] * 3 + [False] * 3 and not repaired
    assert torch.equal(found.eigenvectors[3:], starts)
    some_fail(monkeypatch)
    assert (
        OrthogonalIterationSolver().basis(both, both_starts).accepted.tolist()
        == [True] * 3 + [False] * 3
    )
    assert repaired == [1]


def test_bases_that_stay_are_not_held_against_their_rounding() -> None:
    """In few bits a basis is not quite orthogonal; within the tolerance it stays what it is."""
    matrices, _ = three()
    exact = torch.linalg.eigh(matrices.double()).eigenvectors.flip(-1).float()
    rounded = (exact * 128).round() / 128
    solver = OrthogonalIterationSolver(tolerance=0.5, eigh_fallback=False)
    found = solver.basis(matrices, rounded)
    assert not are_orthogonal(found.eigenvectors).any()
    assert found.accepted.all() and found.order is not None
    expected = rounded.gather(-1, found.order[:, None, :].expand_as(rounded))
    assert torch.equal(found.eigenvectors, expected)


def test_a_start_that_wants_gradients_gets_none() -> None:
    matrices, starts = three()
    found = OrthogonalIterationSolver().basis(matrices, starts.requires_grad_())
    assert not found.eigenvectors.requires_grad
