"""Plain tensor and matrix arithmetic of the reference: one tensor, float64, no batching.

Conventions (ALGORITHMS.md 0.2): ``X x_i B`` contracts axis ``i`` of ``X`` with the FIRST index of
``B`` and puts the result on axis ``i``, so that for matrices ``X x_0 Q_L x_1 Q_R = Q_L' X Q_R``.
Axes are counted from 0. ``None`` in a list of matrices leaves that axis alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Exponent = float | Mapping[int, float | Mapping[int, float]] | None

RIDGES = ("shift_before", "shift_after", "absolute", "relative", "truncate")


def mode_product(tensor: Array, matrix: Array, axis: int) -> Array:
    """``tensor x_axis matrix``."""
    return np.moveaxis(np.tensordot(tensor, matrix, axes=(axis, 0)), -1, axis)


def multiply(tensor: Array, matrices: Sequence[Array | None]) -> Array:
    """``tensor x_0 matrices[0] x_1 matrices[1] ...``."""
    for axis, matrix in enumerate(matrices):
        if matrix is not None:
            tensor = mode_product(tensor, matrix, axis)
    return tensor


def rotate_back(tensor: Array, bases: Sequence[Array | None]) -> Array:
    """Inverse of ``multiply`` for orthogonal ``bases``."""
    return multiply(tensor, [None if basis is None else basis.T for basis in bases])


def gram(tensor: Array, axis: int) -> Array:
    """Contract ``tensor`` with itself over all axes but ``axis``; (d, d)."""
    unfolded = np.moveaxis(tensor, axis, 0).reshape(tensor.shape[axis], -1)
    return unfolded @ unfolded.T


def outer(vectors: Sequence[Array]) -> Array:
    """Outer product of one vector per axis; shape (d_0, d_1, ...)."""
    result: Array = np.ones(())
    for vector in vectors:
        result = np.multiply.outer(result, vector)
    return result


def axis_exponents(order: int, override: Exponent = None) -> list[float]:
    """Exponent of each axis of an order-``order`` tensor (ALGORITHMS.md 1.4).

    Args:
        order: Number of axes after merging and blocking.
        override: None for ``1/(2 max(order, 1))`` on every axis; a number for every axis; or a map
            from order to a number or to ``{axis: number}``. Axes and orders that the map does
            not name keep the default. 0 means that the axis has no factor.
    """
    default = 1.0 / (2.0 * max(order, 1))
    chosen = override.get(order, default) if isinstance(override, Mapping) else override
    if chosen is None:
        chosen = default
    if isinstance(chosen, Mapping):
        return [float(chosen.get(axis, default)) for axis in range(order)]
    return [float(chosen)] * order


def regularised_eigh(matrix: Array, eps: float, ridge: str) -> tuple[Array, Array]:
    """Eigenvalues (ascending) and eigenvectors of a symmetric matrix with its ridge.

    Args:
        matrix: Symmetric, (d, d).
        eps: Size of the ridge, >= 0.
        ridge: "shift_before": add ``eps I``; if an eigenvalue is still below ``eps``, shift the
            whole spectrum so that the smallest is ``eps``. "shift_after" (the v0.5 entry): shift by
            ``min(lambda_min, 0)``, then add ``eps``. "absolute": add ``eps``, nothing
            else. "relative": add ``eps * lambda_max``. "truncate": as "absolute"; the
            cut is made by ``power``. Source: ALGORITHMS.md 1.5, 5.2.
    """
    if ridge not in RIDGES:
        raise ValueError(f"ridge must be one of {RIDGES}, got {ridge!r}")
    if ridge == "shift_before":
        values, vectors = np.linalg.eigh(matrix + eps * np.eye(len(matrix)))
        if values.min() < eps:
            values = values - values.min() + eps
        return values, vectors
    values, vectors = np.linalg.eigh(matrix)
    if ridge == "shift_after":
        return values - min(values.min(), 0.0) + eps, vectors
    if ridge == "relative":
        return values + eps * values.max(), vectors
    return values + eps, vectors


def cutoff(values: Array, rtol: float | None, atol: float) -> float:
    """``max(atol, rtol * largest)``; ``rtol=None`` means ``d * machine epsilon``."""
    relative = len(values) * float(np.finfo(np.float64).eps) if rtol is None else rtol
    return max(atol, relative * float(values.max()))


def power(values: Array, exponent: float, kept: NDArray[np.bool_] | None = None) -> Array:
    """``values ** exponent`` where ``kept``, 0 elsewhere (a pseudo-inverse)."""
    if kept is None:
        return values**exponent
    result = np.zeros_like(values)
    result[kept] = values[kept] ** exponent
    return result


def inverse_root(
    matrix: Array,
    exponent: float,
    eps: float = 0.0,
    *,
    ridge: str = "shift_before",
    rtol: float | None = None,
    atol: float = 0.0,
) -> Array:
    """``(matrix + ridge) ** -exponent`` by eigendecomposition.

    With ``ridge="truncate"`` eigenvalues <= ``max(atol, rtol * largest)`` of the matrix
    count as zero and stay zero (ALGORITHMS.md 5.3); ``eps`` is added to the kept ones and is
    0 for the exact pseudo-inverse.
    """
    values, vectors = regularised_eigh(matrix, eps, ridge)
    kept = values - eps > cutoff(values - eps, rtol, atol) if ridge == "truncate" else None
    return (vectors * power(values, -exponent, kept)) @ vectors.T


def trace_scaled(matrix: Array, exponent: float, eps: float) -> Array:
    """``matrix * max(trace, eps) ** -exponent`` (ALGORITHMS.md 1.4); a zero matrix stays zero."""
    trace = max(float(np.trace(matrix)), eps)
    return matrix if trace == 0.0 else matrix * trace**-exponent


def off_diagonal_ratio(matrix: Array, basis: Array) -> float:
    """``||B - diag(B)|| / ||B||`` for ``B = Q' A Q`` (ALGORITHMS.md 3.1); 0 for a zero matrix."""
    rotated = basis.T @ matrix @ basis
    total = float(np.linalg.norm(rotated))
    return (
        0.0 if total == 0.0 else float(np.linalg.norm(rotated - np.diag(np.diag(rotated)))) / total
    )


def transport(
    second_moment: Array, old: Sequence[Array | None], new: Sequence[Array | None]
) -> Array:
    """Carry second moments measured in the ``old`` basis to the ``new`` one (ALGORITHMS.md 2.3).

    ``D' = D x_i (S_i o S_i)`` with ``S_i = Q_old,i' Q_new,i``: the expected squares of the rotated
    coordinates if the old ones are uncorrelated.
    """
    squares = [
        None if before is None or after is None else (before.T @ after) ** 2
        for before, after in zip(old, new, strict=True)
    ]
    return multiply(second_moment, squares)
