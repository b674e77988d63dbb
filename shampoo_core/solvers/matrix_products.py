"""What the solvers made of matrix products share: preparation, residual test, fallback."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import Tensor

from shampoo_core.solvers.base import (
    OneBatchAtATime,
    RootResult,
    check_matrices,
    check_number,
    check_regularization,
)
from shampoo_core.solvers.eigh import EighSolver
from shampoo_core.solvers.precision import full_precision
from shampoo_core.solvers.scaling import scale_to_unit
from shampoo_core.solvers.spectral_bounds import eigenvalue_bound, largest_eigenvalue

MAX_DENOMINATOR = 32


@dataclass(frozen=True, kw_only=True)
class MatrixProductSolver(OneBatchAtATime, ABC):
    """Inverse roots by batched matrix products, no eigendecomposition on the happy path.

    They cannot truncate a spectrum: rounding grows with the condition number, so that a relative
    ridge has to bound it. At least ``relative_ridge_floor`` is applied whatever the caller asks;
    ``rank_tolerance`` has no other effect. "Relative" is to :func:`largest_eigenvalue`.

    The root X is accepted when ``max|X^(p/2) A X^(p/2) - I|`` (A with its ridge, X = A^(-1/p)) is at
    most ``residual_bound``. The customary ``max|A X^p - I|`` says the same but rounds ten times
    worse, and in float32 refuses good roots of rank-deficient factors.

    Attributes:
        relative_ridge_floor: The least relative ridge. ``None``: 1e-6 in float32, 1e-12 in float64.
        residual_bound: Of the test above. Default 0.1 (ALGORITHMS.md 5.9); the error of the root is
            about the residual divided by p.
        eigh_fallback: Solve what fails the test with :class:`EighSolver` and the same ridge; asking
            whether there is any is the only host synchronisation of a call. Without the fallback
            there is none, and what fails is reported as not accepted.
    """

    relative_ridge_floor: float | None = None
    residual_bound: float = 0.1
    eigh_fallback: bool = True

    def __post_init__(self) -> None:
        if self.relative_ridge_floor is not None:
            check_number("relative_ridge_floor", self.relative_ridge_floor, 1e-15, 1.0)
        check_number("residual_bound", self.residual_bound, 0.0)

    @abstractmethod
    def _root(self, matrices: Tensor, denominator: int, least_eigenvalue: float) -> Tensor:
        """Return (N, d, d) ``A^(-1/denominator)``; anything, NaN included, where it fails.

        Args:
            matrices: (N, d, d), eigenvalues in ``[least_eigenvalue, 1]``.
            denominator: p >= 1.
            least_eigenvalue: A lower bound known before looking at the matrices.
        """

    def _check_exponent(self, exponent: float) -> Fraction:
        """Return the exponent as a fraction, or say that this method cannot do it."""
        fraction = Fraction(exponent).limit_denominator(MAX_DENOMINATOR)
        if fraction == 0 or abs(float(fraction) / exponent - 1) > 1e-9:
            raise ValueError(
                f"exponent must be a fraction q/p with p <= {MAX_DENOMINATOR} for "
                f"{type(self).__name__}, got {exponent}; use EighSolver for any other"
            )
        return fraction

    def inverse_root(
        self,
        matrices: Tensor,
        exponent: float,
        *,
        rank_tolerance: float | None = None,
        ridge: float = 0.0,
        relative_ridge: float = 0.0,
        warm_start: Tensor | None = None,
    ) -> RootResult:
        """See :meth:`RootSolver.inverse_root`. ``warm_start`` is not used."""
        del warm_start
        check_matrices(matrices)
        check_regularization(matrices, exponent, rank_tolerance, ridge, relative_ridge)
        fraction = self._check_exponent(exponent)
        relative = max(relative_ridge, self._ridge_floor(matrices.dtype))
        with full_precision(matrices.device):
            unit, scales = scale_to_unit(matrices, ridge)
            largest = largest_eigenvalue(unit)
            shift = ridge / scales + relative * largest
            unit.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
            bound = eigenvalue_bound(unit, largest + shift)
            regular = unit / bound[:, None, None]
            # The bound exceeds the estimate by at most a quarter.
            root = self._root(regular, fraction.denominator, 0.75 * relative / (1 + relative))
            residual = symmetric_residual(regular, root, fraction.denominator)
            roots = torch.linalg.matrix_power(root, fraction.numerator)
            roots = (roots + roots.mT).mul_(0.5 * (scales * bound).pow_(-exponent)[:, None, None])
            size = torch.linalg.vector_norm(roots, float("inf"), dim=(-2, -1))
            accepted = (residual <= self.residual_bound) & (size < float("inf"))
            result = RootResult(roots.masked_fill_(~accepted[:, None, None], 0.0), accepted)
        if self.eigh_fallback:
            solvable = (scales < float("inf")) & (bound > 0)
            _solve_rejected(result, solvable, matrices, exponent, ridge, relative)
        return result

    def _ridge_floor(self, dtype: torch.dtype) -> float:
        if self.relative_ridge_floor is not None:
            return self.relative_ridge_floor
        return 1e-6 if dtype == torch.float32 else 1e-12


def _solve_rejected(
    result: RootResult,
    solvable: Tensor,
    matrices: Tensor,
    exponent: float,
    ridge: float,
    relative_ridge: float,
) -> None:
    """Put eigendecomposition roots, where there are any, in the place of rejected ones."""
    rejected = solvable & ~result.accepted
    if not rejected.any().item():  # the host synchronisation
        return
    indices = rejected.nonzero().squeeze(-1)
    again = EighSolver().inverse_root(
        matrices[indices], exponent, ridge=ridge, relative_ridge=relative_ridge
    )
    result.roots[indices] = again.roots
    result.accepted[indices] = again.accepted


def symmetric_residual(matrices: Tensor, roots: Tensor, denominator: int) -> Tensor:
    """Return (N,): ``max|X^a A X^b - I|`` with ``a + b = p``, as equal as can be."""
    left = torch.linalg.matrix_power(roots, denominator // 2)
    right = torch.linalg.matrix_power(roots, denominator - denominator // 2)
    error = torch.bmm(torch.bmm(left, matrices), right)
    error.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return torch.linalg.vector_norm(error, float("inf"), dim=(-2, -1))


def steps_forward(error: Tensor, new_error: Tensor, tolerance: float) -> Tensor:
    """Return (N, 1, 1) bool: which matrices of an iteration take the step to ``new_error``.

    A matrix stops, each for itself, when its error is within the tolerance, or when a step would
    not lessen it any more; its best iterate stays. Far from the solution, where an error may stand
    still to rounding for many steps, every finite step is taken.

    Args:
        error: (N,) ``||M - I||_F`` of the present iterates.
        new_error: (N,) the same after one more step.
        tolerance: On the Frobenius norm, since that falls from step to step (the largest entry does
            not, and misleads where many small ones make a large eigenvalue).
    """
    far = (error > 0.5) & (new_error < float("inf"))
    return ((error > tolerance) & (far | (new_error < error)))[:, None, None]


def distance_to_identity(matrices: Tensor, identity: Tensor) -> Tensor:
    """Return (N,) ``||M - I||_F``."""
    return torch.linalg.vector_norm(matrices - identity, dim=(-2, -1))
