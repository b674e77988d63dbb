"""What KL-Shampoo learns about gradients: factors, their eigenbases, and eigenvalues of its own.

The gradients of a block are taken for samples of a Gaussian with covariance S_1 x S_2 x ... (Kronecker
product). Fitting it by maximum likelihood makes the factor of an axis the second moment of gradients
that all other axes have whitened; d_i is the length of axis i, D_i the product of the other lengths:

    g        = G x_1 Q_1 x_2 Q_2 ...                                rotated into the eigenbases
    w_i      = g / prod_{j != i} sqrt(d_j lambda_j)                 whitened along all axes but i
    S_i      <- beta2 S_i + (1 - beta2) Gram_i(w_i)                 = G Q_j diag(1/lambda_j) Q_j^T G^T / D_i
    lambda_i <- beta2 lambda_i + (1 - beta2) diag Gram_i(w_i)       limited from below

for all i at once, with the old bases and eigenvalues on the right. S_i is kept in the eigenbasis, as
Q_i^T S_i Q_i: then neither whitening nor measuring takes products beyond the Gram matrices. When a
basis turns, by S = Q_old^T Q_new, what is kept in it turns along.

The eigenvalues are averages of their own, not diag(Q_i^T S_i Q_i), with which they would agree but for
where they start: the first gradient enters the factors as it is, and leaves the eigenvalues at a constant.

Source: Lin et al. 2025 (arXiv 2509.03378); the limit on eigenvalues is that of its published code.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from shampoo_core.config import Storage
from shampoo_core.gradients import StackedGradients
from shampoo_core.preconditioners.basis_change import SecondMoments, turned_squares
from shampoo_core.preconditioners.batches import Batch, Solution, Solve
from shampoo_core.preconditioners.eigenbases import eigenbases
from shampoo_core.preconditioners.factor_matrices import FactorMatrices, Replacement
from shampoo_core.refresh import FactorSlice
from shampoo_core.solvers import BasisSolver
from shampoo_core.solvers.precision import full_precision
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states, stacked_state
from shampoo_core.statistics import FactorAxis, KroneckerFactors, RowsOf, by_axis, unfold


class KLFactors:
    """Factors S_i in their eigenbases Q_i, and eigenvalues lambda_i, of a set of stacks."""

    def __init__(
        self,
        stack_set: StackSet,
        axes: Sequence[FactorAxis],
        decay: float,
        *,
        all_axes: Sequence[FactorAxis],
        interval: int,
        initial_eigenvalue: float,
        largest_scale: float | None,
        second_moments: SecondMoments,
        solver: BasisSolver,
        storage: Storage = "dense",
        portion_numel: int | None = None,
    ) -> None:
        """Start with factors zero and bases the identity.

        Args:
            stack_set: Geometry.
            axes: The preconditioned axes.
            decay: beta2 of factors and eigenvalues per step; 1 sums.
            all_axes: The preconditioned axes of ``stack_set.whole``.
            interval: Gradients are absorbed every so many steps, with ``decay ** interval``.
            initial_eigenvalue: Of all axes after the first gradient.
            largest_scale: What lambda^(-1/2) may be; None means max(10, min(d, 4000)).
            second_moments: What becomes of eigenvalues when their basis turns.
            solver: Computes the eigenbases.
            storage: How factors and bases are kept.
            portion_numel: See `FactorMatrices`.
        """
        self._stack_set = stack_set
        self._solver = solver
        self._second_moments = second_moments
        self._decay = decay**interval
        self._gain = 1.0 if decay == 1.0 else 1.0 - self._decay
        self._initial_eigenvalue = initial_eigenvalue
        self._floors = [
            (largest_scale or max(10.0, min(float(axis.dimension), 4000.0))) ** -2.0
            for axis in axes
        ]
        # No bias correction: a basis does not depend on the scale of its factor.
        self.factors = KroneckerFactors(
            stack_set,
            axes,
            decay,
            bias_correction=False,
            interval=interval,
            storage=storage,
            all_axes=all_axes,
        )
        self.bases = FactorMatrices(
            stack_set,
            self.factors,
            [1.0] * len(axes),
            kind="bases",
            storage=storage,
            portion_numel=portion_numel,
        )
        # One until the first gradient has come, which is therefore not whitened.
        self.eigenvalues = [
            torch.ones(
                size.num_factors, size.dimension, dtype=stack_set.dtype, device=stack_set.device
            )
            for size in self.factors.sizes
        ]
        """(N, d) per preconditioned axis."""
        self.started = stack_set.block_vector()
        """1 for blocks that have absorbed a gradient."""

    def absorb(self, rotated: StackedGradients, step: int) -> None:
        """Learn from gradients that are in the eigenbases, if this step is one of every interval."""
        lengths: list[Tensor] = []
        counted = self.factors.absorb(rotated, step, partial(self._whitened, lengths))
        if counted is not None:
            self._absorb_eigenvalues(lengths, counted.is_open)

    def _whitened(self, lengths: list[Tensor], rotated: StackedGradients) -> RowsOf:
        """Rows that all other axes have whitened; ``lengths`` gets theirs as they are made."""
        dimensions = [float(axis.dimension) for axis in self.factors.axes]
        scales = torch._foreach_pow(torch._foreach_mul(self.eigenvalues, dimensions), -0.5)
        per_stack = self._broadcast(list(scales))

        def whitened_rows(axis: FactorAxis) -> Tensor:
            whitened = rotated.stacks[axis.stack]
            for other, scale in per_stack[axis.stack].items():
                if other != axis.axis:
                    whitened = whitened * scale
            rows = unfold(whitened, axis.axis)
            # The diagonal of the Gram matrix: squared lengths of its rows.
            lengths.append(torch.linalg.vector_norm(rows, dim=-1))
            return rows

        return whitened_rows

    def _absorb_eigenvalues(self, lengths: list[Tensor], is_open: Tensor) -> None:
        """``lambda <- decay lambda + gain lengths^2``; a block's first gradient sets it instead."""
        first = is_open * (1.0 - self.started)
        self.started.add_(first)
        decayed = (1.0 - (1.0 - self._decay) * is_open) * (1.0 - first)
        torch._foreach_mul_(self.eigenvalues, self._per_axis(decayed))
        scaled = torch._foreach_mul(lengths, self._per_axis(self._gain * (1.0 - first)))
        torch._foreach_addcmul_(self.eigenvalues, scaled, lengths)
        torch._foreach_add_(self.eigenvalues, self._per_axis(self._initial_eigenvalue * first))
        torch._foreach_clamp_min_(self.eigenvalues, self._floors)

    def root_products(self) -> list[Tensor]:
        """``sqrt(lambda_1) x sqrt(lambda_2) x ...`` (outer product) per stack.

        What a whitened gradient is divided by in the eigenbasis; axes that are not preconditioned
        have length 1.
        """
        per_stack = self._broadcast(list(torch._foreach_sqrt(self.eigenvalues)))
        products = []
        for index in range(len(self._stack_set)):
            product, *others = per_stack[index].values()
            for root in others:
                product = product * root
            products.append(product)
        return products

    def refresh(
        self,
        due: Sequence[FactorSlice],
        tolerance: float,
        carry_over: Callable[[FactorAxis, Replacement], None],
        *,
        first: bool,
    ) -> bool:
        """Recompute the bases of due factors and turn factors and eigenvalues along.

        Args:
            due: Slices of factor stacks.
            tolerance: Of `FactorMatrices.stale`.
            carry_over: Is told of every change, for what else is kept in the bases; the last to use it.
            first: Whether the schedule comes to these factors for the first time.

        Returns:
            Whether any basis has changed.
        """
        # In the coordinates that factors are kept in, their old basis is the identity.
        solver = self._solver
        stale = self.bases.stale(
            due, tolerance, self._identities, first=first, asks=solver.warm_starts
        )
        for portion, continued in self.bases.rounds(stale, warm_starts=solver.warm_starts):
            solve = partial(self._rotate_bases, continued=continued, may_wait=stale.may_wait)
            self._turn_portion(portion, solve, carry_over)
        return bool(stale.due)

    def _turn_portion(
        self,
        due: list[FactorSlice],
        solve: Solve,
        carry_over: Callable[[FactorAxis, Replacement], None],
    ) -> None:
        with full_precision(self._stack_set.device):
            changes = self.bases.replace(due, solve)
            for change in changes:
                where = change.where
                self.factors.turn(where, change.turn)
                eigenvalues = self.eigenvalues[where.stack][where.start : where.stop]
                moved = turned_squares(eigenvalues, 0, change, self._second_moments)
                if moved is not None:
                    eigenvalues.copy_(moved)
        for change in changes:
            carry_over(self.factors.axes[change.where.stack], change)

    def _identities(self, where: FactorSlice) -> Tensor:
        side = self.factors.sizes[where.stack].dimension
        one = torch.eye(side, dtype=self._stack_set.dtype, device=self._stack_set.device)
        return one.expand(where.stop - where.start, -1, -1)

    def _rotate_bases(
        self, batches: list[Batch], *, continued: bool, may_wait: bool
    ) -> list[Solution]:
        rotate = eigenbases(self._solver, continued=continued, may_wait=may_wait)
        rotations = rotate(
            [batch._replace(read_old=partial(_identity_like, batch.factors)) for batch in batches]
        )
        return [
            rotation._replace(matrices=_rotated_basis(batch.read_old(), rotation.matrices))
            for batch, rotation in zip(batches, rotations, strict=True)
        ]

    def _broadcast(self, per_axis: list[Tensor]) -> list[dict[int, Tensor]]:
        """Per stack and axis of its blocks: (N, d) as (N, 1, ..., d, ..., 1)."""
        per_stack: list[dict[int, Tensor]] = [{} for _ in range(len(self._stack_set))]
        for axis, tensor in zip(self.factors.axes, per_axis, strict=True):
            shape = [len(tensor), *[1] * axis.order]
            shape[axis.axis + 1] = axis.dimension
            per_stack[axis.stack][axis.axis] = tensor.view(shape)
        return per_stack

    def _per_axis(self, block_vector: Tensor) -> list[Tensor]:
        """Views of a block vector, (N, 1) per preconditioned axis."""
        pieces = block_vector.split(self._stack_set.sizes)
        return [pieces[axis.stack].view(-1, 1) for axis in self.factors.axes]

    def state(self) -> StackState:
        """Factors, bases, eigenvalues, and which blocks have started."""
        count, axes = len(self._stack_set), self.factors.axes
        started = self.started.split(self._stack_set.sizes)
        return merge_states(
            count,
            {
                "factors": self.factors.state(),
                "": self.bases.state("bases"),
                "eigenvalues": by_axis(count, axes, "axis", self.eigenvalues),
                "kl": stacked_state(count, {"started": started}),
            },
        )


def _rotated_basis(old: Tensor, rotation: Tensor) -> Tensor:
    """``old @ rotation``, orthogonal again up to rounding (one Newton step on Q^T Q = I)."""
    basis = torch.bmm(old, rotation)
    # Without it the product of thousands of rotations would drift away from orthogonality.
    return torch.baddbmm(basis, basis, torch.bmm(basis.mT, basis), beta=1.5, alpha=-0.5)


def _identity_like(matrices: Tensor) -> Tensor:
    identity = torch.eye(matrices.shape[-1], dtype=matrices.dtype, device=matrices.device)
    return identity.expand_as(matrices)
