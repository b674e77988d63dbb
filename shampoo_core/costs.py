"""What a step costs, in floating-point operations: the model behind schedules and plans.

Counts are of multiplications and additions of the matrix products. Elementwise work is bound by memory
and counted as the products that a GPU could have done meanwhile.

Source: counted from the products of each method; decompositions by the usual counts of the Householder
algorithms (Golub and Van Loan, Matrix Computations, sections 5.2 and 8.3).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from shampoo_core.blocking import Shape

EIGH_FLOPS_PER_CUBE = 24.0
"""Eigendecomposition of a (d, d) factor and the product that builds the root, in units of d^3: 9 to 22
for the first, 2 for the second; the upper end, for it runs at the lowest efficiency."""

ELEMENTWISE_FLOPS = 900.0
"""Moments, momentum, decay and update of one number: some 15 passes over 4 bytes on a GPU that does 15
operations in the time of a byte (V100: 15 TFLOP/s, 0.9 TB/s)."""


def product_flops(block_shape: Shape) -> float:
    """Multiplying a block along all of its axes once, or forming all of its Gram matrices."""
    return 2.0 * math.prod(block_shape) * sum(block_shape)


def plain_step_flops(block_shape: Shape) -> float:
    """Statistics and preconditioning of one block by Shampoo with stored roots."""
    return 2.0 * product_flops(block_shape) if len(block_shape) > 1 else 0.0


def refresh_flops(dimension: int) -> float:
    """One refresh of one (d, d) factor by eigendecomposition."""
    return EIGH_FLOPS_PER_CUBE * float(dimension) ** 3


def method_flops(
    block_shape: Shape, factor_sides: Sequence[int], products: float, refresh_interval: int
) -> float:
    """An average step of a method with Kronecker factors on one block, refreshes spread out.

    Args:
        block_shape: Of the block.
        factor_sides: Lengths of the axes that have a factor; none for a diagonal method.
        products: How often the block is multiplied along all of these axes, or their Gram matrices
            are formed, in a step without a refresh.
        refresh_interval: Steps from one refresh of a factor to the next.
    """
    numbers = math.prod(block_shape)
    along_axes = 2.0 * numbers * sum(factor_sides)
    refreshes = sum(refresh_flops(side) for side in factor_sides) / refresh_interval
    return ELEMENTWISE_FLOPS * numbers + products * along_axes + refreshes
