"""Coupled Newton iterations for inverse p-th roots, of second and higher order."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_core.config import check_count, check_range
from shampoo_core.solvers.matrix_products import (
    MatrixProductSolver,
    distance_to_identity,
    steps_forward,
)


@dataclass(frozen=True, kw_only=True)
class CoupledNewtonSolver(MatrixProductSolver):
    """Coupled Newton: any exponent q/p, four products of d x d matrices an iteration for p = 4.

    With ``M = X^p A`` kept alongside X, ``T = (1 + 1/p) I - M/p``, ``X <- X T``, ``M <- T^p M``;
    M tends to I and X to ``A^(-1/p)``. Small eigenvalues of M grow by ``(1 + 1/p)^p`` a step, 2.44
    for p = 4, so that a relative ridge of 1e-6 takes 20 steps and one of 1e-3 takes 13. That many
    are made; matrices that are done earlier keep what they have.

    Accuracy in float32: 5e-6 at condition 1e3, 1e-3 to 9e-3 at 1e6.
    Source: Guo and Higham, SIAM J. Matrix Anal. Appl. 28 (2006); Anil et al., arXiv 2002.09018.

    Attributes:
        max_iterations: ``None``: as many as the ridge can need.
        tolerance: On ``||M - I||_F / sqrt(d)``. ``None``: 8 times the machine epsilon, 1e-6 in float32.
    """

    max_iterations: int | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        owner = type(self).__name__
        check_count(owner, "max_iterations", self.max_iterations, optional=True)
        if self.tolerance is not None:
            check_range(owner, "tolerance", self.tolerance, low=0.0, high=1.0)

    def _root(self, matrices: Tensor, denominator: int, least_eigenvalue: float) -> Tensor:
        return self._iterate(matrices, denominator, least_eigenvalue, order=2)

    def _iterate(self, matrices: Tensor, p: int, least_eigenvalue: float, order: int) -> Tensor:
        identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        coefficients = _expansion(p, order)
        tolerance = (
            8 * torch.finfo(matrices.dtype).eps if self.tolerance is None else self.tolerance
        )
        # Converges from eigenvalues of M in (0, p + 1); half of that leaves room for rounding.
        start = (p + 1) / 2
        iterations = self.max_iterations or _iterations(start * least_eigenvalue, p, coefficients)
        root = (start ** (1 / p) * identity).expand_as(matrices)
        product = start * matrices
        error = distance_to_identity(product, identity)
        for iteration in range(iterations):
            # One plain step first: the higher-order expansions need M within 1 of I.
            terms = coefficients[:2] if iteration == 0 else coefficients
            step = _horner(identity - product, terms, identity)
            new_product = torch.bmm(torch.linalg.matrix_power(step, p), product)
            new_error = distance_to_identity(new_product, identity)
            forward = steps_forward(error, new_error, tolerance)
            root = torch.where(forward, torch.bmm(root, step), root)
            product = torch.where(forward, new_product, product)
            error = torch.where(forward[:, 0, 0], new_error, error)
        return root


@dataclass(frozen=True, kw_only=True)
class HigherOrderNewtonSolver(CoupledNewtonSolver):
    """Coupled iteration with more terms of ``(1 - y)^(-1/p)``: fewer steps, more products each.

    Order 3 makes five products an iteration for p = 4, small eigenvalues grow by 3.91. About as
    accurate and as costly in all as :class:`CoupledNewtonSolver`, which is its order 2.

    Attributes:
        order: Terms of the expansion of the step in ``I - M``, 2 to 8. Default 3.
    """

    order: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("HigherOrderNewtonSolver", "order", self.order, minimum=2)
        check_range("HigherOrderNewtonSolver", "order", self.order, low=2, high=8)

    def _root(self, matrices: Tensor, denominator: int, least_eigenvalue: float) -> Tensor:
        return self._iterate(matrices, denominator, least_eigenvalue, order=self.order)


def _expansion(p: int, order: int) -> list[float]:
    """Coefficients of ``(1 - y)^(-1/p) = sum_i b_i y^i``, the first ``order`` of them.

    >>> _expansion(4, 3)
    [1.0, 0.25, 0.15625]
    """
    coefficients = [1.0]
    for i in range(1, order):
        coefficients.append(coefficients[-1] * (1 + (i - 1) * p) / (i * p))
    return coefficients


def _iterations(least: float, p: int, coefficients: list[float]) -> int:
    """Steps until an eigenvalue of M that starts at ``least`` is 1 to rounding.

    >>> _iterations(2e-6, 4, _expansion(4, 2)), _iterations(2e-6, 4, _expansion(4, 3))
    (20, 16)
    """
    growth = sum(coefficients) ** p
    # From one half it takes another five or six, each squaring the distance, to reach 1e-7.
    return math.ceil(math.log(max(0.5 / least, 1.0)) / math.log(growth)) + 6


def _horner(matrices: Tensor, coefficients: list[float], identity: Tensor) -> Tensor:
    """Return ``sum_i b_i Y^i`` with ``len(coefficients) - 2`` products."""
    value = coefficients[-1] * matrices
    for coefficient in reversed(coefficients[1:-1]):
        value = torch.bmm(value + coefficient * identity, matrices)
    return value + coefficients[0] * identity
