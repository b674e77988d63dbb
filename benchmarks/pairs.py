"""Runs in pairs: how many steps more a variant takes than the run it is compared with, and how surely.

One rule for all workloads:

- Both runs of a pair have the seed in common: weights at first, batches, examples held out.
- The loss is that of two evaluation batches (all validation examples of most workloads), and is smoothed:
  every value is the mean of five evaluations around it, so that no single dip decides.
- The target of a pair is the mean of its runs' losses after 60 % of the steps. There the curve still falls;
  towards the end of a cosine schedule it is flat, and half a per cent of loss would be many steps. Seeds
  differ too much for one target. One of a single run of the pair would favour that run, whose chance dips
  set it; so runs of the same quality have ratios above and below 1 alike.
- A pair's number is the ratio of its steps to the target; what is reported is the geometric mean over
  pairs, in which neither run of a pair counts differently from the other, and its confidence interval.

How far two runs of the same quality come apart is seen from a variant that is perturbed by rounding alone.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.courses import Course, Variant, train

TARGET_AT = 0.6
"""Share of the steps after which runs have the target's loss."""
EVAL_BATCHES = 2
WINDOW = 5
"""Evaluations that are averaged."""

# Quantiles 0.975 of Student's t with 1, 2, ... degrees of freedom.
T_QUANTILES = (
    12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip

COLUMNS = {
    "workload": "workload",
    "variant": "variant",
    "seeds": "seeds",
    "reached": "reached",
    "diverged": "diverged",
    "steps": "steps %",
    "steps_low": "from",
    "steps_high": "to",
    "loss": "final loss %",
    "loss_low": "from",
    "loss_high": "to",
    "state_ratio": "state",
}
"""Of the table; per cent are those by which a variant has more than the first."""


@dataclass(frozen=True)
class MeanRatio:
    """A geometric mean of ratios."""

    mean: float
    low: float | None
    """Lower end of its 95 % confidence interval; None for a single ratio."""
    high: float | None


def mean_ratio(ratios: Sequence[float]) -> MeanRatio:
    """Geometric mean, and the interval in which it lies with 95 % confidence by Student's t of logarithms.

    Args:
        ratios: At least one, positive. For more than 31 the quantile of 31 is taken: the interval is then
            a little too wide, by at most 4 %.
    """
    logs = [math.log(ratio) for ratio in ratios]
    centre = statistics.mean(logs)
    if len(logs) == 1:
        return MeanRatio(math.exp(centre), None, None)
    quantile = T_QUANTILES[min(len(logs) - 1, len(T_QUANTILES)) - 1]
    half = quantile * statistics.stdev(logs) / math.sqrt(len(logs))
    return MeanRatio(*(math.exp(centre + shift) for shift in (0.0, -half, half)))


def smoothed(course: Course, window: int = WINDOW) -> Course:
    """The course with every loss the mean of ``window``, an odd number, around it, fewer at the ends."""
    reach = window // 2
    means = [
        statistics.mean(course.losses[max(0, i - reach) : i + reach + 1])
        for i in range(len(course.losses))
    ]
    return replace(course, losses=means)


def steps_of_pair(first: Course, own: Course) -> tuple[float, float] | None:
    """Steps of two courses to the loss that they have in the mean after a share of their steps.

    None if one of them never has it.
    """
    index = round(TARGET_AT * len(first.losses)) - 1
    target = (first.losses[index] + own.losses[index]) / 2.0
    steps = first.steps_to(target), own.steps_to(target)
    return None if steps[0] is None or steps[1] is None else (steps[0], steps[1])


def compare_pairs(
    workload: str, variants: Sequence[Variant], num_steps: int, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of one workload, one for each variant; the first is what the others are compared with."""
    courses: list[list[Course]] = [[] for _ in variants]
    for seed in seeds:
        for variant, own in zip(variants, courses, strict=True):
            own.append(smoothed(train(workload, variant, num_steps, seed, EVAL_BATCHES)))
    return [
        {"workload": workload, "variant": variant.name, "seeds": len(seeds)}
        | pair_row(courses[0], own)
        for variant, own in zip(variants, courses, strict=True)
    ]


def pair_row(first: Sequence[Course], own: Sequence[Course]) -> dict[str, Any]:
    """Compare smoothed courses of a variant with those of the first, seed by seed.

    Steps are of the pairs that have both reached their target, losses of those that have not diverged;
    neither is there if there is none.
    """
    both = list(zip(first, own, strict=True))
    pairs = [pair for pair in (steps_of_pair(*courses) for courses in both) if pair is not None]
    losses = [(a.losses[-1], b.losses[-1]) for a, b in both]
    finite = [(a, b) for a, b in losses if math.isfinite(a) and math.isfinite(b)]
    return {
        "reached": len(pairs),
        "diverged": len(losses) - len(finite),
        **_excess("steps", [b / a for a, b in pairs]),
        **_excess("loss", [b / a for a, b in finite]),
        "state_ratio": own[0].state_bytes / first[0].state_bytes,
        "pairs": pairs,
    }


def _excess(name: str, ratios: Sequence[float]) -> dict[str, float | None]:
    """The mean ratio and its interval in per cent above 1."""
    if not ratios:
        return {}
    found = mean_ratio(ratios)
    entries = {name: found.mean, f"{name}_low": found.low, f"{name}_high": found.high}
    return {key: x if x is None else 100.0 * (x - 1.0) for key, x in entries.items()}
