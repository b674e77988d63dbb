"""The laws that hold for all solvers."""

from __future__ import annotations

import contextlib
import doctest
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from solver_cases import BASIS_SOLVERS, batch, each_solver
from torch import Tensor

from shampoo_core.counting import OperationCounter
from shampoo_core.live_memory import LiveMemory
from shampoo_core.solvers import (
    BasisSolver,
    ChebyshevSolver,
    CoupledNewtonSolver,
    EighSolver,
    NewtonDBSolver,
    OrthogonalIterationSolver,
    RootSolver,
    coupled_newton,
    scaling,
)
from shampoo_core.solvers.base import Regularization
from shampoo_core.solvers.precision import full_precision


@settings(deadline=None, max_examples=40)
@given(
    st.integers(1, 12),
    st.integers(0, 12),
    st.sampled_from([1, 2, 3, 4, 6, 8]),
    st.integers(0, 2**20),
)
def test_root_to_the_power_p_times_the_matrix_is_a_projector(
    side: int, rank: int, p: int, seed: int
) -> None:
    generator = np.random.default_rng(seed)
    columns = generator.standard_normal((side, min(rank, side)))
    matrix = torch.from_numpy(columns @ columns.T)[None]
    result = EighSolver().inverse_root(matrix, 1 / p, rank_tolerance=1e-10)
    if rank == 0:
        assert not result.accepted.any()
        return
    assert result.accepted.all()
    projector = torch.linalg.matrix_power(result.roots, p) @ matrix
    expected = torch.from_numpy(columns @ np.linalg.pinv(columns))[None]
    condition = np.linalg.cond(columns) ** 2
    torch.testing.assert_close(projector, expected, rtol=0.0, atol=1e-14 * condition + 1e-10)


@each_solver
def test_roots_scale_with_the_matrix(solver: RootSolver) -> None:
    matrices = batch(2, torch.float64)
    root = solver.inverse_root(matrices, 0.25, relative_ridge=1e-3).roots
    for factor in (1e-20, 3.0, 1e20):
        scaled = solver.inverse_root(factor * matrices, 0.25, relative_ridge=1e-3).roots
        torch.testing.assert_close(scaled * factor**0.25, root, rtol=1e-9, atol=1e-9)


@each_solver
def test_roots_turn_with_the_matrix(solver: RootSolver) -> None:
    matrices = batch(2, torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64))
    root = solver.inverse_root(matrices, 0.5, ridge=1e-2).roots
    turned = solver.inverse_root(turn @ matrices @ turn.mT, 0.5, ridge=1e-2).roots
    # The iterative solvers bound the spectrum by norms that depend on the basis.
    torch.testing.assert_close(turned, turn @ root @ turn.mT, rtol=0.0, atol=0.05)
    if not isinstance(solver, ChebyshevSolver):
        torch.testing.assert_close(turned, turn @ root @ turn.mT, rtol=1e-4, atol=1e-4)


@each_solver
def test_inputs_are_left_alone(solver: RootSolver) -> None:
    matrices = batch(3)
    before = matrices.clone()
    solver.inverse_root(matrices, 0.25, ridge=1e-3)
    assert torch.equal(matrices, before)


@each_solver
def test_roots_are_symmetric(solver: RootSolver) -> None:
    root = solver.inverse_root(batch(3), 0.25).roots
    torch.testing.assert_close(root, root.mT, rtol=0.0, atol=1e-6 * root.abs().max().item())


@each_solver
def test_an_empty_batch_is_no_error(solver: RootSolver) -> None:
    result = solver.inverse_root(torch.zeros(0, 4, 4), 0.25)
    assert result.roots.shape == (0, 4, 4)
    assert result.accepted.shape == (0,)


@each_solver
def test_calls_are_repeatable_and_draw_no_random_numbers(solver: RootSolver) -> None:
    state = torch.random.get_rng_state()
    first = solver.inverse_root(batch(3), 0.25).roots
    assert torch.equal(first, solver.inverse_root(batch(3), 0.25).roots)
    assert torch.equal(state, torch.random.get_rng_state())


def several_batches() -> list[Tensor]:
    """Of different sides and sizes, one empty, with a zero and a NaN matrix among them."""
    batches = [batch(2, side=24), batch(1, side=5), torch.zeros(0, 7, 7), batch(3, side=11)]
    batches[0][1] = 0.0
    batches[3][0] = float("nan")
    return batches


