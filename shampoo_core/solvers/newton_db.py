"""Newton-Denman-Beavers iteration: square roots, and roots of order 2^k by repeating it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from shampoo_core.config import check_count, check_range
from shampoo_core.solvers.matrix_products import (
    MatrixProductSolver,
    distance_to_identity,
    steps_forward,
)


@dataclass(frozen=True, kw_only=True)
class NewtonDBSolver(MatrixProductSolver):
    """Newton-Denman-Beavers in its product form: exponents q/2^k.

    From ``Y = A, Z = I``: ``E = 1.5 I - 0.5 Z Y``, ``Y <- Y E``, ``Z <- E Z``; Y tends to ``A^(1/2)``
    and Z to ``A^(-1/2)``. For ``A^(-1/4)`` it is run on A and once more on ``A^(1/2)``. Three products
    a step; small eigenvalues of ``Z Y`` grow by 2.25, so that a relative ridge of 1e-6 takes 23
    steps and then 14. Fixed small numbers of steps, as DASH makes them, act as a hidden floor under
    the spectrum: set ``max_iterations`` (and a large ``residual_bound``) to have that.

    Accuracy in float32: 6e-6 at condition 1e3, 4e-3 to 6e-3 at 1e6.
    Source: Higham, Functions of Matrices (2008), section 6.3; DASH, arXiv 2602.02016.

    Attributes:
        max_iterations: Of each run. ``None``: as many as the ridge can need.
        tolerance: On ``||Z Y - I||_F / sqrt(d)``. ``None``: 8 times the machine epsilon, 1e-6 in float32.
    """

    max_iterations: int | None = None
    tolerance: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("NewtonDBSolver", "max_iterations", self.max_iterations, optional=True)
        if self.tolerance is not None:
            check_range("NewtonDBSolver", "tolerance", self.tolerance, low=0.0, high=1.0)

    def _fraction(self, exponent: float) -> Fraction:
        fraction = super()._fraction(exponent)
        if fraction.denominator.bit_count() != 1:
            raise ValueError(
                f"exponent must be a fraction q/2^k for {type(self).__name__}, got {exponent} = "
                f"{fraction}; use CoupledNewtonSolver for other denominators"
            )
        return fraction

    def _root(self, matrices: Tensor, denominator: int, least_eigenvalue: float) -> Tensor:
        if denominator == 1:  # A^-1 is the square of A^(-1/2)
            _, inverse = self._square_roots(matrices, least_eigenvalue)
            return torch.bmm(inverse, inverse)
        root, inverse = matrices, matrices
        for _ in range(int(math.log2(denominator))):
            root, inverse = self._square_roots(root, least_eigenvalue)
            least_eigenvalue = math.sqrt(least_eigenvalue)
        return inverse

    def _square_roots(self, matrices: Tensor, least_eigenvalue: float) -> tuple[Tensor, Tensor]:
        """Return ``A^(1/2)`` and ``A^(-1/2)`` of matrices with eigenvalues up to 1."""
        identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
        tolerance = (
            8 * torch.finfo(matrices.dtype).eps if self.tolerance is None else self.tolerance
        )
        iterations = self.max_iterations or _iterations(least_eigenvalue)
        root, inverse = matrices, identity.expand_as(matrices)
        product = matrices
        error = distance_to_identity(product, identity)
        for _ in range(iterations):
            step = 1.5 * identity - 0.5 * product
            new_root, new_inverse = torch.bmm(root, step), torch.bmm(step, inverse)
            new_product = torch.bmm(new_inverse, new_root)
            new_error = distance_to_identity(new_product, identity)
            forward = steps_forward(error, new_error, tolerance)
            root = torch.where(forward, new_root, root)
            inverse = torch.where(forward, new_inverse, inverse)
            product = torch.where(forward, new_product, product)
            error = torch.where(forward[:, 0, 0], new_error, error)
        return root, inverse


def _iterations(least: float) -> int:
    """Steps until an eigenvalue of ``Z Y`` that starts at ``least`` is 1 to rounding."""
    return math.ceil(math.log(max(0.5 / least, 1.0)) / math.log(2.25)) + 6
