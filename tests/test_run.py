"""The runner as a command: what it leaves on disk, how it resumes, what it says to mistakes."""

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
from tiny_runner import write_submission

TIMES = ("score", "time", "duration")


class Runner:
    """Calls the command in a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.submission = write_submission(folder / "entry")
        self.space = folder / "space.json"
        self.space.write_text(json.dumps([{"learning_rate": 0.1}, {"learning_rate": 0.02}]))

    def flags(self, **flags: Any) -> list[str]:
        given = {
            "workload": "tiny",
            "submission_path": self.submission,
            "tuning_search_space": self.space,
            "num_tuning_trials": 1,
            "experiment_dir": self.folder / "results",
            "experiment_name": "study_0",
            "rng_seed": 3,
            "max_global_steps": 30,
            "eval_every_steps": 10,
            **flags,
        }
        return [f"--{name}={value}" for name, value in given.items() if value is not None]

    def command(self, **flags: Any) -> list[str]:
        return [
            sys.executable,
            str(Path(__file__).with_name("tiny_runner.py")),
            *self.flags(**flags),
        ]

    def run(self, environment: dict[str, str] | None = None, **flags: Any) -> Any:
        return subprocess.run(
            self.command(**flags),
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
            capture_output=True,
            text=True,
            timeout=120,
        )

    def trial(self, number: int = 1, study: str = "study_0", workload: str = "tiny") -> Path:
        return self.folder / "results" / study / f"{workload}_pytorch" / f"trial_{number}"


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


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


def test_a_run_leaves_the_official_layout(runner: Runner) -> None:
    result = runner.run(num_tuning_trials=2)
    assert result.returncode == 0, result.stderr
    for number, learning_rate in ((1, 0.1), (2, 0.02)):
        trial = runner.trial(number)
        files = {path.name for path in trial.iterdir()}
        assert files == {
            *("hparams.json", "meta_data_0.json", "flags_0.json", "outcome.json"),
            *("eval_measurements.csv", "measurements.csv", "step_times.csv"),
            *(f"checkpoint_{step}" for step in (1, 10, 20, 30)),
        }
        assert json.loads((trial / "hparams.json").read_text()) == {"learning_rate": learning_rate}
        assert json.loads((trial / "meta_data_0.json").read_text())["rng_seed"] == 3
        assert json.loads((trial / "flags_0.json").read_text())["workload"] == "tiny"
        evals = rows(trial / "eval_measurements.csv")
        assert [row["global_step"] for row in evals] == ["1", "10", "20", "30"]
        assert rows(trial / "measurements.csv")[-1]["score"]
    assert "2 trials" in result.stdout.splitlines()[-1]


@pytest.mark.parametrize(
    "death", [{"KILL_AT_STEP": "17"}, {"KILL_IN_SAVE": "3"}, {"KILL_IN_SAVE": "5"}]
)
def test_a_killed_run_resumes_to_the_same_bits(runner: Runner, death: dict[str, str]) -> None:
    """SIGKILL in the middle of a step, of a checkpoint, and of the last checkpoint."""
    assert runner.run(experiment_name="whole").returncode == 0
    assert runner.run(death).returncode == -signal.SIGKILL
    for path in runner.trial().glob("checkpoint_*"):
        torch.load(path, weights_only=False)
    result = runner.run(resume_last_run=True, rng_seed=None)
    assert result.returncode == 0, result.stderr
    assert_same_trial(runner.trial(study="whole"), runner.trial())
    assert {row["preemption_count"] for row in rows(runner.trial() / "eval_measurements.csv")} == (
        {"0"} if death.get("KILL_IN_SAVE") == "5" else {"0", "1"}
    )
    assert (runner.trial() / "meta_data_1.json").exists()
