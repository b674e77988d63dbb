"""The submission through the local runner: two processes as one, and resumed on any number of them."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from official_harness import REPOSITORY
from runner_calls import ONE_THREAD

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

TORCHRUN = ["-m", "torch.distributed.run", "--standalone"]
LOSSES = ("train/loss", "validation/loss", "test/loss")


class Study:
    """A folder of runs of the submission on the smoke translation workload."""

    def __init__(self, folder: Path, ruleset: str) -> None:
        self.folder = folder
        self.flags = [
            "--workload=wmt",
            "--submission_path=submission/submission.py",
            f"--tuning_ruleset={ruleset}",
            f"--experiment_dir={folder}",
            "--eval_every_steps=8",
            "--rng_seed=4",
        ]
        if ruleset == "external":
            # The second point has averaged weights.
            space = ["tuning_search_space.json", "--hparam_start_index=1", "--hparam_end_index=2"]
            self.flags += [f"--tuning_search_space={space[0]}", "--num_tuning_trials=5", *space[1:]]

    def run(self, name: str, last_step: int, num_processes: int, *flags: str) -> None:
        launcher = [*TORCHRUN, f"--nproc_per_node={num_processes}"] if num_processes > 1 else []
        command = [sys.executable, *launcher, "-m", "workloads_smoke.run", *self.flags, *flags]
        command += [f"--experiment_name={name}", f"--max_global_steps={last_step}"]
        done = subprocess.run(
            command, cwd=REPOSITORY, env=ONE_THREAD, capture_output=True, text=True, timeout=280
        )
        assert done.returncode == 0, done.stderr[-4000:]

    def resume(self, name: str, last_step: int, num_processes: int) -> None:
        """Go on as if the run had been cut off; one that ended by itself says so in two places."""
        (outcome,) = (self.folder / name).rglob("outcome.json")
        outcome.unlink()
        numbers = {
            int(file.name.split("_")[1]): file for file in outcome.parent.glob("checkpoint_*")
        }
        checkpoint = torch.load(numbers[max(numbers)], weights_only=False)
        checkpoint["train_state"]["training_complete"] = False
        torch.save(checkpoint, numbers[max(numbers)])
        self.run(name, last_step, num_processes, "--resume_last_run")

    def losses(self, name: str) -> dict[int, list[float]]:
        (path,) = (self.folder / name).rglob("eval_measurements.csv")
        with path.open() as file:
            rows = list(csv.DictReader(file))
        return {int(row["global_step"]): [float(row[loss]) for loss in LOSSES] for row in rows}


@pytest.mark.parametrize("ruleset", ["external", "self"])
def test_two_processes_train_as_one_and_resume_as_one(tmp_path: Path, ruleset: str) -> None:
    study = Study(tmp_path, ruleset)
    study.run("alone", 24, 1)
    study.run("together", 16, 2)
    alone, together = study.losses("alone"), study.losses("together")
    assert {1, 8, 16, 24} <= alone.keys()
    for step in (1, 8, 16):
        assert together[step] == pytest.approx(alone[step], rel=2e-3), step

    # Rank 0 saved everything: the run goes on, and on one process as well.
    study.resume("together", 20, 2)
    study.resume("together", 24, 1)
    assert study.losses("together")[24] == pytest.approx(alone[24], rel=5e-3)
