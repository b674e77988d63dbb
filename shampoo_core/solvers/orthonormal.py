"""Orthonormal columns, the Q of a QR factorisation: by reflections, or by matrix products on a GPU.

Householder reflections are made one after the other, which leaves a GPU idle: 4.5 milliseconds at side 1024
on an H200, where a matrix product takes a tenth of one. There, shifted Cholesky-QR takes their place:

    Y <- A V + r V
    Y <- Y / |y_j|;   R^T R = Y^T Y + s I;   Y <- Y R^-1        three times, s = 0 at the last

If V is close to the eigenbasis of A, columns of ``A V`` that have unit length are close to orthogonal. The
shift s takes care of those that are not, up to condition 1e6 in float32. Columns in null directions of A
would be rounding noise, along any direction; r, somewhat larger, makes them stay what they were. Q is the
same: one with a positive diagonal of R is unique, and neither lengths of columns nor r change eigenvectors.

Source: Fukaya et al. 2020 (SIAM J. Sci. Comput. 42), shifted CholeskyQR3.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

PASSES = 3
NUMEL_AT_ONCE = 2**24
"""Numbers of the matrices that are taken at once: enough to keep a GPU busy, whatever the number of all."""
NOISE = 1.0
"""In the columns of ``A V``, at most, in units of ``sqrt(d) * eps`` of the longest one."""
RESIDUAL_BOUND = 64.0
"""Of ``max|Q^T Q - I|``, in units of ``sqrt(d) * eps``; healthy results stay below 1."""


def prefers_products(device: torch.device) -> bool:
    """Whether reflections take a device far longer than as many operations in products."""
    return device.type != "cpu"


Orthonormalized = Callable[[Tensor, Tensor, Tensor], Tensor]
"""From ``A V`` and V, (N, d, d), and an order of their columns, (N, d) integers, to Q, (N, d, d)."""


def by_reflections(products: Tensor, vectors: Tensor, order: Tensor) -> Tensor:
    """Q by Householder reflections, the diagonal of R non-negative; arguments as of `Orthonormalized`."""
    del vectors
    # What torch.linalg.qr does, without the copies for an R, a quarter of its time on a CPU.
    factored, reflections = torch.geqrf(columns(products, order))
    signs = torch.where(factored.diagonal(dim1=-2, dim2=-1) < 0, -1.0, 1.0)
    orthogonal = torch.linalg.householder_product(factored, reflections)
    return orthogonal.mul_(signs.to(orthogonal.dtype)[:, None, :])


def by_products(products: Tensor, vectors: Tensor, order: Tensor) -> Tensor:
    """Q by shifted Cholesky-QR; anything, NaN included, where the condition is too bad. Never waits.

    Arguments as of `Orthonormalized`; they stay as they are.
    """
    finfo = torch.finfo(products.dtype)
    side = products.shape[-1]
    lengths = torch.linalg.vector_norm(products, dim=-2, keepdim=True)
    noise = lengths.amax(-1, keepdim=True).mul_(NOISE * side**0.5 * finfo.eps)
    basis = columns(torch.addcmul(products, vectors, noise), order)
    for remaining in reversed(range(PASSES)):
        lengths = torch.linalg.vector_norm(basis, dim=-2, keepdim=True)
        basis.div_(lengths.clamp_(min=finfo.tiny))
        gram = torch.bmm(basis.mT, basis)
        if remaining:
            gram.diagonal(dim1=-2, dim2=-1).add_(side * finfo.eps)
        lower, _ = torch.linalg.cholesky_ex(gram)
        basis = torch.linalg.solve_triangular(lower.mT, basis, upper=True, left=False)
    return basis


def columns(matrices: Tensor, order: Tensor) -> Tensor:
    """Columns of (N, d, d) matrices in another order, (N, d) integers."""
    return matrices.gather(-1, order[:, None, :].expand_as(matrices))


def are_orthogonal(matrices: Tensor) -> Tensor:
    """(N,) bool: whether ``max|Q^T Q - I|`` is what rounding makes it."""
    error = torch.bmm(matrices.mT, matrices)
    error.diagonal(dim1=-2, dim2=-1).sub_(1.0)
    bound = RESIDUAL_BOUND * matrices.shape[-1] ** 0.5 * torch.finfo(matrices.dtype).eps
    return torch.linalg.vector_norm(error, float("inf"), dim=(-2, -1)) <= bound
