"""Spectral descent: Muon with the polar factor from an SVD (ALGORITHMS.md 9)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .algebra import Array
from .method import Method

SCALES = ("none", "rectangular", "adam_rms", "fan")


def polar(matrix: Array, rtol: float = 1e-12) -> Array:
    """``U V'`` of the SVD; singular values <= ``rtol`` times the largest count as zero."""
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    kept = values > rtol * values.max()
    return np.asarray(u[:, kept] @ vt[kept])


def newton_schulz(
    matrix: Array, coefficients: Sequence[tuple[float, float, float]], safety: float = 1.0
) -> Array:
    """Iterate ``s <- a s + b s^3 + c s^5`` on the singular values of ``matrix``.

    Args:
        matrix: (m, n). It is first divided by ``safety`` times its Frobenius norm.
        coefficients: One (a, b, c) per iteration.
        safety: >= 1.

    Returns:
        What Newton-Schulz with matrix products gives in exact arithmetic.
    """
    u, values, vt = np.linalg.svd(matrix, full_matrices=False)
    values = values / (safety * np.linalg.norm(matrix))
    for a, b, c in coefficients:
        values = a * values + b * values**3 + c * values**5
    return np.asarray((u * values) @ vt)


def update_scale(shape: tuple[int, int], kind: str) -> float:
    """Factor on the polar factor of an (out, in) matrix.

    "none": 1. "rectangular": ``sqrt(max(1, rows/cols))``. "fan": ``sqrt(rows/cols)``.
    "adam_rms": ``0.2 sqrt(max(rows, cols))``, which gives the update Adam's root mean square.
    """
    rows, cols = shape
    if kind not in SCALES:
        raise ValueError(f"kind must be one of {SCALES}, got {kind!r}")
    if kind == "rectangular":
        return float(np.sqrt(max(1.0, rows / cols)))
    if kind == "adam_rms":
        return float(0.2 * np.sqrt(max(rows, cols)))
    return float(np.sqrt(rows / cols)) if kind == "fan" else 1.0


class Muon(Method):
    """``M <- mu M + G``; ``B = G + mu M`` (Nesterov) or ``M``; ``P = scale * polar(B)``.

    Args:
        parameter: Start value; more than two axes are read as ``out x (the rest)``.
        spectral_momentum: mu of the gradient sum, before the polar factor.
        spectral_nesterov: Look ahead.
        scale: See ``update_scale``.
        coefficients: None for the exact polar factor, else those of ``newton_schulz``.
        safety: Of ``newton_schulz``.
        options: ``lr``, ``weight_decay`` ... of ``Method``; ``betas=(0, ...)`` by default, for
            the momentum here replaces the filtered gradient.
    """

    def __init__(
        self,
        parameter: Array,
        *,
        spectral_momentum: float = 0.95,
        spectral_nesterov: bool = True,
        scale: str = "rectangular",
        coefficients: Sequence[tuple[float, float, float]] | None = None,
        safety: float = 1.0,
        betas: tuple[float, float] = (0.0, 0.999),
        **options: Any,
    ) -> None:
        super().__init__(parameter, betas=betas, **options)
        self.spectral_momentum, self.spectral_nesterov = spectral_momentum, spectral_nesterov
        self.scale, self.coefficients, self.safety = scale, coefficients, safety
        self.gradient_sum: Array = np.zeros(self.parameter.shape)

    def precondition(self, gradient: Array, filtered: Array) -> Array:
        self.gradient_sum = self.spectral_momentum * self.gradient_sum + filtered
        ahead = self.gradient_sum
        if self.spectral_nesterov:
            ahead = filtered + self.spectral_momentum * self.gradient_sum
        matrix = ahead.reshape(len(ahead), -1)
        if self.coefficients is None:
            orthogonal = polar(matrix)
        else:
            orthogonal = newton_schulz(matrix, self.coefficients, self.safety)
        rows, cols = matrix.shape
        return update_scale((rows, cols), self.scale) * orthogonal.reshape(ahead.shape)
