"""A corpus of symmetric matrices on which solvers fail, and a float64 reference for their roots.

Every matrix is float64, made from a fixed seed. Spectra have no eigenvalue near the default cutoffs
of float32 and float64, so that "dropped or not" is not decided by rounding.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Matrix = NDArray[np.float64]

SIDE = 48
SINGULAR_FACTOR = Path(__file__).parent / "data" / "singular_factor.npz"


class HardMatrix(NamedTuple):
    """A matrix of the corpus.

    Attributes:
        matrix: (d, d).
        condition: Ratio of the largest to the least eigenvalue that is not zero.
        deficient: Whether some eigenvalues are zero (or negative by rounding).
    """

    matrix: Matrix
    condition: float
    deficient: bool = False


def with_spectrum(eigenvalues: Matrix, seed: int = 0) -> Matrix:
    """A symmetric matrix with these eigenvalues and random eigenvectors."""
    side = len(eigenvalues)
    basis, _ = np.linalg.qr(np.random.default_rng(seed).standard_normal((side, side)))
    matrix = (basis * eigenvalues) @ basis.T
    return (matrix + matrix.T) / 2


def hard_matrices(epsilon: float) -> dict[str, HardMatrix]:
    """Matrices of one side that have a root; the rounding of one is that of ``epsilon``."""
    decay = np.arange(1, SIDE + 1) ** -1.5
    third = SIDE // 3
    zeros = np.zeros(SIDE - third)
    near_diagonal = np.diag(np.linspace(1, 3, SIDE)) + 1e-7 * with_spectrum(decay, 1)
    gradients = np.random.default_rng(2).standard_normal((SIDE, 3))
    sparse = np.zeros((SIDE, SIDE))
    sparse[:third, :third] = with_spectrum(decay[:third], 3)
    by_rounding = with_spectrum(np.r_[decay[:third], zeros], 4)
    by_rounding -= epsilon / 2 * with_spectrum(np.r_[np.zeros(third), np.ones(SIDE - third)], 4)
    clusters = np.repeat([1.0, 0.5, 1e-2], third)
    return {
        "identity": HardMatrix(np.eye(SIDE), 1),
        "diagonal": HardMatrix(np.diag(decay), 333),
        "nearly diagonal": HardMatrix(near_diagonal, 3),
        "power law": HardMatrix(with_spectrum(decay), 333),
        "repeated": HardMatrix(with_spectrum(clusters), 100),
        "condition 1e3": HardMatrix(with_spectrum(np.geomspace(1, 1e-3, SIDE)), 1e3),
        "condition 1e6": HardMatrix(with_spectrum(np.geomspace(1, 8e-7, SIDE)), 1.25e6),
        "condition 1e12": HardMatrix(with_spectrum(np.geomspace(1, 1e-12, SIDE)), 1e12),
        "entries 1e-30": HardMatrix(1e-30 * with_spectrum(decay), 333),
        "entries 1e+30": HardMatrix(1e30 * with_spectrum(decay), 333),
        "rank one": HardMatrix(np.outer(gradients[:, 0], gradients[:, 0]), 1, True),
        "rank three": HardMatrix(gradients @ gradients.T, 4, True),
        "rank a third": HardMatrix(with_spectrum(np.r_[decay[:third], zeros]), 64, True),
        "rank a third, 1e-30": HardMatrix(
            1e-30 * with_spectrum(np.r_[decay[:third], zeros]), 64, True
        ),
        "zero rows": HardMatrix(sparse, 64, True),
        "one entry": HardMatrix(np.diag(np.r_[1.0, np.zeros(SIDE - 1)]), 1, True),
        "all ones": HardMatrix(np.ones((SIDE, SIDE)), 1, True),
        "indefinite by rounding": HardMatrix(by_rounding, 64, True),
    }


def hopeless_matrices() -> dict[str, Matrix]:
    """Matrices of the same side that have none."""
    healthy = with_spectrum(np.arange(1, SIDE + 1) ** -1.5)
    one_nan, one_infinity = healthy.copy(), healthy.copy()
    one_nan[3, 5] = one_nan[5, 3] = np.nan
    one_infinity[7, 7] = np.inf
    return {
        "zero": np.zeros_like(healthy),
        "one nan": one_nan,
        "all nan": np.full_like(healthy, np.nan),
        "one infinity": one_infinity,
        "all minus infinity": np.full_like(healthy, -np.inf),
        "negative": -healthy,
    }


def singular_factor() -> NDArray[np.float32]:
    """(1024, 1024) factor of an embedding table; see tests/data/README.md."""
    with np.load(SINGULAR_FACTOR) as archive:
        factor: NDArray[np.float32] = archive["factor"]
    return factor


def reference_root(
    matrix: Matrix, exponent: float, *, cutoff: float = 0.0, ridge: float = 0.0, least: float = 0.0
) -> Matrix:
    """``(A + ridge I)^(-exponent)`` without the eigenvalues up to ``cutoff * lambda_max``.

    numpy and float64 throughout. With a ridge nothing is dropped, and eigenvalues below ``least``
    are taken for ``least``.
    """
    # Divided by the largest entry only to stay clear of overflow.
    scale = np.abs(matrix).max()
    eigenvalues, eigenvectors = np.linalg.eigh(matrix / scale)
    if ridge > 0:
        regular = np.maximum(eigenvalues, least) + ridge / scale
    else:
        kept = eigenvalues > cutoff * eigenvalues.max()
        regular = np.where(kept, eigenvalues, np.inf)
    root: Matrix = (eigenvectors * regular**-exponent) @ eigenvectors.T * scale**-exponent
    return root


def relative_error(actual: Matrix, expected: Matrix) -> float:
    """In the Frobenius norm."""
    scale = np.abs(expected).max()
    return float(
        np.linalg.norm(actual / scale - expected / scale) / np.linalg.norm(expected / scale)
    )
