"""AdamW with Nesterov's look-ahead, on lists of tensors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor


class NAdamW(torch.optim.Optimizer):
    """NAdamW as the benchmark's baseline has it.

        w <- (1 - lr wd) w
        m <- beta1 m + (1 - beta1) g;      v <- beta2 v + (1 - beta2) g^2
        w <- w - lr / (1 - beta1^t) * (beta1 m + (1 - beta1) g) / (sqrt(v / (1 - beta2^t)) + eps)

    Args:
        params: Parameters or groups of them.
        lr: Learning rate.
        betas: Decay rates of the first and second moment.
        eps: Added to the root of the second moment.
        weight_decay: Decoupled weight decay.

    Source: Choi et al. 2019 (arXiv 1910.05446), table 1, with AdamW's decay.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        *,
        betas: tuple[float, float],
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "steps": 0}
        super().__init__(params, defaults)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take one step."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            group["steps"] += 1
            self._step_group(group)
        return loss

    def _step_group(self, group: dict[str, Any]) -> None:
        weights = [weight for weight in group["params"] if weight.grad is not None]
        if not weights:
            return
        gradients = [weight.grad for weight in weights]
        first, second = self._moments(weights)
        beta1, beta2 = group["betas"]
        scale1, scale2 = 1.0 - beta1 ** group["steps"], math.sqrt(1.0 - beta2 ** group["steps"])

        torch._foreach_mul_(weights, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_lerp_(first, gradients, 1.0 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, gradients, gradients, value=1.0 - beta2)
        ahead = torch._foreach_lerp(gradients, first, beta1)
        # sqrt(v) / scale2 + eps, with numerator and denominator times scale2.
        denominator = torch._foreach_sqrt(second)
        torch._foreach_add_(denominator, group["eps"] * scale2)
        torch._foreach_addcdiv_(weights, ahead, denominator, value=-group["lr"] * scale2 / scale1)

    def _moments(self, weights: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["first_moment"] = torch.zeros_like(weight)
                self.state[weight]["second_moment"] = torch.zeros_like(weight)
        states = [self.state[weight] for weight in weights]
        return [s["first_moment"] for s in states], [s["second_moment"] for s in states]
