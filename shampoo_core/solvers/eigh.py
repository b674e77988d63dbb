"""Eigendecomposition: the reference solver, and the fallback of the others."""

from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_core.solvers.base import (
    BasisResult,
    RootResult,
    check_matrices,
    check_number,
    check_regularization,
)
from shampoo_core.solvers.precision import full_precision
from shampoo_core.solvers.scaling import scale_to_unit, spectral_power


@dataclass(frozen=True)
class EighSolver:
    """Inverse roots and bases by ``torch.linalg.eigh``, tested and repaired.

    Any exponent; truncation or ridge. A batch is solved in its own precision. The result is tested
    on the device (``max|A V - V D| / lambda_max`` and ``max|V'V - I|``), because a float32
    eigendecomposition can come back wrong without an exception; the matrices that fail, and only
    they, are solved once more in float64. One host synchronisation a call, to learn whether any
    failed, beside the one that ``torch.linalg.eigh`` itself makes on a GPU.

    Accuracy: about ``cond(A) * eps`` relative; float32 resolves eigenvalues down to about
    ``d * 6e-8`` of the largest. Peak memory is about five times the batch.

    Attributes:
        residual_bound: What the two residuals may be, in units of ``sqrt(d) * eps`` of the dtype.
            Healthy decompositions stay below 5; default 32.
    """

    residual_bound: float = 32.0

    def __post_init__(self) -> None:
        check_number("residual_bound", self.residual_bound, 1.0)

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
        check_regularization(exponent, rank_tolerance, ridge, relative_ridge)
        with full_precision(matrices.device):
            unit, scales = scale_to_unit(matrices, ridge)
            eigenvalues, eigenvectors = self._decompose(unit)
            powers, accepted = spectral_power(
                eigenvalues,
                scales,
                exponent,
                rank_tolerance=rank_tolerance,
                ridge=ridge,
                relative_ridge=relative_ridge,
            )
            return RootResult(
                torch.bmm(eigenvectors * powers[:, None, :], eigenvectors.mT), accepted
            )

    def basis(self, matrices: Tensor, warm_start: Tensor | None = None) -> BasisResult:
        """See :meth:`BasisSolver.basis`. ``warm_start`` only stands in where not accepted."""
        check_matrices(matrices, warm_start)
        with full_precision(matrices.device):
            unit, scales = scale_to_unit(matrices)
            eigenvalues, eigenvectors = self._decompose(unit)
            eigenvalues = eigenvalues.flip(-1) * scales[:, None]
            eigenvectors = eigenvectors.flip(-1)
            accepted = (eigenvalues[:, 0] > 0) & (eigenvalues[:, 0] < float("inf"))
            kept = warm_start if warm_start is not None else _identity_like(matrices)
            return BasisResult(
                torch.where(accepted[:, None, None], eigenvectors, kept),
                torch.where(accepted[:, None], eigenvalues, 0.0),
                accepted,
            )

    def _decompose(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (ascending) and eigenvectors of finite matrices of unit size.

        What cannot be solved at all has NaN eigenvalues and the identity for a basis.
        """
        if unit.numel() == 0:
            return unit.new_zeros(unit.shape[:2]), unit
        # Exactly singular blocks (embedding rows that saw no gradient) send LAPACK's divide and
        # conquer through denormals, where it fails or returns NaN for every second such matrix,
        # scaled or not. One epsilon on the diagonal prevents it and is far below its error.
        shift = torch.finfo(unit.dtype).eps
        unit.diagonal(dim1=-2, dim2=-1).add_(shift)
        eigenvalues, eigenvectors = _eigh_or_nan(unit)
        residuals = _residuals(unit, eigenvalues, eigenvectors)
        bound = self.residual_bound * unit.shape[-1] ** 0.5 * shift
        if not residuals.amax().item() <= bound:  # the host synchronisation; NaN is a failure too
            self._repair(unit, eigenvalues, eigenvectors, ~(residuals <= bound), bound)
        return eigenvalues - shift, eigenvectors

    def _repair(
        self, unit: Tensor, eigenvalues: Tensor, eigenvectors: Tensor, failed: Tensor, bound: float
    ) -> None:
        """Solve the failed matrices in float64, in place; the rare path, free to synchronise."""
        indices = failed.nonzero().squeeze(-1)
        doubles = unit[indices].double()
        values, vectors = _eigh_or_nan(doubles)
        residuals = _residuals(doubles, values, vectors)
        for i in (~(residuals <= bound)).nonzero().squeeze(-1).tolist():
            # One hopeless matrix fails its whole batch: alone, each gets its own chance.
            one = slice(i, i + 1)
            values[one], vectors[one] = _eigh_or_nan(doubles[one])
            residuals[one] = _residuals(doubles[one], values[one], vectors[one])
        solved = residuals <= bound
        values = torch.where(solved[:, None], values, float("nan"))
        vectors = torch.where(solved[:, None, None], vectors, _identity_like(doubles))
        eigenvalues[indices] = values.to(eigenvalues.dtype)
        eigenvectors[indices] = vectors.to(eigenvectors.dtype)


def _eigh_or_nan(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``, with NaN for the whole batch where it gives up."""
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except RuntimeError as error:
        if not _is_solver_failure(error):
            raise
        return torch.full_like(matrices[:, 0], float("nan")), torch.full_like(
            matrices, float("nan")
        )
    return values, vectors


def _is_solver_failure(error: RuntimeError) -> bool:
    """Whether the algorithm gave up, as opposed to the memory or the device."""
    if isinstance(error, torch.OutOfMemoryError):
        return False
    if isinstance(error, torch.linalg.LinAlgError):  # type: ignore[attr-defined]
        return True
    # Some CUDA releases report non-convergence as a status of the library (pytorch issue 94772).
    text = str(error).lower()
    return "cusolver" in text and "alloc" not in text


def _residuals(matrices: Tensor, eigenvalues: Tensor, eigenvectors: Tensor) -> Tensor:
    """Return (N,): the larger of ``max|A V - V D| / lambda_max`` and ``max|V'V - I|``."""
    largest = eigenvalues[:, -1]
    error = (eigenvectors * eigenvalues[:, None, :]).baddbmm_(matrices, eigenvectors, beta=-1)
    skew = torch.bmm(eigenvectors.mT, eigenvectors)
    skew.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return torch.maximum(_largest_entry(error) / largest, _largest_entry(skew))


def _largest_entry(matrices: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrices, float("inf"), dim=(-2, -1))


def _identity_like(matrices: Tensor) -> Tensor:
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return identity.expand_as(matrices)
