"""Corrected, KL, averaged, spectral, diagonal references against a second computation."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import reference
from reference.algebra import Array
from reference.compare import assert_close, gradients
from reference.spectral import update_scale


def power(matrix: Array, exponent: float) -> Array:
    """Symmetric positive definite matrix power by SVD."""
    u, values, vt = np.linalg.svd(matrix)
    return np.asarray((u * values**exponent) @ vt)


# --- eigenvalue correction --------------------------------------------------------------------


def test_transport_makes_column_order_irrelevant() -> None:
    """With ``keep`` ascending and descending columns differ: the defect named in 3.5 (c)."""
    for second_moments, equal in (("transport", True), ("keep", False)):
        paths = []
        for descending in (False, True):
            method = reference.EShampoo(
                np.zeros((3, 3)),
                lr=0.1,
                eps=1e-8,
                start=2,
                interval=2,
                descending=descending,
                second_moments=second_moments,
            )
            paths.append(np.stack([method.step(gradient) for gradient in gradients((3, 3), 6)]))
        assert (np.abs(paths[0] - paths[1]).max() < 1e-9) == equal


def test_adaptive_tolerance() -> None:
    def bases(tolerance: float | None) -> list[Any]:
        method = reference.EShampoo(
            np.zeros((3, 3)), lr=0.1, eps=1e-8, start=1, interval=2, tolerance=tolerance
        )
        seen = []
        for gradient in gradients((3, 3), 6):
            method.step(gradient)
            seen.append(method.bases[0])
        return seen

    assert all(np.array_equal(basis, np.eye(3)) for basis in bases(1.0))
    for exact, never_skipped in zip(bases(None), bases(0.0), strict=True):
        assert_close(never_skipped, exact)


def test_soap_permutes_and_transports_alike_in_an_exact_basis() -> None:
    """Diagonal factors, whose order changes: both move D with its column."""
    results = []
    for second_moments in ("permute", "transport"):
        method = reference.SOAP(
            np.zeros((2, 2)), lr=0.1, betas=(0.9, 0.9), interval=1, second_moments=second_moments
        )
        for scale in (1.0, 1.0, 0.1, 0.1, 0.1):
            method.step(np.diag([scale, 0.5]))
        results.append((method.parameter, method.second_moment))
    assert_close(results[0][0], results[1][0])
    assert_close(results[0][1], results[1][1])
    assert results[0][1][0, 0] != 0.0


def test_soap_normalised_and_skipping_an_axis() -> None:
    inputs = gradients((3, 4), 3)
    options: dict[str, Any] = {"lr": 1.0, "betas": (0.9, 0.95), "bias_correction": False}
    method = reference.SOAP(np.zeros((3, 4)), normalise=True, **options)
    path = np.stack([method.step(gradient) for gradient in inputs])
    assert_close(path[0], 0.0)
    assert_close(np.sqrt(np.mean(np.diff(path, axis=0) ** 2, axis=(1, 2))), 1.0)
    plain = reference.SOAP(np.zeros((3, 4)), ignored_axes=(0, 1), **options)
    adam = reference.AdamW(np.zeros((3, 4)), **options)
    adam.second_moment.kind = "rmsprop"  # raw average, as without bias correction
    plain.step(inputs[0])
    for gradient in inputs[1:]:
        assert_close(plain.step(gradient), adam.step(gradient))


# --- KL and per-factor correction -------------------------------------------------------------


def test_kl_practical_statistics_by_kronecker_product() -> None:
    """Order 3, old values on every right-hand side."""
    shape, decay = (2, 3, 2), 0.9
    method = reference.KLShampoo(np.zeros(shape), lr=0.1, betas=(0.9, decay), interval=2)
    inputs = gradients(shape, 4)
    method.step(inputs[0])
    for gradient in inputs[1:]:
        bases, values, factors = method.bases, method.eigenvalues, method.factors
        method.step(gradient)
        for axis in range(3):
            inverses = [(q / v) @ q.T for q, v in zip(bases, values, strict=True)]
            del inverses[axis]
            unfolded = np.moveaxis(gradient, axis, 0).reshape(shape[axis], -1)
            whitened = unfolded @ np.kron(*inverses) @ unfolded.T / unfolded.shape[1]
            expected = decay * factors[axis] + (1 - decay) * whitened
            assert_close(method.factors[axis], expected)
            measured = np.diag(bases[axis].T @ whitened @ bases[axis])
            expected_values = np.maximum(decay * values[axis] + (1 - decay) * measured, 0.01)
            assert_close(method.eigenvalues[axis], expected_values)


def test_kl_eigenvalues_are_bounded_below() -> None:
    """Inverse square roots are at most 10, or the side where that is larger."""
    method = reference.KLShampoo(np.zeros((2, 12)), lr=0.1, betas=(0.9, 0.5), interval=1)
    for gradient in gradients((2, 12), 30):
        method.step(1e-3 * gradient)
    assert_close(method.eigenvalues[0], np.full(2, 1e-2))
    assert_close(method.eigenvalues[1], np.full(12, 12.0**-2))


def test_kl_second_gradient_by_hand() -> None:
    """The first only initialises; the second meets equal eigenvalues, so no basis shows."""
    first, second = gradients((2, 3), 2)
    method = reference.KLShampoo(
        np.ones((2, 3)), lr=0.1, betas=(0.9, 0.99), factor_beta=0.7, eps=0.5, weight_decay=0.2
    )
    assert_close(method.step(first), np.ones((2, 3)))
    assert_close(method.factors[0], 0.3 / 3 * first @ first.T)
    assert_close(method.factors[1], 0.3 / 2 * first.T @ first)
    scale = 10.0 / (1 + 0.5 * 10.0)
    moved = np.ones((2, 3)) - 0.1 * scale * 0.1 * second
    assert_close(method.step(second), (1 - 0.1 * 0.2) * moved)


@pytest.mark.parametrize("name", ["MetaKLShampoo", "PerFactorCorrected"])
def test_kl_statistics_divided_by_the_other_side(name: str) -> None:
    """At the first step nothing is whitened yet; at the second by the roots of the first."""
    first, second = gradients((2, 3), 2)
    options: dict[str, Any] = {"kl": True} if name == "PerFactorCorrected" else {}
    method = getattr(reference, name)(
        np.zeros((2, 3)), lr=0.1, betas=(0.0, 0.9), eps=1e-2, exponent=0.5, divide=True, **options
    )
    method.step(first)
    left = 0.1 / 3 * first @ first.T
    right = 0.1 / 2 * first.T @ first
    assert_close(method.factors[0], left)
    assert_close(method.factors[1], right)
    method.step(second)
    whitener = np.linalg.inv(right / 0.1 + 1e-2 * np.eye(3))
    assert_close(method.factors[0], 0.9 * left + 0.1 / 3 * second @ whitener @ second.T, 1e-10)


def test_klsoap_momentum_turns_with_the_basis() -> None:
    method = reference.KLSOAP(np.zeros((3, 3)), lr=0.1, betas=(0.9, 0.95), interval=1)
    inputs, average = gradients((3, 3), 5), np.zeros((3, 3))
    method.step(inputs[0])
    for gradient in inputs[1:]:
        method.step(gradient)
        average = 0.9 * average + 0.1 * gradient
        left, right = method.bases
        assert_close(left @ method.momentum_in_basis @ right.T, average)


def test_ideal_kl_finds_the_scale() -> None:
    """One element: S_a S_b -> g^2, so the direction tends to sign(g)."""
    method = reference.IdealKLShampoo(np.zeros((1, 1)), lr=1.0, betas=(0.0, 0.5))
    for _ in range(60):
        before = method.parameter
        after = method.step(np.full((1, 1), -3.0))
    assert_close(before - after, -1.0, 1e-9)


def test_ideal_kl_step_by_hand() -> None:
    first, second = gradients((2, 3), 2)
    method = reference.IdealKLShampoo(np.zeros((2, 3)), lr=1.0, betas=(0.0, 0.9))
    left, right = np.eye(2), np.eye(3)
    for gradient in (first, second):
        left, right = (
            0.9 * left + 0.1 / 3 * gradient @ np.linalg.inv(right) @ gradient.T,
            0.9 * right + 0.1 / 2 * gradient.T @ np.linalg.inv(left) @ gradient,
        )
        before = method.parameter
        after = method.step(gradient)
        assert_close(before - after, power(left, -0.5) @ gradient @ power(right, -0.5), 1e-10)


def test_klsoap_is_adam_while_the_basis_stands() -> None:
    """Raw averages, started at the second gradient, in the basis of the first one."""
    inputs = gradients((3, 3), 5)
    method = reference.KLSOAP(np.zeros((3, 3)), lr=0.1, betas=(0.9, 0.95), interval=100)
    adam = reference.AdamW(np.zeros((3, 3)), lr=0.1, betas=(0.9, 0.95), bias_correction=False)
    adam.second_moment.kind = "rmsprop"
    method.step(inputs[0])
    left, right = method.bases
    for gradient in inputs[1:]:
        expected = left @ adam.step(left.T @ gradient @ right) @ right.T
        assert_close(method.step(gradient), expected)


@pytest.mark.parametrize("kl", [False, True])
def test_per_factor_with_fresh_bases_is_shampoo(kl: bool) -> None:
    options: dict[str, Any] = {"lr": 0.1, "eps": 1e-4, "exponent": 0.5 if kl else None}
    twin = reference.MetaKLShampoo if kl else reference.Shampoo
    expected = twin(np.zeros((3, 4)), ridge="absolute", **options)
    method = reference.PerFactorCorrected(np.zeros((3, 4)), kl=kl, **options)
    for gradient in gradients((3, 4), 5):
        assert_close(method.step(gradient), expected.step(gradient), 1e-9)


def test_per_factor_measured_and_averaged_agree_while_the_basis_stands() -> None:
    differences = []
    for interval in (100, 2):
        results = []
        for kind in ("measured", "averaged"):
            method = reference.PerFactorCorrected(
                np.zeros((3, 3)),
                lr=0.1,
                eps=1e-4,
                eigenvalues=kind,
                interval=interval,
                start=1,
            )
            results.append(np.stack([method.step(g) for g in gradients((3, 3), 5)]))
        differences.append(float(np.abs(results[0] - results[1]).max()))
    assert differences[0] < 1e-12 < 1e-4 < differences[1]


# --- averaging --------------------------------------------------------------------------------


def test_primal_averaging_special_cases() -> None:
    beta, inputs = 0.8, gradients((3,), 6)

    def run(method: Any) -> Array:
        return np.stack([method.step(gradient) for gradient in inputs])

    def sgd(lr: float, **options: Any) -> reference.SGD:
        return reference.SGD(np.ones(3), lr=lr, betas=(0.0, 1.0), **options)

    averaged = reference.PrimalAveraging(sgd(0.1 / (1 - beta)), mu_x=beta, mu_y=1.0)
    assert_close(run(averaged), run(sgd(0.1, momentum=beta)))
    averaged = reference.PrimalAveraging(sgd(0.1 / (1 - beta)), mu_x=beta, mu_y=beta)
    assert_close(run(averaged), run(sgd(0.1, momentum=beta, nesterov=True)))


def test_schedule_free_evaluates_the_mean_of_z() -> None:
    method = reference.ScheduleFree(reference.SGD(np.ones(3), lr=0.1, betas=(0.0, 1.0)))
    visited = []
    for gradient in gradients((3,), 6):
        y = method.step(gradient)
        visited.append(method.z)
        assert_close(method.evaluation, np.mean(visited, axis=0))
        assert_close(y, 0.1 * method.z + 0.9 * method.x)


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({"weight_lr": "max"}, [1.0, 9.0, 9.0]),
        ({"weight_lr": "current"}, [1.0, 9.0, 4.0]),
        ({"weight_lr": "current", "weight_lr_power": 1.0}, [1.0, 3.0, 2.0]),
        ({"weight_lr_power": 0.0, "weight_r": 2.0}, [1.0, 4.0, 9.0]),
    ],
)
def test_schedule_free_weights(options: dict[str, Any], weights: list[float]) -> None:
    """Weights of z in x for the rates 1, 3, 2."""
    base = reference.SGD(np.ones(3), lr=1.0, betas=(0.0, 1.0))
    method = reference.ScheduleFree(base, **options)
    visited = []
    for gradient, lr in zip(gradients((3,), 3), (1.0, 3.0, 2.0), strict=True):
        method.step(gradient, lr)
        visited.append(method.z)
    assert_close(method.evaluation, np.average(visited, axis=0, weights=weights))


def test_decay_under_averaging() -> None:
    """No gradient, z = x = y = 1, then each rule by hand (lr .5, decay .2, mu_x .9, mu_y .8)."""
    expected = {
        "z": (0.9, 0.99),
        "y": (0.9, 0.99),
        "z_holding_y": (0.9, 0.9 * (1 - 0.2 * 0.9) / 0.8 + 0.1 * 0.9),
    }
    for decay_at, (z, x) in expected.items():
        base = reference.SGD(np.ones(1), lr=0.5, betas=(0.0, 1.0), weight_decay=0.2)
        method = reference.PrimalAveraging(base, mu_x=0.9, mu_y=0.8, decay_at=decay_at)
        y = method.step(np.zeros(1))
        assert_close([method.z[0], method.x[0], y[0]], [z, x, 0.8 * x + 0.2 * z])


def test_weight_averages() -> None:
    weights = [np.full(2, float(t)) for t in range(1, 8)]
    ema = reference.WeightEMA(np.zeros(2), beta=0.5, every=3)
    lawa = reference.LatestWeightAverage(length=2, every=2)
    averages = [(ema.update(w)[0], lawa.update(w)[0]) for w in weights]
    assert [a for a, _ in averages] == [0.0, 0.0, 1.5, 1.5, 1.5, 3.75, 3.75]
    assert [b for _, b in averages] == [1.0, 2.0, 2.0, 3.0, 3.0, 5.0, 5.0]


# --- spectral and diagonal --------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(3, 5), (5, 3)])
def test_newton_schulz_equals_its_matrix_form(shape: tuple[int, int]) -> None:
    coefficients = [(3.4445, -4.7750, 2.0315)] * 3
    matrix = gradients(shape, 1)[0]
    x = matrix / (1.01 * np.linalg.norm(matrix))
    for a, b, c in coefficients:
        s = x @ x.T
        x = a * x + (b * s + c * s @ s) @ x
    assert_close(reference.newton_schulz(matrix, coefficients, safety=1.01), x)


@pytest.mark.parametrize(
    ("coefficients", "iterations"),
    [((1.5, -0.5, 0.0), 20), ((1.875, -1.25, 0.375), 20), ((3.0, -16 / 5, 6 / 5), 60)],
)
def test_newton_schulz_converges_to_the_polar_factor(
    coefficients: tuple[float, float, float], iterations: int
) -> None:
    """The last set has slope -0.6 at 1, so it converges linearly."""
    matrix = gradients((4, 6), 1)[0]
    iterated = reference.newton_schulz(matrix, [coefficients] * iterations)
    assert_close(iterated, reference.polar(matrix), 1e-9)
    assert_close(reference.polar(matrix) @ reference.polar(matrix).T, np.eye(4))
    deficient = np.outer([3.0, 4.0], [0.0, 2.0, 0.0])
    assert_close(reference.polar(deficient), np.outer([0.6, 0.8], [0.0, 1.0, 0.0]))


def test_muon_step_by_hand() -> None:
    first, second = gradients((4, 2), 2)
    method = reference.Muon(np.ones((4, 2)), lr=0.1, weight_decay=0.5)
    once = 0.95 * np.ones((4, 2)) - 0.1 * math.sqrt(2) * reference.polar(first)
    assert_close(method.step(first), once)
    momentum = 0.95 * first + second
    twice = 0.95 * once - 0.1 * math.sqrt(2) * reference.polar(second + 0.95 * momentum)
    assert_close(method.step(second), twice)
    assert [update_scale((2, 8), kind) for kind in ("none", "rectangular", "fan")] == [1, 1, 0.5]
    assert update_scale((25, 4), "adam_rms") == 1.0


def test_row_wise_adagrad() -> None:
    first, second = np.array([[3.0, -4.0], [0.0, 0.0]]), np.array([[1.0, 7.0], [2.0, 2.0]])
    method = reference.RowWiseAdaGrad(np.zeros((2, 2)), lr=1.0, betas=(0.0, 1.0), eps=0.5)
    once = -first / np.array([[math.sqrt(12.5) + 0.5], [0.5]])
    assert_close(method.step(first), once)
    twice = once - second / np.array([[math.sqrt(37.5) + 0.5], [2.5]])
    assert_close(method.step(second), twice)
    averaged = reference.RowWiseAdaGrad(np.zeros((1, 2)), lr=1.0, betas=(0.0, 0.9), eps=0.0)
    assert_close(averaged.step(np.array([[3.0, -4.0]])), [[-3, 4]] / np.sqrt(12.5))
