"""Eigendecomposition: the reference solver, and the fallback of the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from shampoo_core.config import check_flags, check_range
from shampoo_core.grams import add_gram, mirror, strip_bounds
from shampoo_core.solvers.base import (
    BasisResult,
    ManyBatchesSolver,
    Regularization,
    RootResult,
    check_matrices,
    check_regularization,
)
from shampoo_core.solvers.decomposition import decompose
from shampoo_core.solvers.precision import full_precision
from shampoo_core.solvers.scaling import largest_entries, scale_batches_to_unit, spectral_power

PROBES = 8
"""Random vectors that a decomposition is tested on."""


@dataclass(frozen=True)
class EighSolver(ManyBatchesSolver):
    """Inverse roots and bases by ``torch.linalg.eigh``, tested and repaired.

    Any exponent; truncation or ridge. A batch is solved in its own precision. The result is tested
    on the device (``max|A X - V D V'X| / lambda_max`` and ``max|V V'X - X|`` for a few random vectors
    X), because a float32 eigendecomposition can come back wrong without an exception; the matrices
    that fail, and only they, are solved once more in float64. One host synchronisation a call, however
    many batches it has, to learn whether any failed, beside the one that ``torch.linalg.eigh`` itself
    makes on a GPU; none where there is nothing more precise to fall back to. On a GPU float32 matrices of
    side 33 to 512 are solved in float64 from the start (`solvers.decomposition`): measured on one for data
    centres, one for consumers may take longer.

    Accuracy: eigenvalues are off by a few epsilons of the largest one, so that in float32 a root with
    p = 4 has a relative error of 1e-5 at condition 1e3 and 2e-2 at 1e6; ``double_precision`` takes
    that to 5e-7 and 6e-4, what the rounding of the input leaves. Peak memory is three times the batch,
    twice where it may be overwritten, once more for roots that come with eigenvectors; what
    ``torch.linalg.eigh`` takes inside comes on top.

    Attributes:
        double_precision: Solve float32 batches in float64 from the start and round the result. Takes
            about twice as long on a CPU or a data-centre GPU, far longer on a consumer one.
        double_fallback: Solve once more in float64 what failed in float32; without it what fails is
            not accepted, and the host never waits to know.
        residual_bound: What the two residuals may be, in units of ``sqrt(d) * eps`` of the dtype.
            Healthy decompositions stay below 12; default 64.
    """

    double_precision: bool = False
    double_fallback: bool = True
    residual_bound: float = 64.0
    warm_starts: ClassVar[bool] = False
    finds_eigenvectors: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_flags(self)
        check_range("EighSolver", "residual_bound", self.residual_bound, low=1.0)

    def without_fallback(self) -> EighSolver:
        """See :meth:`RootSolver.without_fallback`."""
        return replace(self, double_fallback=False)

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
        """See :meth:`RootSolver.inverse_roots`. ``warm_starts`` only ask for eigenvectors."""
        regularizations = []
        for batch, exponent in zip(batches, exponents, strict=True):
            check_matrices(batch)
            regularizations.append(
                check_regularization(batch, exponent, rank_tolerance, ridge, relative_ridge)
            )
        if not sum(map(len, batches)):
            return [RootResult(batch, batch.new_zeros(0, dtype=torch.bool)) for batch in batches]
        with full_precision(batches[0].device):
            units, scales = scale_batches_to_unit(
                self._working_copies(batches), ridge, overwrite=overwrite
            )
            spectra = self._decompose(units)
            powers, accepted = spectral_power(
                spectra.values,
                scales,
                _per_matrix(exponents, units),
                Regularization(
                    _per_matrix([r.rank_tolerance for r in regularizations], units),
                    ridge,
                    relative_ridge,
                ),
                limit=torch.finfo(batches[0].dtype).max,
                padding=spectra.padding,
            )
            counts = [len(batch) for batch in batches]
            # Units have served, their memory takes the roots; so have vectors nobody asked for.
            _put_roots(
                units, spectra.vectors, powers.sqrt().split(counts), overwrite=warm_starts is None
            )
            return [
                RootResult(
                    root.to(batch.dtype),
                    kept,
                    None if warm_starts is None else vectors.to(batch.dtype),
                )
                for batch, root, vectors, kept in zip(
                    batches, units, spectra.vectors, accepted.split(counts), strict=True
                )
            ]

    def basis(self, matrices: Tensor, warm_start: Tensor | None = None) -> BasisResult:
        """See :meth:`BasisSolver.basis`. ``warm_start`` only stands in where not accepted."""
        (result,) = self.bases([matrices], None if warm_start is None else [warm_start])
        return result

    def bases(
        self,
        batches: Sequence[Tensor],
        warm_starts: Sequence[Tensor] | None = None,
        *,
        overwrite: bool = False,
    ) -> list[BasisResult]:
        """See :meth:`BasisSolver.bases`. ``warm_starts`` only stand in where not accepted."""
        starts = [None] * len(batches) if warm_starts is None else warm_starts
        for batch, start in zip(batches, starts, strict=True):
            check_matrices(batch, start)
        if not sum(map(len, batches)):
            return [BasisResult(batch, batch[:, 0], batch[:, 0, 0] > 0) for batch in batches]
        with full_precision(batches[0].device):
            units, scales = scale_batches_to_unit(
                self._working_copies(batches), overwrite=overwrite
            )
            spectra = self._decompose(units)
            all_values = (spectra.values * scales[:, None]).to(batches[0].dtype)
            largest = all_values.amax(-1)
            all_accepted = (largest > 0) & (largest < float("inf"))
            all_rejected = ~all_accepted
            all_values = all_values.masked_fill_(all_rejected[:, None], 0.0)
            counts = [len(batch) for batch in batches]
            return [
                BasisResult(
                    _replaced(vectors.to(batch.dtype), rejected, start),
                    values[:, : batch.shape[-1]],
                    accepted,
                )
                for batch, start, vectors, values, accepted, rejected in zip(
                    batches,
                    starts,
                    spectra.vectors,
                    all_values.split(counts),
                    all_accepted.split(counts),
                    all_rejected.split(counts),
                    strict=True,
                )
            ]

    def _working_copies(self, batches: Sequence[Tensor]) -> Sequence[Tensor]:
        return [batch.double() for batch in batches] if self.double_precision else batches

    def _decompose(self, units: Sequence[Tensor]) -> _Spectra:
        """Eigenvalues (descending) and eigenvectors of finite matrices of unit size.

        What cannot be solved at all has NaN eigenvalues and the identity for a basis.

        Args:
            units: Used up: negated, and changed by a rounding error.
        """
        # LAPACK sorts eigenvalues upwards; those of -A are in the wanted order. Turning columns round
        # afterwards takes as long as a matrix product on a CPU.
        torch._foreach_neg_(list(units))
        # Exactly singular blocks (embedding rows that saw no gradient) send LAPACK's divide and
        # conquer through denormals, where it fails or returns NaN for every second such matrix,
        # scaled or not. One epsilon on the diagonal prevents it and is below its rounding.
        shift = torch.finfo(units[0].dtype).eps
        torch._foreach_sub_([unit.diagonal(dim1=-2, dim2=-1) for unit in units], shift)
        pairs = [decompose(unit) for unit in units]
        residuals = _residuals(units, pairs)
        bounds = _per_matrix([self._bound(unit) for unit in units], units).squeeze(-1)
        failed = ~(residuals <= bounds)  # NaN is a failure too
        by_batch = list(zip(units, pairs, failed.split([len(u) for u in units]), strict=True))
        if not self.double_fallback or units[0].dtype == torch.float64:
            pairs = [_marked(*pair, part) for _, pair, part in by_batch]
        elif failed.any().item():  # the host synchronisation
            for unit, pair, part in by_batch:
                self._repair(unit, *pair, part)
        values, padding = _side_by_side([values for values, _ in pairs])
        shifted_back = torch.rsub(values, -shift).masked_fill_(padding, 0.0)
        return _Spectra(shifted_back, padding, [vectors for _, vectors in pairs])

    def _bound(self, matrices: Tensor) -> float:
        """What the residuals of matrices of this side and dtype may be."""
        epsilon = float(torch.finfo(matrices.dtype).eps)
        return float(self.residual_bound * matrices.shape[-1] ** 0.5 * epsilon)

    def _repair(self, unit: Tensor, values: Tensor, vectors: Tensor, failed: Tensor) -> None:
        """Solve the failed matrices in float64, in place; the rare path, free to synchronise."""
        indices = failed.nonzero().squeeze(-1)
        if not len(indices):
            return
        doubles = unit[indices].double()
        double_values, double_vectors = decompose(doubles)
        residuals = _residuals([doubles], [(double_values, double_vectors)])
        still_failed = ~(residuals <= self._bound(doubles))
        double_values, double_vectors = _marked(double_values, double_vectors, still_failed)
        values[indices] = double_values.to(values.dtype)
        vectors[indices] = double_vectors.to(vectors.dtype)


class _Spectra(NamedTuple):
    """Eigendecompositions of K matrices in several batches.

    Attributes:
        values: (K, largest side), each row descending and filled up with zeros.
        padding: (K, largest side) bool, true for what fills up.
        vectors: Per batch (N, d, d).
    """

    values: Tensor
    padding: Tensor
    vectors: list[Tensor]


def _side_by_side(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Stack (N, d) tensors of any d into one, filled up with zeros; and what is filling."""
    sides = _per_matrix([row.shape[-1] for row in rows], rows)
    widest = max(row.shape[-1] for row in rows)
    padding = torch.arange(widest, device=rows[0].device) >= sides
    together = rows[0].new_zeros(padding.shape)
    parts = together.split([len(row) for row in rows])
    torch._foreach_copy_(
        [part[:, : row.shape[-1]] for part, row in zip(parts, rows, strict=True)], list(rows)
    )
    return together, padding


