"""Bring matrices to unit size before they are solved, and spectra back afterwards."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_core.solvers.base import Regularization


def scale_to_unit(
    matrices: Tensor, ridge: float = 0.0, *, overwrite: bool = False
) -> tuple[Tensor, Tensor]:
    """Divide every matrix by its largest absolute entry (plus the absolute ridge).

    Args:
        matrices: (N, d, d), any content.
        ridge: >= 0; part of the size, so that a matrix of zeros with a ridge has a size as well.
        overwrite: Whether to divide in place.

    Returns:
        unit: (N, d, d), always finite, entries in [-1, 1]; zeros for matrices that are zero or not
            finite.
        scales: (N,) such that ``matrices = scales * unit``; NaN or infinity for matrices that are
            not finite, the smallest normal number for zeros.
    """
    if not len(matrices):
        return matrices, matrices.new_zeros(0)
    (unit,), scales = scale_batches_to_unit([matrices], ridge, overwrite=overwrite)
    return unit, scales


def scale_batches_to_unit(
    batches: Sequence[Tensor], ridge: float = 0.0, *, overwrite: bool = False
) -> tuple[list[Tensor], Tensor]:
    """`scale_to_unit` of several batches, of any sides.

    Returns:
        units: As `scale_to_unit`, one per batch.
        scales: (K,) of all K matrices, batch after batch.
    """
    scales = largest_entries(batches)
    if ridge > 0:
        scales = scales + ridge
    scales = scales.clamp(min=torch.finfo(scales.dtype).tiny)
    per_batch = scales.split([len(batch) for batch in batches])
    divisors = [part[:, None, None] for part in per_batch]
    if overwrite:
        units = list(batches)
        torch._foreach_div_(units, divisors)
    else:
        units = list(torch._foreach_div(list(batches), divisors))
    for unit in units:
        # A finite entry over an infinite or NaN size is 0 or NaN: one NaN anywhere empties its matrix.
        unit.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return units, scales


def largest_entries(batches: Sequence[Tensor]) -> Tensor:
    """(K,): the largest absolute entry of each of all K matrices, batch after batch."""
    if _norm_is_slow(batches[0].device):
        highest = torch.cat([batch.amax((-2, -1)) for batch in batches])
        lowest = torch.cat([batch.amin((-2, -1)) for batch in batches])
        return torch.maximum(highest, lowest.neg_())
    matrices = list(itertools.chain.from_iterable(batch.unbind() for batch in batches))
    return torch.stack(torch._foreach_norm(matrices, torch.inf))


def _norm_is_slow(device: torch.device) -> bool:
    """Whether torch's infinity norm takes ten times as long as a maximum and a minimum."""
    return device.type == "cpu"


def spectral_power(
    eigenvalues: Tensor,
    scales: Tensor,
    exponent: float | Tensor,
    regularization: Regularization,
    *,
    limit: float = float("inf"),
    padding: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Eigenvalues of the regularised inverse root, in the units of the unscaled matrices.

    Args:
        eigenvalues: (N, d) of the matrices divided by ``scales``, in any order; NaN where unsolved.
        scales: (N,) as :func:`scale_to_unit` gives them.
        exponent: > 0; a number, or (N, 1).
        regularization: Its ridge is in units of the unscaled matrices; its ``rank_tolerance`` may
            be (N, 1) too.
        limit: What powers have to stay below to be accepted.
        padding: (N, d) bool: entries that fill rows up, zero in ``eigenvalues``, and are no
            eigenvalues.

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
    if padding is not None:
        regular = regular.masked_fill_(padding, float("inf"))
    powers = regular.pow_(-exponent).mul_(scales[:, None].pow(-exponent))
    highest = powers.amax(-1)
    accepted = (highest > 0) & (highest < limit)
    return powers.masked_fill_(~accepted[:, None], 0.0), accepted
