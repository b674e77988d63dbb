"""Adam's arithmetic in one pass over memory, by the kernel of ``torch.optim.AdamW(fused=True)``.

Written out, an average, a second moment, its root and a quotient are seven operations, each of which
reads and writes all numbers; on a CPU they take four times as long as the kernel. It has one decay, one
eps and one bias correction for a whole stack, so that it does for steps in which all blocks are open.

Source: Kingma and Ba 2015 (arXiv 1412.6980), Algorithm 1, bias corrections left to the caller.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.optim.adamw import adamw

with torch.inference_mode(mode=False):  # wherever this is imported: the kernel adds 1 to it
    FOREVER = torch.tensor(math.inf, dtype=torch.float32, device="cpu")
    """Steps so far: corrections for bias divide by 1 - beta^step, which is 1 then. One more is as many."""


def average_and_scale(
    gradients: Sequence[Tensor],
    averages: Sequence[Tensor],
    squares: Sequence[Tensor],
    directions: Sequence[Tensor],
    *,
    betas: tuple[float, float],
    eps: float,
) -> None:
    """``M <- b1 M + (1 - b1) G``, ``V <- b2 V + (1 - b2) G^2``, and ``P <- M / (sqrt(V) + eps)``.

    Args:
        gradients: G, each with its M, V and P of one shape; all contiguous, on a CPU.
        averages: M, changed in place. May be the gradients themselves where b1 is 0: what is written
            then is what is there.
        squares: V, changed in place.
        directions: P, finite and overwritten. May be the gradients themselves where averages are not:
            each number is read before it is written.
        betas: b1 and b2.
        eps: Positive.
    """
    adamw(
        list(directions),
        list(gradients),
        list(averages),
        list(squares),
        max_exp_avg_sqs=[],
        state_steps=[FOREVER] * len(directions),
        amsgrad=False,
        beta1=betas[0],
        beta2=betas[1],
        lr=-1.0,  # it descends
        weight_decay=-1.0,  # "weights" are multiplied by 1 - lr * decay, which is 0
        eps=eps,
        maximize=False,
        fused=True,
    )
