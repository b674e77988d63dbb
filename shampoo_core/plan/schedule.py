"""What a staggered refresh makes due on every rank, and how long all wait for the slowest one."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shampoo_core.blocking import Shape
from shampoo_core.plan.layout import MethodBlocks
from shampoo_core.refresh import FactorSlice, FactorStackSize, StaggeredRefresh


@dataclass(frozen=True)
class Stacks:
    """The factor stacks of all ranks' blocks of one method."""

    sizes: tuple[FactorStackSize, ...]
    owners: list[list[int]]
    """Per stack and factor: whose block it is of."""

    def of_rank(self, rank: int, due: Sequence[FactorSlice]) -> list[FactorSlice]:
        """Slices of all stacks in the numbering of one rank's own."""
        places = [
            [place for place, owner in enumerate(owners) if owner == rank] for owners in self.owners
        ]
        own_stacks = [stack for stack, own in enumerate(places) if own]
        found = []
        for item in due:
            own = places[item.stack]
            start, stop = bisect_left(own, item.start), bisect_left(own, item.stop)
            if start < stop:
                found.append(FactorSlice(own_stacks.index(item.stack), start, stop))
        return found


class Schedule:
    """One interval of a staggered refresh, work in units of d^3."""

    def __init__(
        self,
        methods: Sequence[MethodBlocks],
        sides_of: Sequence[Mapping[Shape, tuple[int, ...]]],
        interval: int,
        num_owners: int,
    ) -> None:
        """Spread the factors of all ranks over the steps of an interval.

        Args:
            methods: The blocks of the model.
            sides_of: Per method, the sides of the factors that a block of some shape has.
            interval: Steps from one refresh of a factor to its next.
            num_owners: Ranks that share the work, as the refresh is told.
        """
        self._stacks = [_stacks(*pair) for pair in zip(methods, sides_of, strict=True)]
        policy = StaggeredRefresh(interval, ranks=num_owners)
        self._due: dict[int, list[list[FactorSlice]]] = {}
        self._work: dict[int, Counter[int]] = {}
        for phase in range(interval):
            step = policy.settled_step + 1 + phase
            due = [policy.due(step, stacks.sizes) for stacks in self._stacks]
            if any(due):
                self._due[phase] = due
                self._work[phase] = self._work_of(due)

    def _work_of(self, due: Iterable[Sequence[FactorSlice]]) -> Counter[int]:
        work = Counter[int]()
        for stacks, slices in zip(self._stacks, due, strict=True):
            for item in slices:
                each = stacks.sizes[item.stack].dimension ** 3
                for owner in stacks.owners[item.stack][item.start : item.stop]:
                    work[owner] += each
        return work

    @property
    def waiting(self) -> float:
        """What all ranks wait for in an interval, in units of the work of the rank that has most."""
        totals = sum(self._work.values(), Counter[int]())
        if not totals:
            return 1.0
        return sum(max(work.values()) for work in self._work.values()) / max(totals.values())

    def busiest(self, ranks: Sequence[int]) -> tuple[int, list[list[FactorSlice]]]:
        """The rank, of some, with most work at one step; and what it has to do then, per method."""
        if not self._work:
            return ranks[0], [[] for _ in self._stacks]
        rank, phase = max(
            ((rank, phase) for phase in self._work for rank in ranks),
            key=lambda pair: self._work[pair[1]][pair[0]],
        )
        due = zip(self._stacks, self._due[phase], strict=True)
        return rank, [stacks.of_rank(rank, slices) for stacks, slices in due]


def _stacks(method: MethodBlocks, sides_of: Mapping[Shape, tuple[int, ...]]) -> Stacks:
    pairs = [
        (FactorStackSize(len(owners), side), owners)
        for shape, owners in method.stacks
        for side in sides_of[shape]
    ]
    return Stacks(tuple(size for size, _ in pairs), [owners for _, owners in pairs])
