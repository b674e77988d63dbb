"""Iterate averaging around any method, and averages of finished weights (ALGORITHMS.md 8).

``ScheduleFree`` and ``PrimalAveraging`` keep three sequences: z (fast), x (average, for evaluation)
and y (where gradients are taken: ``parameter``). They drive ``method.search_direction``, so the
momentum of the wrapped method is not used; its betas, grafting and weight decay are.
"""

from __future__ import annotations

from collections import deque
from typing import Any

import numpy as np

from .algebra import Array
from .diagonal import AdamW
from .method import Method


class AveragedMethod:
    """What the two averagings share; y lives in ``method.parameter``.

    Args:
        method: Gives the direction. Its decay rate and learning rate are used.
        interpolation: Weight of x in y, > 0 (b of Schedule-Free, mu_y of GPA).
        decay_at: What decays. "y": ``alpha y`` is added to the direction. "z": z shrinks by
            ``1 - lr alpha`` before its update. "z_holding_y": as "z", but x is not stored: it is
            read off y and the shrunk z, so x moves by ``+ (1-b)/b lr alpha z`` (away from 0).
            The in-place code of facebookresearch/optimizers does that, and the GPA row of
            section 11 comes from it; "z" is what the three-sequence equations of 8.2 say.
    """

    def __init__(self, method: Method, *, interpolation: float, decay_at: str) -> None:
        if decay_at not in ("y", "z", "z_holding_y"):
            raise ValueError(f'decay_at must be "y", "z" or "z_holding_y", got {decay_at!r}')
        if method.momentum != 0.0:
            raise ValueError(f"momentum must be 0 under averaging, got {method.momentum}")
        self.method, self.decay_at = method, decay_at
        self.interpolation = interpolation
        self.x = self.z = method.parameter.copy()

    @property
    def parameter(self) -> Array:
        """y: the weights that gradients are taken at."""
        return self.method.parameter

    @property
    def evaluation(self) -> Array:
        """x: the weights to evaluate."""
        return self.x

    def move_z(self, gradient: Array, lr: float) -> None:
        """``z <- z - lr d`` with the decay where it belongs."""
        direction = self.method.search_direction(np.asarray(gradient, dtype=np.float64))
        decay = self.method.decay_rate()
        if self.decay_at == "y":
            direction = direction + decay * self.parameter
        else:
            self.z = (1.0 - lr * decay) * self.z
        if self.decay_at == "z_holding_y":
            self.x = (self.parameter - (1.0 - self.interpolation) * self.z) / self.interpolation
        self.z = self.z - lr * direction

    def average(self, c: float) -> Array:
        """``x <- (1-c) x + c z`` and ``y = b x + (1-b) z``; return y (a copy)."""
        self.x = (1.0 - c) * self.x + c * self.z
        b = self.interpolation
        self.method.parameter = b * self.x + (1.0 - b) * self.z
        return self.parameter.copy()


class ScheduleFree(AveragedMethod):
    """Schedule-Free (8.1; arXiv 2405.15682).

    ``y = (1-b) z + b x``; ``z <- z - lr_t d(y)``; ``x <- (1-c) x + c z`` with
    ``c_t = w_t / sum_s w_s`` and ``w_t = t^r * lr_ref^power``.

    Args:
        method: Base direction; give it ``betas=(0, beta2)`` for the usual form.
        interpolation: b.
        weight_r: r.
        weight_lr_power: power.
        warmup_steps: ``lr_t = lr * min(1, t / warmup_steps)``.
        weight_lr: lr_ref, "max" (running maximum, the reference) or "current".
        decay_at: See ``AveragedMethod``.
    """

    def __init__(
        self,
        method: Method,
        *,
        interpolation: float = 0.9,
        weight_r: float = 0.0,
        weight_lr_power: float = 2.0,
        warmup_steps: int = 0,
        weight_lr: str = "max",
        decay_at: str = "y",
    ) -> None:
        if weight_lr not in ("max", "current"):
            raise ValueError(f'weight_lr must be "max" or "current", got {weight_lr!r}')
        super().__init__(method, interpolation=interpolation, decay_at=decay_at)
        self.warmup_steps = warmup_steps
        self.weight_r, self.weight_lr_power, self.weight_lr = weight_r, weight_lr_power, weight_lr
        self.lr_max = self.weight_sum = 0.0
        self.t = 0

    def step(self, gradient: Array, lr: float | None = None) -> Array:
        """Take one step and return the new y (a copy)."""
        self.t += 1
        base_lr = self.method.lr if lr is None else lr
        warm = min(1.0, self.t / self.warmup_steps) if self.warmup_steps else 1.0
        current = base_lr * warm
        self.method.lr = current
        self.move_z(gradient, current)
        self.method.lr = base_lr
        self.lr_max = max(self.lr_max, current)
        reference = self.lr_max if self.weight_lr == "max" else current
        weight = self.t**self.weight_r * reference**self.weight_lr_power
        self.weight_sum += weight
        return self.average(weight / self.weight_sum if self.weight_sum > 0.0 else 0.0)


class ScheduleFreeAdamW(ScheduleFree):
    """Schedule-Free with Adam's second moment: ``betas[0]`` is the interpolation b."""

    def __init__(
        self,
        parameter: Array,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        base = AdamW(parameter, lr=lr, betas=(0.0, betas[1]), eps=eps, weight_decay=weight_decay)
        super().__init__(base, interpolation=betas[0], **options)


class PrimalAveraging(AveragedMethod):
    """Generalised primal averaging, GPA (8.2; arXiv 2512.17131).

    ``y = mu_y x + (1-mu_y) z``; ``z <- z - lr d(y)``; ``x <- mu_x x + (1-mu_x) z``.
    """

    def __init__(
        self, method: Method, *, mu_x: float = 0.9, mu_y: float = 0.8, decay_at: str = "z"
    ) -> None:
        super().__init__(method, interpolation=mu_y, decay_at=decay_at)
        self.mu_x = mu_x

    def step(self, gradient: Array, lr: float | None = None) -> Array:
        """Take one step and return the new y (a copy)."""
        self.method.lr = self.method.lr if lr is None else lr
        self.move_z(gradient, self.method.lr)
        return self.average(1.0 - self.mu_x)


class WeightEMA:
    """``S <- beta S + (1-beta) W`` every ``every`` steps (8.3); S starts at the initial weights."""

    def __init__(self, parameter: Array, *, beta: float = 0.9, every: int = 1) -> None:
        self.beta, self.every, self.t = beta, every, 0
        self.evaluation: Array = np.array(parameter, dtype=np.float64)

    def update(self, parameter: Array) -> Array:
        """See the weights after a step; return the average (a copy)."""
        self.t += 1
        if self.t % self.every == 0:
            self.evaluation = self.beta * self.evaluation + (1.0 - self.beta) * parameter
        return self.evaluation.copy()


class LatestWeightAverage:
    """LAWA (8.3): the mean of the last ``length`` weights, one kept every ``every`` steps.

    Before the first one is kept the average is the current weights.
    """

    def __init__(self, *, length: int = 20, every: int = 1) -> None:
        self.every, self.t = every, 0
        self.queue: deque[Array] = deque(maxlen=length)

    def update(self, parameter: Array) -> Array:
        """See the weights after a step; return the average (a copy)."""
        self.t += 1
        if self.t % self.every == 0:
            self.queue.append(np.array(parameter, dtype=np.float64))
        if not self.queue:
            return np.array(parameter, dtype=np.float64)
        return np.array(sum(self.queue) / len(self.queue), dtype=np.float64)
