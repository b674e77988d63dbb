"""How a trial ended, told from its evaluations."""

import math
from dataclasses import dataclass
from typing import Any

from workloads_smoke.spec import Workload


@dataclass(frozen=True)
class TrialOutcome:
    """The end of a trial; `outcome.json` in its folder holds the same and marks it as complete.

    Attributes:
        stopped_by: Why it ended: "targets reached", "time budget used up", "step limit" or
            "submission ended training".
        global_step: Steps taken.
        submission_time: Seconds on the submission's clock.
        best_metric: Best value of the target metric on the validation split; None without one.
        steps_to_target: Step of the first evaluation beyond the validation target, or None.
        seconds_to_target: The submission's clock at that evaluation, or None.
    """

    stopped_by: str
    global_step: int
    submission_time: float
    best_metric: float | None
    steps_to_target: int | None
    seconds_to_target: float | None

    def summary(self, workload: Workload) -> str:
        """One line for a person."""
        metric = f"validation/{workload.target_metric_name}"
        target = f"{workload.validation_target_value:.4g}"
        if self.steps_to_target is not None:
            return (
                f"{metric} passed {target} at step {self.steps_to_target} "
                f"after {self.seconds_to_target:.1f} s"
            )
        best = "none" if self.best_metric is None else f"{self.best_metric:.4g}"
        return (
            f"target not reached: best {metric} {best}, target {target}; "
            f"ended at step {self.global_step} after {self.submission_time:.1f} s ({self.stopped_by})"
        )


def outcome_of(
    workload: Workload,
    eval_results: list[tuple[int, dict[str, Any]]],
    global_step: int,
    submission_time: float,
    stopped_by: str,
) -> TrialOutcome:
    """Sum up a trial.

    Args:
        workload: Knows its target metric and when it is reached.
        eval_results: `(global_step, metrics)` of each evaluation.
        global_step: Steps taken.
        submission_time: Seconds on the submission's clock.
        stopped_by: Why it ended.

    Returns:
        The outcome.
    """
    name = f"validation/{workload.target_metric_name}"
    larger_is_better = workload.has_reached_validation_target({name: math.inf})
    values = [result[name] for _, result in eval_results if math.isfinite(result[name])]
    best = (max if larger_is_better else min)(values, default=None)
    for step, result in eval_results:
        if workload.has_reached_validation_target(result):
            clock = result["accumulated_submission_time"]
            return TrialOutcome(stopped_by, global_step, submission_time, best, step, clock)
    return TrialOutcome(stopped_by, global_step, submission_time, best, None, None)
