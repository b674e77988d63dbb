"""Diagonal methods: SGD, AdaGrad, RMSprop, Adam(W), row-wise AdaGrad (ALGORITHMS.md 1.7, 1.8)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .algebra import Array
from .grafting import SecondMoment
from .method import Method


class Diagonal(Method):
    """``P = f / (sqrt(V) + eps)`` with the second moment of ``kind``.

    Args:
        parameter: Start value.
        kind: See ``SecondMoment``.
        eps: Outside the square root.
        options: Of ``Method``.
    """

    kind = "adam"

    def __init__(self, parameter: Array, *, eps: float = 1e-8, **options: Any) -> None:
        super().__init__(parameter, **options)
        self.second_moment = SecondMoment(
            self.parameter.shape, self.kind, beta2=self.beta2, eps=eps
        )

    def precondition(self, gradient: Array, filtered: Array) -> Array:
        self.second_moment.absorb(gradient)
        return self.second_moment.direction(filtered, self.t)


class AdamW(Diagonal):
    """Adam; ``weight_decay_type="decoupled"`` gives AdamW, ``beta3=beta1**2`` the NAdam form."""

    kind = "adam"


class RMSprop(Diagonal):
    """Second moment averaged with beta2, not bias-corrected."""

    kind = "rmsprop"


class AdaGrad(Diagonal):
    """Second moment summed."""

    kind = "adagrad"


class SGD(Diagonal):
    """The filtered gradient itself (``betas=(0, ...)`` for the raw one)."""

    kind = "sgd"


class RowWiseAdaGrad(Method):
    """One second moment per row (index of the first axis): the mean square over the row.

    ``beta2 == 1`` sums (AdaGrad); ``beta2 < 1`` averages, with bias correction when it is on.
    """

    def __init__(self, parameter: Array, *, eps: float = 1e-8, **options: Any) -> None:
        super().__init__(parameter, **options)
        self.eps = eps
        self.second_moment: Array = np.zeros(self.parameter.shape[0])

    def precondition(self, gradient: Array, filtered: Array) -> Array:
        rows = len(gradient)
        mean_square = np.mean(gradient.reshape(rows, -1) ** 2, axis=1)
        self.second_moment = (
            self.beta2 * self.second_moment + self.statistics_weight() * mean_square
        )
        scale = np.sqrt(self.second_moment / self.statistics_correction()) + self.eps
        return filtered / scale.reshape(rows, *[1] * (gradient.ndim - 1))
