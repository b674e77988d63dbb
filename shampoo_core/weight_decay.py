"""Weight decay: what is added to the gradient or to the search direction.

| kind        | rule                          | shrink per step without momentum |
|-------------|-------------------------------|----------------------------------|
| l2          | G += decay W                  | through the preconditioner       |
| decoupled   | P += decay W                  | 1 - lr decay                     |
| corrected   | P += decay (lr / peak_lr) W   | 1 - decay lr^2 / peak_lr         |
| independent | P += decay / peak_lr W        | 1 - decay lr / peak_lr           |

It is part of the direction that is sent to all ranks, never applied by the owner of a block alone.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); Schaipp 2023, Defazio 2025 (arXiv 2506.02285).
"""

from __future__ import annotations

from typing import Literal

WeightDecayKind = Literal["l2", "decoupled", "corrected", "independent"]
WEIGHT_DECAY_KINDS: tuple[WeightDecayKind, ...] = ("l2", "decoupled", "corrected", "independent")


def direction_decay(kind: WeightDecayKind, decay: float, lr: float, peak_lr: float) -> float:
    """Factor on the weights that are added to the search direction; 0 for L2, which is not."""
    if kind == "decoupled":
        return decay
    if kind == "corrected":
        return decay * lr / peak_lr
    if kind == "independent":
        return decay / peak_lr
    return 0.0
