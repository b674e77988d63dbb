"""Algebra, schedules and Shampoo of the references, each against a second way to compute it."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference
from reference import algebra
from reference.algebra import Array
from reference.compare import assert_close, gradients


def power(matrix: Array, exponent: float) -> Array:
    """Symmetric positive definite matrix power by SVD."""
    u, values, vt = np.linalg.svd(matrix)
    return np.asarray((u * values**exponent) @ vt)


# --- algebra ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4,), (2, 3), (2, 3, 4), (2, 3, 2, 2)])
def test_mode_products_are_a_kronecker_product(shape: tuple[int, ...]) -> None:
    tensor = gradients(shape, 1)[0]
    matrices = [gradients((d, d), 1, seed=d)[0] for d in shape]
    kronecker: Array = np.ones((1, 1))
    for matrix in matrices:
        kronecker = np.asarray(np.kron(kronecker, matrix.T))
    assert_close(algebra.multiply(tensor, matrices).ravel(), kronecker @ tensor.ravel())


def test_gram_is_the_outer_product_of_the_unfolding() -> None:
    tensor = gradients((2, 3, 4), 1)[0]
    assert_close(algebra.gram(tensor, 0), np.einsum("ajk,bjk->ab", tensor, tensor))
    assert_close(algebra.gram(tensor, 1), np.einsum("iak,ibk->ab", tensor, tensor))
    assert_close(algebra.gram(tensor, 2), np.einsum("ija,ijb->ab", tensor, tensor))


def test_exponents() -> None:
    assert [algebra.axis_exponents(k) for k in range(4)] == [[], [0.5], [0.25] * 2, [1 / 6] * 3]
    assert algebra.axis_exponents(2, 0.5) == [0.5, 0.5]
    assert algebra.axis_exponents(2, {2: 0.5}) == [0.5, 0.5]
    assert algebra.axis_exponents(3, {2: 0.5}) == [1 / 6] * 3
    assert algebra.axis_exponents(3, {3: {0: 0.0}}) == [0.0, 1 / 6, 1 / 6]


def test_ridge_rules_by_hand() -> None:
    """diag(-1, 3) with eps 2, exponent 1."""
    matrix = np.diag([-1.0, 3.0])
    expected = {
        "shift_before": (1 / 2, 1 / 6),  # (1, 5), raised by 1 to begin at eps
        "shift_after": (1 / 2, 1 / 6),  # (0, 4), then + 2
        "absolute": (1 / 1, 1 / 5),
        "relative": (1 / 5, 1 / 9),
    }
    for ridge, inverse in expected.items():
        assert_close(algebra.inverse_root(matrix, 1.0, 2.0, ridge=ridge), np.diag(inverse))
    positive = np.diag([1.0, 4.0])
    assert_close(algebra.inverse_root(positive, 0.5), np.diag([1.0, 0.5]))
    with pytest.raises(ValueError, match="ridge must be one of"):
        algebra.inverse_root(positive, 0.5, ridge="none")


def test_truncation_is_a_pseudo_inverse_root() -> None:
    tall = gradients((5, 2), 1)[0]
    matrix = tall @ tall.T
    root = algebra.inverse_root(matrix, 0.5, ridge="truncate", rtol=1e-10)
    assert_close(root @ root, np.linalg.pinv(matrix, rcond=1e-10, hermitian=True), 1e-9)
    diagonal = np.diag([1e-8, 1e-3, 1.0])
    cut = algebra.inverse_root(diagonal, 1.0, ridge="truncate", rtol=1e-4)
    assert_close(np.diag(cut), [0.0, 1e3, 1.0], 1e-9)
    cut = algebra.inverse_root(diagonal, 1.0, ridge="truncate", atol=0.1)
    assert_close(np.diag(cut), [0.0, 0.0, 1.0])
    assert_close(algebra.inverse_root(np.zeros((2, 2)), 0.25, ridge="truncate"), np.zeros((2, 2)))


def test_off_diagonal_ratio() -> None:
    matrix = gradients((4, 4), 1)[0]
    matrix = matrix + matrix.T
    values, vectors = np.linalg.eigh(matrix)
    assert algebra.off_diagonal_ratio(matrix, vectors) < 1e-14
    plain = algebra.off_diagonal_ratio(matrix, np.eye(4))
    diagonal = np.diag(np.diag(matrix))
    assert plain == pytest.approx(np.linalg.norm(matrix - diagonal) / np.linalg.norm(values))
    shuffled = np.eye(4)[:, [2, 0, 3, 1]] * np.array([1.0, -1.0, -1.0, 1.0])
    assert algebra.off_diagonal_ratio(matrix, shuffled) == pytest.approx(plain)


def test_transport_of_second_moments() -> None:
    """Exact for uncorrelated coordinates: the diagonal of the rotated covariance."""
    old = [np.linalg.qr(g)[0] for g in (*gradients((3, 3), 1), *gradients((2, 2), 1))]
    new = [np.linalg.qr(g)[0] for g in (*gradients((3, 3), 1, 1), *gradients((2, 2), 1, 1))]
    moment = np.random.default_rng(2).uniform(size=(3, 2))
    back = np.kron(old[0], old[1])
    covariance = back @ np.diag(moment.ravel()) @ back.T
    forward = np.kron(new[0], new[1])
    expected = np.diag(forward.T @ covariance @ forward).reshape(3, 2)
    assert_close(algebra.transport(moment, old, new), expected)
    turned = [old[0][:, [2, 0, 1]] * np.array([1.0, -1.0, 1.0]), None]
    assert_close(algebra.transport(moment, [old[0], None], turned), moment[[2, 0, 1]])


# --- first moment, decay, schedule ------------------------------------------------------------


@pytest.mark.parametrize("beta3", [None, 0.0, 0.5, 0.81])
def test_filter_is_unbiased(beta3: float | None) -> None:
    constant = np.array([1.0, -2.0])
    filtered = reference.FilteredGradient((2,), 0.9, beta3)
    for t in range(1, 6):
        assert_close(filtered(constant, t), constant)


def test_v05_normaliser_overshoots_at_first() -> None:
    filtered = reference.FilteredGradient((1,), 0.9, 0.81, v05_normaliser=True)
    ones = np.ones(1)
    assert filtered(ones, 1)[0] == pytest.approx(1.9)
    for t in range(2, 200):
        last = filtered(ones, t)
    assert last[0] == pytest.approx(1.0, abs=1e-8)


@pytest.mark.parametrize(
    ("kind", "shrink"),
    [
        ("decoupled", 1 - 0.05 * 0.3),
        ("corrected", 1 - 0.3 * 0.05**2 / 0.2),
        ("independent", 1 - 0.3 * 0.05 / 0.2),
        ("l2", 1 - 0.05 * 0.3),  # through SGD, where it is the same as decoupled
    ],
)
def test_decay_shrinks_as_the_table_says(kind: str, shrink: float) -> None:
    method = reference.SGD(
        np.ones(3), lr=0.2, betas=(0.0, 1.0), weight_decay=0.3, weight_decay_type=kind
    )
    assert_close(method.step(np.zeros(3), lr=0.05), np.full(3, shrink))


def test_refresh_steps() -> None:
    """At ``start`` even off the interval, then at multiples; never with ``start=inf``."""

    def steps(**options: Any) -> list[int]:
        method = reference.Shampoo(np.zeros((2, 2)), lr=0.1, eps=1e-3, **options)
        changed = []
        for t, gradient in enumerate(gradients((2, 2), 13), start=1):
            before = method.roots
            method.step(gradient)
            if method.roots is not before:
                changed.append(t)
        return changed

    assert steps(interval=3, start=5) == [5, 6, 9, 12]
    assert steps(interval=4) == [4, 8, 12]
    assert steps(interval=1, start=math.inf) == []


def test_a_missing_gradient_moves_nothing_but_the_clock() -> None:
    gradient = np.full((2, 2), 0.5)
    method = reference.AdamW(np.ones((2, 2)), lr=0.1, weight_decay=0.5)
    assert_close(method.step(None), np.ones((2, 2)))
    assert method.t == 1 and not method.first_moment.value.any()
    method.step(gradient)
    ratio = ((1 - 0.9) / (1 - 0.9**2)) / math.sqrt((1 - 0.999) / (1 - 0.999**2))
    assert_close(method.parameter, np.full((2, 2), 1 - 0.1 * (ratio + 0.5)), 1e-8)


# --- Shampoo ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3,), (2, 2), (2, 3, 2)])
def test_shampoo_is_its_definition(shape: tuple[int, ...]) -> None:
    method = reference.Shampoo(np.zeros(shape), lr=1.0, betas=(0.0, 0.9), eps=1e-3)
    factors = [np.zeros((d, d)) for d in shape]
    previous = np.zeros(shape)
    for t, gradient in enumerate(gradients(shape, 4), start=1):
        kronecker: Array = np.ones((1, 1))
        for axis, d in enumerate(shape):
            unfolded = np.moveaxis(gradient, axis, 0).reshape(d, -1)
            factors[axis] = 0.9 * factors[axis] + 0.1 * unfolded @ unfolded.T
            ridged = factors[axis] / (1 - 0.9**t) + 1e-3 * np.eye(d)
            kronecker = np.asarray(np.kron(kronecker, power(ridged, -1 / (2 * len(shape)))))
        now = method.step(gradient)
        assert_close((previous - now).ravel(), kronecker @ gradient.ravel(), 1e-10)
        previous = now


def test_drop_weighting_and_sum() -> None:
    first, second = gradients((3, 3), 2)
    for decay in (0.9, 1.0):
        method = reference.Shampoo(
            np.zeros((3, 3)),
            lr=1.0,
            betas=(0.0, decay),
            eps=1e-3,
            drop_weighting=decay < 1.0,
        )
        method.step(first)
        before = method.parameter
        after = method.step(second)
        left = decay * first @ first.T + second @ second.T + 1e-3 * np.eye(3)
        right = decay * first.T @ first + second.T @ second + 1e-3 * np.eye(3)
        assert_close(before - after, power(left, -0.25) @ second @ power(right, -0.25), 1e-10)


def test_trace_scaling() -> None:
    gradient = gradients((3, 3), 1)[0]
    left, right = gradient @ gradient.T, gradient.T @ gradient
    method = reference.Shampoo(
        np.zeros((3, 3)), lr=1.0, betas=(0.0, 0.9), eps=0.0, exponent=0.5, trace_scaling=0.5
    )
    expected = math.sqrt(np.trace(left)) * power(left, -0.5) @ gradient @ power(right, -0.5)
    assert_close(-method.step(gradient), expected, 1e-9)


def test_one_sided() -> None:
    gradient = gradients((2, 5), 1)[0]
    method = reference.Shampoo(
        np.zeros((2, 5)), lr=1.0, betas=(0.0, 0.9), eps=0.0, exponent={2: {0: 0.5, 1: 0.0}}
    )
    assert_close(-method.step(gradient), reference.polar(gradient), 1e-9)
    assert method.factors[1] is None
