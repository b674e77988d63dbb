"""What becomes of averages that are kept in an eigenbasis when the basis turns.

With S = Q_old^T Q_new, (d, d), along the axis that turns:

    first moment     M <- M x S                     exact
    second moment    D <- D x (S o S)               "transport": exact where coordinates are uncorrelated
                     D <- D[order]                  "permute": follows its column
                     D <- D                         "keep"

Source: "permute" is the published SOAP code (arXiv 2409.11321), "keep" the published KL-Shampoo and
eigenvalue-corrected Shampoo codes; the transport is ALGORITHMS.md section 2.3.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
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
        change: Old and new bases of some of its blocks.
    """
    place = axis.stack, change.where.start, change.where.stop
    turn = torch.bmm(change.old.mT, change.new)
    moment.replace_blocks(*place, multiply_along_axis(moment.blocks(*place), axis.axis, turn))


def turn_second_moment(
    moment: MovingAverage, axis: FactorAxis, change: Replacement, rule: SecondMoments
) -> None:
    """Carry a second moment into the new basis; arguments as of `turn_first_moment`, and `turned`'s."""
    place = axis.stack, change.where.start, change.where.stop
    blocks = turned(moment.blocks(*place), axis.axis, change, rule)
    if blocks is not None:
        moment.replace_blocks(*place, blocks)


def turned(blocks: Tensor, axis: int, change: Replacement, rule: SecondMoments) -> Tensor | None:
    """Second moments in the new basis; None where they stay as they are.

    Args:
        blocks: (K, d_0, ..., d_k).
        axis: The axis of blocks whose basis has turned.
        change: Its K old and new bases.
        rule: See the module. Where a solver made a basis from scratch there is no order of its
            columns to follow, and "permute" keeps.
    """
    if rule == "transport":
        turn = torch.bmm(change.old.mT, change.new)
        return multiply_along_axis(blocks, axis, turn.square())
    if rule == "permute" and change.order is not None:
        shape = [1] * blocks.dim()
        shape[0], shape[axis + 1] = change.order.shape
        return blocks.gather(axis + 1, change.order.view(shape).expand_as(blocks))
    return None
