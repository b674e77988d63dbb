"""Schedule-Free AdamW, on lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class ScheduleFreeAdamW(torch.optim.Optimizer):
    """Schedule-Free AdamW with decay at the gradient point.

    Between steps the parameters hold the average x, so that evaluation and checkpoints need no
    swap. `extrapolate` moves them to y, where the gradient belongs, and `step` back:

        y = (1 - beta1) z + beta1 x;       v <- beta2 v + (1 - beta2) grad(y)^2
        z <- z - lr_t sqrt(1 - beta2^t) (grad(y) / (sqrt(v) + eps) + wd y)
        x <- (1 - c) x + c z;              c = lr_t^2 / sum of lr_s^2 for s <= t

    Args:
        params: Parameters.
        lr: Learning rate after the warm-up.
        betas: Interpolation and second-moment decay.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.
        warmup_steps: Steps of linear warm-up.

    Source: Defazio et al. 2024 (arXiv 2405.15682), algorithm 1, whose decay is lr_t wd y; that the
    bias correction shortens it, too, is of the AlgoPerf submission (schedule_free_adamw_v2).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        warmup_steps: int = 0,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "warmup_steps": warmup_steps,
            "steps": 0,
            "weight_sum": 0.0,
        }
        super().__init__(params, defaults)
        for group in self.param_groups:
            for weight in group["params"]:
                self.state[weight]["fast"] = weight.detach().clone()
                self.state[weight]["second_moment"] = torch.zeros_like(weight)

    @torch.no_grad()
    def extrapolate(self) -> None:
        """Move the parameters from the average x to the gradient point y."""
        for group in self.param_groups:
            fast = [self.state[weight]["fast"] for weight in group["params"]]
            torch._foreach_lerp_(group["params"], fast, 1.0 - group["betas"][0])

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step from y and leave the parameters at the average x."""
        del closure
        for group in self.param_groups:
            group["steps"] += 1
            self._step_group(group)

    def _step_group(self, group: dict[str, Any]) -> None:
        # A parameter without a gradient goes through with a zero one: it must return to x as well.
        weights: list[Tensor] = group["params"]
        gradients = [torch.zeros_like(w) if w.grad is None else w.grad for w in weights]
        fast = [self.state[weight]["fast"] for weight in weights]
        second = [self.state[weight]["second_moment"] for weight in weights]
        beta1, beta2 = group["betas"]
        lr = group["lr"] * min(group["steps"] / max(group["warmup_steps"], 1), 1.0)
        group["weight_sum"] += lr**2
        share = lr**2 / group["weight_sum"]
        scale2 = math.sqrt(1.0 - beta2 ** group["steps"])

        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1.0 - beta2)
        denominator = torch._foreach_sqrt(second)
        torch._foreach_add_(denominator, group["eps"])
        # y - z is needed below; taken before z moves.
        average = torch._foreach_lerp(weights, fast, 1.0 - 1.0 / beta1)
        torch._foreach_add_(fast, weights, alpha=-lr * scale2 * group["weight_decay"])
        torch._foreach_addcdiv_(fast, gradients, denominator, value=-lr * scale2)
        torch._foreach_lerp_(average, fast, share)
        torch._foreach_copy_(weights, average)
