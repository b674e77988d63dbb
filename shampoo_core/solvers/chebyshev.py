"""Chebyshev polynomials of a matrix, summed by Clenshaw's recurrence."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_core.config import check_count, check_range
from shampoo_core.solvers.matrix_products import MatrixProductSolver

NUM_NODES = 4096


@dataclass(frozen=True, kw_only=True)
class ChebyshevSolver(MatrixProductSolver):
    """A polynomial of fixed degree in place of ``x^(-1/p)``: ``degree - 1`` products, any q/p.

    A polynomial cannot follow a root near zero: the relative ridge has to be 1e-3 or more, and
    even then :class:`CoupledNewtonSolver` is cheaper and more accurate. Here to be compared with.
    On ``[1e-3, 1]`` and for p = 4 the largest relative error of the root is 2e-2 for degree 40,
    6e-3 for 60, 5e-4 for 100; for p = 1 it takes degree 150.

    Source: DASH, arXiv 2602.02016 (which leaves out the factor of the scaling).

    Attributes:
        relative_ridge_floor: ``None``: 1e-3 in both precisions.
        degree: At least 2. Default 60.
    """

    degree: int = 60

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("ChebyshevSolver", "degree", self.degree, minimum=2)
        check_range("ChebyshevSolver", "degree", self.degree, low=2, high=NUM_NODES // 4)

    def _ridge_floor(self, dtype: torch.dtype) -> float:
        return 1e-3 if self.relative_ridge_floor is None else self.relative_ridge_floor

    def _root(self, matrices: Tensor, denominator: int, least_eigenvalue: float) -> Tensor:
        coefficients = inverse_root_coefficients(denominator, least_eigenvalue, self.degree)
        identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        width = 1 - least_eigenvalue
        # Maps the spectrum, [least_eigenvalue, 1], to [-1, 1].
        mapped = (2 / width) * matrices - ((1 + least_eigenvalue) / width) * identity
        # Clenshaw: b_k = c_k + 2 S b_{k+1} - b_{k+2}, and the sum is c_0 + S b_1 - b_2.
        after = coefficients[-1] * identity
        current = (2 * coefficients[-1]) * mapped + coefficients[-2] * identity
        for coefficient in reversed(coefficients[1:-2]):
            value = torch.baddbmm(coefficient * identity - after, mapped, current, alpha=2)
            after, current = current, value
        return torch.baddbmm(coefficients[0] * identity - after, mapped, current)


@functools.lru_cache(maxsize=64)
def inverse_root_coefficients(p: int, least: float, degree: int) -> tuple[float, ...]:
    """Chebyshev coefficients c_0..c_degree of ``x^(-1/p)`` on ``[least, 1]`` mapped to [-1, 1]."""
    nodes = torch.arange(NUM_NODES, dtype=torch.float64, device="cpu")
    angles = (nodes + 0.5) * (math.pi / NUM_NODES)
    values = (0.5 * (1 + least) + 0.5 * (1 - least) * angles.cos()).pow(-1 / p)
    orders = torch.arange(degree + 1, dtype=torch.float64, device="cpu")
    coefficients = torch.cos(torch.outer(orders, angles)) @ values * (2 / NUM_NODES)
    first, *others = coefficients.tolist()
    return (0.5 * first, *others)
