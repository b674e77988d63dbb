"""Adam in the eigenbasis of Shampoo's factors: EShampoo and SOAP (ALGORITHMS.md 2).

Where factors have a null space of two or more dimensions its basis is arbitrary, and so is
everything measured in it later: compare two implementations on trajectories whose first
refresh sees factors without repeated eigenvalues.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import numpy as np

from .algebra import (
    Array,
    gram,
    multiply,
    off_diagonal_ratio,
    regularised_eigh,
    rotate_back,
    transport,
)
from .method import Method
from .shampoo import Shampoo


class EShampoo(Shampoo):
    """Eigenvalue-corrected Shampoo (ALGORITHMS.md 2.1; arXiv 2506.03595).

    Args:
        parameter: Start value.
        exponent: Power of the second moment in the eigenbasis (a number, default 1/2).
        ignored_axes: Axes that stay in the standard basis and have no factor.
        descending: Order of the eigenvectors; it matters only with ``second_moments="keep"``.
        second_moments: On a change of basis "keep" the numbers or "transport" them (2.3).
        tolerance: None refreshes whenever due; else a factor whose off-diagonal ratio in the
            old basis is <= ``tolerance`` keeps that basis (3.1).
        options: ``eps``, ``interval``, ``start``, ``ridge`` of ``Shampoo`` and those of ``Method``.

    Attributes:
        bases: Q_i, columns are eigenvectors; identity before the first refresh.
        second_moment: D, raw (not bias-corrected), in the current basis.
    """

    def __init__(
        self,
        parameter: Array,
        *,
        exponent: float = 0.5,
        ignored_axes: Collection[int] = (),
        descending: bool = False,
        second_moments: str = "keep",
        tolerance: float | None = None,
        **options: Any,
    ) -> None:
        if second_moments not in ("keep", "transport"):
            raise ValueError(
                f'second_moments must be "keep" or "transport", got {second_moments!r}'
            )
        order = np.ndim(parameter)
        sides = {axis: 0.0 if axis in ignored_axes else 1.0 for axis in range(order)}
        super().__init__(parameter, exponent={order: sides}, **options)
        self.exponent, self.descending = exponent, descending
        self.second_moments, self.tolerance = second_moments, tolerance
        self.bases = [None if a is None else np.eye(len(a)) for a in self.factors]
        self.second_moment: Array = np.zeros(self.parameter.shape)

    def new_basis(self, factor: Array, old: Array) -> Array:
        """Eigenvectors of the factor, or the old basis where it is still good enough."""
        corrected = self.corrected_factor(factor)
        if self.tolerance is not None:
            ridged = corrected + self.eps * np.eye(len(corrected))
            if off_diagonal_ratio(ridged, old) <= self.tolerance:
                return old
        _, vectors = regularised_eigh(corrected, self.eps, self.ridge)
        return vectors[:, ::-1] if self.descending else vectors

    def refresh(self) -> None:
        new = [
            None if a is None or q is None else self.new_basis(a, q)
            for a, q in zip(self.factors, self.bases, strict=True)
        ]
        if self.second_moments == "transport":
            self.second_moment = transport(self.second_moment, self.bases, new)
        self.bases = new

    def precondition(self, gradient: Array, filtered: Array) -> Array:
        self.accumulate(gradient)
        if self.refresh_due():
            self.refresh()
        squares = multiply(gradient, self.bases) ** 2
        weight = self.statistics_weight()
        self.second_moment = self.beta2 * self.second_moment + weight * squares
        scale = (self.second_moment / self.statistics_correction()) ** self.exponent + self.eps
        return rotate_back(multiply(filtered, self.bases) / scale, self.bases)


class SOAP(Method):
    """SOAP as its reference code runs it (ALGORITHMS.md 2.2; Vyas et al. 2024).

    The first gradient only initialises. The update of a step uses a basis that has not seen its
    gradient; decay acts on the weights after the update.

    Args:
        parameter: Start value.
        eps: Outside the square root of the raw second moment.
        factor_beta: Decay of the factors; None means beta2.
        interval: Steps between refreshes by one orthogonal iteration.
        ignored_axes: Axes that are not rotated.
        normalise: Divide the direction by its root mean square.
        second_moments: On a refresh "permute" with the columns (the reference) or "transport".
        options: ``lr``, ``betas``, ``bias_correction``, ``weight_decay`` of ``Method``.
    """

    def __init__(
        self,
        parameter: Array,
        *,
        eps: float = 1e-8,
        factor_beta: float | None = None,
        interval: int = 10,
        ignored_axes: Collection[int] = (),
        normalise: bool = False,
        second_moments: str = "permute",
        **options: Any,
    ) -> None:
        if second_moments not in ("permute", "transport"):
            raise ValueError(
                f'second_moments must be "permute" or "transport", got {second_moments!r}'
            )
        super().__init__(parameter, **options)
        self.eps, self.interval, self.normalise = eps, interval, normalise
        self.factor_beta = self.beta2 if factor_beta is None else factor_beta
        self.second_moments = second_moments
        self.axes = [axis not in ignored_axes for axis in range(self.parameter.ndim)]
        self.factors: list[Array | None] = []
        self.bases: list[Array | None] = []
        self.momentum_in_basis: Array = np.zeros(self.parameter.shape)
        self.second_moment: Array = np.zeros(self.parameter.shape)

    def initialise(self, gradient: Array) -> None:
        """Factors and descending eigenbases from the first gradient."""
        for axis, rotated in enumerate(self.axes):
            if not rotated:
                self.factors.append(None)
                self.bases.append(None)
                continue
            factor = (1.0 - self.factor_beta) * gram(gradient, axis)
            _, vectors = np.linalg.eigh(factor + 1e-30 * np.eye(len(factor)))
            self.factors.append(factor)
            self.bases.append(vectors[:, ::-1])

    def precondition(self, gradient: Array, filtered: Array) -> Array:
        rotated = multiply(gradient, self.bases)
        self.momentum_in_basis = self.beta1 * self.momentum_in_basis + (1.0 - self.beta1) * rotated
        self.second_moment = self.beta2 * self.second_moment + (1.0 - self.beta2) * rotated**2
        direction = rotate_back(
            self.momentum_in_basis / (np.sqrt(self.second_moment) + self.eps), self.bases
        )
        if self.normalise:
            direction = direction / (1e-30 + np.sqrt(np.mean(direction**2)))
        if self.bias_correction:
            direction = direction * np.sqrt(1.0 - self.beta2**self.t) / (1.0 - self.beta1**self.t)
        self.absorb(gradient)
        return direction

    def absorb(self, gradient: Array) -> None:
        """Update the factors, then the bases when due."""
        self.factors = [
            None
            if a is None
            else self.factor_beta * a + (1.0 - self.factor_beta) * gram(gradient, i)
            for i, a in enumerate(self.factors)
        ]
        if self.t % self.interval == 0:
            self.refresh()

    def refresh(self) -> None:
        """One orthogonal iteration per axis from columns sorted by decreasing eigenvalue."""
        new: list[Array | None] = []
        permuted = self.second_moment
        for axis, (factor, basis) in enumerate(zip(self.factors, self.bases, strict=True)):
            if factor is None or basis is None:
                new.append(None)
                continue
            order = np.argsort(-np.diag(basis.T @ factor @ basis), kind="stable")
            permuted = np.take(permuted, order, axis=axis)
            new.append(np.linalg.qr(factor @ basis[:, order])[0])
        if self.second_moments == "transport":
            permuted = transport(self.second_moment, self.bases, new)
        self.second_moment = permuted
        self.momentum_in_basis = multiply(rotate_back(self.momentum_in_basis, self.bases), new)
        self.bases = new

    def step(self, gradient: Array | None, lr: float | None = None) -> Array:
        self.lr = self.lr if lr is None else lr
        if gradient is None:
            return self.parameter.copy()
        if not self.bases:
            self.initialise(np.asarray(gradient, dtype=np.float64))
            return self.parameter.copy()
        direction = self.search_direction(np.asarray(gradient, dtype=np.float64))
        moved = self.parameter - self.lr * direction
        self.parameter = moved - self.lr * self.decay_rate() * moved
        return self.parameter.copy()