def _per_matrix(numbers: Sequence[float | Tensor], batches: Sequence[Tensor]) -> Tensor:
    """(K, 1): the number of its batch for each of all K matrices."""
    repeated = [
        float(number)
        for number, batch in zip(numbers, batches, strict=True)
        for _ in range(len(batch))
    ]
    like = batches[0]
    # Made on the host and sent without waiting: torch.tensor(..., device=) synchronises the stream.
    column = torch.tensor(repeated, dtype=like.dtype, device="cpu")[:, None]
    return column.to(like.device, non_blocking=True)


def _put_roots(
    roots: Sequence[Tensor],
    vectors: Sequence[Tensor],
    half_powers: Sequence[Tensor],
    *,
    overwrite: bool,
) -> None:
    """Write ``V diag(h)^2 V^T``, the Gram matrix of the rows of ``V diag(h)``, for several batches.

    Args:
        roots: What to write to, (N, d, d) each.
        vectors: V, likewise.
        half_powers: h, (N, d or more) each.
        overwrite: Whether V is not needed any more.
    """
    factors = [h[:, None, : v.shape[-1]] for h, v in zip(half_powers, vectors, strict=True)]
    if overwrite:
        torch._foreach_mul_(list(vectors), factors)
        rows = list(vectors)
    else:
        rows = list(torch._foreach_mul(list(vectors), factors))
    bounds = [strip_bounds(own) for own in rows]
    for root, own, strips in zip(roots, rows, bounds, strict=True):
        # A decay of zero does not read what is there.
        add_gram(root, own, strips, decay=0.0, gain=1.0)
    mirror(roots, bounds)


