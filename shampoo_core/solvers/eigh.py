"""Eigendecomposition: the reference solver, and the fallback of the others."""

from __future__ import annotations

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

    Accuracy: eigenvalues are off by a few epsilons of the largest one, so that in float32 a root with
    p = 4 has a relative error of 1e-5 at condition 1e3 and 2e-2 at 1e6; ``double_precision`` takes
    that to 5e-7 and 6e-4, what the rounding of the input leaves. Peak memory is five times the batch.

    Attributes:
        double_precision: Solve float32 batches in float64 from the start and round the result. Takes
            about twice as long on a CPU or a data-centre GPU, far longer on a consumer one.
        residual_bound: What the two residuals may be, in units of ``sqrt(d) * eps`` of the dtype.
            Healthy decompositions stay below 5; default 32.
    """

    double_precision: bool = False
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
        regularization = check_regularization(
            matrices, exponent, rank_tolerance, ridge, relative_ridge
        )
        with full_precision(matrices.device):
            unit, scales = scale_to_unit(self._working_copy(matrices), ridge)
            values, vectors = self._decompose(unit)
            powers, accepted = spectral_power(
                values, scales, exponent, regularization, limit=torch.finfo(matrices.dtype).max
            )
            roots = torch.bmm(vectors * powers[:, None, :], vectors.mT)
            return RootResult(roots.to(matrices.dtype), accepted)

    def basis(self, matrices: Tensor, warm_start: Tensor | None = None) -> BasisResult:
        """See :meth:`BasisSolver.basis`. ``warm_start`` only stands in where not accepted."""
        check_matrices(matrices, warm_start)
        with full_precision(matrices.device):
            unit, scales = scale_to_unit(self._working_copy(matrices))
            values, vectors = self._decompose(unit)
            values = (values.flip(-1) * scales[:, None]).to(matrices.dtype)
            vectors = vectors.flip(-1).to(matrices.dtype)
            accepted = (values[:, 0] > 0) & (values[:, 0] < float("inf"))
            kept = warm_start if warm_start is not None else _identity_like(matrices)
            return BasisResult(
                torch.where(accepted[:, None, None], vectors, kept),
                values.masked_fill_(~accepted[:, None], 0.0),
                accepted,
            )

    def _working_copy(self, matrices: Tensor) -> Tensor:
        return matrices.double() if self.double_precision else matrices

    def _decompose(self, unit: Tensor) -> tuple[Tensor, Tensor]:
        """Eigenvalues (ascending) and eigenvectors of finite matrices of unit size.

        What cannot be solved at all has NaN eigenvalues and the identity for a basis.
        """
        if unit.shape[0] == 0:
            return unit.new_zeros(unit.shape[:2]), unit
        # Exactly singular blocks (embedding rows that saw no gradient) send LAPACK's divide and
        # conquer through denormals, where it fails or returns NaN for every second such matrix,
        # scaled or not. One epsilon on the diagonal prevents it and is below its rounding.
        shift = torch.finfo(unit.dtype).eps
        unit.diagonal(dim1=-2, dim2=-1).add_(shift)
        values, vectors = _eigh(unit)
        residuals = _residuals(unit, values, vectors)
        bound = self.residual_bound * unit.shape[-1] ** 0.5 * shift
        if not residuals.amax().item() <= bound:  # the host synchronisation; NaN is a failure too
            self._repair(unit, values, vectors, ~(residuals <= bound))
        return values - shift, vectors

    def _repair(self, unit: Tensor, values: Tensor, vectors: Tensor, failed: Tensor) -> None:
        """Solve the failed matrices in float64, in place; the rare path, free to synchronise."""
        indices = failed.nonzero().squeeze(-1)
        doubles = unit[indices].double()
        double_values, double_vectors = _eigh(doubles)
        residuals = _residuals(doubles, double_values, double_vectors)
        epsilon = torch.finfo(torch.float64).eps
        solved = residuals <= self.residual_bound * unit.shape[-1] ** 0.5 * epsilon
        double_values = double_values.masked_fill(~solved[:, None], float("nan"))
        double_vectors = torch.where(solved[:, None, None], double_vectors, _identity_like(doubles))
        values[indices] = double_values.to(values.dtype)
        vectors[indices] = double_vectors.to(vectors.dtype)


def _eigh(matrices: Tensor) -> tuple[Tensor, Tensor]:
    """``torch.linalg.eigh``, with NaN for the matrices where it gives up.

    One hopeless matrix fails the whole call, so that a batch that fails is halved until the
    culprits are alone.
    """
    try:
        values, vectors = torch.linalg.eigh(matrices)
    except RuntimeError as error:
        if not _is_solver_failure(error):
            raise
        if matrices.shape[0] == 1:
            nan = torch.full_like(matrices, float("nan"))
            return nan[:, 0], nan
        halves = [_eigh(half) for half in matrices.tensor_split(2)]
        return torch.cat([half[0] for half in halves]), torch.cat([half[1] for half in halves])
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


def _residuals(matrices: Tensor, values: Tensor, vectors: Tensor) -> Tensor:
    """Return (N,): the larger of ``max|A V - V D| / lambda_max`` and ``max|V'V - I|``."""
    error = (vectors * values[:, None, :]).baddbmm_(matrices, vectors, beta=-1)
    skew = torch.bmm(vectors.mT, vectors)
    skew.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    return torch.maximum(_largest_entry(error) / values[:, -1], _largest_entry(skew))


def _largest_entry(matrices: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrices, float("inf"), dim=(-2, -1))


def _identity_like(matrices: Tensor) -> Tensor:
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return identity.expand_as(matrices)
