"""The submission in the real `submission_runner.py`: both rulesets, killed and resumed."""

import json
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import pytest
from official_harness import REPOSITORY, Harness, require_harness

from workloads_smoke.harness_data import write_mnist

pytestmark = [pytest.mark.harness, pytest.mark.timeout(900)]

EVAL_PERIOD = 10  # seconds, of the official mnist workload


@pytest.fixture(scope="module")
def harness() -> Harness:
    return require_harness()


@pytest.fixture(scope="module")
def data_dir(harness: Harness, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    write_mnist(folder)
    return folder


class Trial:
    """A run of the official runner on mnist that can be killed and started again."""

    def __init__(self, harness: Harness, data_dir: Path, folder: Path, ruleset: str) -> None:
        self.harness, self.folder = harness, folder
        self.trial_dir = folder / "experiments" / "shampoo" / "mnist_pytorch" / "trial_1"
        self.flags = [
            "--framework=pytorch",
            "--submission_path=submission/submission.py",
            "--workload=mnist",
            f"--data_dir={data_dir}",
            f"--experiment_dir={folder / 'experiments'}",
            "--experiment_name=shampoo",
            f"--tuning_ruleset={ruleset}",
            "--rng_seed=1",
        ]
        if ruleset == "external":
            self.flags.append("--tuning_search_space=tuning_search_space.json")
        self.num_starts = 0

    def start(self, *flags: str) -> tuple[subprocess.Popen[bytes], Path]:
        """Start the runner in a process group of its own; returns it and its log."""
        self.num_starts += 1
        log = self.folder / f"log_{self.num_starts}"
        runner = str(self.harness.checkout / "submission_runner.py")
        with log.open("wb") as file:
            process = subprocess.Popen(
                [self.harness.python, runner, *self.flags, *flags],
                cwd=REPOSITORY,
                env=self.harness.environment(),
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        return process, log

    def run(self, *flags: str) -> str:
        """Run to the end and return the log."""
        process, log = self.start(*flags)
        try:
            status = process.wait(timeout=400)
        finally:
            kill(process)
        text = log.read_text(errors="replace")
        assert status == 0, text[-5000:]
        assert "Traceback" not in text, text[-5000:]
        return text

    def run_until_killed(self, *flags: str) -> int:
        """Kill the runner once it has saved a checkpoint and learned something; returns its step."""
        process, log = self.start(*flags)
        try:
            while process.poll() is None:
                saved = re.findall(r"Saved checkpoint to .*checkpoint_(\d+)\.", log.read_text())
                # However little a busy machine gets done between two evaluations.
                if saved and int(saved[-1]) > 1 and self.has_learned(int(saved[-1])):
                    return int(saved[-1])
                time.sleep(0.2)
        finally:
            kill(process)
        pytest.fail(f"the runner ended by itself: {log.read_text(errors='replace')[-5000:]}")

    def has_learned(self, step: int) -> bool:
        loss = self.evaluations()["validation/loss"]
        return step in loss and loss[step] < 0.8 * loss[1]

    def evaluations(self) -> pd.DataFrame:
        return pd.read_csv(self.trial_dir / "eval_measurements.csv").set_index("global_step")


def kill(process: subprocess.Popen[bytes]) -> None:
    """Kill -9 the runner and what it started."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@pytest.fixture(params=["external", "self"])
def trial(
    request: pytest.FixtureRequest, harness: Harness, data_dir: Path, tmp_path: Path
) -> Iterator[Trial]:
    yield Trial(harness, data_dir, tmp_path, request.param)


def test_a_killed_run_goes_on_where_it_was(trial: Trial) -> None:
    # Uncompiled, so that compilation does not use up the minute that the workload allows.
    saved_step = trial.run_until_killed("--torch_compile=false")
    # The runner evaluates at its first step when the last evaluation is a period ago.
    time.sleep(EVAL_PERIOD)
    last_step = saved_step + 150
    log = trial.run("--torch_compile=false", "--resume_last_run", f"--max_global_steps={last_step}")
    assert f"Loaded checkpoint from {trial.trial_dir}/checkpoint_{saved_step}" in log

    evaluations = trial.evaluations()
    loss = evaluations["validation/loss"]
    # One step after the restart nothing has jumped; at the end the run has learned more.
    assert loss[saved_step + 1] == pytest.approx(loss[saved_step], rel=0.1)
    assert loss[last_step] < loss[saved_step] < 0.8 * loss[1]
    assert evaluations["preemption_count"][saved_step] == 0
    assert evaluations["preemption_count"][last_step] == 1
    # The submission's time goes on from what the checkpoint had.
    times = evaluations["accumulated_submission_time"]
    assert times.loc[[1, saved_step, saved_step + 1, last_step]].is_monotonic_increasing


def test_a_compiled_model_trains_saves_and_is_found_again(trial: Trial) -> None:
    trial.run("--max_global_steps=2")
    (last_step,) = trial.evaluations().index[-1:]
    assert f"checkpoint_{last_step}" in os.listdir(trial.trial_dir)
    log = trial.run("--resume_last_run")
    assert f"Loaded checkpoint from {trial.trial_dir}/checkpoint_{last_step}" in log


def test_every_setting_survives_the_harness_checkpoint_bit_for_bit(
    harness: Harness, tmp_path: Path
) -> None:
    driver = Path(__file__).with_name("official_checkpoint_driver.py")
    finished = harness.run(os.fspath(driver), os.fspath(tmp_path), timeout=800)
    assert finished.returncode == 0, finished.stderr[-5000:]
    (line,) = (text for text in finished.stdout.splitlines() if text.startswith("REPORT "))
    report = json.loads(line.removeprefix("REPORT "))
    points = json.loads((REPOSITORY / "tuning_search_space.json").read_text())
    assert report.keys() > {"self", *(f"point {k}" for k in range(1, len(points) + 1))}
    averaging = {name for name in report if name.startswith("averaging=")}
    assert len(averaging) > 1
    for name, outcome in report.items():
        if name in averaging:
            assert outcome["evaluates_other_weights"] == (name != "averaging=none"), name
        assert outcome["differences_on_restore"] == [], name
        assert outcome["differences_at_the_end"] == [], name
        assert outcome["trained_on"], name
    assert report["batch norm"]["evaluates_other_weights"]
