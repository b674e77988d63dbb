"""Shampoo with stored inverse roots (ALGORITHMS.md 1; Gupta et al. 2018, arXiv 1802.09568)."""

from __future__ import annotations

from typing import Any

import numpy as np

from .algebra import Array, Exponent, axis_exponents, gram, inverse_root, multiply, trace_scaled
from .method import Method


class Shampoo(Method):
    """``P = f x_i (A_i/bc2 + ridge)^(-e_i)`` with ``A_i`` an average or sum of ``Gram_i(G)``.

    Args:
        parameter: Start value.
        eps: Ridge, see ``algebra.regularised_eigh``; also the floor of the trace.
        interval: Roots are recomputed at ``start`` and then at multiples of ``interval``.
        start: First preconditioned step; None means ``interval``; ``math.inf`` never.
        exponent: See ``algebra.axis_exponents``.
        trace_scaling: None, or c: each factor is multiplied by ``trace^-c`` before its root.
        ridge: Rule, see ``algebra.regularised_eigh``.
        rtol: Relative cut of "truncate"; None means ``d * machine epsilon``.
        atol: Absolute cut of "truncate".
        drop_weighting: ``A <- beta2 A + Gram`` with ``beta2 < 1`` and without bias correction of A.
        options: Of ``Method``.

    Attributes:
        factors: A_i, raw (not bias-corrected); None for an axis with exponent 0.
        roots: Inverse roots as of the last refresh, identity before.
    """

    def __init__(
        self,
        parameter: Array,
        *,
        eps: float = 1e-12,
        interval: int = 1,
        start: float | None = None,
        exponent: Exponent = None,
        trace_scaling: float | None = None,
        ridge: str = "shift_before",
        rtol: float | None = None,
        atol: float = 0.0,
        drop_weighting: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(parameter, start=interval if start is None else start, **options)
        self.eps, self.interval, self.trace_scaling = eps, interval, trace_scaling
        self.ridge, self.rtol, self.atol = ridge, rtol, atol
        self.drop_weighting = drop_weighting
        self.exponents = axis_exponents(self.parameter.ndim, exponent)
        sides = zip(self.parameter.shape, self.exponents, strict=True)
        self.factors = [np.zeros((d, d)) if e != 0.0 else None for d, e in sides]
        self.roots = [None if a is None else np.eye(len(a)) for a in self.factors]

    def refresh_due(self) -> bool:
        """Roots or bases are computed at ``start`` and then at multiples of ``interval``."""
        return self.t == self.start or (self.t > self.start and self.t % self.interval == 0)

    def statistics_weight(self) -> float:
        return 1.0 if self.drop_weighting else super().statistics_weight()

    def statistics_correction(self) -> float:
        return 1.0 if self.drop_weighting else super().statistics_correction()

    def statistic(self, gradient: Array, axis: int) -> Array:
        """What ``gradient`` adds to the factor of ``axis``."""
        return gram(gradient, axis)

    def accumulate(self, gradient: Array) -> None:
        """``A_i <- beta2 A_i + w Gram_i(G)``, all right-hand sides with the old state."""
        weight = self.statistics_weight()
        self.factors = [
            None if a is None else self.beta2 * a + weight * self.statistic(gradient, axis)
            for axis, a in enumerate(self.factors)
        ]

    def corrected_factor(self, factor: Array) -> Array:
        """Bias-corrected and trace-scaled copy of a factor."""
        factor = factor / self.statistics_correction()
        if self.trace_scaling is None:
            return factor
        return trace_scaled(factor, self.trace_scaling, self.eps)

    def refresh(self) -> None:
        """Recompute every inverse root."""
        self.roots = [
            None
            if a is None
            else inverse_root(
                self.corrected_factor(a),
                e,
                self.eps,
                ridge=self.ridge,
                rtol=self.rtol,
                atol=self.atol,
            )
            for a, e in zip(self.factors, self.exponents, strict=True)
        ]

    def precondition(self, gradient: Array, filtered: Array) -> Array:
        self.accumulate(gradient)
        if self.refresh_due():
            self.refresh()
        return multiply(filtered, self.roots)
