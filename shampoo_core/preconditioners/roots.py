"""What is done to factors before a solver takes their roots, and to the roots behind it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from shampoo_core.solvers import RootResult


def limited(result: RootResult, limit: float, *, rescale: bool) -> RootResult:
    """Roots with norms below a limit.

    Args:
        result: Its roots are changed in place.
        limit: Infinity is none.
        rescale: Whether larger roots are scaled down, where length does not matter, or not accepted.
    """
    if limit == math.inf:
        return result
    # The trace is no smaller than the norm.
    norms = result.roots.diagonal(dim1=-2, dim2=-1).sum(-1)
    if not rescale:
        return result._replace(accepted=result.accepted & (norms < limit))
    result.roots.mul_((limit / norms).clamp_max_(1.0)[:, None, None])
    return result._replace(accepted=result.accepted & (norms < math.inf))


def scale_by_trace(factors: Tensor, exponent: float) -> Tensor:
    """``A * trace(A)^(-exponent)``, in place; a zero factor stays zero."""
    trace = factors.diagonal(dim1=-2, dim2=-1).sum(-1)
    scale = torch.where(trace > 0, trace, torch.ones_like(trace)).pow(-exponent)
    return factors.mul_(scale.view(-1, 1, 1))
