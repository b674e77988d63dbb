"""Muon, with equally shaped matrices orthogonalised together."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

#: Coefficients of the published quintic iteration (K. Jordan, 2024).
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalised(matrices: Tensor, iterations: int, eps: float) -> Tensor:
    """Return about U V^T for each matrix U S V^T of a stack (N, m, n).

    The iteration does not converge: singular values end between about 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    on_gpu = matrices.is_cuda and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.bfloat16() if on_gpu else matrices
    is_tall = x.shape[-2] > x.shape[-1]
    if is_tall:
        x = x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + eps)
    for _ in range(iterations):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are orthogonalised.

        m <- beta m + (1 - beta) g;        o = orthogonalised((1 - beta) g + beta m)
        w <- (1 - lr wd) w - lr sqrt(max(1, sides[0] / sides[1])) o

    Dimensions after the first are flattened for the orthogonalisation; the published scale looks at
    the first two sides as they are.

    Args:
        params: Parameters with at least two dimensions.
        lr: Learning rate, the spectral norm of an update.
        beta: Decay rate of the momentum.
        nesterov: Orthogonalise one step ahead; otherwise the momentum itself.
        iterations: Newton-Schulz iterations.
        eps: Added to the norm that the iteration starts from.
        weight_decay: Decoupled weight decay.

    Source: K. Jordan et al. 2024; scale by spectral norm, Yang et al. 2023 (arXiv 2310.17813).
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        lr: float,
        *,
        beta: float,
        nesterov: bool = True,
        iterations: int = 5,
        eps: float = 1e-7,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {
            "lr": lr,
            "beta": beta,
            "nesterov": nesterov,
            "iterations": iterations,
            "eps": eps,
            "weight_decay": weight_decay,
        }
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take one step."""
        del closure
        for group in self.param_groups:
            weights = [weight for weight in group["params"] if weight.grad is not None]
            if weights:
                self._step_group(group, weights)

    def _step_group(self, group: dict[str, Any], weights: list[Tensor]) -> None:
        gradients = [weight.grad for weight in weights if weight.grad is not None]
        for weight in weights:
            if not self.state[weight]:
                self.state[weight]["momentum"] = torch.zeros_like(weight)
        momenta = [self.state[weight]["momentum"] for weight in weights]
        torch._foreach_lerp_(momenta, gradients, 1.0 - group["beta"])
        ahead = torch._foreach_lerp(gradients, momenta, group["beta"])
        directions = ahead if group["nesterov"] else momenta

        stacks: dict[torch.Size, list[int]] = defaultdict(list)
        for index, weight in enumerate(weights):
            stacks[weight.shape].append(index)
        for shape, members in stacks.items():
            stack = torch.stack([directions[index].flatten(1) for index in members])
            updates = orthogonalised(stack, group["iterations"], group["eps"])
            scale = math.sqrt(max(1.0, shape[0] / shape[1]))
            chosen = [weights[index] for index in members]
            torch._foreach_mul_(chosen, 1.0 - group["lr"] * group["weight_decay"])
            torch._foreach_add_(
                chosen, [update.view(shape) for update in updates], alpha=-group["lr"] * scale
            )
