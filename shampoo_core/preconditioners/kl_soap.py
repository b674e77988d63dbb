"""KL-SOAP: Adam in the eigenbases of KL-Shampoo.

    M, D <- averages of g and g^2,   g = G x_1 Q_1 x_2 Q_2 ...
    P     = (M / (sqrt(D) + eps)) x_1 Q_1^T x_2 Q_2^T ...

Q_i and what they are made from are those of `shampoo_core.preconditioners.kl`; the second moment is one
number per element instead of a product of eigenvalues.

Source: Lin et al. 2025 (arXiv 2509.03378).
"""

from __future__ import annotations

from dataclasses import dataclass

from shampoo_core.config import GroupOptions
from shampoo_core.filtering import Direction
from shampoo_core.gradients import StackedGradients
from shampoo_core.grafting import SecondMomentScaling
from shampoo_core.preconditioners.base import Preconditioner
from shampoo_core.preconditioners.basis_change import turn_second_moment
from shampoo_core.preconditioners.factor_matrices import Replacement
from shampoo_core.preconditioners.kl import KLShampoo, KLShampooConfig
from shampoo_core.refresh import RefreshPolicy
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states
from shampoo_core.statistics import FactorAxis


@dataclass(frozen=True)
class KLSOAPConfig(KLShampooConfig):
    """KL-SOAP on matrices and tensors, Adam with the group's ``betas`` and ``eps`` on vectors.

    Args:
        solver: Computes the eigenbases; by default one orthogonal iteration from the last one.
        second_moments: What becomes of D, and of the eigenvalues, when a basis turns; see
            `KLShampooConfig`, as for all that follow.
        lagged: Whether a step knows past gradients only.
        initial_eigenvalue: Of all axes after the first gradient, positive.
        largest_scale: Limit of lambda^(-1/2), positive; None means max(10, min(d, 4000)).
        factor_decay: Decay of factors and eigenvalues per step, 1 sums; None takes ``betas[1]``.
        statistics_interval: Steps from one update of factors and eigenvalues to the next.
        precondition_vectors: Whether blocks with one axis get a factor too.
        storage: How factors, bases and moments are kept.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number is out of range.
    """

    def _create_method(
        self, stack_set: StackSet, options: GroupOptions, refresh: RefreshPolicy
    ) -> Preconditioner:
        return KLSOAP(self, stack_set, options, refresh)


class KLSOAP(KLShampoo):
    """State and step of KL-SOAP for one set of stacks, all of which have factors."""

    def __init__(
        self,
        config: KLSOAPConfig,
        stack_set: StackSet,
        options: GroupOptions,
        refresh: RefreshPolicy,
    ) -> None:
        """Allocate what KL-Shampoo has, and the second moment (zero)."""
        super().__init__(config, stack_set, options, refresh)
        self._second_moments = config.second_moments
        self.scaling = SecondMomentScaling(
            stack_set,
            options.betas[1],
            options.eps,
            bias_correction=options.bias_correction,
            storage=config.storage,
        )

    def _scaled(self, rotated: StackedGradients) -> Direction:
        # Lagging factors come to read the gradients later.
        filtered = self.scaling.absorb(rotated, self.filter, in_place=not self._lagged)
        return self.scaling.direction(filtered)

    def _carry_over(self, axis: FactorAxis, change: Replacement) -> None:
        super()._carry_over(axis, change)
        turn_second_moment(self.scaling.second_moment, axis, change, self._second_moments)

    def state(self) -> StackState:
        """See `Preconditioner`."""
        parts = {"": super().state(), "second_moment": self.scaling.state()}
        return merge_states(len(self._stack_set), parts)
