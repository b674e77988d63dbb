"""What a refresh hands to a solver, and gets back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Solution(NamedTuple):
    """The new matrices of a batch of K factors."""

    matrices: Tensor
    """(K, d, d)."""
    accepted: Tensor
    """(K,) bool; the old matrix stays where it is false."""
    order: Tensor | None = None
    """(K, d): the old column that a new one continues; None where columns are not continued."""


class Batch(NamedTuple):
    """Due factors of one size and exponent."""

    factors: Tensor
    """(K, d, d), bias-corrected copies, which the solver may overwrite."""
    exponent: float
    read_old: Callable[[], Tensor]
    """Gives (K, d, d), the matrices so far; maybe a view, so not to be written to."""
    limit: float = math.inf
    """What the norm of a new matrix has to stay below."""


Solve = Callable[[list[Batch]], list[Solution]]
"""Computes new matrices, batch by batch."""


def has_gradient(batches: Sequence[Batch]) -> Tensor:
    """(K,) bool: whether factors are not zero; those that are not finite are not."""
    factors = [factor for batch in batches for factor in batch.factors]
    # Sums of absolute values: the smallest squares would be zero.
    return torch.stack(list(torch._foreach_norm(factors, ord=1))) != 0
