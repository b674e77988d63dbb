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

from shampoo_core.preconditioners.factor_matrices import Replacement
from shampoo_core.statistics import multiply_along_axis

SecondMoments = Literal["transport", "permute", "keep"]
SECOND_MOMENTS: tuple[SecondMoments, ...] = get_args(SecondMoments)


def turn_first_moment(average: Tensor, axis: int, change: Replacement) -> None:
    """Carry a first moment into the new basis, in place.

    Args:
        average: (N, d_0, ..., d_k), a whole stack.
        axis: The axis of its blocks whose basis has turned.
        change: Old and new bases of some of its blocks.
    """
    blocks = average[change.where.start : change.where.stop]
    turn = torch.bmm(change.old.mT, change.new)
    blocks.copy_(multiply_along_axis(blocks, axis, turn))


def turn_second_moment(
    average: Tensor, axis: int, change: Replacement, rule: SecondMoments
) -> None:
    """Carry a second moment into the new basis, in place.

    Args:
        average: (N, d_0, ..., d_k), a whole stack.
        axis: The axis of its blocks whose basis has turned.
        change: Old and new bases of some of its blocks.
        rule: See the module. Where a solver made a basis from scratch there is no order of its
            columns to follow, and "permute" keeps.
    """
    blocks = average[change.where.start : change.where.stop]
    if rule == "transport":
        turn = torch.bmm(change.old.mT, change.new)
        blocks.copy_(multiply_along_axis(blocks, axis, turn.square()))
    elif rule == "permute" and change.order is not None:
        shape = [1] * blocks.dim()
        shape[0], shape[axis + 1] = change.order.shape
        blocks.copy_(blocks.gather(axis + 1, change.order.view(shape).expand_as(blocks)))
