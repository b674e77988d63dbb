"""Weight decay: what is added to the gradient or to the search direction.

| kind            | rule                          | shrink per step without momentum |
|-----------------|-------------------------------|----------------------------------|
| l2              | G += decay W                  | through the preconditioner       |
| decoupled       | P += decay W                  | 1 - lr decay                     |
| decoupled_after | P += decay (W - lr P)         | 1 - lr decay, of the new weights |
| corrected       | P += decay (lr / peak_lr) W   | 1 - decay lr^2 / peak_lr         |
| independent     | P += decay / peak_lr W        | 1 - decay lr / peak_lr           |

peak_lr is the learning rate that a parameter group is made with.

It is part of the direction that is sent to all ranks, never applied by the owner of a block alone.

Source: Loshchilov and Hutter 2019 (arXiv 1711.05101); Schaipp 2023, Defazio 2025 (arXiv 2506.02285).
"""

from __future__ import annotations

from typing import Literal, get_args

WeightDecayKind = Literal["l2", "decoupled", "decoupled_after", "corrected", "independent"]
WEIGHT_DECAY_KINDS: tuple[WeightDecayKind, ...] = get_args(WeightDecayKind)


def check_peak(owner: str, kind: WeightDecayKind, decay: float, peak_lr: float) -> None:
    """Raise where there is no peak rate to decay in proportion to.

    Raises:
        ValueError: ``kind`` divides by ``peak_lr``, which is 0.
    """
    if kind in ("corrected", "independent") and decay != 0.0 and peak_lr == 0.0:
        raise ValueError(
            f"{owner}: weight_decay_kind={kind!r} with weight_decay={decay} divides by the peak learning "
            f"rate, the lr that the parameter group is made with, got lr={peak_lr}; construct with the "
            "peak rate and lower it afterwards, as schedulers do"
        )


def direction_decay(kind: WeightDecayKind, decay: float, lr: float, peak_lr: float) -> float:
    """Factor on the weights that are added to the search direction; 0 for L2, which is not."""
    if decay == 0.0:
        return 0.0
    if kind in ("decoupled", "decoupled_after"):
        return decay
    if kind == "corrected":
        return decay * lr / peak_lr
    if kind == "independent":
        return decay / peak_lr
    return 0.0


def direction_shrink(kind: WeightDecayKind, decay: float, lr: float) -> float:
    """Factor on the direction itself: decay that acts after the step shrinks the step too."""
    return 1.0 - lr * decay if kind == "decoupled_after" else 1.0
