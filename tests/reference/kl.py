"""KL-Shampoo and its relatives (ALGORITHMS.md 4; arXiv 2509.03378), per-factor correction.

Every statistic is formed from the OLD state of the other axes, for all axes at once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from .algebra import (
    Array,
    Exponent,
    cutoff,
    gram,
    inverse_root,
    multiply,
    outer,
    power,
    regularised_eigh,
    rotate_back,
)
from .method import Method
from .shampoo import Shampoo

Matrices = list[Array | None]


def other_axes(matrices: Matrices, axis: int) -> Matrices:
    """``matrices`` without the one of ``axis``."""
    return [None if i == axis else matrix for i, matrix in enumerate(matrices)]


def other_sizes(shape: tuple[int, ...], axis: int) -> int:
    """Product of all dimensions but that of ``axis``."""
    return int(np.prod([d for i, d in enumerate(shape) if i != axis]))


class MetaKLShampoo(Shampoo):
    """Shampoo whose statistic is whitened by the STORED inverse roots of the other axes (4.3).

    Args:
        parameter: Start value.
        divide: Divide the statistic by the product of the other dimensions, as the paper does.
        options: Of ``Shampoo``. The paper's exponent is 1/2; the default stays 1/(2k).
    """

    def __init__(self, parameter: Array, *, divide: bool = False, **options: Any) -> None:
        super().__init__(parameter, **options)
        self.divide = divide

    def statistic(self, gradient: Array, axis: int) -> Array:
        whitened = multiply(gradient, other_axes(self.roots, axis))
        size = other_sizes(gradient.shape, axis) if self.divide else 1
        return gram(whitened, axis) / size


class IdealKLShampoo(Method):
    """The idealised algorithm (4.1): exact inverses of the old factors, new roots every step.

    Args:
        parameter: Start value.
        eps: Ridge ("absolute") of every inverse.
        initial: Factors start at ``initial * I``; no bias correction of factors.
        options: Of ``Method``; beta2 is the decay of the factors.
    """

    def __init__(
        self, parameter: Array, *, eps: float = 0.0, initial: float = 1.0, **options: Any
    ) -> None:
        super().__init__(parameter, **options)
        self.eps = eps
        self.factors = [initial * np.eye(d) for d in self.parameter.shape]

    def roots(self) -> Matrices:
        """``(S_i + eps I)^(-1/2)``."""
        return [inverse_root(s, 0.5, self.eps, ridge="absolute") for s in self.factors]

    def precondition(self, gradient: Array, filtered: Array) -> Array:
        old = self.roots()
        self.factors = [
            self.beta2 * s
            + (1.0 - self.beta2)
            / other_sizes(gradient.shape, axis)
            * gram(multiply(gradient, other_axes(old, axis)), axis)
            for axis, s in enumerate(self.factors)
        ]
        return multiply(filtered, self.roots())


class KLShampoo(Method):
    """KL-Shampoo as its official code runs it (4.2), for any order.

    The first gradient only initialises. No bias correction anywhere; the direction of a step
    uses statistics up to the gradient before; decay acts on the weights after the update.

    Args:
        parameter: Start value.
        eps: Damping of the scale, ``s / (1 + eps s)``; outside the square root in ``KLSOAP``.
        factor_beta: Decay of factors and eigenvalues; None means beta2.
        interval: Steps between refreshes by one orthogonal iteration.
        initial_eigenvalue: Of every axis after the first gradient.
        options: ``lr``, ``betas``, ``weight_decay`` of ``Method``.

    Attributes:
        factors: S_i.
        bases: Q_i, not re-sorted after the first gradient.
        eigenvalues: lambda_i, averages measured in the current basis; their inverse
            square roots are at most ``max(10, min(d, 4000))``.
    """

    def __init__(
        self,
        parameter: Array,
        *,
        eps: float = 1e-8,
        factor_beta: float | None = None,
        interval: int = 10,
        initial_eigenvalue: float = 0.1,
        **options: Any,
    ) -> None:
        super().__init__(parameter, bias_correction=False, **options)
        self.eps, self.interval = eps, interval
        self.factor_beta = self.beta2 if factor_beta is None else factor_beta
        self.eigenvalues = [np.full(d, initial_eigenvalue) for d in self.parameter.shape]
        self.factors: list[Array] = []
        self.bases: list[Array] = []

    def initialise(self, gradient: Array) -> None:
        """Factors and descending eigenbases from the first gradient, not whitened."""
        for axis in range(gradient.ndim):
            factor = (1.0 - self.factor_beta) * gram(gradient, axis)
            factor = factor / other_sizes(gradient.shape, axis)
            _, vectors = np.linalg.eigh(factor + 1e-30 * np.eye(len(factor)))
            self.factors.append(factor)
            self.bases.append(vectors[:, ::-1])

    def absorb(self, gradient: Array) -> None:
        """Factors and eigenvalues from the old bases and eigenvalues, then refresh when due."""
        decay, shape = self.factor_beta, gradient.shape
        rotated = multiply(gradient, self.bases)
        scales = [values**-0.5 for values in self.eigenvalues]
        factors, eigenvalues = [], []
        for axis, (factor, values) in enumerate(zip(self.factors, self.eigenvalues, strict=True)):
            others = [np.ones(d) if i == axis else scales[i] for i, d in enumerate(shape)]
            whitened = rotated * outer(others)
            in_basis = gram(whitened, axis) / other_sizes(shape, axis)
            basis = self.bases[axis]
            factors.append(decay * factor + (1.0 - decay) * basis @ in_basis @ basis.T)
            measured = decay * values + (1.0 - decay) * np.diag(in_basis)
            largest_scale = max(10.0, min(float(shape[axis]), 4000.0))
            eigenvalues.append(np.maximum(measured, largest_scale**-2.0))
        self.factors, self.eigenvalues = factors, eigenvalues
        if self.t % self.interval == 0:
            self.refresh()

    def refresh(self) -> None:
        """One orthogonal iteration per axis, columns as they stand."""
        self.bases = [np.linalg.qr(s @ q)[0] for s, q in zip(self.factors, self.bases, strict=True)]

    def direction(self, gradient: Array, filtered: Array) -> Array:
        """Direction from the statistics up to the gradient before."""
        scale = outer([values**-0.5 for values in self.eigenvalues])
        scale = scale / (1.0 + self.eps * scale)
        return rotate_back(multiply(filtered, self.bases) * scale, self.bases)

    def precondition(self, gradient: Array, filtered: Array) -> Array:
        direction = self.direction(gradient, filtered)
        self.absorb(gradient)
        return direction

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


class KLSOAP(KLShampoo):
    """Adam in the basis of KL-Shampoo (4.2): M rotates with the basis, D stays as it is."""

    def __init__(self, parameter: Array, **options: Any) -> None:
        super().__init__(parameter, **options)
        self.momentum_in_basis: Array = np.zeros(self.parameter.shape)
        self.second_moment: Array = np.zeros(self.parameter.shape)

    def direction(self, gradient: Array, filtered: Array) -> Array:
        rotated = multiply(gradient, self.bases)
        self.momentum_in_basis = self.beta1 * self.momentum_in_basis + (1.0 - self.beta1) * rotated
        self.second_moment = self.beta2 * self.second_moment + (1.0 - self.beta2) * rotated**2
        scaled = self.momentum_in_basis / (np.sqrt(self.second_moment) + self.eps)
        return rotate_back(scaled, self.bases)

    def refresh(self) -> None:
        in_parameter_space = rotate_back(self.momentum_in_basis, self.bases)
        super().refresh()
        self.momentum_in_basis = multiply(in_parameter_space, self.bases)


class PerFactorCorrected(Shampoo):
    """Shampoo in a stale basis with fresh eigenvalues for every factor.

    ``P = Q-rotated f * prod_i (lambda_i + eps)^(-e_i)``, rotated back. Bases are refreshed as
    Shampoo's roots are; before ``start`` the preconditioner is the identity.

    Args:
        parameter: Start value.
        eigenvalues: "measured": ``diag(Q' A Q)`` of the current bias-corrected factor, every step.
            "averaged": an average of ``diag(Q' Gram_i(G) Q)`` of its own, each term
            measured in the basis of its step, as in KL-Shampoo.
        kl: Whiten the statistic by ``(lambda_j + eps)^(-e_j)`` of the other axes in the basis and
            with the eigenvalues that the step before left (identity before ``start``).
        divide: Divide the statistic by the product of the other dimensions.
        options: Of ``Shampoo``; ``ridge`` is "absolute" or "truncate".
    """

    def __init__(
        self,
        parameter: Array,
        *,
        eigenvalues: str = "measured",
        kl: bool = False,
        divide: bool = False,
        exponent: Exponent = None,
        ridge: str = "absolute",
        **options: Any,
    ) -> None:
        if eigenvalues not in ("measured", "averaged"):
            raise ValueError(f'eigenvalues must be "measured" or "averaged", got {eigenvalues!r}')
        if ridge not in ("absolute", "truncate"):
            raise ValueError(f'ridge must be "absolute" or "truncate" here, got {ridge!r}')
        super().__init__(parameter, exponent=exponent, ridge=ridge, **options)
        self.kind, self.kl, self.divide = eigenvalues, kl, divide
        self.bases: Matrices = [None if a is None else np.eye(len(a)) for a in self.factors]
        self.averages = [None if a is None else np.zeros(len(a)) for a in self.factors]

    def statistic(self, gradient: Array, axis: int) -> Array:
        whitened = multiply(gradient, other_axes(self.roots, axis)) if self.kl else gradient
        size = other_sizes(gradient.shape, axis) if self.divide else 1
        return gram(whitened, axis) / size

    def refresh(self) -> None:
        self.bases = [
            None if a is None else regularised_eigh(self.corrected_factor(a), 0.0, "absolute")[1]
            for a in self.factors
        ]

    def current_eigenvalues(self, axis: int, factor: Array, basis: Array) -> Array:
        """Eigenvalue estimates of one axis, bias-corrected."""
        if self.kind == "measured":
            return np.diag(basis.T @ self.corrected_factor(factor) @ basis)
        average = self.averages[axis]
        assert average is not None
        return average / self.statistics_correction()

    def precondition(self, gradient: Array, filtered: Array) -> Array:
        fresh = [self.statistic(gradient, axis) for axis in range(gradient.ndim)]
        self.accumulate(gradient)
        if self.refresh_due():
            self.refresh()
        weight = self.statistics_weight()
        self.averages = [
            None
            if average is None or basis is None
            else self.beta2 * average + weight * np.diag(basis.T @ statistic @ basis)
            for average, basis, statistic in zip(self.averages, self.bases, fresh, strict=True)
        ]
        if self.t < self.start:
            return filtered
        self.roots = [
            None
            if factor is None or basis is None
            else self.root(self.current_eigenvalues(axis, factor, basis), basis, exponent)
            for axis, (factor, basis, exponent) in enumerate(
                zip(self.factors, self.bases, self.exponents, strict=True)
            )
        ]
        return multiply(filtered, self.roots)

    def root(self, values: Array, basis: Array, exponent: float) -> Array:
        """``Q (lambda + eps)^(-e) Q'``."""
        kept = values > cutoff(values, self.rtol, self.atol) if self.ridge == "truncate" else None
        return (basis * power(values + self.eps, -exponent, kept)) @ basis.T
