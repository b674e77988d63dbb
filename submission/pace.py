"""Fit the time scales of a setting to the length of the run.

Published settings were found on runs of ten thousand to two hundred thousand steps. In a run of six
hundred, a refresh every hundred steps happens six times, and a second moment that remembers two
hundred steps is still warming up at a third of the run. The rules here shorten what is too slow for
short runs and leave the long ones as they are.

A run's length is that of its schedule, the step hint times `step_hint_factor`, and it is long from 10,000
steps on. With the factors of the tuning search space, 0.4 to 0.9, every run with a step hint of 25,000 or
more is long, and none with one of 11,111 or less. So a hint of 10,666 has its rates multiplied by 1.25 at
factor 0.6, by 1.53 at 0.4 and by 1.02 at 0.9, and blocks of 512 instead of 1024 at 0.4; one of 18,094 has
its rate multiplied by 1.18, at 0.4 alone.
"""

from __future__ import annotations

import dataclasses
import math

from .hyperparameters import Hyperparameters
from .schedule import Schedule

#: Published learning rates belong to runs of at least this many steps. A step moves a weight by about
#: the learning rate, so that with the same rate a short run gets nowhere; with a rate in inverse
#: proportion to its steps it would get as far, but its steps would be too coarse. The square root
#: of the proportion lies between.
LONG_RUN = 10_000
#: A run gets at least this many refreshes, however long the longest allowed interval is.
REFRESHES_PER_RUN = 25
#: Blocks of a short run are cut smaller, by this power of its share of a long one and to a power of two:
#: a refresh costs the cube of the side and a short run has fewer steps to earn it back; nor do its
#: gradients fill a factor of a thousand directions.
BLOCK_SIZE_POWER = 0.75
#: But not below this side.
SMALLEST_LARGEST_BLOCK = 128
#: Budget of a self-tuned run, in step hints; under the external ruleset it is one.
SELF_TUNING_BUDGET = 1.5
#: A run whose schedule ends with at least this share of it left in the budget has a second course.
SHORTEST_SECOND_COURSE = 0.25
#: Second moments forget within one part in this many of the run.
MEMORIES_PER_RUN = 20
#: The window of averaged weights, as a share of the run (Ajroldi et al. 2025, arXiv 2502.06761).
AVERAGE_WINDOW = 0.01
#: But at least this many steps: below, the average differs little from the weights and costs as much.
SHORTEST_AVERAGE_WINDOW = 20
_AVERAGE_DECAY = 0.9


@dataclasses.dataclass(frozen=True)
class Pace:
    """The time scales of one run.

    Attributes:
        schedule: Learning rate by step.
        max_block_size: Longest side of a block, >= 1.
        refresh_interval: Steps between two refreshes of a root or basis, >= 1.
        beta1: Decay rate of the first moment, in [0, 1).
        beta2: Decay rate of factors and second moments, in [0, 1).
        average_decay: Decay rate of averaged weights per `average_interval` steps, in [0, 1).
        average_interval: Steps between two contributions to averaged weights, >= 1.
    """

    schedule: Schedule
    max_block_size: int
    refresh_interval: int
    beta1: float
    beta2: float
    average_decay: float
    average_interval: int


def pace(hyperparameters: Hyperparameters, step_hint: int, budget: float = 1.0) -> Pace:
    """Return the time scales for a run of about `step_hint` steps.

    Args:
        hyperparameters: The setting.
        step_hint: The workload's estimate of the steps in its budget, >= 1.
        budget: How much longer than that the ruleset lets the run go on, as a multiple.

    Raises:
        ValueError: `step_hint` is below 1.
    """
    if step_hint < 1:
        raise ValueError(f"step_hint must be at least 1, got {step_hint!r}")
    total = max(1, round(step_hint * hyperparameters.step_hint_factor))
    end = round(step_hint * budget)
    has_second = end - total >= max(1.0, SHORTEST_SECOND_COURSE * total)
    forget = max(hyperparameters.one_minus_beta2, min(MEMORIES_PER_RUN / total, 0.1))
    # The window of an exponential average is its interval over one minus its decay.
    window = max(float(SHORTEST_AVERAGE_WINDOW), AVERAGE_WINDOW * total)
    average_interval = max(1, round(window * (1.0 - _AVERAGE_DECAY)))
    return Pace(
        schedule=Schedule(
            shape=hyperparameters.schedule,
            peak=hyperparameters.learning_rate * math.sqrt(max(1.0, LONG_RUN / total)),
            total_steps=total,
            warmup_steps=min(round(total * hyperparameters.warmup_factor), total - 1),
            second_end=end if has_second else None,
        ),
        max_block_size=_max_block_size(hyperparameters.max_block_size, total),
        refresh_interval=max(1, min(hyperparameters.refresh_interval, total // REFRESHES_PER_RUN)),
        beta1=1.0 - hyperparameters.one_minus_beta1,
        beta2=1.0 - forget,
        average_decay=1.0 - average_interval / window,
        average_interval=average_interval,
    )


def _max_block_size(asked: int, total_steps: int) -> int:
    """Return the longest side of a block in a run of `total_steps`."""
    fitting = asked * min(1.0, total_steps / LONG_RUN) ** BLOCK_SIZE_POWER
    return min(asked, max(SMALLEST_LARGEST_BLOCK, 2 ** round(math.log2(fitting))))
