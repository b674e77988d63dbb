"""The same submission under the official runner and under ours: same calls, arguments, files."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from official_harness import REPOSITORY, Harness, require_harness

from workloads_smoke.harness_data import write_mnist

pytestmark = [pytest.mark.harness, pytest.mark.timeout(900)]

# Writes down how it was called, and otherwise trains by plain gradient descent.
RECORDER = """
import json, os
import torch
from algoperf import spec

OPTIONAL = ", train_state=None"


def note(function, positional, keywords):
    def told(value):
        if value is None or isinstance(value, (int, float, str, bool)):
            return value
        if hasattr(value, "_asdict"):
            return sorted(value._asdict())
        if type(value).__name__ in ("list", "ndarray") and len(value) == 2 and not isinstance(
            value[0], tuple
        ):
            return [int(word) for word in value]
        if type(value).__name__ in ("dict", "mappingproxy"):
            return [type(value).__name__, sorted(value)]
        if isinstance(value, list):
            return [[step, sorted(result)] for step, result in value]
        return type(value).__name__ if isinstance(value, spec.LossType) else "object"
    with open(os.environ["RECORD"], "a") as file:
        line = [function, [told(v) for v in positional], {k: told(v) for k, v in keywords.items()}]
        file.write(json.dumps(line, sort_keys=True) + "\\n")


def init_optimizer_state(*positional, **keywords):
    note("init_optimizer_state", positional, keywords)
    return {"optimizer": torch.optim.SGD(positional[1].parameters(), lr=0.01)}


def update_params(train_state=None, **keywords):
    note("update_params", (), {**keywords, "train_state": train_state})
    model, optimizer = keywords["current_param_container"], keywords["optimizer_state"]["optimizer"]
    workload, batch = keywords["workload"], keywords["batch"]
    optimizer.zero_grad()
    logits, state = workload.model_fn(
        model, batch, keywords["model_state"], spec.ForwardPassMode.TRAIN, keywords["rng"], True
    )
    workload.loss_fn(batch["targets"], logits, batch.get("weights"))["summed"].backward()
    optimizer.step()
    if workload.metrics_logger is not None:
        workload.metrics_logger.append_scalar_metrics({"loss": 1.0}, keywords["global_step"])
    return keywords["optimizer_state"], model, state


def prepare_for_eval(**keywords):
    note("prepare_for_eval", (), keywords)
    return tuple(
        keywords[k] for k in ("optimizer_state", "current_param_container", "model_state")
    )


def data_selection(*positional, **keywords):
    note("data_selection", positional, keywords)
    return next(positional[1])


def get_batch_size(workload_name):
    note("get_batch_size", (workload_name,), {})
    return 64
"""
SPACE = {
    "learning_rate": {"min": 1e-4, "max": 1e-2, "scaling": "log"},
    "momentum": {"min": 0.0, "max": 0.9, "scaling": "linear"},
    "kind": {"feasible_points": ["a", "b", "c"]},
}


@pytest.fixture(scope="module")
def harness() -> Harness:
    return require_harness()


class Comparison:
    """Runs the recorder under both."""

    def __init__(self, harness: Harness, folder: Path, ruleset: str) -> None:
        self.harness, self.folder = harness, folder
        (folder / "recorder.py").write_text(RECORDER)
        space = folder / "space.json"
        space.write_text(json.dumps(SPACE))
        write_mnist(folder / "data")
        self.flags = [
            "--workload=mnist",
            "--framework=pytorch",
            f"--data_dir={folder / 'data'}",
            "--experiment_name=study_0",
            f"--tuning_ruleset={ruleset}",
            "--rng_seed=11",
            "--max_global_steps=3",
            "--notorch_compile",
        ]
        if ruleset == "external":
            self.flags += [f"--tuning_search_space={space}", "--num_tuning_trials=2"]

    def run(
        self, name: str, command: list[str], submission: str, environment: dict[str, str]
    ) -> None:
        environment = environment | {"RECORD": str(self.folder / f"{name}.jsonl")}
        arguments = [f"--experiment_dir={self.folder / name}", f"--submission_path={submission}"]
        result = subprocess.run(
            [*command, *self.flags, *arguments],
            cwd=REPOSITORY,
            env=environment,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-5000:]

    def run_both(self) -> None:
        runner = str(self.harness.checkout / "submission_runner.py")
        environment = self.harness.environment()
        environment["PYTHONPATH"] += os.pathsep + str(self.folder)
        self.run("official", [self.harness.python, runner], "recorder.py", environment)
        # The official workload evaluates every 10 s: after the first step and at the end.
        ours = [sys.executable, "-m", "workloads_smoke.run", "--eval_every_steps=1000"]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        self.run("ours", ours, str(self.folder / "recorder.py"), environment)

    def calls(self, name: str) -> list[Any]:
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").open()]

    def trials(self, name: str) -> list[Path]:
        return sorted((self.folder / name / "study_0" / "mnist_pytorch").glob("trial_*"))


def header(path: Path) -> list[str]:
    with path.open(newline="") as file:
        return next(csv.reader(file))


@pytest.mark.parametrize("ruleset", ["external", "self"])
def test_the_two_runners_do_the_same(harness: Harness, tmp_path: Path, ruleset: str) -> None:
    comparison = Comparison(harness, tmp_path, ruleset)
    comparison.run_both()
    official, ours = comparison.calls("official"), comparison.calls("ours")
    assert [call[0] for call in ours] == [call[0] for call in official]
    for ours_call, official_call in zip(ours, official, strict=True):
        assert ours_call == official_call
    both = list(zip(comparison.trials("ours"), comparison.trials("official"), strict=True))
    assert len(both) == (2 if ruleset == "external" else 1)
    for ours_trial, official_trial in both:
        for name in ("eval_measurements.csv", "measurements.csv"):
            assert header(ours_trial / name) == header(official_trial / name)
        metas = [
            json.loads((t / "meta_data_0.json").read_text()) for t in (ours_trial, official_trial)
        ]
        assert metas[0]["rng_seed"] == metas[1]["rng_seed"] == 11
        names = {path.name for path in ours_trial.iterdir()} - {"outcome.json", "step_times.csv"}
        official_names = {path.name for path in official_trial.iterdir()}
        assert names == {name for name in official_names if not name.startswith("events.out")}
    if ruleset == "external":
        # The official runner shuffles the points, without a seed.
        points = [
            sorted((trial / "hparams.json").read_text() for trial in comparison.trials(name))
            for name in ("ours", "official")
        ]
        assert [json.loads(p) for p in points[0]] == [json.loads(p) for p in points[1]]
