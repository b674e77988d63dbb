"""Flags of ``python -m workloads_smoke.smoke``."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

from workloads_smoke.contenders import known_contenders
from workloads_smoke.registry import WORKLOADS
from workloads_smoke.scoring.targets import BUDGETS

DEFAULT_WORKLOADS = "mnist,wmt"
DEFAULT_SUBMISSIONS = "shampoo,nadamw"


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; None means that of the process."""
    parser = argparse.ArgumentParser(
        prog="python -m workloads_smoke.smoke",
        description="Train submissions on smoke workloads with the local runner, then compare them:"
        " table, plots, report. Every submission gets the same number of trials, at its own points.",
    )
    parser.add_argument(
        "--workloads",
        type=_names,
        default=DEFAULT_WORKLOADS,
        help=f"separated by commas, or 'all'; known: {', '.join(WORKLOADS)} (default: %(default)s)",
    )
    parser.add_argument(
        "--submissions",
        type=_names,
        default=DEFAULT_SUBMISSIONS,
        help=f"separated by commas; known: {', '.join(known_contenders())}; NAME=FILE for any other,"
        " with tuning_search_space.json beside the file or one folder up, which --tuning_ruleset=self"
        " does not need (default: %(default)s)",
    )
    parser.add_argument(
        "--seeds", type=_seeds, default="0", help="one study a seed, such as 0,1,2 (default: 0)"
    )
    parser.add_argument(
        "--tuning_ruleset",
        choices=sorted(BUDGETS),
        default="external",
        help="external: each submission at the points of its search space; self: one trial without"
        " any point, half as much budget again (default: %(default)s)",
    )
    parser.add_argument(
        "--trials",
        type=_positive,
        default=1,
        help="trials of each study: the first points of each search space (default: %(default)s)",
    )
    parser.add_argument(
        "--evaluations",
        type=_positive,
        default=20,
        help="evaluations along a workload's step hint, at equal steps for everybody"
        " (default: %(default)s)",
    )
    parser.add_argument(
        "--step_budget",
        type=_budget,
        help="end a trial after this multiple of the step hint, where schedules have decayed"
        " (default: 1, or 1.5 under --tuning_ruleset=self)",
    )
    parser.add_argument(
        "--threads",
        type=_positive,
        default=1,
        help="CPU threads of a run; with one, times of these small models repeat best, also on a"
        " busy machine (default: %(default)s)",
    )
    parser.add_argument(
        "--results_dir",
        type=Path,
        default=Path("results"),
        help="folder of all results (default: %(default)s)",
    )
    parser.add_argument(
        "--run_name",
        help="folder of this comparison below it (default: a new one, smoke-001, smoke-002, ...)",
    )
    parser.add_argument(
        "--resume_last_run",
        action="store_true",
        help="go on with --run_name: complete trials are kept; refused if they were run otherwise",
    )
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="with --run_name: delete its logs of the submissions, workloads and seeds to be run",
    )
    return parser.parse_args(arguments)


def step_budget(options: argparse.Namespace) -> float:
    """Multiple of the step hint after which a trial ends: what was given, else the ruleset's."""
    budget: float | None = options.step_budget
    return BUDGETS[options.tuning_ruleset] if budget is None else budget


def _names(text: str) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise argparse.ArgumentTypeError(f"expected names separated by commas, got {text!r}")
    return list(dict.fromkeys(names))


def _budget(text: str) -> float:
    try:
        budget = float(text)
    except ValueError:
        budget = math.nan
    if not 0 < budget < math.inf:
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text!r}")
    return budget


def _seeds(text: str) -> list[int]:
    try:
        seeds = [int(part) for part in text.split(",")]
    except ValueError:
        seeds = []
    if not seeds or min(seeds) < 0:
        raise argparse.ArgumentTypeError(f"expected whole numbers >= 0 such as 0,1,2, got {text!r}")
    return list(dict.fromkeys(seeds))


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number >= 1, got {text!r}")
    return int(text)
