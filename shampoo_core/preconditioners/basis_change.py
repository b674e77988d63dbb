"""What becomes of averages that are kept in an eigenbasis when the basis turns.

With S = Q_old^T Q_new, (d, d), along the axis that turns:

    first moment     M <- M x S                     exact
    second moment    D <- D x (S o S)               "transport": exact where coordinates are uncorrelated
                     D <- D[order]                  "permute": follows its column
                     D <- D                         "keep"

Source: "permute" is the published SOAP code (arXiv 2409.11321), "keep" the published KL-Shampoo and
eigenvalue-corrected Shampoo codes; the transport is our own.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from shampoo_core.moments import MovingAverage
from shampoo_core.preconditioners.factor_matrices import Replacement
from shampoo_core.statistics import FactorAxis, multiply_along_axis

SecondMoments = Literal["transport", "permute", "keep"]
SECOND_MOMENTS: tuple[SecondMoments, ...] = get_args(SecondMoments)


def turn_first_moment(moment: MovingAverage, axis: FactorAxis, change: Replacement) -> None:
    """Carry a first moment into the new basis.

    Args:
        moment: Of all stacks.
        axis: Whose basis has turned.
        change: Of the bases of some of its blocks.
    """
    place = axis.stack, change.where.start, change.where.stop
    turned = multiply_along_axis(moment.blocks(*place), axis.axis, change.turn)
    moment.replace_blocks(*place, turned)


def turn_second_moment(
    moment: MovingAverage, axis: FactorAxis, change: Replacement, rule: SecondMoments
) -> None:
    """Carry a second moment into the new basis, as the last to turn: ``change.turn`` is used up.

    Arguments as of `turn_first_moment`, and `turned_squares`'.
    """
    place = axis.stack, change.where.start, change.where.stop
    blocks = turned_squares(moment.blocks(*place), axis.axis, change, rule, overwrite=True)
    if blocks is not None:
        moment.replace_blocks(*place, blocks)


def turned_squares(
    blocks: Tensor, axis: int, change: Replacement, rule: SecondMoments, *, overwrite: bool = False
) -> Tensor | None:
    """Second moments in the new basis; None where they stay as they are.

    Args:
        blocks: (K, d_0, ..., d_k).
        axis: The axis of blocks whose basis has turned.
        change: Of its K bases.
        rule: See the module. Where a solver made a basis from scratch there is no order of its
            columns to follow, and "permute" keeps.
        overwrite: Whether ``change.turn`` is not needed any more.
    """
    if rule == "transport":
        squares = change.turn.square_() if overwrite else change.turn.square()
        return multiply_along_axis(blocks, axis, squares)
    if rule == "permute" and change.order is not None:
        shape = [1] * blocks.dim()
        shape[0], shape[axis + 1] = change.order.shape
        return blocks.gather(axis + 1, change.order.view(shape).expand_as(blocks))
    return None
