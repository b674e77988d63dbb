"""How often roots and bases are recomputed, from what that costs on this machine for this model.

A setting's interval suits a machine on which a refresh of everything takes some ten steps' time. Early
in the run both are measured, and the interval is halved or doubled as often as it takes to bring
refreshes near their share of the time. What is measured is noisy, so that the rule is coarse: powers of
two, no change within a factor of two of what is wanted, one decision a run, kept in the checkpoint.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from absl import logging

from shampoo_core import FactorSlice, FactorStackSize, StaggeredRefresh

from .objective import world_size
from .pace import REFRESHES_PER_RUN

#: Part of a step's time, without refreshes, that refreshes may take on average.
SHARE = 0.1
#: The interval is at most multiplied or divided by this.
MOST_CHANGE = 4
#: First steps are slow for reasons of their own, such as memory that is allocated.
WARM_UP_STEPS = 10
#: Each share of the refresh is timed as often, and the quickest time counts.
CYCLES = 2
#: Steps without a refresh, to compare with.
IDLE_STEPS = 4


def chosen_interval(
    interval: int, bounds: tuple[int, int], refresh_seconds: float, step_seconds: float
) -> int:
    """Return the interval that fits measured costs.

    Args:
        interval: The setting's.
        bounds: Smallest and largest interval allowed, `interval` among them.
        refresh_seconds: Time to refresh everything once.
        step_seconds: Time of a step without refreshes.

    >>> [chosen_interval(32, (8, 128), cost, 1.0) for cost in (0.0, 1.0, 2.0, 5.0, 7.0, 20.0)]
    [8, 16, 32, 32, 64, 128]
    """
    wanted = refresh_seconds / (SHARE * step_seconds)
    low, high = bounds
    doublings = math.trunc(math.log2(max(wanted, low / 2) / interval))
    return min(max(round(interval * 2.0**doublings), low), high)


def interval_bounds(interval: int, total_steps: int) -> tuple[int, int]:
    """Return the smallest and the largest interval that measuring may lead to.

    A short run keeps its number of refreshes, whatever they cost.

    >>> interval_bounds(100, 50_000), interval_bounds(10, 600), interval_bounds(1, 18)
    ((25, 400), (2, 24), (1, 1))
    """
    high = min(interval * MOST_CHANGE, total_steps // REFRESHES_PER_RUN)
    return max(1, interval // MOST_CHANGE), max(interval, high)


class MeasuredRefresh:
    """A staggered refresh whose interval is changed once; a `shampoo_core` refresh policy.

    Args:
        interval: Steps from one refresh of a factor to its next until the change.
        ranks: That share the work, as of `StaggeredRefresh`.
    """

    def __init__(self, interval: int, ranks: int = 1) -> None:
        self.ranks = ranks
        self._plans = [StaggeredRefresh(interval=interval, ranks=ranks)]
        #: While true nothing is due.
        self.is_idle = False
        #: Whether anything was due since this was last set to false.
        self.had_work = False

    @property
    def plan(self) -> StaggeredRefresh:
        """What holds now."""
        return self._plans[-1]

    @property
    def interval(self) -> int:
        """Steps from one refresh of a factor to its next."""
        return self.plan.interval

    @property
    def first_step(self) -> int:
        """First step, counted from 1, at which anything is due."""
        return self._plans[0].first_step

    @property
    def settled_step(self) -> int:
        """Step from which on every factor has been due at least once."""
        return self._plans[0].settled_step

    @property
    def tolerance(self) -> float:
        """Every due factor is refreshed."""
        return 0.0

    def due(self, step: int, sizes: tuple[FactorStackSize, ...]) -> list[FactorSlice]:
        """Slices due at `step`, counted from 1."""
        # Parameters whose gradients began late are at an earlier step of their own.
        plan = self._plans[0] if step < self.plan.first_step else self.plan
        due = [] if self.is_idle else plan.due(step, sizes)
        self.had_work |= bool(due)
        return due

    def change(self, interval: int, start: int) -> None:
        """Begin a new round at step `start`, which must lie behind `settled_step`."""
        if start <= self.settled_step:
            raise ValueError(f"start must be above {self.settled_step}, got {start}")
        self._plans[1:] = [StaggeredRefresh(interval=interval, start=start, ranks=self.ranks)]

    def take_back(self) -> None:
        """Go on as if nothing had been changed."""
        del self._plans[1:]

    def __repr__(self) -> str:
        """What a checkpoint compares: the setting, not what was measured."""
        return f"MeasuredRefresh(interval={self._plans[0].interval})"


class RefreshCost:
    """Measures refreshes and steps, and decides on the interval.

    The steps to measure follow from the interval alone: `CYCLES` whole rounds of refreshes, then
    `IDLE_STEPS` without. Times and the decision are in the state, so that a run resumed in between
    measures on and one resumed later does not measure again.

    Args:
        interval: The setting's interval for this run.
        total_steps: Length of the run's schedule.
        device: Where the model is.
    """

    def __init__(self, interval: int, total_steps: int, device: torch.device) -> None:
        self.policy = MeasuredRefresh(interval, world_size())
        self._device = device
        self._bounds = interval_bounds(interval, total_steps)
        first = max(self.policy.settled_step, WARM_UP_STEPS) + 1
        self._idle_from = first + CYCLES * interval
        decision = self._idle_from + IDLE_STEPS
        self._steps = range(first, decision)
        if self._bounds == (interval, interval) or decision > total_steps // 2:
            self._steps = range(0)
        # Of the optimizer's steps by phase of the round, where it has work, and where it has none; the
        # many phases without would only add up noise. Of whole steps without work.
        self._by_phase = [math.inf] * interval
        self._idle_update = self._idle_step = math.inf
        #: From which step on these times are of a run like this one.
        self._measured_from = first
        #: The last that has begun.
        self._step = 0
        self._begin = self._update_begin = 0.0

    def begin(self, step: int) -> None:
        """Begin a step, counted from 1; call it before the forward pass."""
        self._step = step
        self.policy.is_idle = step in self._steps and step >= self._idle_from
        self.policy.had_work = False
        if step in self._steps:
            self._begin = self._now()

    def begin_update(self, step: int) -> None:
        """Call it before the optimizer's step."""
        if step in self._steps:
            self._update_begin = self._now()

    def end(self, step: int) -> None:
        """Call it after the optimizer's step, on all ranks; after the last one it decides."""
        if step not in self._steps:
            return
        now = self._now()
        update = now - self._update_begin
        if self.policy.had_work:
            phase = (step - self._steps.start) % len(self._by_phase)
            self._by_phase[phase] = min(self._by_phase[phase], update)
        else:
            self._idle_update = min(self._idle_update, update)
            self._idle_step = min(self._idle_step, now - self._begin)
        if step == self._steps[-1]:
            self._decide(step + 1)

    def _decide(self, start: int) -> None:
        if self._measured_from + len(self._by_phase) > self._idle_from:
            logging.info("Refreshes keep the setting's interval: not all of them were timed.")
            return
        seconds = [
            max(0.0, update - self._idle_update)
            for update in self._by_phase
            if math.isfinite(update)
        ]
        refresh_seconds, step_seconds = _slowest([sum(seconds), self._idle_step], self._device)
        before = self.policy.interval
        after = chosen_interval(before, self._bounds, refresh_seconds, step_seconds)
        if after != before:
            self.policy.change(after, start)
        logging.info(
            "A refresh takes %.3g s, a step without %.3g s: every %d steps (setting: %d).",
            *(refresh_seconds, step_seconds, after, before),
        )

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def state_dict(self) -> dict[str, Any]:
        """Return what was measured and decided."""
        plan = self.policy.plan
        return {
            "by_phase": list(self._by_phase),
            "idle": [self._idle_update, self._idle_step],
            "interval": plan.interval,
            "start": plan.first_step,
            "ranks": self.policy.ranks,
            "measured_from": self._measured_from,
            "step": self._step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what a run to be resumed had measured and decided."""
        if len(state["by_phase"]) != len(self._by_phase):
            raise ValueError(
                f"the checkpoint was made with a refresh interval of {len(state['by_phase'])}, "
                f"this run has {len(self._by_phase)}"
            )
        self._step = state["step"]
        if state["ranks"] == self.policy.ranks:
            self._by_phase = list(state["by_phase"])
            self._idle_update, self._idle_step = state["idle"]
            self._measured_from = state["measured_from"]
        else:
            # Other ranks have other work at every step of a round, and take other times for it.
            self._by_phase = [math.inf] * len(self._by_phase)
            self._idle_update = self._idle_step = math.inf
            self._measured_from = max(self._measured_from, self._step + 1)
        if state["start"] > self.policy.settled_step:
            self.policy.change(state["interval"], state["start"])
        else:
            self.policy.take_back()


def _slowest(seconds: Sequence[float], device: torch.device) -> list[float]:
    """Return the largest value over all ranks of each number; the same on all of them."""
    if world_size() == 1:
        return list(seconds)
    # Not every device has float64, and single precision is ample.
    values = torch.tensor(seconds, dtype=torch.float32, device=device)
    dist.all_reduce(values, op=dist.ReduceOp.MAX)
    numbers: list[float] = values.tolist()
    return numbers
