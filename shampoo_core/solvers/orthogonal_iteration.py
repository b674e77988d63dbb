"""Orthogonal iteration from the previous basis: tracks an eigenbasis by matrix products and QR."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shampoo_core.config import check_count, check_flags, check_range
from shampoo_core.solvers.base import (
    BasisResult,
    ManyBatchesSolver,
    Regularization,
    RootResult,
    check_matrices,
    check_regularization,
)
from shampoo_core.solvers.criterion import relative_off_diagonal
from shampoo_core.solvers.eigh import EighSolver
from shampoo_core.solvers.orthonormal import (
    NUMEL_AT_ONCE,
    Orthonormalized,
    are_orthogonal,
    by_products,
    by_reflections,
    columns,
    prefers_products,
)
from shampoo_core.solvers.precision import full_precision
from shampoo_core.solvers.scaling import scale_to_unit, spectral_power


@dataclass(frozen=True)
class OrthogonalIterationSolver(ManyBatchesSolver):
    """Warm-started orthogonal iteration, the basis refresh of SOAP.

    One iteration: ``Y = A Q``; sort the columns by ``diag(Q^T Y)``, descending; ``Q <- qr(Y).Q``.
    Descending order is what makes it converge: entry (i, j), i > j, of ``Q^T A Q`` is multiplied by
    ``lambda_i / lambda_j``, in ascending order every step drives the basis away. Columns keep their
    direction: ``q_new . A q_old >= 0``.

    Without a warm start the first basis is an eigendecomposition. Matrices that are not accepted
    (zero or not finite) keep their warm start. On a CPU columns are made orthonormal by reflections,
    without host synchronisation. Elsewhere that is done by products (`solvers.orthonormal`), tested,
    and done again by reflections where it failed; asking whether any did is one host synchronisation
    a call.

    Attributes:
        max_iterations: At least 1. Default 1, as SOAP.
        tolerance: A matrix stops, unchanged but for the order of its columns, as soon as its relative
            off-diagonal norm (:func:`off_diagonal_ratio`) is at most this. Default 0: all iterations
            are made, and the test's product is saved.
        residual_bound: Of roots: ``max|B_ij| / sqrt(b_i b_j)``, i != j, where b are the regularised
            eigenvalues. Default 0.1.
        eigh_fallback: Roots that exceed the bound are made from an eigendecomposition; asking whether
            there is any is a host synchronisation of :meth:`inverse_root` with a warm start. Also whether
            the first basis may fall back to float64, and columns to reflections. Without it the host
            never waits, and what failed is not accepted. An `AdaptiveRefresh` does without until its next
            test, so that with one roots want several iterations.
    """

    max_iterations: int = 1
    tolerance: float = 0.0
    residual_bound: float = 0.1
    eigh_fallback: bool = True
    warm_starts: ClassVar[bool] = True
    finds_eigenvectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        owner = "OrthogonalIterationSolver"
        check_flags(self)
        check_count(owner, "max_iterations", self.max_iterations)
        check_range(owner, "tolerance", self.tolerance, low=0.0, high=1.0)
        check_range(owner, "residual_bound", self.residual_bound, low=0.0)

    def basis(self, matrices: Tensor, warm_start: Tensor | None = None) -> BasisResult:
        """See :meth:`BasisSolver.basis`."""
        (result,) = self.bases([matrices], None if warm_start is None else [warm_start])
        return result

    def bases(
        self,
        batches: Sequence[Tensor],
        warm_starts: Sequence[Tensor] | None = None,
        *,
        overwrite: bool = False,
    ) -> list[BasisResult]:
        """See :meth:`BasisSolver.bases`. Reflections do not ``overwrite``."""
        if warm_starts is None:
            return self._eigh().bases(batches, overwrite=overwrite)
        for batch, start in zip(batches, warm_starts, strict=True):
            check_matrices(batch, start)
        pairs = list(zip(batches, warm_starts, strict=True))
        with full_precision(batches[0].device) if batches else nullcontext():
            if batches and prefers_products(batches[0].device):
                results = self._continued_by_products(pairs, overwrite=overwrite)
            else:
                results = [self._continued(*pair, by_reflections).result for pair in pairs]
            return [
                _or_start(result, start) for result, start in zip(results, warm_starts, strict=True)
            ]

    def _continued_by_products(
        self, pairs: Sequence[tuple[Tensor, Tensor]], *, overwrite: bool
    ) -> list[BasisResult]:
        """Bases of matrices from warm starts, repaired by reflections if that is allowed."""
        attempts = [self._in_portions(*pair, overwrite=overwrite) for pair in pairs]
        failed = torch.cat([failed for _, failed in attempts])
        if self.eigh_fallback and failed.any().item():  # the host synchronisation
            for (matrices, warm_start), (result, mask) in zip(pairs, attempts, strict=True):
                again = self._continued(matrices[mask], warm_start[mask], by_reflections)
                for old, new in zip(result, again.result, strict=True):
                    if old is not None and new is not None:
                        old[mask] = new
        return [result for result, _ in attempts]

    def _in_portions(
        self, matrices: Tensor, warm_start: Tensor, *, overwrite: bool
    ) -> tuple[BasisResult, Tensor]:
        """Bases, and (N,) bool: which could not be made by products; such matrices are not overwritten."""
        vectors = matrices if overwrite else torch.empty_like(matrices)
        at_once = max(1, NUMEL_AT_ONCE // matrices.shape[-1] ** 2)
        rest, all_failed = [], []
        for part, start, own in zip(
            *(tensor.split(at_once) for tensor in (matrices, warm_start, vectors)), strict=True
        ):
            found, is_solvable, is_new = self._continued(part, start, by_products)
            is_basis = found.accepted & (are_orthogonal(found.eigenvectors) | ~is_new)
            all_failed.append(is_solvable & ~is_basis)
            torch.where(is_basis[:, None, None], found.eigenvectors, part, out=own)
            rest.append((found.eigenvalues, is_basis, found.order))
        values, accepted, order = map(torch.cat, zip(*rest, strict=True))
        return BasisResult(vectors, values, accepted, order), torch.cat(all_failed)

    def _continued(
        self, matrices: Tensor, warm_start: Tensor, orthonormalized: Orthonormalized
    ) -> _Continued:
        """Iterate; where the result is not accepted, it is anything."""
        unit, scales = scale_to_unit(matrices)
        vectors, order, is_new = self._iterate(unit, warm_start, orthonormalized)
        values = (vectors * torch.bmm(unit, vectors)).sum(-2)
        values, last = values.sort(dim=-1, descending=True, stable=True)
        vectors, order = columns(vectors, last), order.gather(-1, last)
        values = values * scales[:, None]
        accepted = (values[:, 0] > 0) & (values[:, 0] < float("inf"))
        # Of unit size: traces cannot overflow, and matrices that were not finite are zero.
        is_solvable = unit.diagonal(dim1=-2, dim2=-1).sum(-1) > 0
        return _Continued(BasisResult(vectors, values, accepted, order), is_solvable, is_new)

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
        """See :meth:`RootSolver.inverse_roots`. Does not ``overwrite``.

        ``warm_starts`` are the ``eigenvectors`` of the previous results, not their roots. Small
        eigenvalues need an accurate basis: without enough iterations most roots will come from the
        fallback.
        """
        del overwrite
        regularizations = []
        for batch, exponent in zip(batches, exponents, strict=True):
            check_matrices(batch)
            regularizations.append(
                check_regularization(batch, exponent, rank_tolerance, ridge, relative_ridge)
            )
        bases = self.bases(batches, warm_starts)
        vectors = [basis.eigenvectors for basis in bases]
        tasks = list(zip(batches, exponents, regularizations, vectors, strict=True))
        results = [_root_in_basis(*task) for task in tasks]
        if warm_starts is None or not results:  # already eigendecompositions, or the identity
            return [
                _accepted(result, result.usable & self._is_good(result, basis))
                for result, basis in zip(results, bases, strict=True)
            ]
        failed = [r.usable & (r.residual > self.residual_bound) for r in results]
        if self.eigh_fallback and torch.cat(failed).any().item():  # the host synchronisation
            exact = EighSolver().bases([b[mask] for b, mask in zip(batches, failed, strict=True)])
            for task, result, mask, basis in zip(tasks, results, failed, exact, strict=True):
                matrices, exponent, regularization, _ = task
                repaired = _root_in_basis(
                    matrices[mask], exponent, regularization, basis.eigenvectors
                )
                for old, new in zip(result, repaired, strict=True):
                    old[mask] = new
                mask[mask.clone()] = ~self._is_good(repaired, basis)
        return [
            _accepted(result, result.usable & ~mask)
            for result, mask in zip(results, failed, strict=True)
        ]

    def _is_good(self, result: _RootInBasis, basis: BasisResult) -> Tensor:
        """Whether a basis is one: what failed is the identity, which is one of the zero matrix alone."""
        return basis.accepted | (result.residual <= self.residual_bound)

    def without_fallback(self) -> OrthogonalIterationSolver:
        """See :meth:`RootSolver.without_fallback`."""
        return replace(self, eigh_fallback=False)

    def _eigh(self) -> EighSolver:
        return EighSolver(double_fallback=self.eigh_fallback)

    def _iterate(
        self, unit: Tensor, warm_start: Tensor, orthonormalized: Orthonormalized
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The last basis, per column the column of the warm start it came from, and which are new."""
        vectors = warm_start
        order = _identity_order(vectors[:, 0])
        is_new = torch.full_like(unit[:, 0, 0], self.tolerance == 0.0, dtype=torch.bool)
        for _ in range(self.max_iterations):
            products = torch.bmm(unit, vectors)
            stale = None
            if self.tolerance == 0.0:
                sizes = (vectors * products).sum(-2)
            else:
                rotated = torch.bmm(vectors.mT, products)
                sizes = rotated.diagonal(dim1=-2, dim2=-1).clone()
                stale = (relative_off_diagonal(rotated) > self.tolerance)[:, None]
                is_new |= stale[:, 0]
            descending = sizes.argsort(descending=True, stable=True)
            refreshed = orthonormalized(products, vectors, descending)
            moved = order.gather(-1, descending)
            vectors = (
                refreshed if stale is None else torch.where(stale[..., None], refreshed, vectors)
            )
            order = moved if stale is None else torch.where(stale, moved, order)
        return vectors, order, is_new


