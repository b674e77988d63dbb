"""Everything that follows from a set of logs, computed once and shared by tables and plots."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd

from workloads_smoke.scoring.logs import Trial
from workloads_smoke.scoring.notes import (
    notes_on_counts,
    notes_on_ends,
    notes_on_evaluations,
    notes_on_files,
    notes_on_flags,
    notes_on_rulesets,
    notes_on_texts,
    notes_on_time,
    notes_on_variants,
)
from workloads_smoke.scoring.profiles import (
    R_MAX,
    algoperf_scores,
    geometric_means,
    performance_profiles,
    performance_ratios,
    speedups,
    within_budget,
)
from workloads_smoke.scoring.targets import BUDGETS, Target, official_targets
from workloads_smoke.scoring.time_to_target import (
    resolve_targets,
    study_table,
    trial_table,
    workload_table,
)

_REFERENCE_WORDS = ("baseline", "nadamw", "adamw")


@dataclass(frozen=True)
class Scoreboard:
    """Scores of a set of runs.

    Attributes:
        trials: the runs, those of other workloads left out.
        workloads: the workloads that count, in order of display.
        submissions: names, in order of display: best score first.
        targets: by workload.
        per_trial: see `time_to_target.trial_table`.
        per_study: see `time_to_target.study_table`.
        per_workload: see `time_to_target.workload_table`.
        seconds: median seconds to target, a row a submission, a column a workload; infinite
            where not reached or not run.
        steps: the same in steps, of the trials with the fewest, which need not be the quickest.
        reference: the submission that speed-ups are relative to.
        r_max: a time above ``r_max`` times the fastest counts as not reached.
    """

    trials: tuple[Trial, ...]
    workloads: tuple[str, ...]
    submissions: tuple[str, ...]
    targets: Mapping[str, Target]
    per_trial: pd.DataFrame
    per_study: pd.DataFrame
    per_workload: pd.DataFrame
    seconds: pd.DataFrame
    steps: pd.DataFrame
    reference: str
    r_max: float

    @classmethod
    def of(
        cls,
        trials: Sequence[Trial],
        targets: Mapping[str, Target] | None = None,
        workloads: Sequence[str] | None = None,
        reference: str | None = None,
        r_max: float = R_MAX,
    ) -> Scoreboard:
        """Score a set of trials.

        Args:
            trials: from `logs.read_results`.
            targets: by workload; None takes those that the logs recorded, else the official.
            workloads: the workloads that count; None takes all that were run. One that a
                submission did not run counts as not reached.
            reference: submission that speed-ups are relative to; None takes one whose name
                says that it is a baseline, else the one with the lowest score.
            r_max: a time above ``r_max`` times the fastest counts as not reached.

        Raises:
            ValueError: if a name is unknown, a target is missing or ambiguous, or r_max <= 1.
        """
        run = sorted({trial.workload for trial in trials})
        counted = tuple(run if workloads is None else dict.fromkeys(workloads))
        unknown = sorted(set(counted) - set(run))
        if unknown:
            raise ValueError(
                f"no logs of workload(s) {', '.join(unknown)}; there are those of {', '.join(run)}"
            )
        kept = tuple(trial for trial in trials if trial.workload in counted)
        resolved = resolve_targets(kept, targets)
        per_trial = trial_table(kept, resolved)
        per_study = study_table(per_trial, resolved)
        per_workload = workload_table(per_study, resolved)
        names = sorted({trial.submission for trial in trials})
        seconds = _times(per_workload, "seconds", names, counted)
        scores = algoperf_scores(performance_profiles(seconds, r_max))
        ranked = tuple(sorted(names, key=lambda name: (-scores[name], name)))
        return cls(
            trials=kept,
            workloads=counted,
            submissions=ranked,
            targets=resolved,
            per_trial=per_trial,
            per_study=per_study,
            per_workload=per_workload,
            seconds=seconds.loc[list(ranked)],
            steps=_times(per_workload, "fewest_steps", ranked, counted),
            reference=_choose_reference(ranked, reference),
            r_max=r_max,
        )

    def profiles(self, unit: str = "seconds") -> pd.DataFrame:
        """Performance profiles by ``seconds`` (the official ones) or by ``steps``."""
        return performance_profiles(self._times(unit), self.r_max)

    def workload_scores(self, unit: str = "seconds") -> pd.DataFrame:
        """Score on each workload alone; a submission's score is the mean of its row."""
        times = self._times(unit)
        return pd.DataFrame(
            {
                name: algoperf_scores(performance_profiles(times[[name]], self.r_max))
                for name in times.columns
            }
        )

    def ratios(self, unit: str = "seconds") -> pd.DataFrame:
        """Time divided by the fastest, infinite where not reached or above r_max."""
        return performance_ratios(self._times(unit), self.r_max)

    def speedups(self, unit: str = "seconds") -> pd.DataFrame:
        """Speed-up over the reference, a row a submission and a column a workload."""
        return speedups(self._times(unit), self.reference)

    def summary(self) -> pd.DataFrame:
        """One row a submission, best first.

        Returns:
            Columns ``score`` and ``score_by_steps``; ``num_reached``; ``num_fastest``, in
            seconds; ``speedup`` and ``speedup_in_steps``, geometric means over the workloads
            that both the submission and the reference reached, ``num_compared`` of them;
            ``speedup_with_budget``, over all workloads with every miss counted as the runtime
            budget of the ruleset plus a second (NaN where a budget is unknown, or rulesets are mixed).
        """
        reached = np.isfinite(self.seconds)
        fastest = reached & self.seconds.eq(self.seconds.min(axis=0), axis=1)
        by_seconds = self.speedups()
        return pd.DataFrame(
            {
                "score": algoperf_scores(self.profiles("seconds")),
                "score_by_steps": algoperf_scores(self.profiles("steps")),
                "num_reached": reached.sum(axis=1),
                "num_fastest": fastest.sum(axis=1),
                "speedup": geometric_means(by_seconds),
                "speedup_in_steps": geometric_means(self.speedups("steps")),
                "num_compared": by_seconds.notna().sum(axis=1),
                "speedup_with_budget": self._speedup_with_budget(),
            }
        ).rename_axis("submission")

    def ranking(self, workload: str) -> list[str]:
        """Submissions on one workload: fastest first, then misses by best metric, then absent."""
        rows = self.per_workload[self.per_workload["workload"] == workload]
        sign = 1.0 if self.targets[workload].lower_is_better else -1.0
        order = rows.assign(loss=sign * rows["best_metric"]).sort_values(
            ["seconds", "loss", "submission"]
        )
        ran = [str(name) for name in order["submission"]]
        return ran + [name for name in self.submissions if name not in ran]

    def notes(self) -> list[str]:
        """What a reader must know before trusting the comparison."""
        rulesets = {trial.ruleset for trial in self.trials}
        notes = notes_on_counts(self.per_study, rulesets.pop() if len(rulesets) == 1 else None)
        notes += notes_on_variants(self.workloads, official_targets())
        ran = set(zip(self.per_workload["submission"], self.per_workload["workload"], strict=True))
        for submission in self.submissions:
            absent = [name for name in self.workloads if (submission, name) not in ran]
            if absent:
                notes.append(f"{submission} did not run {', '.join(absent)}: counted as missed")
        return [
            *notes,
            *notes_on_files(self.trials),
            *notes_on_rulesets(self.trials),
            *notes_on_ends(self.trials),
            *notes_on_time(self.trials),
            *notes_on_evaluations(self.trials),
            *notes_on_flags(self.trials),
            *notes_on_texts(self.trials),
        ]

    def _times(self, unit: str) -> pd.DataFrame:
        if unit not in ("seconds", "steps"):
            raise ValueError(f"unit must be 'seconds' or 'steps', got {unit!r}")
        return self.seconds if unit == "seconds" else self.steps

    def _speedup_with_budget(self) -> pd.Series:
        factors = {BUDGETS.get(trial.ruleset or "external", 1.0) for trial in self.trials}
        budgets = {name: self.targets[name].max_seconds for name in self.workloads}
        known = {
            name: budget * max(factors) for name, budget in budgets.items() if budget is not None
        }
        if len(known) < len(budgets) or len(factors) > 1:
            return pd.Series(np.nan, index=self.seconds.index)
        return geometric_means(speedups(within_budget(self.seconds, known), self.reference))


def _times(
    per_workload: pd.DataFrame, unit: str, submissions: Sequence[str], workloads: Sequence[str]
) -> pd.DataFrame:
    wide = per_workload.pivot(index="submission", columns="workload", values=unit)
    wide = wide.reindex(index=list(submissions), columns=list(workloads))
    return wide.astype(float).fillna(np.inf)


def _choose_reference(ranked: Sequence[str], asked: str | None) -> str:
    if asked is not None:
        if asked not in ranked:
            raise ValueError(
                f"reference {asked!r} has no logs; there are those of {', '.join(ranked)}"
            )
        return asked
    for word in _REFERENCE_WORDS:
        for name in ranked:
            if word in name.lower():
                return name
    return ranked[-1]
