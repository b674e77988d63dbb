"""One optimizer step in the order of ALGORITHMS.md 1.2, around a rule for the direction.

A family overrides ``precondition``; everything that the families share is here: filtered gradient
(1.8), grafting (1.7), weight decay (1.10), momentum (1.9), the start step (1.11).
"""

from __future__ import annotations

import numpy as np

from .algebra import Array
from .grafting import SecondMoment, graft

DECAYS = ("l2", "decoupled", "corrected", "independent")


class FilteredGradient:
    """First moment, read with ``beta3`` before it is updated with ``beta1`` (ALGORITHMS.md 1.8).

    Args:
        shape: Shape of the block.
        beta1: Decay of the stored average; 0 means no filtering.
        beta3: Decay for reading; None means ``beta1``. ``beta1**2`` is the NAdam form.
        bias_correction: Divide by the sum of the weights.
        v05_normaliser: Divide by ``1 - beta1^t`` whatever ``beta3`` is, as the v0.5
            entry did, instead of the unbiased ``1 - beta3 beta1^(t-1)``.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        beta1: float,
        beta3: float | None = None,
        *,
        bias_correction: bool = True,
        v05_normaliser: bool = False,
    ) -> None:
        self.beta1 = beta1
        self.beta3 = beta1 if beta3 is None else beta3
        self.bias_correction, self.v05_normaliser = bias_correction, v05_normaliser
        self.value: Array = np.zeros(shape)

    def __call__(self, gradient: Array, t: int) -> Array:
        """Filter the gradient of step ``t`` (counted from 1)."""
        if self.beta1 == 0.0:
            return gradient
        filtered = self.beta3 * self.value + (1.0 - self.beta3) * gradient
        self.value = self.beta1 * self.value + (1.0 - self.beta1) * gradient
        if not self.bias_correction:
            return filtered
        if self.v05_normaliser:
            return filtered / (1.0 - self.beta1**t)
        return filtered / (1.0 - self.beta3 * self.beta1 ** (t - 1))


class Method:
    """Shared step; subclasses say how a gradient becomes a direction.

    Args:
        parameter: Start value W0, any shape.
        lr: Learning rate. Its value here is the peak rate of "corrected" and "independent" decay;
            later rates are set by assigning ``lr`` or passed to ``step``.
        betas: (beta1, beta2). ``beta2 == 1`` sums the statistics instead of averaging.
        beta3: See ``FilteredGradient``.
        v05_normaliser: See ``FilteredGradient``.
        bias_correction: Of the first moment and of the statistics.
        weight_decay: lambda.
        weight_decay_type: "l2", "decoupled", "corrected" or "independent" (ALGORITHMS.md 1.10).
        momentum: mu, on the preconditioned update and the decay term (ALGORITHMS.md 1.9).
        dampening: d.
        nesterov: Use ``(1-d) P + mu B`` instead of ``B``.
        grafting: None, "sgd", "adagrad", "rmsprop" or "adam".
        grafting_beta2: Decay of the grafted second moment; None means 0.99 for "rmsprop",
            0.999 for "adam".
        grafting_eps: Outside the square root.
        start: First step (counted from 1) that preconditions. Before it: the graft direction, or
            the identity preconditioner without a graft.
    """

    def __init__(
        self,
        parameter: Array,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        beta3: float | None = None,
        v05_normaliser: bool = False,
        bias_correction: bool = True,
        weight_decay: float = 0.0,
        weight_decay_type: str = "decoupled",
        momentum: float = 0.0,
        dampening: float = 0.0,
        nesterov: bool = False,
        grafting: str | None = None,
        grafting_beta2: float | None = None,
        grafting_eps: float = 1e-10,
        start: float = 1,
    ) -> None:
        if weight_decay_type not in DECAYS:
            raise ValueError(
                f"weight_decay_type must be one of {DECAYS}, got {weight_decay_type!r}"
            )
        self.parameter: Array = np.array(parameter, dtype=np.float64)
        self.lr = self.lr_peak = lr
        self.beta1, self.beta2 = betas
        self.bias_correction = bias_correction
        self.weight_decay, self.weight_decay_type = weight_decay, weight_decay_type
        self.momentum, self.dampening, self.nesterov = momentum, dampening, nesterov
        self.start = start
        shape = self.parameter.shape
        self.first_moment = FilteredGradient(
            shape, self.beta1, beta3, bias_correction=bias_correction, v05_normaliser=v05_normaliser
        )
        self.graft: SecondMoment | None = None
        if grafting is not None:
            if grafting_beta2 is None:
                grafting_beta2 = 0.99 if grafting == "rmsprop" else 0.999
            self.graft = SecondMoment(shape, grafting, beta2=grafting_beta2, eps=grafting_eps)
        self.momentum_buffer: Array = np.zeros(shape)
        self.t = 0

    def statistics_weight(self) -> float:
        """Weight of a new statistic: ``1 - beta2``, or 1 when statistics are summed."""
        return 1.0 if self.beta2 == 1.0 else 1.0 - self.beta2

    def statistics_correction(self) -> float:
        """``1 - beta2^t``, or 1 without bias correction or when statistics are summed."""
        if not self.bias_correction or self.beta2 == 1.0:
            return 1.0
        return 1.0 - self.beta2**self.t

    def precondition(self, gradient: Array, filtered: Array) -> Array:
        """Absorb ``gradient`` in the statistics and return the direction for ``filtered``."""
        raise NotImplementedError

    def search_direction(self, gradient: Array) -> Array:
        """Steps 1 to 6: everything before decay, momentum and the learning rate."""
        self.t += 1
        if self.weight_decay_type == "l2":
            gradient = gradient + self.weight_decay * self.parameter
        filtered = self.first_moment(gradient, self.t)
        direction = self.precondition(gradient, filtered)
        if self.graft is None:
            return direction
        self.graft.absorb(gradient)
        grafted = self.graft.direction(filtered, self.t)
        return grafted if self.t < self.start else graft(direction, grafted)

    def decay_rate(self) -> float:
        """The alpha of ``P <- P + alpha W``; 0 for "l2", which acts on the gradient."""
        if self.weight_decay_type == "l2":
            return 0.0
        if self.weight_decay_type == "corrected":
            return self.weight_decay * self.lr / self.lr_peak
        if self.weight_decay_type == "independent":
            return self.weight_decay / self.lr_peak
        return self.weight_decay

    def with_momentum(self, direction: Array) -> Array:
        """``B <- mu B + (1-d) P``; plain ``B``, Nesterov ``(1-d) P + mu B``."""
        if self.momentum == 0.0:
            return direction
        fresh = (1.0 - self.dampening) * direction
        self.momentum_buffer = self.momentum * self.momentum_buffer + fresh
        return (
            fresh + self.momentum * self.momentum_buffer if self.nesterov else self.momentum_buffer
        )

    def step(self, gradient: Array | None, lr: float | None = None) -> Array:
        """Take one step and return the new parameter (a copy).

        Args:
            gradient: Of the shape of the parameter, or None: the step counter advances and nothing
                else moves (ALGORITHMS.md 1.2).
            lr: Learning rate from this step on; None keeps the current one.
        """
        self.lr = self.lr if lr is None else lr
        if gradient is None:
            self.t += 1
            return self.parameter.copy()
        direction = self.search_direction(np.asarray(gradient, dtype=np.float64))
        direction = direction + self.decay_rate() * self.parameter
        self.parameter = self.parameter - self.lr * self.with_momentum(direction)
        return self.parameter.copy()
