"""How a refresh asks a solver for eigenbases."""

from __future__ import annotations

from shampoo_core.preconditioners.batches import Batch, Solution, Solve
from shampoo_core.solvers import BasisSolver


def eigenbases(solver: BasisSolver, *, continued: bool, may_wait: bool = True) -> Solve:
    """Recompute matrices as eigenbases of their factors.

    Args:
        solver: Computes them.
        may_wait: See `Stale`.
        continued: Whether the old matrices are eigenbases to start from; a first basis is made from
            scratch, for one iteration from the identity would be a poor start.
    """

    def solve(batches: list[Batch]) -> list[Solution]:
        # Where a solver does not start from them, the old matrices stay for all that it has not accepted.
        starts = None
        if continued and solver.warm_starts:
            starts = [batch.read_old() for batch in batches]
        chosen = solver if may_wait else solver.without_fallback()
        factors = [batch.factors for batch in batches]
        results = chosen.bases(factors, starts, overwrite=True)
        return [Solution(r.eigenvectors, r.accepted, r.order) for r in results]

    return solve