@pytest.mark.parametrize("ridges", [{}, {"ridge": 1e-3}, {"relative_ridge": 1e-3}])
@each_solver
def test_several_batches_in_one_call(solver: RootSolver, ridges: dict[str, float]) -> None:
    batches, exponents = several_batches(), [0.25, 0.5, 0.25, 1.0]
    with OperationCounter() as ops:
        together = solver.inverse_roots(batches, exponents, **ridges)
    # One to learn whether anything failed; where something did, as for Chebyshev with exponent 1,
    # the repair costs more.
    assert ops.num_synchronisations <= 1 or isinstance(solver, ChebyshevSolver)
    for one, matrices, exponent in zip(together, batches, exponents, strict=True):
        alone = solver.inverse_root(matrices, exponent, **ridges)
        assert torch.equal(one.accepted, alone.accepted)
        torch.testing.assert_close(one.roots, alone.roots, rtol=1e-5, atol=1e-5)
    assert together[0].accepted.tolist() == [True, "ridge" in ridges]
    assert together[3].accepted.tolist() == [False, True, True]


@pytest.mark.parametrize("solver", BASIS_SOLVERS, ids=lambda solver: type(solver).__name__)
def test_bases_of_several_batches_in_one_call(solver: BasisSolver) -> None:
    batches = several_batches()
    starts = [torch.eye(matrices.shape[-1]).expand_as(matrices) for matrices in batches]
    for warm in (None, starts):
        together = solver.bases(batches, warm)
        for i, (one, matrices) in enumerate(zip(together, batches, strict=True)):
            alone = solver.basis(matrices, None if warm is None else warm[i])
            assert torch.equal(one.accepted, alone.accepted)
            torch.testing.assert_close(one.eigenvalues, alone.eigenvalues)
            torch.testing.assert_close(one.eigenvectors, alone.eigenvectors)


def test_a_wider_batch_beside_it_does_not_overflow_a_root() -> None:
    """Batches are solved side by side, narrower ones filled up: filling has no spectrum."""
    narrow, wide = 1e-28 * torch.eye(2)[None], torch.eye(5)[None]
    results = EighSolver().inverse_roots([narrow, wide], [1.3, 1.3], relative_ridge=1e-6)
    assert all(result.accepted.all() for result in results)
    expected = (1e-28 * (1 + 1e-6)) ** -1.3
    torch.testing.assert_close(results[0].roots[0] / expected, torch.eye(2), rtol=1e-4, atol=0.0)


def test_failures_in_several_batches_share_one_fallback() -> None:
    few = CoupledNewtonSolver(max_iterations=2)
    batches, exponents = several_batches(), [0.25, 0.5, 0.25, 1.0]
    results = few.inverse_roots(batches, exponents)
    expected = EighSolver().inverse_roots(batches, exponents, relative_ridge=1e-6)
    for result, exact in zip(results, expected, strict=True):
        assert torch.equal(result.accepted, exact.accepted)
        torch.testing.assert_close(result.roots, exact.roots)


@each_solver
def test_number_of_operations_does_not_grow_with_the_batch(solver: RootSolver) -> None:
    counts = []
    for num_matrices in (1, 9):
        matrices = batch(num_matrices)
        with OperationCounter() as ops:
            result = solver.inverse_root(matrices, 0.25)
        assert result.accepted.all()
        counts.append(ops.num_operations)
        assert ops.num_synchronisations <= 1
    assert counts[0] == counts[1]


@pytest.mark.usefixtures("as_on_an_accelerator")
@pytest.mark.parametrize(
    ("call", "num_operations", "num_synchronisations"),
    [
        (lambda a: EighSolver().inverse_root(a, 0.25), 49, 1),
        (lambda a: EighSolver().basis(a), 48, 1),
        (lambda a: OrthogonalIterationSolver(eigh_fallback=False).basis(a, a), 70, 0),
        (lambda a: OrthogonalIterationSolver().basis(a, torch.eye(24).expand_as(a)), 73, 1),
        (
            lambda a: OrthogonalIterationSolver(tolerance=0.1).basis(a, torch.eye(24).expand_as(a)),
            82,
            1,
        ),
        (lambda a: CoupledNewtonSolver(eigh_fallback=False).inverse_root(a, 0.25), 600, 0),
        (lambda a: CoupledNewtonSolver().inverse_root(a, 0.25), 600, 1),
        (lambda a: NewtonDBSolver(eigh_fallback=False).inverse_root(a, 0.25), 900, 0),
        (lambda a: ChebyshevSolver(eigh_fallback=False).inverse_root(a, 0.25), 300, 0),
    ],
)
def test_operations_and_synchronisations_of_a_call(
    call: Callable[[Tensor], object], num_operations: int, num_synchronisations: int
) -> None:
    matrices = batch(4)
    with OperationCounter() as ops:
        call(matrices)
    assert ops.num_operations <= num_operations
    assert ops.num_synchronisations == num_synchronisations


