"""Steps and seconds to target: per trial, fastest of a study's trials, median of the studies.

The rule is the benchmark's (DOCUMENTATION.md, "Scoring"): within a study the trial that reaches
the target first counts, and a workload's time is the median over studies, where a study that
never reaches it counts as infinite. The official scorer picks a study's trial by the number of
evaluations before the target, ties by the order in which the file system lists folders; here it
is picked by time, as the rules say. On the published v0.6 runs only that gives the published
scores whatever that order is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import pandas as pd

from workloads_smoke.scoring.logs import SECONDS, STEP, Trial
from workloads_smoke.scoring.targets import Target, official_targets

NOT_REACHED = float("inf")


def resolve_targets(
    trials: Sequence[Trial], given: Mapping[str, Target] | None = None
) -> dict[str, Target]:
    """Find the target of every workload that was run.

    Args:
        trials: what was run.
        given: targets by workload that win over those recorded in the logs.

    Returns:
        By workload: the given target, else the one that its trials recorded in
        ``meta_data_0.json``, else the official one of that name.

    Raises:
        ValueError: if a workload has no target, or its trials recorded different ones.
    """
    official = official_targets()
    targets = {}
    for workload in sorted({trial.workload for trial in trials}):
        if given is not None:
            if workload not in given:
                raise ValueError(
                    f"no target for workload {workload!r} among {', '.join(sorted(given))}"
                )
            targets[workload] = given[workload]
            continue
        recorded = {t.target for t in trials if t.workload == workload and t.target is not None}
        if len({(target.metric, target.value) for target in recorded}) > 1:
            shown = ", ".join(sorted(f"{t.metric} {t.sign} {t.value:g}" for t in recorded))
            raise ValueError(
                f"trials of workload {workload!r} were run against different targets ({shown});"
                " say which one counts with --targets FILE"
            )
        if recorded:
            targets[workload] = min(recorded, key=str)
        elif workload in official:
            targets[workload] = official[workload]
        else:
            raise ValueError(
                f"the logs of workload {workload!r} record no target (meta_data_0.json) and it is"
                " not an official workload; name a file with --targets FILE"
            )
    return targets


def trial_table(trials: Sequence[Trial], targets: Mapping[str, Target]) -> pd.DataFrame:
    """One row a trial.

    Returns:
        Columns ``submission``, ``workload``, ``study``, ``trial``; ``steps`` and ``seconds`` to
        target (infinite where not reached); ``best_metric`` (NaN where no evaluation is finite)
        and ``best_step``; ``last_step``, ``last_seconds``; ``seconds_per_step``, submission time
        by steps up to the target, or to the last evaluation where not reached (NaN where that is
        the first step, which is all start-up); ``num_evaluations``.

    Raises:
        ValueError: if a log has evaluations but lacks the target metric, or holds something else than
            numbers.
    """
    return pd.DataFrame.from_records([_trial_row(t, targets[t.workload]) for t in trials])


def _trial_row(trial: Trial, target: Target) -> dict[str, object]:
    evaluations = trial.evaluations
    if len(evaluations) and target.column not in evaluations:
        where = trial.folder or " ".join(trial.key)
        raise ValueError(f"{where}: no column {target.column!r}, the metric of the target")
    steps, seconds = _numbers(trial, STEP), _numbers(trial, SECONDS)
    values = _numbers(trial, target.column) if len(evaluations) else np.empty(0)
    # Comparisons with NaN are false: a diverged evaluation never reaches a target.
    hits = np.flatnonzero(
        values <= target.value if target.lower_is_better else values >= target.value
    )
    finite = np.flatnonzero(np.isfinite(values))
    best = -1
    if len(finite):
        pick = np.argmin if target.lower_is_better else np.argmax
        best = int(finite[pick(values[finite])])
    end = hits[0] if len(hits) else len(steps) - 1
    trained = len(steps) > 0 and steps[end] > 1
    return {
        "submission": trial.submission,
        "workload": trial.workload,
        "study": trial.study,
        "trial": trial.trial,
        "steps": steps[hits[0]] if len(hits) else NOT_REACHED,
        "seconds": seconds[hits[0]] if len(hits) else NOT_REACHED,
        "best_metric": values[best] if best >= 0 else np.nan,
        "best_step": steps[best] if best >= 0 else np.nan,
        "last_step": steps[-1] if len(steps) else 0.0,
        "last_seconds": seconds[-1] if len(steps) else 0.0,
        "seconds_per_step": seconds[end] / steps[end] if trained else np.nan,
        "num_evaluations": len(steps),
    }


def _numbers(trial: Trial, column: str) -> npt.NDArray[np.float64]:
    try:
        return trial.evaluations[column].to_numpy(dtype=float)
    except ValueError as error:
        where = trial.folder or " ".join(trial.key)
        raise ValueError(f"{where}: evaluations, column {column!r}: {error}") from error


def study_table(per_trial: pd.DataFrame, targets: Mapping[str, Target]) -> pd.DataFrame:
    """One row a study: the fastest of its trials.

    Returns:
        Columns ``submission``, ``workload``, ``study``; ``best_trial`` (fastest in time, or where
        none reached the target, the one with the best metric) with its ``steps``, ``seconds`` and
        ``seconds_per_step``; ``fewest_steps`` over trials, maybe another's; ``best_metric`` over
        all trials; ``num_trials``.
    """
    rows = []
    for key, group in per_trial.groupby(["submission", "workload", "study"], sort=False):
        submission, workload, study = key
        sign = 1.0 if targets[str(workload)].lower_is_better else -1.0
        # Fastest first; among misses the best metric, NaN last.
        order = group.assign(loss=sign * group["best_metric"]).sort_values(
            ["seconds", "loss"], kind="stable"
        )
        best = order.iloc[0]
        rows.append(
            {
                "submission": submission,
                "workload": workload,
                "study": study,
                "steps": best["steps"],
                "seconds": best["seconds"],
                "fewest_steps": group["steps"].min(),
                "best_trial": best["trial"],
                "seconds_per_step": best["seconds_per_step"],
                "best_metric": sign * order["loss"].min(),
                "num_trials": len(group),
            }
        )
    return pd.DataFrame.from_records(rows)


def workload_table(per_study: pd.DataFrame, targets: Mapping[str, Target]) -> pd.DataFrame:
    """One row a submission and workload: the median of its studies.

    Returns:
        Columns ``workload``, ``submission``; ``steps``, ``seconds`` and ``fewest_steps``, medians
        over studies; ``seconds_per_step``, the quotient of the first two, or where not reached, or
        at the first step, the median over the studies' best trials; ``best_metric`` over all;
        ``studies_reached``, ``num_studies``, ``num_trials`` (all studies together).
    """
    rows = []
    for key, group in per_study.groupby(["workload", "submission"], sort=True):
        workload, submission = key
        steps, seconds = float(np.median(group["steps"])), float(np.median(group["seconds"]))
        pick = (
            group["best_metric"].min
            if targets[str(workload)].lower_is_better
            else (group["best_metric"].max)
        )
        rows.append(
            {
                "workload": workload,
                "submission": submission,
                "steps": steps,
                "seconds": seconds,
                "fewest_steps": float(np.median(group["fewest_steps"])),
                # The quotient, so that a ratio of times is that of steps times that of step times.
                "seconds_per_step": (
                    seconds / steps
                    if math.isfinite(seconds) and steps > 1.0
                    else group["seconds_per_step"].median()
                ),
                "best_metric": pick(),
                "studies_reached": int(np.isfinite(group["seconds"]).sum()),
                "num_studies": len(group),
                "num_trials": int(group["num_trials"].sum()),
            }
        )
    return pd.DataFrame.from_records(rows)
