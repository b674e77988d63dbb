"""How well an old basis still diagonalises a matrix: the test of adaptive refreshes."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_core.solvers.base import check_matrices
from shampoo_core.solvers.precision import full_precision
from shampoo_core.solvers.scaling import scale_to_unit


def off_diagonal_ratio(matrices: Tensor, basis: Tensor, *, overwrite: bool = False) -> Tensor:
    """Return (N,): ``||B - diag(B)||_F / ||B||_F`` of ``B = Q^T A Q``; see `in_old_basis`."""
    return in_old_basis(matrices, basis, overwrite=overwrite)[0]


def in_old_basis(
    matrices: Tensor, basis: Tensor, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Return (N,): ``||B - diag(B)||_F / ||B||_F`` of ``B = Q^T A Q``, and (N, d): the diagonal of B.

    It is the relative error of ``Q diag(B) Q^T``, the best reconstruction of A in the old basis
    (arXiv 2506.03595); it does not depend on the scale of A, nor on the order and signs of the
    columns of Q. No host synchronisation.

    Args:
        matrices: (N, d, d) symmetric.
        basis: (N, d, d) orthogonal.
        overwrite: Whether the matrices may be overwritten, to save memory.

    Returns:
        The ratio, between 0 and 1; 0 for matrices of zeros, which any basis diagonalises; infinity for
        matrices that are not finite, so that they exceed every tolerance and meet a solver that counts
        them. And the diagonal, in units of the largest entry of A.
    """
    check_matrices(matrices, basis)
    with full_precision(matrices.device):
        unit, scales = scale_to_unit(matrices, overwrite=overwrite)
        product = torch.bmm(unit, basis)
        rotated = torch.bmm(basis.mT, product, out=unit if overwrite else None)
        diagonals = rotated.diagonal(dim1=-2, dim2=-1).clone()
        ratio = relative_off_diagonal(rotated)
        return ratio.masked_fill_(~(scales < float("inf")), float("inf")), diagonals


def relative_off_diagonal(matrices: Tensor) -> Tensor:
    """Return (N,) ``||B - diag(B)||_F / ||B||_F``, zero for zero; sets the diagonals to zero.

    Not as ``sqrt(||B||^2 - ||diag B||^2)``: the difference of two large numbers has a floor of 3e-4
    in float32 and can be negative.
    """
    total = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    matrices.diagonal(dim1=-2, dim2=-1).zero_()
    off_diagonal = torch.linalg.vector_norm(matrices, dim=(-2, -1))
    return off_diagonal / total.clamp_(min=torch.finfo(matrices.dtype).tiny)
