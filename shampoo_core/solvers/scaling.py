"""Bring matrices to unit size before they are solved, and spectra back afterwards."""

from __future__ import annotations

import torch
from torch import Tensor

from shampoo_core.solvers.base import Regularization


def scale_to_unit(matrices: Tensor, ridge: float = 0.0) -> tuple[Tensor, Tensor]:
    """Divide every matrix by its largest absolute entry (plus the absolute ridge).

    Args:
        matrices: (N, d, d), any content.
        ridge: >= 0; part of the size, so that a matrix of zeros with a ridge has a size as well.

    Returns:
        unit: (N, d, d), always finite, entries in [-1, 1]; zeros for matrices that are zero or not
            finite.
        scales: (N,) such that ``matrices = scales * unit``; NaN or infinity for matrices that are
            not finite, the smallest normal number for zeros.
    """
    sizes = torch.linalg.vector_norm(matrices, float("inf"), dim=(-2, -1))
    if ridge > 0:
        sizes = sizes + ridge
    scales = sizes.clamp(min=torch.finfo(matrices.dtype).tiny)
    # A finite entry over an infinite or NaN size is 0 or NaN: one NaN anywhere empties its matrix.
    unit = (matrices / scales[:, None, None]).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return unit, scales


def spectral_power(
    eigenvalues: Tensor,
    scales: Tensor,
    exponent: float,
    regularization: Regularization,
    *,
    limit: float = float("inf"),
) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the regularised inverse root, in the units of the unscaled matrices.

    Args:
        eigenvalues: (N, d) of the matrices divided by ``scales``, in any order; NaN where unsolved.
        scales: (N,) as :func:`scale_to_unit` gives them.
        exponent: > 0.
        regularization: Its ridge is in units of the unscaled matrices.
        limit: What powers have to stay below to be accepted.

    Returns:
        powers: (N, d), finite; zeros for dropped eigenvalues and where not accepted.
        accepted: (N,) bool; some direction is kept, and all powers are below the limit.
    """
    tolerance, ridge, relative_ridge = regularization
    largest = eigenvalues.amax(-1, keepdim=True)
    if ridge > 0 or relative_ridge > 0:
        # Rounding makes null directions slightly negative; a ridge far below rounding vanishes.
        shift = ridge / scales[:, None] + relative_ridge * largest
        regular = eigenvalues.clamp(min=0.0) + shift
        regular.clamp_(min=torch.finfo(eigenvalues.dtype).tiny)
        if ridge == 0:  # else the zero matrix is as good as any
            regular = regular.masked_fill_(largest <= 0, float("inf"))
    else:
        # Infinity, since its inverse power is zero. No positive eigenvalue: all are dropped.
        regular = eigenvalues.masked_fill(eigenvalues <= tolerance * largest, float("inf"))
    powers = regular.pow_(-exponent).mul_(scales.pow(-exponent)[:, None])
    highest = powers.amax(-1)
    accepted = (highest > 0) & (highest < limit)
    return powers.masked_fill_(~accepted[:, None], 0.0), accepted
