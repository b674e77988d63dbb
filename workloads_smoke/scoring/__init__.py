"""Scores from logs, the official ones and ours: reading, time to target, profiles, tables."""

from workloads_smoke.scoring.logs import Trial, read_results
from workloads_smoke.scoring.scoreboard import Scoreboard
from workloads_smoke.scoring.targets import Target, official_targets, read_targets

__all__ = ["Scoreboard", "Target", "Trial", "official_targets", "read_results", "read_targets"]
