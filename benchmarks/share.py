"""The optimizer's share of a training step of the submission on the smoke workloads.

A step is what the benchmark's clock sees of it: the next batch, forward, backward, update. Times are of the
processor on one thread, so that other work on the machine does not count. Every workload is trained in a
process of its own, as in a trial: what other models leave behind makes refreshes dearer. What counts are
whole intervals of refreshes, for part of one has too many of them or too few.
"""

from __future__ import annotations

import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import chosen, out_folder, parser_of
from benchmarks.tables import DEFAULT_FOLDER, publish
from shampoo_core.model_shapes import official_workloads
from submission import submission
from workloads_smoke.registry import WORKLOADS, load_workload

LARGEST_SHARE = 0.25
"""Of a training step that the optimizer should take."""
INTERVALS = 3
"""Intervals of refreshes that are looked at."""
TAKES = "smoke workloads: any but cifar, by default all"
NO_SMOKE_WORKLOAD = "share is measured on smoke workloads, and none has this name"
FIRST_STEPS = 20
"""Not looked at: these allocate memory."""


@dataclass
class _Clock:
    """Seconds of steps and of the updates in them."""

    steps: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    begun: float = 0.0

    def begin_update(self, *_: Any) -> None:
        """A hook before the optimizer's step."""
        self.begun = time.thread_time()

    def end_update(self, *_: Any) -> None:
        """A hook after the optimizer's step."""
        self.updates.append(time.thread_time() - self.begun)


def measure(workload_name: str, intervals: int = INTERVALS) -> dict[str, Any]:
    """A row of the table: median step and update in milliseconds, and shares.

    Args:
        workload_name: Of a smoke workload.
        intervals: Intervals of refreshes to take behind the first steps.
    """
    torch.set_num_threads(1)
    workload: Any = load_workload(workload_name)
    torch.manual_seed(0)
    model, model_state = workload.init_model_fn([0, 1])
    state = submission.init_optimizer_state(workload, model, model_state, None, [0, 2])
    clock = _Clock()
    state["optimizer"].register_step_pre_hook(clock.begin_update)
    state["optimizer"].register_step_post_hook(clock.end_update)
    batches = workload._build_input_queue([0, 3], "train", "", workload.smoke_batch_size)
    interval = state["optimizer"].param_groups[0]["refresh"].interval
    for step in range(FIRST_STEPS + intervals * interval):
        begun = time.thread_time()
        batch = next(batches)
        state, model, model_state = submission.update_params(
            workload,
            model,
            None,
            model_state,
            None,
            batch,
            workload.loss_type,
            state,
            [],
            step,
            [0, 4],
        )
        clock.steps.append(time.thread_time() - begun)
    steps, updates = clock.steps[FIRST_STEPS:], clock.updates[FIRST_STEPS:]
    return {
        "workload": workload_name,
        "step_ms": 1e3 * statistics.median(steps),
        "update_ms": 1e3 * statistics.median(updates),
        "share": statistics.median(updates) / statistics.median(steps),
        "share_with_refreshes": sum(updates) / sum(steps),
        "interval": interval,
        "limit": LARGEST_SHARE,
    }


COLUMNS = {
    "workload": "workload",
    "step_ms": "step ms",
    "update_ms": "update ms",
    "share": "share",
    "share_with_refreshes": "with refreshes",
    "limit": "limit",
    "interval": "interval",
}


def run(workloads: Sequence[str] | None = None, folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """Print and write the shares on the smoke workloads of the given names, or on all.

    Args:
        workloads: Names; None is all that smoke workloads have.
        folder: For the JSON.

    Returns:
        Files that were written.
    """
    torch.set_num_threads(1)  # what the table's head says is then true of the processes too
    context = multiprocessing.get_context("spawn")
    known = [name for name in official_workloads() if name in WORKLOADS]
    others = {name: NO_SMOKE_WORKLOAD for name in workloads or () if name not in known}
    names = chosen(workloads, known, others)
    with ProcessPoolExecutor(1, mp_context=context, max_tasks_per_child=1) as processes:
        rows = list(processes.map(measure, names))
    return publish(
        "Share: of the optimizer in a step of the submission's default setting on smoke workloads",
        rows,
        COLUMNS,
        folder,
    )


def main() -> None:
    """Command line."""
    options = parser_of(__doc__, TAKES).parse_args()
    run(options.workload, out_folder(options))


if __name__ == "__main__":
    main()