@each_solver
def test_surrounding_precision_settings_have_no_effect(solver: RootSolver) -> None:
    matrices = batch(3)
    expected = solver.inverse_root(matrices, 0.25).roots
    with matmul_precision("medium"), torch.autocast("cpu", dtype=torch.bfloat16):
        actual = solver.inverse_root(matrices, 0.25).roots
    assert torch.equal(actual, expected)


@contextlib.contextmanager
def matmul_precision(setting: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("setting", ["highest", "high", "medium"])
def test_full_precision_holds_inside_and_ends_with_the_block(setting: str) -> None:
    left, right = torch.randn(64, 64), torch.randn(64, 64)
    exact = left @ right
    with matmul_precision(setting):
        tf32 = torch.backends.cuda.matmul.allow_tf32
        with (
            contextlib.suppress(KeyError),
            torch.autocast("cpu", dtype=torch.bfloat16),
            full_precision(left.device),
        ):
            assert torch.get_float32_matmul_precision() == "highest"
            assert not torch.backends.cuda.matmul.allow_tf32
            assert not torch.is_grad_enabled()
            assert torch.equal(left @ right, exact)
            raise KeyError("an exception restores the settings too")
        assert torch.get_float32_matmul_precision() == setting
        assert torch.backends.cuda.matmul.allow_tf32 == tf32
        assert torch.is_grad_enabled()


def test_full_precision_with_the_newer_settings() -> None:
    matmul = torch.backends.cuda.matmul
    if not hasattr(matmul, "fp32_precision"):
        pytest.skip("torch before 2.9")
    before = matmul.fp32_precision
    try:
        matmul.fp32_precision = "tf32"
        with full_precision(torch.device("cpu")):
            assert matmul.fp32_precision == "ieee"
        assert matmul.fp32_precision == "tf32"
    finally:
        matmul.fp32_precision = before


@pytest.mark.parametrize("ridge", [0.0, 1e-3])
@each_solver
def test_overwriting_the_matrices_changes_no_root(solver: RootSolver, ridge: float) -> None:
    batches, exponents = (
        [*several_batches(), torch.full((2, 1, 1), 3.0)],
        [0.25, 0.5, 0.25, 1.0, 0.5],
    )
    expected = solver.inverse_roots(batches, exponents, ridge=ridge)
    given = [matrices.clone() for matrices in batches]
    found = solver.inverse_roots(given, exponents, ridge=ridge, overwrite=True)
    for own, one in zip(found, expected, strict=True):
        assert torch.equal(own.accepted, one.accepted)
        torch.testing.assert_close(own.roots, one.roots, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("solver", BASIS_SOLVERS, ids=lambda solver: type(solver).__name__)
@pytest.mark.parametrize("warm", [False, True])
def test_overwriting_the_matrices_changes_no_basis(solver: BasisSolver, warm: bool) -> None:
    batches = [*several_batches(), torch.full((2, 1, 1), 3.0)]
    starts = [torch.eye(matrices.shape[-1]).expand_as(matrices) for matrices in batches]
    expected = solver.bases(batches, starts if warm else None)
    given = [matrices.clone() for matrices in batches]
    found = solver.bases(given, starts if warm else None, overwrite=True)
    for own, one in zip(found, expected, strict=True):
        assert torch.equal(own.accepted, one.accepted)
        torch.testing.assert_close(own.eigenvectors, one.eigenvectors)
        torch.testing.assert_close(own.eigenvalues, one.eigenvalues)


@pytest.mark.parametrize(("overwrite", "most"), [(False, 3.1), (True, 2.1)])
def test_memory_of_an_eigendecomposition_in_units_of_the_matrices(
    overwrite: bool, most: float
) -> None:
    matrices = batch(2, side=512)
    for solve in (
        lambda given: EighSolver().bases([given], overwrite=overwrite),
        lambda given: EighSolver().inverse_roots([given], [0.25], overwrite=overwrite),
    ):
        with LiveMemory() as memory:
            solve(matrices.clone())
        assert memory.peak <= most * matrices.nbytes


def test_roots_of_parameters_do_not_record_gradients() -> None:
    matrices = batch(2).requires_grad_()
    assert not EighSolver().inverse_root(matrices, 0.25).roots.requires_grad
    assert not CoupledNewtonSolver().inverse_root(matrices, 0.25).roots.requires_grad


def test_largest_entries_are_the_same_by_norm_and_by_extremes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    batches = [batch(3), -batch(2)[:, :3, :3], batch(1)[:, :1, :1], batch(3)[:0]]
    batches[0][1, 2, 3], batches[1][0, 0, 1], batches[1][1, 2, 2] = (
        float("nan"),
        -7e9,
        -float("inf"),
    )
    by_extremes = scaling.largest_entries(batches)
    monkeypatch.setattr(scaling, "_norm_is_slow", lambda *_: False)
    expected = torch.cat([each.abs().flatten(1).amax(-1) for each in batches])
    for found in (by_extremes, scaling.largest_entries(batches)):
        torch.testing.assert_close(found, expected, rtol=0.0, atol=0.0, equal_nan=True)


@pytest.mark.parametrize(
    "solver", [EighSolver(), EighSolver(double_precision=True), OrthogonalIterationSolver()]
)
def test_eigenvectors_that_come_with_roots_are_those_of_the_matrices(solver: Any) -> None:
    """Orthonormal, and the roots are diagonal in them: a refresh that tests them keeps them."""
    spread = torch.linspace(1.0, 100.0, 12, dtype=torch.float64).diag()
    turns = torch.linalg.qr(torch.randn(3, 12, 12, dtype=torch.float64)).Q
    matrices = turns @ spread @ turns.mT
    result = solver.inverse_root(matrices, 0.25, warm_start=turns.flip(-1).contiguous())
    vectors = result.eigenvectors
    identity = torch.eye(12, dtype=torch.float64).expand(3, -1, -1)
    torch.testing.assert_close(vectors.mT @ vectors, identity)
    for matrix, expected in (
        (matrices, spread),
        (result.roots, spread.diagonal().pow(-0.25).diag()),
    ):
        found = vectors.mT @ matrix @ vectors
        largest_first = expected.diagonal().flip(0).diag().expand(3, -1, -1)
        torch.testing.assert_close(found, largest_first, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("ridges", [(1e-12, 0.0), (0.0, 1e-12)])
def test_a_ridge_below_rounding_is_all_that_null_directions_have(
    ridges: tuple[float, float],
) -> None:
    """Eigenvalues that rounding has made negative are taken for zero before it is added."""
    values = torch.tensor([[1.0, 1e-3, -1e-8], [1.0, 0.0, -1.0]], dtype=torch.float64)
    powers, accepted = scaling.spectral_power(
        values, torch.ones(2, dtype=torch.float64), 0.25, Regularization(0.0, *ridges)
    )
    expected = (values.clamp_min(0.0) + 1e-12) ** -0.25
    assert accepted.all()
    torch.testing.assert_close(powers, expected, rtol=1e-9, atol=0.0)


def test_examples_in_docstrings() -> None:
    outcome = doctest.testmod(coupled_newton)
    assert outcome.attempted > 0
    assert outcome.failed == 0


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_batches_of_one_call_share_operations_and_the_synchronisation() -> None:
    batches = [batch(3)[:, :side, :side].contiguous() for side in (2, 3, 5, 6, 7, 8)]
    exponents = [0.25, 0.5, 0.25, 1 / 6, 0.25, 0.25]
    with OperationCounter() as ops:
        results = EighSolver().inverse_roots(batches, exponents)
    assert ops.num_synchronisations == 1
    assert ops.num_operations <= 48 + 5 * 8
    for matrices, exponent, result in zip(batches, exponents, results, strict=True):
        alone = EighSolver().inverse_root(matrices, exponent)
        torch.testing.assert_close(result.roots, alone.roots, rtol=1e-5, atol=1e-6)
        assert torch.equal(result.accepted, alone.accepted)
