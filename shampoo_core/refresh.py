"""Which roots or eigenbases are recomputed at this step.

A policy is asked once a step and answers with slices of factor stacks. Costs are counted in d^3, the
work of a root or an eigendecomposition of a (d, d) factor.
"""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from shampoo_core.config import ADDED_LATER, check_count, check_range


class FactorStackSize(NamedTuple):
    """A stack of ``num_factors`` factors of shape (dimension, dimension)."""

    num_factors: int
    dimension: int


class FactorSlice(NamedTuple):
    """Factors ``start`` to ``stop`` (exclusive) of factor stack number ``stack``."""

    stack: int
    start: int
    stop: int


class RefreshPolicy(Protocol):
    """Decides when a factor's root or basis is recomputed.

    Laws: the answer depends on the arguments alone; every factor is due at least once in any
    ``interval`` consecutive steps from ``first_step`` on.
    """

    @property
    def interval(self) -> int:
        """Steps from one refresh, or test, of a factor to its next."""

    @property
    def first_step(self) -> int:
        """First step, counted from 1, at which anything is due."""

    @property
    def settled_step(self) -> int:
        """Step from which on every factor has been due at least once."""

    @property
    def tolerance(self) -> float:
        """A due factor is left alone while its relative off-diagonal norm is at most this."""

    def due(self, step: int, sizes: tuple[FactorStackSize, ...]) -> list[FactorSlice]:
        """Slices due at ``step`` (counted from 1)."""


@dataclass(frozen=True)
class FixedRefresh:
    """Everything at once: at step ``start`` and then at every multiple of ``interval``.

    Args:
        interval: Steps from one refresh to the next.
        start: First refresh, in steps counted from 1; None means ``interval``.

    Raises:
        ValueError: An argument is smaller than 1.
    """

    interval: int = 100
    start: int | None = None

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_count(owner, "interval", self.interval)
        check_count(owner, "start", self.start, optional=True)

    @property
    def first_step(self) -> int:
        """See `RefreshPolicy`."""
        return self.interval if self.start is None else self.start

    @property
    def settled_step(self) -> int:
        """See `RefreshPolicy`."""
        return self.first_step

    @property
    def tolerance(self) -> float:
        """See `RefreshPolicy`."""
        return 0.0

    def due(self, step: int, sizes: tuple[FactorStackSize, ...]) -> list[FactorSlice]:
        """See `RefreshPolicy`."""
        late_enough = step > self.first_step and step % self.interval == 0
        return whole_stacks(sizes) if step == self.first_step or late_enough else []


@dataclass(frozen=True)
class AdaptiveRefresh(FixedRefresh):
    """As `FixedRefresh`, but a factor that its old basis still diagonalises is left alone.

    Shampoo's roots are left alone with their bases, once there is one, whatever became of the eigenvalues;
    but where gradients have come along a direction that a root had dropped it is made anew.

    Args:
        interval: Steps from one test to the next.
        start: First test, in steps counted from 1; None means ``interval``.
        threshold: Largest relative off-diagonal Frobenius norm of Q^T A Q that is left alone, in
            [0, 1].

    Raises:
        ValueError: An argument is out of range.

    Source: arXiv 2506.03595 (off-diagonal criterion); the defaults are its AlgoPerf setting.
    """

    interval: int = 50
    start: int | None = None
    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("AdaptiveRefresh", "threshold", self.threshold, low=0.0, high=1.0)

    @property
    def tolerance(self) -> float:
        """See `RefreshPolicy`."""
        return self.threshold


@dataclass(frozen=True)
class StaggeredRefresh:
    """The work of an interval spread evenly over its steps, so that no step is a spike.

    Args:
        interval: Steps from one refresh of a factor to its next.
        start: First step at which a refresh may happen; None means 1.
        ranks: Give it the number of ranks that share the work. What is due at a step is then made of as
            many neighbouring factors, which have as many owners; of single ones, all ranks would wait for
            one at nearly every step. Results depend on it, as on the interval, whatever number of ranks
            there is.

    Raises:
        ValueError: An argument is smaller than 1.
    """

    interval: int = 100
    start: int | None = None
    ranks: int = field(default=1, kw_only=True, metadata=ADDED_LATER)

    def __post_init__(self) -> None:
        owner = type(self).__name__
        check_count(owner, "interval", self.interval)
        check_count(owner, "start", self.start, optional=True)
        check_count(owner, "ranks", self.ranks)

    @property
    def first_step(self) -> int:
        """See `RefreshPolicy`."""
        return 1 if self.start is None else self.start

    @property
    def settled_step(self) -> int:
        """See `RefreshPolicy`."""
        return self.first_step + self.interval - 1

    @property
    def tolerance(self) -> float:
        """See `RefreshPolicy`."""
        return 0.0

    def due(self, step: int, sizes: tuple[FactorStackSize, ...]) -> list[FactorSlice]:
        """See `RefreshPolicy`."""
        if step < self.first_step:
            return []
        phase = (step - self.first_step) % self.interval
        return list(_stagger(sizes, self.interval, self.ranks).get(phase, ()))


