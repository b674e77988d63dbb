"""Which factors have been refreshed: counted on the device, and known on the host where it has asked.

A factor whose gradients were missing or zero so far has nothing to be refreshed from, which the device
alone knows. The host asks at a refresh, on a CPU right after one, and never again once all have been
refreshed. What it knows decides what is waited for and what is left out, never a result: a resumed run that
knows less goes on with the same bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_core.refresh import FactorSlice
from shampoo_core.stacks import StackSet
from shampoo_core.statistics import KroneckerFactors


class Readiness:
    """Counters of refreshes, and what follows from them for blocks."""

    def __init__(self, stack_set: StackSet, factors: KroneckerFactors) -> None:
        """Start with no factor refreshed.

        Args:
            stack_set: Geometry.
            factors: That are to be refreshed.
        """
        self._stack_set = stack_set
        counts = [size.num_factors for size in factors.sizes]
        self._counters = torch.zeros(sum(counts), dtype=torch.int64, device=stack_set.device)
        self.num_refreshes = list(self._counters.split(counts))
        """Per factor, how many refreshes gave it a new matrix; `forget` after writing to it."""
        self._indices = sorted({axis.stack for axis in factors.axes})
        """Of the stacks that have factors."""
        positions = torch.arange(stack_set.num_blocks, device=stack_set.device)
        of_stack = positions.split(stack_set.sizes)
        self._blocks = torch.cat([positions[:0], *(of_stack[axis.stack] for axis in factors.axes)])
        """Which block each factor belongs to."""
        self._fewest = torch.ones_like(positions)
        """Per block, refreshes of the factor that had the fewest; 1 without factors."""
        self._unready = stack_set.block_vector()
        self._weights = stack_set.split(self._unready)
        self.forget()

    def __getstate__(self) -> dict[str, object]:
        """Without views: pickled, they would have memory of their own."""
        views = ("num_refreshes", "_weights")
        return {name: value for name, value in vars(self).items() if name not in views}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take over everything, and view it."""
        vars(self).update(state)
        self.num_refreshes = list(self._counters.split([len(k) for k in self._is_known]))
        self._weights = self._stack_set.split(self._unready)

    def forget(self) -> None:
        """Know nothing, for somebody may have written to the counters."""
        self._is_known = [[False] * len(counts) for counts in self.num_refreshes]
        self.all_are_known = not self._indices
        self._is_counted = False

    def recount(self) -> None:
        """Take notice of refreshes."""
        self._is_counted = False
        if not self.all_are_known and _looks_cost_nothing(self._counters):
            self.ask()

    def ask(self) -> None:
        """Learn about all factors from the device; a host synchronisation."""
        counts = [len(known) for known in self._is_known]
        is_new = iter((self._counters == 0).tolist())
        self._is_known = [[not next(is_new) for _ in range(count)] for count in counts]
        self.all_are_known = all(map(all, self._is_known))

    def learn(self, refreshed: Sequence[FactorSlice]) -> None:
        """Remember that factors have been refreshed."""
        for stack, start, stop in refreshed:
            self._is_known[stack][start:stop] = [True] * (stop - start)
        self.all_are_known = all(map(all, self._is_known))

    def knows(self, due: Sequence[FactorSlice]) -> bool:
        """Whether the host knows that all of some factors have been refreshed."""
        return all(all(self._is_known[stack][start:stop]) for stack, start, stop in due)

    def stand_in(self, stacks: Sequence[Tensor], others: Sequence[Tensor]) -> None:
        """Give blocks with a factor that was never refreshed the numbers of others, in place.

        One operation while the host does not know that there are none, nothing from then on. Blocks that
        are ready keep their bits.

        Args:
            stacks: All; those without factors stay.
            others: Of the same shapes.
        """
        if self.all_are_known:
            return
        self._count()
        lists = [[tensors[i] for i in self._indices] for tensors in (stacks, others, self._weights)]
        torch._foreach_lerp_(*lists)

    def _count(self) -> None:
        """Bring the unready blocks up to date, 1 in a block vector that others are views of."""
        if not self._is_counted:
            self._fewest.scatter_reduce_(
                0, self._blocks, self._counters, "amin", include_self=False
            )
            torch.lt(self._fewest, 1, out=self._unready)
            self._is_counted = True


def _looks_cost_nothing(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
