"""Orthogonalisation: the polar factor of rectangular matrices by Newton-Schulz iterations."""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor

from shampoo_core.solvers.precision import full_precision

Coefficients = tuple[float, float, float]
"""(a, b, c) of one step ``X <- a X + b (X X') X + c (X X')^2 X``."""

ORIGINAL: tuple[Coefficients, ...] = ((3.4445, -4.7750, 2.0315),)
"""Of Muon (Jordan et al., 2024), for 5 steps: fast, not convergent; singular values from 0.01 up end
between 0.68 and 1.13."""

CONVERGENT: tuple[Coefficients, ...] = ((3.0, -16 / 5, 6 / 5),)
"""With a fixed point at 1 that attracts: the distance to it shrinks by 0.6 a step in the end."""

CUBIC: tuple[Coefficients, ...] = ((1.5, -0.5, 0.0),)
"""The classical Newton-Schulz iteration (Higham, Functions of Matrices, section 8.3)."""

TUNED: tuple[Coefficients, ...] = (
    (4.0848, -6.8946, 2.9270),
    (3.9505, -6.3029, 2.6377),
    (3.7418, -5.5913, 2.3037),
    (2.8769, -3.1427, 1.2046),
    (2.8366, -3.0525, 1.2012),
)
"""One triple a step, tuned for 5 steps (Cesista, Jordan, You; used in modded-nanogpt, 2025)."""

POLAR_EXPRESS: tuple[Coefficients, ...] = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
    (2.300652019954817, -1.6689039845747493, 0.4188073119525673),
    (1.891301407787398, -1.2679958271945868, 0.37680408948524835),
    (1.8750014808534479, -1.2500016453999487, 0.3750001645474248),
    (1.875, -1.25, 0.375),
)
"""Minimax-optimal steps for singular values from 1e-3 up (Amsel et al., arXiv 2505.16932)."""

COEFFICIENTS = MappingProxyType(
    {
        "original": ORIGINAL,
        "convergent": CONVERGENT,
        "cubic": CUBIC,
        "tuned": TUNED,
        "polar_express": POLAR_EXPRESS,
    }
)
"""The tables by name; the last triple of a table repeats when more steps are asked for."""

SAFETY = 1.01


def orthogonalize(
    matrices: Tensor,
    coefficients: str | Sequence[Coefficients] = "polar_express",
    steps: int = 5,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Replace the singular values of every matrix by numbers near 1: ``U S V'`` becomes ``U V'``.

    Matrices are divided by 1.01 times their Frobenius norm, so that singular values start in (0, 1);
    those that start below about 0.01 (5 steps) or 0.001 (8 steps of Polar Express) do not get all
    the way. Tall matrices are transposed for the products. No host synchronisation.

    Args:
        matrices: (N, m, n), any m and n, float32 or float64.
        coefficients: A name in :data:`COEFFICIENTS` or triples (a, b, c), one a step.
        steps: >= 1; how many steps to make.
        dtype: Of the products. ``None``: that of the matrices. ``torch.bfloat16`` is usual where the
            hardware has it, and leaves errors of about 0.01 in the singular values.

    Returns:
        (N, m, n): finite; zeros for matrices that are zero or not finite.

    Raises:
        TypeError: dtype is neither float32 nor float64.
        ValueError: Shape, name of coefficients, or number of steps.
    """
    schedule = _schedule(coefficients, steps)
    if matrices.dim() != 3:
        raise ValueError(f"matrices must have shape (N, m, n), got {tuple(matrices.shape)}")
    if matrices.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"matrices must be float32 or float64, got {matrices.dtype}; convert with .float()"
        )
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonalize(matrices.mT, coefficients, steps, dtype).mT
    with full_precision(matrices.device):
        iterate = _unit_spectrum(matrices).to(dtype or matrices.dtype)
        for a, b, c in schedule:
            gram = torch.bmm(iterate, iterate.mT)
            polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
            iterate = torch.baddbmm(iterate, polynomial, iterate, beta=a)
        return iterate.to(matrices.dtype)


def _unit_spectrum(matrices: Tensor) -> Tensor:
    """Scale to Frobenius norm ``1 / SAFETY``; zeros for what is zero or not finite."""
    tiny = torch.finfo(matrices.dtype).tiny
    # By the largest entry first: the squares of 1e-30 or 1e+30 do not exist in float32.
    sizes = torch.linalg.vector_norm(matrices, float("inf"), dim=(-2, -1), keepdim=True)
    unit = (matrices / sizes.clamp(min=tiny)).nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    norms = torch.linalg.vector_norm(unit, dim=(-2, -1), keepdim=True)
    return unit.div_((norms * SAFETY).clamp_(min=tiny))


def _schedule(coefficients: str | Sequence[Coefficients], steps: int) -> list[Coefficients]:
    """One triple a step.

    With a table of different triples, all but the last step are damped against the overshoot of
    rounding: a singular value above 1 would be thrown far out by the steep first polynomials.
    """
    if steps < 1:
        raise ValueError(f"steps must be >= 1, got {steps}; 5 is usual")
    if isinstance(coefficients, str):
        if coefficients not in COEFFICIENTS:
            raise ValueError(
                f"coefficients must be triples or one of {sorted(COEFFICIENTS)}, "
                f"got {coefficients!r}"
            )
        coefficients = COEFFICIENTS[coefficients]
    if not coefficients:
        raise ValueError("coefficients must hold at least one triple, got none; name a table")
    triples = [coefficients[min(step, len(coefficients) - 1)] for step in range(steps)]
    if coefficients is not POLAR_EXPRESS:
        return triples
    damped = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in triples[:-1]]
    return [*damped, triples[-1]]