def _replaced(vectors: Tensor, where: Tensor, new: Tensor | None = None) -> Tensor:
    """``new``, None for the identity, in the place of the matrices where ``where``, (N,) bool, is true."""
    if new is not None:
        return torch.where(where[:, None, None], new, vectors, out=vectors)
    vectors.masked_fill_(where[:, None, None], 0.0)
    vectors.diagonal(dim1=-2, dim2=-1).masked_fill_(where[:, None], 1.0)
    return vectors


def _residuals(batches: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """(K,): the larger of ``max|A X - V D V'X| / |lambda|_max`` and ``max|V V'X - X|`` of each matrix.

    As V is square, ``V V' = I`` says that it is orthogonal, and ``A = V D V'`` that its columns are then
    eigenvectors. Of an error that has a row of norm r the vectors X show at least r / 20, but for one
    case in 10^11; they cost a few per cent of whole products.

    Args:
        batches: A, negative semi-definite.
        pairs: D, ascending, and V.
    """
    probes = _probes(max(batch.shape[-1] for batch in batches), batches[0])
    own = [probes[: batch.shape[-1]].expand(len(batch), -1, -1) for batch in batches]
    inside = [torch.bmm(vectors.mT, x) for x, (_, vectors) in zip(own, pairs, strict=True)]
    scaled = torch._foreach_mul(inside, [values[:, :, None] for values, _ in pairs])
    errors, skews = [], []
    for a, x, y, dy, (_, v) in zip(batches, own, inside, scaled, pairs, strict=True):
        errors.append(torch.bmm(a, x).baddbmm_(v, dy, alpha=-1.0))
        skews.append(torch.baddbmm(x, v, y, alpha=-1.0))
    largest = torch.cat([values[:, 0] for values, _ in pairs])
    error, skew = largest_entries([*errors, *skews]).chunk(2)
    return torch.maximum(error / -largest, skew)


def _probes(side: int, like: Tensor) -> Tensor:
    """(side, `PROBES`): normal numbers, the same at every call."""
    generator = torch.Generator(device="cpu").manual_seed(0)
    numbers = torch.randn(side, PROBES, dtype=like.dtype, device="cpu", generator=generator)
    return numbers.to(like.device, non_blocking=True)


def _marked(values: Tensor, vectors: Tensor, failed: Tensor) -> tuple[Tensor, Tensor]:
    """NaN eigenvalues and, in place, the identity for a basis where a decomposition failed."""
    return values.masked_fill(failed[:, None], float("nan")), _replaced(vectors, failed)