@dataclass(frozen=True)
class StaggeredAdaptiveRefresh(StaggeredRefresh):
    """As `StaggeredRefresh`, but a factor that its old basis still diagonalises is left alone.

    No step is a spike and no basis that stands still is made anew, at the price of a host
    synchronisation at every step at which something is tested.

    Args:
        interval: Steps from one test of a factor to its next.
        start: First step at which a test may happen; None means 1.
        threshold: As of `AdaptiveRefresh`.
        ranks: As of `StaggeredRefresh`.

    Raises:
        ValueError: An argument is out of range.

    Source: arXiv 2506.03595 (off-diagonal criterion), staggered.
    """

    interval: int = 50
    start: int | None = None
    threshold: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range("StaggeredAdaptiveRefresh", "threshold", self.threshold, low=0.0, high=1.0)

    @property
    def tolerance(self) -> float:
        """See `RefreshPolicy`."""
        return self.threshold


def whole_stacks(sizes: tuple[FactorStackSize, ...]) -> list[FactorSlice]:
    """One slice per stack, covering all of it."""
    return [FactorSlice(stack, 0, size.num_factors) for stack, size in enumerate(sizes)]


def singles(due: Sequence[FactorSlice]) -> list[FactorSlice]:
    """A slice for every factor."""
    return [FactorSlice(item.stack, i, i + 1) for item in due for i in range(item.start, item.stop)]


def joined(due: Sequence[FactorSlice]) -> list[FactorSlice]:
    """Join neighbouring slices of one stack."""
    longer: list[FactorSlice] = []
    for item in due:
        if longer and longer[-1].stack == item.stack and longer[-1].stop == item.start:
            longer[-1] = FactorSlice(item.stack, longer[-1].start, item.stop)
        else:
            longer.append(item)
    return longer


def portions(
    due: Sequence[FactorSlice], sizes: Sequence[FactorStackSize], limit: int
) -> list[list[FactorSlice]]:
    """Cut what is due into portions of at most ``limit`` numbers, or of one factor that has more.

    Args:
        due: Slices of factor stacks.
        sizes: Of all factor stacks.
        limit: Numbers in the factors of a portion.

    Returns:
        Slices with the same factors, in the same order.
    """
    result: list[list[FactorSlice]] = []
    room = 0
    for stack, start, stop in due:
        numel = sizes[stack].dimension ** 2
        while start < stop:
            if room < numel:
                result.append([])
                room = limit
            count = min(stop - start, max(1, room // numel))
            result[-1].append(FactorSlice(stack, start, start + count))
            start += count
            room -= count * numel
    return result


SMALLEST_SHARE = 512.0**3
"""Work of a refresh, in units of d^3, below which a `StaggeredRefresh` does not divide it further.

All at once is better while it is no spike: fewer operations, and a block's bases, renewed together, fit
each other. On a small graph network 210 and 240 steps (two seeds) where three shares took 270 each.
"""


@functools.cache
def _stagger(
    sizes: tuple[FactorStackSize, ...], interval: int, ranks: int
) -> dict[int, tuple[FactorSlice, ...]]:
    """Spread factors over the interval's phases, largest first onto the least loaded; those that have any.

    Of the ``interval`` phases as many are used, evenly spaced, as keep a share of `SMALLEST_SHARE` for
    each of the ranks: a small model's factors would otherwise be solved one by one, at the price of a
    batch each.

    Ranks solve as many factors in the time of one. Blocks are dealt out to them in turn, dearest first
    (`shampoo_core.exchange.assignment`), so that this many neighbours have different owners, but at the
    ends of stacks.

    Factors of one stack cost the same and are interchangeable, so that only *how many* of a stack fall
    into a phase is decided by load; which ones is chosen to make every share one contiguous slice.
    """
    work = sum(size.num_factors * float(size.dimension) ** 3 for size in sizes)
    num_shares = min(interval, max(1, math.ceil(work / (ranks * SMALLEST_SHARE))))
    loads = [(0.0, share * interval // num_shares) for share in range(num_shares)]
    shares: dict[tuple[int, int], int] = {}
    by_cost = sorted(range(len(sizes)), key=lambda stack: -sizes[stack].dimension)
    in_turn = [stack for stack in by_cost for _ in range(sizes[stack].num_factors)]
    for first in range(0, len(in_turn), ranks):
        load, phase = heapq.heappop(loads)
        for stack in in_turn[first : first + ranks]:
            shares[stack, phase] = shares.get((stack, phase), 0) + 1
        heapq.heappush(loads, (load + float(sizes[in_turn[first]].dimension) ** 3, phase))
    phases: dict[int, list[FactorSlice]] = {}
    starts = [0] * len(sizes)
    for (stack, phase), count in sorted(shares.items()):
        slices = phases.setdefault(phase, [])
        slices.append(FactorSlice(stack, starts[stack], starts[stack] + count))
        starts[stack] += count
    return {phase: tuple(slices) for phase, slices in phases.items()}