class _Continued(NamedTuple):
    """Bases, which matrices (N,) have one, and which (N,) have another one than before."""

    result: BasisResult
    is_solvable: Tensor
    is_new: Tensor


class _RootInBasis(NamedTuple):
    """Roots as if a basis were exact, whether they are usable at all, how inexact it is, and it."""

    roots: Tensor
    usable: Tensor
    residual: Tensor
    eigenvectors: Tensor


def _root_in_basis(
    matrices: Tensor, exponent: float, regularization: Regularization, eigenvectors: Tensor
) -> _RootInBasis:
    with full_precision(matrices.device):
        unit, scales = scale_to_unit(matrices, regularization.ridge)
        rotated = torch.bmm(eigenvectors.mT, torch.bmm(unit, eigenvectors))
        diagonal = rotated.diagonal(dim1=-2, dim2=-1)
        powers, usable = spectral_power(diagonal, scales, exponent, regularization)
        # A relative test: in directions of small eigenvalues small entries matter. Dropped ones
        # have weight zero.
        weights = (powers * scales.pow(exponent)[:, None]).pow_(0.5 / exponent)
        rotated.diagonal(dim1=-2, dim2=-1).zero_()
        coupling = rotated * weights[:, :, None] * weights[:, None, :]
        residual = torch.linalg.vector_norm(coupling, float("inf"), dim=(-2, -1))
        roots = torch.bmm(eigenvectors * powers[:, None, :], eigenvectors.mT)
        return _RootInBasis(roots, usable, residual, eigenvectors)


def _accepted(result: _RootInBasis, accepted: Tensor) -> RootResult:
    roots = result.roots.masked_fill_(~accepted[:, None, None], 0.0)
    return RootResult(roots, accepted, result.eigenvectors)


def _or_start(result: BasisResult, warm_start: Tensor) -> BasisResult:
    """The warm start, unmoved, and zeros where a result is not accepted."""
    vectors, values, accepted, order = result
    assert order is not None
    return BasisResult(
        torch.where(accepted[:, None, None], vectors, warm_start, out=vectors),
        values.masked_fill_(~accepted[:, None], 0.0),
        accepted,
        torch.where(accepted[:, None], order, _identity_order(order)),
    )


def _identity_order(like: Tensor) -> Tensor:
    """Return (N, d) column numbers 0..d-1, for (N, d) ``like``."""
    return torch.arange(like.shape[-1], device=like.device).expand(like.shape)
