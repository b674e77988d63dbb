"""Which rank owns which block: pure arithmetic on modelled costs, the same on every rank.

Every step ends when the slowest rank does, so that the largest load is made as small as possible:
dearest blocks first, each to the rank with the least load (Graham 1969: at most 4/3 of the best).
Blocks of equal cost are thereby dealt out in turn, and a slice of neighbouring blocks, one for each rank,
is spread over the ranks as well: a staggered refresh that knows their number makes such due at a step.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Mapping, Sequence


def assign(
    costs: Sequence[float],
    num_ranks: int,
    loads: Sequence[float] | None = None,
    *,
    num_teams: int = 1,
    parts: Sequence[Mapping[int, int]] | None = None,
) -> list[int]:
    """Give every block an owner.

    Args:
        costs: Per block, on any scale, at least 0.
        num_ranks: How many ranks share the blocks.
        loads: What each rank has to do already, on the same scale; None means nothing.
        num_teams: Of as many neighbouring ranks each; divides ``num_ranks``.
        parts: Per block, how much of it is of which kind. Of several ranks with the least load the block
            goes to one of the team that has least of its kinds, so that a team's kinds get even.

    Returns:
        Per block its owner, 0 to ``num_ranks - 1``; a function of the arguments alone.
    """
    before = [0.0] * num_ranks if loads is None else loads
    size = num_ranks // num_teams
    teams = [_Team(first, before[first : first + size]) for first in range(0, num_ranks, size)]
    owners = [0] * len(costs)
    # Sorting is stable: equal blocks are dealt out in the order in which they are stacked.
    for block in sorted(range(len(costs)), key=lambda index: -costs[index]):
        kinds = {} if parts is None else parts[block]
        team = teams[0]
        if num_teams > 1:
            least = min(team.least_load for team in teams)
            team = min(
                (team for team in teams if team.least_load == least),
                key=lambda team: sum(team.filled[kind] for kind in kinds),
            )
        owners[block] = team.take(costs[block], kinds)
    return owners


class _Team:
    """Some ranks by load, and how much they have of what."""

    def __init__(self, first: int, loads: Sequence[float]) -> None:
        self._heap = [(load, rank) for rank, load in enumerate(loads, first)]
        heapq.heapify(self._heap)
        self.filled = Counter[int]()

    @property
    def least_load(self) -> float:
        return self._heap[0][0]

    def take(self, cost: float, kinds: Mapping[int, int]) -> int:
        """Give a block to the rank with the least load, and return it."""
        load, rank = self._heap[0]
        heapq.heapreplace(self._heap, (load + cost, rank))
        self.filled.update(kinds)
        return rank


def loads_of(costs: Sequence[float], owners: Sequence[int], num_ranks: int) -> list[float]:
    """Sum of the costs of each rank's blocks."""
    loads = [0.0] * num_ranks
    for cost, owner in zip(costs, owners, strict=True):
        loads[owner] += cost
    return loads


def imbalance(costs: Sequence[float], owners: Sequence[int], num_ranks: int) -> float:
    """Largest load over the mean load; 1 is perfect, and nothing to do is perfect too."""
    total = sum(costs)
    return max(loads_of(costs, owners, num_ranks)) * num_ranks / total if total > 0.0 else 1.0


def least_possible_load(costs: Sequence[float], num_ranks: int) -> float:
    """A bound from below on the largest load of any assignment.

    The mean; the dearest block; and of the ``k * num_ranks + 1`` dearest blocks, of which some rank
    has to take ``k + 1``, the cheapest ``k + 1`` together.
    """
    dearest = sorted(costs, reverse=True)
    bounds = [sum(costs) / num_ranks]
    for last in range(0, len(dearest), num_ranks):
        bounds.append(sum(dearest[last - last // num_ranks : last + 1]))
    return max(bounds)
