"""Newton-Schulz and Polar-Express orthogonalisation against the singular value decomposition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from shampoo_core.counting import OperationCounter
from shampoo_core.solvers import orthogonalize
from shampoo_core.solvers.polar import COEFFICIENTS, POLAR_EXPRESS, SAFETY


def with_singular_values(values: Tensor, num_columns: int) -> tuple[Tensor, Tensor]:
    """A (1, m, n) matrix and its polar factor, in float64."""
    left, _ = torch.linalg.qr(torch.randn(len(values), len(values), dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(num_columns, len(values), dtype=torch.float64))
    return ((left * values) @ right.mT)[None], (left @ right.mT)[None]


@pytest.mark.parametrize(
    ("name", "steps", "low", "high"),
    [
        ("original", 5, 0.68, 1.21),  # documented as about [0.7, 1.2]
        ("convergent", 12, 0.99, 1.01),
        ("cubic", 16, 0.999, 1.001),
        ("tuned", 5, 0.97, 1.15),
        ("polar_express", 5, 0.87, 1.13),
        ("polar_express", 8, 0.9999, 1.0001),
    ],
)
def test_singular_values_end_near_one(name: str, steps: int, low: float, high: float) -> None:
    matrix, polar = with_singular_values(torch.logspace(0, -2, 24, dtype=torch.float64), 40)
    result = orthogonalize(matrix.float(), name, steps)
    values = torch.linalg.svdvals(result.double())
    assert low <= values.min()
    assert values.max() <= high
    # Whatever the values, the singular vectors are those of the matrix.
    symmetric = result[0].double() @ polar[0].mT
    torch.testing.assert_close(symmetric, symmetric.mT, rtol=0.0, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eight_steps_of_polar_express_give_the_polar_factor(dtype: torch.dtype) -> None:
    matrix, polar = with_singular_values(torch.logspace(0, -2, 24, dtype=torch.float64), 24)
    result = orthogonalize(matrix.to(dtype), steps=9)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    torch.testing.assert_close(result, polar.to(dtype), rtol=0.0, atol=tolerance)


def test_every_step_applies_its_triple() -> None:
    """On a diagonal matrix the iteration is a scalar polynomial."""
    values = torch.tensor([1.0, 0.5, 0.1, 0.02], dtype=torch.float64)
    for name, table in COEFFICIENTS.items():
        expected = values / (1.01 * values.norm())
        for step in range(7):
            a, b, c = table[min(step, len(table) - 1)]
            if table is POLAR_EXPRESS and step < 6:
                a, b, c = a / 1.01, b / 1.01**3, c / 1.01**5
            expected = a * expected + b * expected**3 + c * expected**5
        result = orthogonalize(torch.diag(values)[None], name, 7)
        torch.testing.assert_close(result[0], torch.diag(expected), msg=name)


@settings(deadline=None, max_examples=25)
@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 2**20))
def test_transposed_scaled_and_turned_problems(rows: int, columns: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(2, rows, columns, generator=generator, dtype=torch.float64)
    turn, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    result = orthogonalize(matrix)
    assert result.shape == matrix.shape
    torch.testing.assert_close(orthogonalize(matrix.mT), result.mT)
    torch.testing.assert_close(orthogonalize(1e-200 * matrix), result)
    torch.testing.assert_close(orthogonalize(turn @ matrix), turn @ result)
    torch.testing.assert_close(orthogonalize(matrix[1:]), result[1:])


def test_extreme_sizes_and_hopeless_matrices() -> None:
    healthy = torch.randn(3, 5)
    batch = torch.stack(
        [1e-30 * healthy, 1e30 * healthy, 0 * healthy, float("nan") * healthy, healthy]
    )
    batch[4, 1, 1] = float("inf")
    result = orthogonalize(batch)
    expected = orthogonalize(healthy[None])[0]
    torch.testing.assert_close(result[0], expected)
    torch.testing.assert_close(result[1], expected)
    assert (result[2:] == 0).all()
    assert orthogonalize(torch.zeros(0, 3, 5)).shape == (0, 3, 5)


def test_products_in_bfloat16() -> None:
    matrix, polar = with_singular_values(torch.linspace(0.2, 1, 16, dtype=torch.float64), 16)
    result = orthogonalize(matrix.float(), steps=8, dtype=torch.bfloat16)
    assert result.dtype == torch.float32
    torch.testing.assert_close(result, polar.float(), rtol=0.0, atol=0.05)


def test_operations_of_a_call() -> None:
    counts = []
    for num_matrices in (1, 7):
        matrices = torch.randn(num_matrices, 8, 5)
        with OperationCounter() as ops:
            orthogonalize(matrices, steps=5)
        counts.append(ops.num_operations)
        assert ops.num_synchronisations == 0
    assert counts[0] == counts[1] <= 24


def test_tall_matrices_cost_what_wide_ones_do() -> None:
    costs = []
    for shape in ((1, 64, 4), (1, 4, 64)):
        with FlopCounterMode(display=False) as flops:
            orthogonalize(torch.randn(shape), steps=5)
        costs.append(flops.get_total_flops())
    assert costs[0] == costs[1] == 5 * (4 * 4 * 4 * 64 + 2 * 4**3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"matrices": torch.zeros(2, 2)}, ValueError, r"\(N, m, n\), got \(2, 2\)"),
        ({"matrices": torch.zeros(1, 2, 2).half()}, TypeError, r"got torch.float16"),
        ({"coefficients": "muon"}, ValueError, r"one of \['convergent', .* got 'muon'"),
        ({"coefficients": []}, ValueError, r"at least one triple"),
        ({"steps": 0}, ValueError, r"steps must be >= 1, got 0"),
    ],
)
def test_bad_arguments(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        orthogonalize(**({"matrices": torch.eye(2)[None]} | arguments))  # type: ignore[arg-type]


def test_all_steps_of_polar_express_but_the_last_are_damped() -> None:
    """A singular value that rounding leaves above 1 is not thrown out by the next step."""
    values = torch.tensor([1.0, 0.5, 0.1, 0.01], dtype=torch.float64)
    expected = values / (SAFETY * values.norm())
    for step, (a, b, c) in enumerate(POLAR_EXPRESS[:3]):
        x = expected / (SAFETY if step < 2 else 1.0)
        expected = a * x + b * x**3 + c * x**5
    found = orthogonalize(torch.diag(values)[None], "polar_express", 3)[0].diagonal()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0.0)
