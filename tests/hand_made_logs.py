"""Logs in the official layout, made by hand for the tests of scores, plots and reports."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pandas as pd


def write_trial(
    folder: Path,
    steps: Sequence[int],
    seconds: Sequence[float],
    values: Sequence[float],
    metric: str = "accuracy",
    target: float | None = 0.9,
    max_seconds: float = 100.0,
) -> Path:
    """Write one trial folder; ``target`` None leaves out meta_data_0.json."""
    folder.mkdir(parents=True)
    table = pd.DataFrame(
        {
            "accumulated_submission_time": seconds,
            "global_step": steps,
            "preemption_count": 0,
            "score": seconds,
            f"validation/{metric}": values,
        }
    )
    table.to_csv(folder / "eval_measurements.csv", index=False)
    (folder / "hparams.json").write_text(json.dumps({"learning_rate": 0.1}))
    if target is not None:
        fields = {
            "workload.target_metric_name": metric,
            "workload.validation_target_value": target,
            "workload.step_hint": 1000,
            "workload.max_allowed_runtime_sec": max_seconds,
        }
        (folder / "meta_data_0.json").write_text(json.dumps(fields))
    return folder


def write_reaching(folder: Path, steps: int, seconds: float, **options: float) -> Path:
    """Write a trial that misses 0.9 at half of its steps and reaches it at the end."""
    return write_trial(folder, [1, steps // 2, steps], [0.1, seconds / 2, seconds],
                       [0.1, 0.8, 0.95], **options)  # fmt: skip


def write_missing(folder: Path, best: float = 0.8) -> Path:
    """Write a trial that never reaches 0.9."""
    return write_trial(folder, [1, 500, 1000], [0.1, 5.0, 10.0], [0.1, best, best - 0.1])
