"""Score tables: text for the terminal, CSV for everything else."""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from workloads_smoke.atomic_files import write_text
from workloads_smoke.scoring.scoreboard import Scoreboard
from workloads_smoke.scoring.targets import Target

NOT_REACHED = "not reached"
NOT_RUN = "not run"
MISSING = "-"

WORKLOAD_HEADER = (
    "workload",
    "target",
    "submission",
    "steps",
    "seconds",
    "ms/step",
    "best",
    "studies",
    "vs fastest",
    "score",
)
SUMMARY_HEADER = ("submission", "score", "by steps", "reached", "fastest", "speed-up", "by steps")


def workload_rows(board: Scoreboard) -> list[tuple[str, ...]]:
    """Cells of the table of `WORKLOAD_HEADER`, in the order of `Scoreboard.ranking`."""
    records = {
        (record["workload"], record["submission"]): record
        for record in board.per_workload.to_dict("records")
    }
    rows: list[tuple[str, ...]] = []
    for workload in board.workloads:
        target = board.targets[workload]
        for index, submission in enumerate(board.ranking(workload)):
            head = ("", "") if index else (workload, target_text(target))
            record = records.get((workload, submission))
            rows.append((*head, submission, *_cells(board, record)))
    return rows


def _cells(board: Scoreboard, record: Mapping[Hashable, Any] | None) -> tuple[str, ...]:
    if record is None:
        return (NOT_RUN, *[MISSING] * 5, "0.000")
    workload, submission = record["workload"], record["submission"]
    reached = math.isfinite(record["seconds"])
    return (
        count(record["steps"]) if math.isfinite(record["steps"]) else NOT_REACHED,
        seconds(record["seconds"]) if reached else MISSING,
        milliseconds(record["seconds_per_step"]),
        metric(record["best_metric"]),
        f"{record['studies_reached']}/{record['num_studies']}",
        _ratio(float(board.ratios()[workload][submission]), reached, board.r_max),
        f"{board.workload_scores()[workload][submission]:.3f}",
    )


def summary_rows(board: Scoreboard) -> list[tuple[str, ...]]:
    """Cells of the table of `SUMMARY_HEADER`, best score first."""
    total = len(board.workloads)
    return [
        (
            str(row["submission"]),
            f"{row['score']:.4f}",
            f"{row['score_by_steps']:.4f}",
            f"{row['num_reached']}/{total}",
            f"{row['num_fastest']}/{total}",
            times(row["speedup"]),
            times(row["speedup_in_steps"]),
        )
        for row in board.summary().reset_index().to_dict("records")
    ]


def score_text(board: Scoreboard) -> str:
    """Both tables with what a reader must know beside them."""
    lines = [
        text_table(WORKLOAD_HEADER, workload_rows(board), left=3),
        "",
        f"AlgoPerf score over {len(board.workloads)} workload(s), r_max = {board.r_max:g};"
        f" speed-ups are geometric means over the workloads that it and {board.reference} reached",
        text_table(SUMMARY_HEADER, summary_rows(board), left=1),
    ]
    lines += [f"note: {note}" for note in board.notes()]
    return "\n".join(lines)


def text_table(
    header: Sequence[str], rows: Sequence[Sequence[str]], left: int, rule: str = "-"
) -> str:
    """Align cells in columns.

    Args:
        header: column names.
        rows: cells, as many a row as the header has.
        left: how many of the first columns are aligned to the left.
        rule: character of the line below the header.
    """
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]

    def line(cells: Sequence[str]) -> str:
        aligned = [
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(cells, widths, strict=True))
        ]
        return "  ".join(aligned).rstrip()

    return "\n".join([line(header), "  ".join(rule * width for width in widths), *map(line, rows)])


def write_csv(board: Scoreboard, folder: Path) -> list[Path]:
    """Write every table at full precision.

    Returns:
        Paths of ``scores.csv``, ``workloads.csv``, ``studies.csv``, ``trials.csv`` and
        ``performance_profiles.csv`` (seconds and steps, long form), in ``folder``. Not reached
        is ``inf``.
    """
    profiles = [
        board.profiles(unit)
        .rename_axis(index="submission")
        .reset_index()
        .melt(id_vars="submission", var_name="tau", value_name="share_of_workloads")
        .assign(unit=unit)
        for unit in ("seconds", "steps")
    ]
    extra = board.per_workload.assign(
        target=[board.targets[name].value for name in board.per_workload["workload"]],
        metric=[board.targets[name].metric for name in board.per_workload["workload"]],
        ratio_to_fastest=_lookup(board, board.ratios()),
        score=_lookup(board, board.workload_scores()),
        speedup=_lookup(board, board.speedups()),
        speedup_in_steps=_lookup(board, board.speedups("steps")),
    )
    frames = {
        "scores.csv": board.summary().assign(reference=board.reference).reset_index(),
        "workloads.csv": extra,
        "studies.csv": board.per_study,
        "trials.csv": board.per_trial,
        "performance_profiles.csv": pd.concat(profiles, ignore_index=True),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, frame in frames.items():
        write_text(folder / name, frame.to_csv(index=False))
    return [folder / name for name in frames]


def target_text(target: Target) -> str:
    """For example ``accuracy >= 0.97``."""
    return f"{target.metric} {target.sign} {target.value:g}"


def metric(value: float) -> str:
    """A metric's value, five digits."""
    return MISSING if math.isnan(value) else f"{value:.5g}"


def milliseconds(value: float) -> str:
    """Seconds, shown as milliseconds."""
    return MISSING if math.isnan(value) else f"{1e3 * value:,.1f}"


def count(value: float) -> str:
    """Steps; the median of an even number of studies may lie between two."""
    return f"{value:,.0f}" if value == round(value) else f"{value:,.1f}"


def seconds(value: float) -> str:
    """Seconds, two decimals below a hundred."""
    return f"{value:,.2f}" if value < 100 else f"{value:,.0f}"


def _ratio(ratio: float, reached: bool, r_max: float) -> str:
    if math.isfinite(ratio):
        return f"{ratio:.2f}x"
    return f"> {r_max:g}x" if reached else MISSING


def times(value: float) -> str:
    """A ratio, for example ``1.50x``."""
    return MISSING if math.isnan(value) else f"{value:.2f}x"


def _lookup(board: Scoreboard, wide: pd.DataFrame) -> list[float]:
    keys = zip(board.per_workload["submission"], board.per_workload["workload"], strict=True)
    return [float(wide[workload][submission]) for submission, workload in keys]
