"""What a workload asks for: the metric, the value to reach and the budget to reach it in."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OFFICIAL_TARGETS_FILE = Path(__file__).resolve().parent.parent / "official_targets.json"

# Metric names of the benchmark; losses and error rates fall, the others rise.
LOWER_IS_BETTER = {
    "loss": True,
    "ce_loss": True,
    "ctc_loss": True,
    "l1_loss": True,
    "error_rate": True,
    "wer": True,
    "ppl": True,
    "perplexity": True,
    "accuracy": False,
    "bleu": False,
    "mean_average_precision": False,
    "ssim": False,
}


#: Multiples of a workload's step hint and of its time that a ruleset allows.
BUDGETS = {"external": 1.0, "self": 1.5}


@dataclass(frozen=True)
class Target:
    """The validation target of one workload.

    Attributes:
        metric: name of the metric without its split, for example ``accuracy``.
        value: validation value to reach; reaching it exactly counts.
        step_hint: number of steps that the benchmark suggests, None where unknown.
        max_seconds: submission time allowed under external tuning, None where unknown.
    """

    metric: str
    value: float
    step_hint: int | None = None
    max_seconds: float | None = None

    def __post_init__(self) -> None:
        if self.metric not in LOWER_IS_BETTER:
            raise ValueError(
                f"target metric {self.metric!r} is unknown, so is its direction;"
                f" known are {', '.join(sorted(LOWER_IS_BETTER))}"
            )
        if not math.isfinite(self.value):
            raise ValueError(f"validation_target_value must be a finite number, got {self.value}")

    @property
    def column(self) -> str:
        """Name of the metric's column in ``eval_measurements.csv``."""
        return f"validation/{self.metric}"

    @property
    def lower_is_better(self) -> bool:
        """Whether the metric is minimised."""
        return LOWER_IS_BETTER[self.metric]

    @property
    def sign(self) -> str:
        """``<=`` or ``>=``, as the metric has to compare to the target."""
        return "<=" if self.lower_is_better else ">="

    @classmethod
    def from_mapping(cls, fields: Mapping[str, Any], prefix: str = "") -> Target | None:
        """Read a target from the harness's attribute names.

        Args:
            fields: a workload's entry of a targets file, or a trial's ``meta_data_0.json``.
            prefix: ``workload.`` for the latter, where the harness writes attributes so.

        Returns:
            The target, or None where the metric or the value is missing.
        """
        metric = fields.get(f"{prefix}target_metric_name")
        value = fields.get(f"{prefix}validation_target_value")
        if metric is None or value is None:
            return None
        step_hint = fields.get(f"{prefix}step_hint")
        max_seconds = fields.get(f"{prefix}max_allowed_runtime_sec")
        return cls(
            metric=str(metric),
            value=float(value),
            step_hint=None if step_hint is None else int(step_hint),
            max_seconds=None if max_seconds is None else float(max_seconds),
        )


def read_targets(path: Path) -> dict[str, Target]:
    """Read a targets file.

    Args:
        path: JSON with one entry a workload under ``workloads``: ``target_metric_name``,
            ``validation_target_value``, and optionally ``step_hint`` and
            ``max_allowed_runtime_sec`` (seconds). The official ``workload_targets.json`` is one.

    Returns:
        Targets by workload name, without a framework suffix.

    Raises:
        ValueError: if the file is not of that form, or cannot be read.
    """
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))["workloads"].items()
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"targets file {path} must be JSON with an object 'workloads', got {error!r}"
        ) from error
    targets = {}
    for workload, fields in entries:
        if not isinstance(fields, dict):
            raise ValueError(f"targets file {path}: {workload!r} must be an object, got {fields!r}")
        try:
            target = Target.from_mapping(fields)
        except (TypeError, ValueError) as error:
            raise ValueError(f"targets file {path}: workload {workload!r}: {error}") from error
        if target is None:
            raise ValueError(
                f"targets file {path}: workload {workload!r} lacks 'target_metric_name'"
                " or 'validation_target_value'"
            )
        targets[workload] = target
    return targets


def official_targets() -> dict[str, Target]:
    """Targets of the official workloads, v0.6 (source named in the file)."""
    return read_targets(OFFICIAL_TARGETS_FILE)
