"""Diagonal second moments and grafting: the length of one direction for another.

ALGORITHMS.md 1.7. ``f`` is the filtered gradient, the same for both directions;
``P = P_s * ||P_g|| / (||P_s|| + 1e-16)`` with norms over the block.
"""

from __future__ import annotations

import numpy as np

from .algebra import Array

KINDS = ("sgd", "adagrad", "rmsprop", "adam")


class SecondMoment:
    """``V`` of a diagonal method and the direction ``f / (sqrt(V) + eps)``.

    Args:
        shape: Shape of the block.
        kind: "sgd" (no ``V``, direction ``f``), "adagrad" (sum of squares), "rmsprop" (moving
            average) or "adam" (moving average divided by ``1 - beta2^t``).
        beta2: Decay of the average; unused by "sgd" and "adagrad".
        eps: Added outside the square root.
    """

    def __init__(self, shape: tuple[int, ...], kind: str, *, beta2: float, eps: float) -> None:
        if kind not in KINDS:
            raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
        self.kind, self.beta2, self.eps = kind, beta2, eps
        self.value: Array = np.zeros(shape)

    def absorb(self, gradient: Array) -> None:
        """Accumulate the squared gradient."""
        if self.kind == "adagrad":
            self.value = self.value + gradient**2
        elif self.kind != "sgd":
            self.value = self.beta2 * self.value + (1.0 - self.beta2) * gradient**2

    def direction(self, filtered: Array, t: int) -> Array:
        """The diagonal method's own direction at step ``t`` (counted from 1)."""
        if self.kind == "sgd":
            return filtered
        correction = 1.0 - self.beta2**t if self.kind == "adam" else 1.0
        return filtered / (np.sqrt(self.value / correction) + self.eps)


def graft(direction: Array, length_of: Array) -> Array:
    """``direction`` with the Frobenius norm of ``length_of``."""
    scale = np.linalg.norm(length_of) / (np.linalg.norm(direction) + 1e-16)
    return direction * float(scale)
