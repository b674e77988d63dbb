"""What every solver takes and gives: results, protocols, and the checks at the door.

A solver is a frozen dataclass of numbers with one or two methods on batches ``(N, d, d)`` of
symmetric positive semi-definite matrices. The laws that hold for all of them:

- **No neighbours.** What comes out for one matrix does not depend on the others in the batch; a
  non-finite or hopeless matrix spoils its own result only.
- **Always finite.** Nothing that is returned contains NaN or infinity. Whether an entry is worth
  using is said by ``accepted``, on the device; the caller keeps what it had for the others:
  ``torch.where(result.accepted[:, None, None], result.roots, old_roots)``.
- **Scale free.** Matrices are divided by their size before they are solved and the result is scaled
  back, so that factors of 1e-30 and 1e+30 are treated alike.
- **Nothing is learnt about zero.** A matrix of zeros has no direction to precondition: with
  truncation or a relative ridge it is not accepted (the old root, at first the identity, stays).
  With an absolute ridge it is an ordinary matrix.
- **The same on every rank.** No random numbers, no iteration counts that depend on the batch.
- **Inputs stay as they are**, unless they may be overwritten. Then results may lie in their memory.
- **Full precision.** Matrix products inside are true float32 or float64, whatever TF32 or autocast
  settings surround the call: TF32 breaks every coupled iteration.

Regularisation is one of two things. *Truncation*, the default: eigenvalues at or below
``rank_tolerance`` times the largest are taken for rounding noise, and the root is that of the
pseudo-inverse, zero in their directions. Or a *ridge*: ``ridge`` (absolute, in units of the matrix)
plus ``relative_ridge`` times the largest eigenvalue is added to every eigenvalue. Methods made of
matrix products cannot truncate and put a relative ridge of their own in its place; they say which.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class RootResult(NamedTuple):
    """Inverse roots of a batch of N matrices of side d.

    Attributes:
        roots: (N, d, d), symmetric up to rounding; zeros where not accepted.
        accepted: (N,) bool; the root is finite and passed the solver's test.
        eigenvectors: (N, d, d) of solvers that warm-start on a basis: hand them back as
            ``warm_start`` next time. ``None`` from all others.
    """

    roots: Tensor
    accepted: Tensor
    eigenvectors: Tensor | None = None


class BasisResult(NamedTuple):
    """Eigenbases of a batch of N matrices of side d.

    Attributes:
        eigenvectors: (N, d, d), one eigenvector a column, by descending eigenvalue; where not
            accepted, the warm start, or the identity if there was none.
        eigenvalues: (N, d), descending, in units of the matrices (rounding can make the smallest
            ones negative); zeros where not accepted.
        accepted: (N,) bool; orthogonal and diagonalising as far as the solver promises.
        order: (N, d) integers, or ``None`` where no warm start was continued: new column j grew out
            of column ``order[n, j]`` of the warm start, so whatever is kept per eigenvector is
            carried along by ``torch.gather``.
    """

    eigenvectors: Tensor
    eigenvalues: Tensor
    accepted: Tensor
    order: Tensor | None = None


class RootSolver(Protocol):
    """Computes inverse roots of symmetric positive semi-definite matrices."""

    def without_fallback(self) -> RootSolver:
        """The same, but what fails is not accepted, not solved again, and the host never waits."""
        ...

    @property
    def warm_starts(self) -> bool:
        """Whether it goes on from earlier eigenvectors, so that these are worth keeping."""
        ...

    @property
    def finds_eigenvectors(self) -> bool:
        """Whether results have eigenvectors when warm starts are given."""
        ...

    def check_exponent(self, exponent: float) -> None:
        """Say, before there is a matrix, whether the method can do an exponent.

        Raises:
            ValueError: It cannot.
        """
        ...

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
        """Return ``(A + (ridge + relative_ridge * lambda_max) I)^(-exponent)`` for every A.

        Args:
            matrices: (N, d, d), float32 or float64, symmetric up to rounding.
            exponent: > 0; for an order-k block usually 1/(2k).
            rank_tolerance: Eigenvalues at or below this fraction of the largest are dropped.
                ``None`` means d times the machine epsilon. Only without a ridge.
            ridge: >= 0, added to every eigenvalue, in units of the matrices.
            relative_ridge: >= 0, added to every eigenvalue, in units of the largest one.
            warm_start: Earlier result to start from, where the solver can use one.

        Raises:
            TypeError: dtype is neither float32 nor float64.
            ValueError: Shapes or numbers out of range, or an exponent the method cannot do.
        """
        ...

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
        """`inverse_root` of several batches, of any sides, each with an exponent of its own.

        Everything that is refreshed together goes into one call, so that a solver can share
        operations and its host synchronisation between the batches.

        Args:
            batches: As ``matrices`` of `inverse_root`.
            exponents: Of the batches.
            rank_tolerance: As of `inverse_root`.
            ridge: As of `inverse_root`.
            relative_ridge: As of `inverse_root`.
            warm_starts: One for every batch, or none.
            overwrite: Whether the matrices may be overwritten, to save memory. Not every solver
                does.
        """
        ...


class BasisSolver(Protocol):
    """Computes eigenbases of symmetric positive semi-definite matrices."""

    def without_fallback(self) -> BasisSolver:
        """See `RootSolver.without_fallback`."""
        ...

    @property
    def warm_starts(self) -> bool:
        """Whether it goes on from earlier eigenvectors; without, they are the result where not accepted."""
        ...

    def bases(
        self,
        batches: Sequence[Tensor],
        warm_starts: Sequence[Tensor] | None = None,
        *,
        overwrite: bool = False,
    ) -> list[BasisResult]:
        """`basis` of several batches, of any sides; ``overwrite`` as of `RootSolver.inverse_roots`."""
        ...

    def basis(self, matrices: Tensor, warm_start: Tensor | None = None) -> BasisResult:
        """Return eigenvectors and eigenvalues of every matrix, by descending eigenvalue.

        Args:
            matrices: (N, d, d), float32 or float64, symmetric up to rounding.
            warm_start: (N, d, d) earlier eigenvectors, where the solver can use them.

        Raises:
            TypeError: dtype is neither float32 nor float64.
            ValueError: Shapes do not fit.
        """
        ...


class ManyBatchesSolver(ABC):
    """`inverse_root` of solvers that have `inverse_roots`, and any exponent."""

    def check_exponent(self, exponent: float) -> None:
        """See :meth:`RootSolver.check_exponent`."""
        _check_exponent_range(exponent)

    @abstractmethod
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
        """See :meth:`RootSolver.inverse_roots`."""

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
        """See :meth:`RootSolver.inverse_root`."""
        (result,) = self.inverse_roots(
            [matrices],
            [exponent],
            rank_tolerance=rank_tolerance,
            ridge=ridge,
            relative_ridge=relative_ridge,
            warm_starts=None if warm_start is None else [warm_start],
        )
        return result


def check_matrices(matrices: Tensor, warm_start: Tensor | None = None) -> None:
    """Refuse what is not a batch of square matrices in single or double precision."""
    if matrices.dim() != 3 or matrices.shape[-1] != matrices.shape[-2] or not matrices.shape[-1]:
        raise ValueError(
            f"matrices must have shape (N, d, d) with d >= 1, got {tuple(matrices.shape)}; "
            "stack matrices of one size, add a leading dimension to a single one"
        )
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"matrices must be float32 or float64, got {matrices.dtype}; convert with .float()"
        )
    if warm_start is not None and warm_start.shape != matrices.shape:
        raise ValueError(
            f"warm_start must have the shape of matrices, {tuple(matrices.shape)}, "
            f"got {tuple(warm_start.shape)}; start without one when sizes change"
        )


class Regularization(NamedTuple):
    """How a root is kept finite: truncation, or a ridge if one of the ridges is positive.

    Attributes:
        rank_tolerance: Eigenvalues at or below this fraction of the largest are dropped; (N, 1) where
            it differs between matrices.
        ridge: Added to every eigenvalue, in units of the matrix.
        relative_ridge: Added to every eigenvalue, in units of the largest one.
    """

    rank_tolerance: float | Tensor
    ridge: float
    relative_ridge: float


def check_regularization(
    matrices: Tensor,
    exponent: float,
    rank_tolerance: float | None,
    ridge: float,
    relative_ridge: float,
) -> Regularization:
    """Refuse numbers outside their ranges, and both kinds at once; fill in the default tolerance."""
    _check_exponent_range(exponent)
    for name, value in (("ridge", ridge), ("relative_ridge", relative_ridge)):
        if not (math.isfinite(value) and value >= 0):
            raise ValueError(f"{name} must be a finite number >= 0, got {value}; 0 switches it off")
    if rank_tolerance is None:
        epsilon = torch.finfo(matrices.dtype).eps
        return Regularization(matrices.shape[-1] * epsilon, ridge, relative_ridge)
    if not 0 <= rank_tolerance < 1:
        raise ValueError(
            f"rank_tolerance must be None or in [0, 1), got {rank_tolerance}; it is a fraction of "
            "the largest eigenvalue"
        )
    if ridge > 0 or relative_ridge > 0:
        raise ValueError(
            f"rank_tolerance={rank_tolerance} together with ridge={ridge}, "
            f"relative_ridge={relative_ridge}: give one of them; "
            "a ridge takes the place of truncation"
        )
    return Regularization(rank_tolerance, ridge, relative_ridge)


def _check_exponent_range(exponent: float) -> None:
    if not (math.isfinite(exponent) and exponent > 0):
        raise ValueError(
            f"exponent must be a finite number > 0, got {exponent}; to leave a side without "
            "preconditioner do not call the solver for it"
        )
