"""The laws that hold for all solvers, the door, and the repairs of the eigendecomposition."""

from __future__ import annotations

import contextlib
import doctest
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from hard_matrices import SIDE, hard_matrices, hopeless_matrices, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from shampoo_core.counting import OperationCounter
from shampoo_core.solvers import (
    BasisSolver,
    ChebyshevSolver,
    CoupledNewtonSolver,
    EighSolver,
    HigherOrderNewtonSolver,
    NewtonDBSolver,
    OrthogonalIterationSolver,
    RootSolver,
    coupled_newton,
)
from shampoo_core.solvers.precision import full_precision

SOLVERS: list[RootSolver] = [
    EighSolver(),
    EighSolver(double_precision=True),
    OrthogonalIterationSolver(),
    CoupledNewtonSolver(),
    HigherOrderNewtonSolver(),
    NewtonDBSolver(),
    ChebyshevSolver(),
]
BASIS_SOLVERS: list[BasisSolver] = [EighSolver(), OrthogonalIterationSolver()]
each_solver = pytest.mark.parametrize("solver", SOLVERS, ids=lambda solver: type(solver).__name__)


def batch(num_matrices: int, dtype: torch.dtype = torch.float32, side: int = 24) -> Tensor:
    """Different healthy matrices, condition about 100."""
    spectrum = np.arange(1, side + 1) ** -1.5 + 1e-3
    stack = np.stack([with_spectrum(spectrum, seed) for seed in range(num_matrices)])
    return torch.from_numpy(stack).to(dtype)


# --- laws ---


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


@pytest.mark.parametrize(
    ("call", "num_operations", "num_synchronisations"),
    [
        (lambda a: EighSolver().inverse_root(a, 0.25), 44, 1),
        (lambda a: EighSolver().basis(a), 44, 1),
        (lambda a: OrthogonalIterationSolver().basis(a, a), 36, 0),
        (lambda a: OrthogonalIterationSolver(tolerance=0.1).basis(a, a), 44, 0),
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


def test_roots_of_parameters_do_not_record_gradients() -> None:
    matrices = batch(2).requires_grad_()
    assert not EighSolver().inverse_root(matrices, 0.25).roots.requires_grad
    assert not CoupledNewtonSolver().inverse_root(matrices, 0.25).roots.requires_grad


def test_examples_in_docstrings() -> None:
    outcome = doctest.testmod(coupled_newton)
    assert outcome.attempted > 0
    assert outcome.failed == 0


# --- the door ---


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
        (lambda: HigherOrderNewtonSolver(order=1), r"order must be in \[2, 8\], got 1"),
        (lambda: NewtonDBSolver(max_iterations=-3), r"max_iterations .* got -3"),
        (lambda: ChebyshevSolver(degree=1), r"degree .* got 1"),
        (lambda: ChebyshevSolver(residual_bound=float("nan")), r"residual_bound .* got nan"),
    ],
)
def test_settings_out_of_range(make: Callable[[], RootSolver], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


# --- repairs of the eigendecomposition ---

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


def test_batches_of_one_call_share_operations_and_the_synchronisation() -> None:
    batches = [batch(3)[:, :side, :side].contiguous() for side in (2, 3, 5, 6, 7, 8)]
    exponents = [0.25, 0.5, 0.25, 1 / 6, 0.25, 0.25]
    with OperationCounter() as ops:
        results = EighSolver().inverse_roots(batches, exponents)
    assert ops.num_synchronisations == 1
    assert ops.num_operations <= 44 + 5 * 7
    for matrices, exponent, result in zip(batches, exponents, results, strict=True):
        alone = EighSolver().inverse_root(matrices, exponent)
        torch.testing.assert_close(result.roots, alone.roots, rtol=1e-5, atol=1e-6)
        assert torch.equal(result.accepted, alone.accepted)
