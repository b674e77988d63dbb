"""Call the local runner from a test, and compare what two calls left on disk."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from absl import flags
from tiny_runner import ENTRIES, forget_modules, write_submission

from workloads_smoke import run, run_flags
from workloads_smoke.registry import WORKLOADS

TIMES = ("score", "time", "duration")
TINY_RUNNER = Path(__file__).with_name("tiny_runner.py")
# Sums over other numbers of threads have other last bits.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1"}


class Runner:
    """Calls the command, or what the command calls, in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.submission = write_submission(folder / "entry")
        self.space = folder / "space.json"
        self.space.write_text(json.dumps([{"learning_rate": 0.1}, {"learning_rate": 0.02}]))

    def flags(self, **given: Any) -> list[str]:
        values = {
            "workload": "tiny",
            "submission_path": self.submission,
            "tuning_search_space": self.space,
            "num_tuning_trials": 1,
            "experiment_dir": self.folder / "results",
            "experiment_name": "study_0",
            "rng_seed": 3,
            "max_global_steps": 30,
            "eval_every_steps": 10,
            **given,
        }
        return [f"--{name}={value}" for name, value in values.items() if value is not None]

    def command(self, **given: Any) -> list[str]:
        return [sys.executable, str(TINY_RUNNER), *self.flags(**given)]

    def start(self, environment: dict[str, str] | None = None, **given: Any) -> Any:
        """A process of its own; seconds to start, so only where nothing less will do."""
        return subprocess.Popen(
            self.command(**given),
            env={**ONE_THREAD, **(environment or {})},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # A suite that a shell started in the background ignores interrupts, and so would this.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def call(self, **given: Any) -> Any:
        """`main` in this process, with flags and modules of its own; the exit status."""
        values = flags.FlagValues()
        flags.DEFINE_integer("verbosity", 0, "Stands for absl's own.", flag_values=values)
        run_flags.define(values)
        handler, threads = signal.getsignal(signal.SIGTERM), torch.get_num_threads()
        torch.set_num_threads(1)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(run, "FLAGS", values)
            for name, entry in ENTRIES.items():
                patch.setitem(WORKLOADS, name, entry)
            patch.setattr(sys, "path", list(sys.path))
            try:
                run.main(values(["run", *self.flags(**given)]))
            except SystemExit as end:
                return end.code
            finally:
                signal.signal(signal.SIGTERM, handler)
                torch.set_num_threads(threads)
                forget_modules(self.folder)
        return 0

    def trial(self, number: int = 1, study: str = "study_0", workload: str = "tiny") -> Path:
        return self.folder / "results" / study / f"{workload}_pytorch" / f"trial_{number}"


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def untimed(path: Path) -> list[dict[str, str]]:
    """Rows without what no two runs have in common."""
    left_out = (*TIMES, "preemption_count")
    return [
        {k: v for k, v in row.items() if not any(word in k for word in left_out)}
        for row in rows(path)
    ]


def assert_same_bits(first: Any, second: Any) -> None:
    assert type(first) is type(second)
    if isinstance(first, torch.Tensor):
        assert torch.equal(first, second)
    elif isinstance(first, dict):
        assert first.keys() == second.keys()
        for key in first:
            assert_same_bits(first[key], second[key])
    elif isinstance(first, list | tuple):
        assert len(first) == len(second)
        for one, other in zip(first, second, strict=True):
            assert_same_bits(one, other)
    else:
        assert first == second


def assert_same_trial(first: Path, second: Path) -> None:
    """Same metrics, and same bits in the last checkpoint."""
    for name in ("eval_measurements.csv", "measurements.csv"):
        assert untimed(first / name) == untimed(second / name)
    steps = [[row["global_step"] for row in rows(p / "step_times.csv")] for p in (first, second)]
    assert steps[0] == steps[1] == [str(step) for step in range(1, 31)]
    contents = [torch.load(p / "checkpoint_30", weights_only=False) for p in (first, second)]
    for key in ("model_params", "optimizer_state", "model_state", "global_step"):
        assert_same_bits(contents[0][key], contents[1][key])
    for key in ("torch", "python"):
        assert_same_bits(*[content["runner_state"]["random"][key] for content in contents])


def assert_whole_files(trial: Path) -> None:
    for path in trial.glob("checkpoint_*"):
        torch.load(path, weights_only=False)
    for path in trial.glob("*.csv"):
        assert all(None not in row.values() for row in rows(path))
    for path in trial.glob("*.json"):
        json.loads(path.read_text())
