"""How far a basis has turned: the new one in coordinates of the old one."""

from __future__ import annotations

import torch
from torch import Tensor


def turn_of(old: Tensor, new: Tensor) -> Tensor:
    """``Q_old^T Q_new`` of orthogonal matrices, (K, d, d)."""
    return torch.bmm(old.mT, new)


def turn_of_rounded(old: Tensor, new: Tensor) -> Tensor:
    """The same of matrices in few bits, which are not quite orthogonal.

    Averages are multiplied by a turn at every refresh, so that one that lengthens or shortens would make
    those grow or vanish where no gradient comes in between. What stands still does not turn at all;
    otherwise two Newton steps on S^T S = I bring singular values of 0.9 to 0.9997, one to 0.985.
    """
    turn = turn_of(old, new)
    for _ in range(2):
        turn = torch.baddbmm(turn, turn, torch.bmm(turn.mT, turn), beta=1.5, alpha=-0.5)
    stands_still = (old == new).flatten(1).all(1)
    identity = torch.eye(old.shape[-1], dtype=old.dtype, device=old.device)
    return torch.where(stands_still.view(-1, 1, 1), identity, turn)
