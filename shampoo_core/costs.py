"""What a step costs, in floating-point operations: the model behind schedules and plans.

Counts are of multiplications and additions of the matrix products; elementwise work is left out.

Source: ALGORITHMS.md section 10.1.
"""

from __future__ import annotations

import math

from shampoo_core.blocking import Shape

EIGH_FLOPS_PER_CUBE = 24.0
"""Eigendecomposition of a (d, d) factor and the product that builds the root, in units of d^3: 9 to 22
for the first, 2 for the second; the upper end, for it runs at the lowest efficiency."""


def product_flops(block_shape: Shape) -> float:
    """Multiplying a block along all of its axes once, or forming all of its Gram matrices."""
    return 2.0 * math.prod(block_shape) * sum(block_shape)


def plain_step_flops(block_shape: Shape) -> float:
    """Statistics and preconditioning of one block by Shampoo with stored roots."""
    return 2.0 * product_flops(block_shape) if len(block_shape) > 1 else 0.0


def refresh_flops(dimension: int) -> float:
    """One refresh of one (d, d) factor by eigendecomposition."""
    return EIGH_FLOPS_PER_CUBE * float(dimension) ** 3
