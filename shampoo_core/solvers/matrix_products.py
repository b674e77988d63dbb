"""What the solvers made of matrix products share: preparation, residual test, fallback."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar, Self

import torch
from torch import Tensor

from shampoo_core.config import check_flags, check_range
from shampoo_core.solvers.base import (
    ManyBatchesSolver,
    RootResult,
    check_matrices,
    check_regularization,
)
from shampoo_core.solvers.eigh import EighSolver
from shampoo_core.solvers.precision import full_precision
from shampoo_core.solvers.scaling import scale_to_unit
from shampoo_core.solvers.spectral_bounds import eigenvalue_bound, largest_eigenvalue

MAX_DENOMINATOR = 32


@dataclass(frozen=True, kw_only=True)
class MatrixProductSolver(ManyBatchesSolver):
    """Inverse roots by batched matrix products, no eigendecomposition on the happy path.

    They cannot truncate a spectrum: rounding grows with the condition number, so that a relative
    ridge has to bound it. At least ``relative_ridge_floor`` is applied whatever the caller asks;
    ``rank_tolerance`` has no other effect. "Relative" is to :func:`largest_eigenvalue`.

    The root X is accepted when ``max|X^(p/2) A X^(p/2) - I|`` (A with its ridge, X = A^(-1/p)) is at
    most ``residual_bound``. The customary ``max|A X^p - I|`` says the same but rounds ten times
    worse, and in float32 refuses good roots of rank-deficient factors.

    Attributes:
        relative_ridge_floor: The least relative ridge. ``None``: 1e-6 in float32, 1e-12 in float64.
        residual_bound: Of the test above. Default 0.1; the error of the root is
            about the residual divided by p.
        eigh_fallback: Solve what fails the test with :class:`EighSolver` and the same ridge; asking
            whether there is any is the only host synchronisation of a call. Without the fallback
            there is none, and what fails is reported as not accepted.
    """

    relative_ridge_floor: float | None = None
    residual_bound: float = 0.1
    eigh_fallback: bool = True
    warm_starts: ClassVar[bool] = False
    finds_eigenvectors: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_flags(self)
        owner, floor = type(self).__name__, self.relative_ridge_floor
        if floor is not None:
            check_range(owner, "relative_ridge_floor", floor, low=1e-15, high=1.0)
        check_range(owner, "residual_bound", self.residual_bound, low=0.0)

    def without_fallback(self) -> Self:
        """See :meth:`RootSolver.without_fallback`."""
        return replace(self, eigh_fallback=False)

    @abstractmethod
    def _root(self, matrices: Tensor, denominator: int, least_eigenvalue: float) -> Tensor:
        """Return (N, d, d) ``A^(-1/denominator)``; anything, NaN included, where it fails.

        Args:
            matrices: (N, d, d), eigenvalues in ``[least_eigenvalue, 1]``.
            denominator: p >= 1.
            least_eigenvalue: A lower bound known before looking at the matrices.
        """

    def check_exponent(self, exponent: float) -> None:
        """See :meth:`RootSolver.check_exponent`."""
        super().check_exponent(exponent)
        self._fraction(exponent)

    def _fraction(self, exponent: float) -> Fraction:
        """Return the exponent as a fraction, or say that this method cannot do it."""
        fraction = Fraction(exponent).limit_denominator(MAX_DENOMINATOR)
        if abs(float(fraction) / exponent - 1) > 1e-9:
            raise ValueError(
                f"exponent must be a fraction q/p with p <= {MAX_DENOMINATOR} for "
                f"{type(self).__name__}, got {exponent}; use EighSolver for any other"
            )
        return fraction

    def inverse_roots(
        self,
        batches: Sequence[Tensor],
        exponents: Sequence[float],
        *,
        rank_tolerance: float | None = None,
        ridge: float = 0.0,
        relative_ridge: float = 0.0,
        warm_starts: Sequence[Tensor] | None = None,
        overwrite: bool = False,
    ) -> list[RootResult]:
        """See :meth:`RootSolver.inverse_roots`. Uses neither ``warm_starts`` nor ``overwrite``."""
        del warm_starts, overwrite
        fractions = []
        for batch, exponent in zip(batches, exponents, strict=True):
            check_matrices(batch)
            check_regularization(batch, exponent, rank_tolerance, ridge, relative_ridge)
            fractions.append(self._fraction(exponent))
        attempts = [
            self._attempt(batch, fraction, ridge, relative_ridge)
            for batch, fraction in zip(batches, fractions, strict=True)
        ]
        if self.eigh_fallback and attempts:
            failed = [solvable & ~result.accepted for result, solvable in attempts]
            if torch.cat(failed).any().item():  # the host synchronisation
                relative = max(relative_ridge, self._ridge_floor(batches[0].dtype))
                again = EighSolver().inverse_roots(
                    [batch[mask] for batch, mask in zip(batches, failed, strict=True)],
                    exponents,
                    ridge=ridge,
                    relative_ridge=relative,
                )
                for (result, _), mask, repaired in zip(attempts, failed, again, strict=True):
                    result.roots[mask] = repaired.roots
                    result.accepted[mask] = repaired.accepted
        return [result for result, _ in attempts]

    def _attempt(
        self, matrices: Tensor, exponent: Fraction, ridge: float, relative_ridge: float
    ) -> tuple[RootResult, Tensor]:
        """Roots without fallback, and (N,) bool: which matrices have a root at all."""
        relative = max(relative_ridge, self._ridge_floor(matrices.dtype))
        with full_precision(matrices.device):
            unit, scales = scale_to_unit(matrices, ridge)
            largest = largest_eigenvalue(unit)
            shift = ridge / scales + relative * largest
            unit.diagonal(dim1=-2, dim2=-1).add_(shift[:, None])
            bound = eigenvalue_bound(unit, largest + shift)
            regular = unit / bound[:, None, None]
            # The bound exceeds the estimate by at most a quarter.
            root = self._root(regular, exponent.denominator, 0.75 * relative / (1 + relative))
            residual = symmetric_residual(regular, root, exponent.denominator)
            roots = torch.linalg.matrix_power(root, exponent.numerator)
            sizes = (scales * bound).pow_(-float(exponent))
            roots = (roots + roots.mT).mul_(0.5 * sizes[:, None, None])
            largest_entries = torch.linalg.vector_norm(roots, float("inf"), dim=(-2, -1))
            accepted = (residual <= self.residual_bound) & (largest_entries < float("inf"))
            solvable = (scales < float("inf")) & (bound > 0)
            return RootResult(roots.masked_fill_(~accepted[:, None, None], 0.0), accepted), solvable

    def _ridge_floor(self, dtype: torch.dtype) -> float:
        if self.relative_ridge_floor is not None:
            return self.relative_ridge_floor
        return 1e-6 if dtype == torch.float32 else 1e-12


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
