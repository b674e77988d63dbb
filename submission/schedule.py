"""Learning rates as pure functions of the step.

A schedule keeps no state: the harness counts the steps, and after a resume it hands over the
right count, so there is nothing to save and nothing that can drift.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

#: Share of the trapezoid's steps after warm-up that are spent going down.
TRAPEZOID_DECAY_SHARE = 0.3

_SHAPES: dict[str, Callable[[float], float]] = {
    "cosine": lambda progress: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "linear": lambda progress: 1.0 - progress,
    "trapezoid": lambda progress: min(1.0, (1.0 - progress) / TRAPEZOID_DECAY_SHARE),
    "constant": lambda progress: 1.0,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Linear warm-up to `peak`, then `shape` down to `floor`; `schedule(step)` is the rate.

    Steps count from 1. The first step already moves (by `peak / warmup_steps`), step
    `warmup_steps` has the peak. A run that outlives `total_steps` has missed its target so far: with
    `second_end` it climbs once more and comes down at that step; then, and without it at once, the
    rate stays at its last value.

    Attributes:
        shape: "cosine", "linear", "trapezoid" or "constant".
        peak: Largest learning rate, > 0.
        total_steps: Length of the schedule including the warm-up, >= 1.
        warmup_steps: Steps of linear warm-up, in [0, total_steps).
        floor: Smallest rate after warm-up, as a share of `peak`, in [0, 1].
        second_end: Last step of a second course of the same shape, > `total_steps`; None: no second.

    Raises:
        ValueError: An attribute is out of range.
    """

    shape: str
    peak: float
    total_steps: int
    warmup_steps: int = 0
    floor: float = 0.01
    second_end: int | None = None

    def __post_init__(self) -> None:
        if self.shape not in _SHAPES:
            raise ValueError(f"shape must be one of {', '.join(_SHAPES)}, got {self.shape!r}")
        if not 0.0 < self.peak < math.inf:
            raise ValueError(f"peak must be a positive number, got {self.peak!r}")
        if self.total_steps < 1:
            raise ValueError(f"total_steps must be at least 1, got {self.total_steps!r}")
        if not 0 <= self.warmup_steps < self.total_steps:
            raise ValueError(
                f"warmup_steps must be in [0, total_steps = {self.total_steps}), "
                f"got {self.warmup_steps!r}"
            )
        if not 0.0 <= self.floor <= 1.0:
            raise ValueError(f"floor must be in [0, 1], got {self.floor!r}")
        if self.second_end is not None and self.second_end <= self.total_steps:
            raise ValueError(
                f"second_end must be above total_steps = {self.total_steps}, got {self.second_end!r}"
            )

    def __call__(self, step: int) -> float:
        """Return the learning rate of `step`, which counts from 1."""
        if step < 1:
            raise ValueError(f"step counts from 1, got {step!r}")
        if self.second_end is not None and step > self.total_steps:
            return self._second(self.second_end)(step - self.total_steps)
        if step <= self.warmup_steps:
            return self.peak * (step / self.warmup_steps)
        last = self.total_steps - self.warmup_steps
        progress = min((step - self.warmup_steps) / last, 1.0)
        height = _SHAPES[self.shape](progress)
        return self.peak * (self.floor + (1.0 - self.floor) * height)

    def _second(self, end: int) -> Schedule:
        """Return the second course; its warm-up takes the same share of it."""
        steps = end - self.total_steps
        # Below `steps`, as the first one's is below its own.
        warmup_steps = self.warmup_steps * steps // self.total_steps
        return dataclasses.replace(
            self, total_steps=steps, warmup_steps=warmup_steps, second_end=None
        )
