"""Who won where and why, in words: only what the numbers say."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from workloads_smoke.scoring import tables
from workloads_smoke.scoring.scoreboard import Scoreboard
from workloads_smoke.scoring.targets import Target

Record = Mapping[Hashable, Any]


def headline(board: Scoreboard) -> str:
    """One or two sentences on the scores of all submissions."""
    best, *others = board.summary().reset_index().to_dict("records")
    total = len(board.workloads)
    reached = f"the target of {best['num_reached']} of {total} workload{'s' * (total != 1)}"
    if not others:
        return (
            f"{best['submission']} reached {reached}. A score compares submissions; with one alone"
            f" it only counts targets."
        )
    if best["score"] == 0:
        return "No submission reached the target of any workload: every score is 0."
    rest = _join([f"{other['submission']} {other['score']:.4f}" for other in others])
    if math.isclose(best["score"], others[0]["score"]):
        return f"The best AlgoPerf scores tie: {best['submission']} {best['score']:.4f}, {rest}."
    return (
        f"{best['submission']} has the highest AlgoPerf score, {best['score']:.4f} against {rest}."
        f" It was fastest on {best['num_fastest']} of {total} and reached {reached}."
    )


def workload_verdict(board: Scoreboard, workload: str) -> str:
    """Who reached a workload's target first, by how much, and how steps and step time share that.

    Returns:
        Sentences; ratios are those of the medians in the table.
    """
    target = board.targets[workload]
    records: dict[str, Record] = {
        record["submission"]: record
        for record in board.per_workload.to_dict("records")
        if record["workload"] == workload
    }
    ranked = [records[name] for name in board.ranking(workload) if name in records]
    reached = [record for record in ranked if math.isfinite(record["seconds"])]
    missed = [record for record in ranked if not math.isfinite(record["seconds"])]
    sentences = [_winner(reached[0], target, alone=len(records) == 1)] if reached else []
    sentences += [_comparison(reached[0], other, board.r_max) for other in reached[1:]]
    if reached or any(record["studies_reached"] for record in missed):
        sentences += [_miss(record, target) for record in missed]
    else:
        bests = [f"{record['submission']} {_best(record)}" for record in missed]
        sentences.append(f"Nobody reached {tables.target_text(target)}; best: {_join(bests)}.")
    sentences += [f"{name} did not run it." for name in board.submissions if name not in records]
    return " ".join(sentences)


def _winner(winner: Record, target: Target, alone: bool) -> str:
    return (
        f"{winner['submission']} reached {tables.target_text(target)} {'' if alone else 'first, '}"
        f"in {tables.count(winner['steps'])} steps and {tables.seconds(winner['seconds'])} s"
        f"{_how_often(winner)}."
    )


def _comparison(winner: Record, other: Record, r_max: float) -> str:
    time_ratio = other["seconds"] / winner["seconds"]
    step_ratio = other["steps"] / winner["steps"]
    sentence = (
        f"{other['submission']}{_how_often(other)} took {tables.times(time_ratio)} as long"
        f" ({tables.seconds(other['seconds'])} s): {tables.times(step_ratio)} the steps"
        f" ({tables.count(other['steps'])} against {tables.count(winner['steps'])})"
    )
    step_time_ratio = other["seconds_per_step"] / winner["seconds_per_step"]
    if math.isfinite(step_time_ratio):  # the first step of a run is start-up
        sentence += (
            f" at {tables.times(step_time_ratio)} the time per step"
            f" ({tables.milliseconds(other['seconds_per_step'])} against"
            f" {tables.milliseconds(winner['seconds_per_step'])} ms)"
        )
    if time_ratio > r_max:
        sentence += f"; beyond {r_max:g}x, the score counts it as missed"
    return f"{sentence}."


def _how_often(record: Record) -> str:
    """Says so where only some studies reached the target; the median hides that."""
    if record["studies_reached"] == record["num_studies"]:
        return ""
    return f" (reached in {record['studies_reached']} of {record['num_studies']} studies)"


def _miss(record: Record, target: Target) -> str:
    goal = tables.target_text(target)
    if record["studies_reached"]:
        sentence = (
            f"{record['submission']} reached {goal} in only {record['studies_reached']} of"
            f" {record['num_studies']} studies, which counts as missed"
        )
    else:
        sentence = f"{record['submission']} did not reach {goal}"
    return f"{sentence}; its best was {_best(record)}."


def _best(record: Record) -> str:
    if math.isnan(record["best_metric"]):
        return "no finite evaluation"
    return tables.metric(record["best_metric"])


def _join(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
