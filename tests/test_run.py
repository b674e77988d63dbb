"""The runner as a command: what it leaves on disk, and how it resumes."""

import json
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from runner_calls import (
    ONE_THREAD,
    TINY_RUNNER,
    Runner,
    assert_same_trial,
    assert_whole_files,
    rows,
    untimed,
)
from tiny_runner import ENTRIES, SUBMISSION, write_submission

from workloads_smoke import run, run_flags


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


@pytest.fixture(scope="module")
def whole_trial(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trial that nobody disturbed."""
    runner = Runner(tmp_path_factory.mktemp("whole"))
    assert runner.call() == 0
    return runner.trial()


def test_a_run_leaves_the_official_layout(
    runner: Runner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.call(num_tuning_trials=2) == 0
    for number, learning_rate in ((1, 0.1), (2, 0.02)):
        trial = runner.trial(number)
        assert {path.name for path in trial.iterdir()} == {
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
    # A slow machine adds a line now and then.
    lines = [line for line in capsys.readouterr().out.splitlines() if "/30, " not in line]
    assert len(lines) == 3
    assert lines[0].startswith("tiny trial 1/2: target not reached: best validation/accuracy ")
    assert lines[2].startswith("tiny: none of 2 trials reached the target; logs in ")


IN_STEP, IN_CHECKPOINT, IN_LAST_CHECKPOINT = (
    {"KILL_AT_STEP": "17"},
    {"KILL_IN_SAVE": "3"},
    {"KILL_IN_SAVE": "5"},
)


@pytest.mark.parametrize(
    "death", [IN_STEP, IN_CHECKPOINT, pytest.param(IN_LAST_CHECKPOINT, marks=pytest.mark.slow)]
)
def test_a_killed_run_resumes_to_the_same_bits(
    runner: Runner, whole_trial: Path, death: dict[str, str]
) -> None:
    """SIGKILL in the middle of a step, of a checkpoint, and of the last checkpoint."""
    process = runner.start(death)
    process.communicate()
    assert process.returncode == -signal.SIGKILL
    assert_whole_files(runner.trial())
    assert runner.call(resume_last_run=True, rng_seed=None) == 0
    assert_same_trial(whole_trial, runner.trial())
    counts = [row["preemption_count"] for row in rows(runner.trial() / "eval_measurements.csv")]
    assert counts == ["0", "0", *(["0", "0"] if death == IN_LAST_CHECKPOINT else ["1", "1"])]
    assert (runner.trial() / "meta_data_1.json").exists()


@pytest.mark.parametrize(
    ("signal_sent", "status"),
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_an_interrupted_run_leaves_whole_files(
    runner: Runner, signal_sent: signal.Signals, status: int
) -> None:
    process = runner.start(max_global_steps=100_000, num_tuning_trials=2)
    deadline = time.monotonic() + 100
    while not (runner.trial() / "checkpoint_20").exists():
        assert time.monotonic() < deadline
        assert process.poll() is None, process.communicate()
        time.sleep(0.01)
    process.send_signal(signal_sent)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert_whole_files(runner.trial())
    assert not runner.trial(2).exists()


def test_resuming_keeps_complete_trials_and_starts_those_that_lack(
    runner: Runner, whole_trial: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert runner.call() == 0
    before = {path: path.read_bytes() for path in runner.trial().iterdir()}
    runner.trial(2).mkdir()
    (runner.trial(2) / "hparams.json").write_text('{"learning_rate": 0.1}')
    assert runner.call(resume_last_run=True, num_tuning_trials=2, rng_seed=None) == 0
    assert {path: path.read_bytes() for path in runner.trial().iterdir()} == before
    # The second trial keeps the setting that it was started with, which is the first one's.
    assert "going on with the setting that is saved there" in caplog.text
    assert_same_trial(whole_trial, runner.trial(2))
    # Complete trials are kept whatever the search space has become.
    assert "trial_1/hparams.json" not in caplog.text
    runner.space.write_text('[{"learning_rate": 0.5}]')
    assert runner.call(resume_last_run=True) == 0
    assert "trial_1/hparams.json: complete at this setting, not at the one of now" in caplog.text


def test_a_trial_that_another_run_has_ended_meanwhile_is_kept(
    runner: Runner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs share a folder's trials; this one listed what to train before the other began."""
    other = {"num_tuning_trials": 2, "hparam_start_index": 1, "resume_last_run": True}
    kept: dict[Path, bytes] = {}

    def slow_first_trial(request: Any, *arguments: Any) -> Any:
        if request.number == 2:
            monkeypatch.setattr(run, "run_trial", run_trial)
            assert runner.call(**other, save_checkpoints=False) == 0
            kept.update({path: path.read_bytes() for path in runner.trial(2).iterdir()})
        return run_trial(request, *arguments)

    run_trial = run.run_trial
    monkeypatch.setattr(run, "run_trial", slow_first_trial)
    assert runner.call(num_tuning_trials=2, save_checkpoints=False) == 0
    assert "outcome.json" in {path.name for path in kept}
    assert {path: path.read_bytes() for path in runner.trial(2).iterdir()} == kept


def test_a_kill_after_the_last_checkpoint_writes_no_row_twice(
    runner: Runner, whole_trial: Path
) -> None:
    assert runner.call() == 0
    (runner.trial() / "outcome.json").unlink()
    assert runner.call(resume_last_run=True) == 0
    assert_same_trial(whole_trial, runner.trial())
    assert (runner.trial() / "outcome.json").exists()


def test_resuming_what_is_not_there_starts_it_and_says_so(
    runner: Runner, caplog: pytest.LogCaptureFixture
) -> None:
    """As in the official runner, which a job that may be preempted calls so from the first."""
    assert runner.call(resume_last_run=True, max_global_steps=1) == 0
    assert f"there is no {runner.trial().parent} yet, it is started" in caplog.text


def test_a_trial_at_its_step_limit_goes_on_under_a_larger_one(
    runner: Runner, whole_trial: Path
) -> None:
    assert runner.call(max_global_steps=20) == 0
    outcome = runner.trial() / "outcome.json"
    outcome.unlink()  # as a kill leaves it that comes after the last checkpoint
    assert runner.call(resume_last_run=True) == 0
    assert_same_trial(whole_trial, runner.trial())
    assert json.loads(outcome.read_text())["stopped_by"] == "step limit"
    assert json.loads(outcome.read_text())["global_step"] == 30


def test_an_unfinished_trial_without_checkpoints_starts_anew(
    runner: Runner, whole_trial: Path
) -> None:
    assert runner.call(save_checkpoints=False, max_global_steps=20) == 0
    assert not list(runner.trial().glob("checkpoint_*"))
    (runner.trial() / "outcome.json").unlink()
    assert runner.call(save_checkpoints=False, resume_last_run=True) == 0
    for name in ("eval_measurements.csv", "measurements.csv"):
        assert untimed(runner.trial() / name) == untimed(whole_trial / name)


def test_a_resumed_run_keeps_its_seed(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.call(rng_seed=None, max_global_steps=1) == 0
    seed = json.loads((runner.trial() / "meta_data_0.json").read_text())["rng_seed"]
    assert runner.call(resume_last_run=True, rng_seed=seed, max_global_steps=1) == 0
    assert runner.call(resume_last_run=True, rng_seed=seed + 1, max_global_steps=1) == 1
    assert f"was started with {seed}; leave the flag out" in capsys.readouterr().err


def test_a_damaged_checkpoint_stops_a_resume_and_is_left_alone(
    runner: Runner, whole_trial: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert runner.call() == 0
    (runner.trial() / "outcome.json").unlink()
    damaged = runner.trial() / "checkpoint_30"
    content = damaged.read_bytes()[:1000]
    damaged.write_bytes(content)
    before = {path: path.read_bytes() for path in runner.trial().iterdir()}
    assert runner.call(resume_last_run=True) == 1
    assert "move it away to resume from checkpoint_20" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in runner.trial().iterdir()} == before
    damaged.rename(runner.folder / "damaged")
    assert runner.call(resume_last_run=True) == 0
    assert_same_trial(whole_trial, runner.trial())


def test_only_the_latest_checkpoint_is_kept_if_asked_for(runner: Runner) -> None:
    assert runner.call(save_intermediate_checkpoints=False) == 0
    assert [path.name for path in runner.trial().glob("checkpoint_*")] == ["checkpoint_30"]


def test_a_slice_of_the_settings(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.call(num_tuning_trials=2, hparam_start_index=1, max_global_steps=1) == 0
    assert "tiny trial 2/2" in "".join(capsys.readouterr())
    assert not runner.trial(1).exists()
    assert json.loads((runner.trial(2) / "hparams.json").read_text()) == {"learning_rate": 0.02}


def test_several_workloads_in_one_call(
    runner: Runner, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert runner.call(workload="tiny_too,tiny,tiny", max_global_steps=1) == 0
    assert runner.trial(workload="tiny").exists()
    assert runner.trial(workload="tiny_too").exists()
    summary = capsys.readouterr().out.splitlines()[-2:]
    assert [line.partition(":")[0] for line in summary] == ["tiny_too", "tiny"]
    monkeypatch.setattr(run_flags, "WORKLOADS", ENTRIES)
    assert runner.call(workload="all", experiment_name="all", max_global_steps=1) == 0
    assert runner.trial(workload="tiny", study="all").exists()
    assert runner.trial(workload="tiny_too", study="all").exists()


def test_self_tuning_has_no_settings(runner: Runner) -> None:
    text = SUBMISSION.replace(
        "hyperparameters.learning_rate", "0.1 if hyperparameters is None else 9"
    )
    path = write_submission(runner.folder / "self", text)
    given = {"tuning_ruleset": "self", "tuning_search_space": None, "submission_path": path}
    assert runner.call(**given, max_global_steps=2) == 0
    assert not (runner.trial() / "hparams.json").exists()
    assert len(rows(runner.trial() / "eval_measurements.csv")) == 2


def test_a_time_stamp_makes_a_new_folder(runner: Runner) -> None:
    assert runner.call(append_timestamp=True, max_global_steps=1) == 0
    (study,) = (runner.folder / "results").iterdir()
    assert re.fullmatch(r"study_0-\d{4}(-\d\d){5}", study.name)


def test_a_profile_is_printed(runner: Runner, capsys: pytest.CaptureFixture[str]) -> None:
    assert runner.call(profile=True) == 0
    assert re.search(r"Update parameters +30 ", capsys.readouterr().out)


@pytest.mark.slow
def test_trials_in_parallel_do_the_same(runner: Runner, whole_trial: Path) -> None:
    process = runner.start(num_tuning_trials=2, parallel_trials=2)
    output, errors = process.communicate()
    assert process.returncode == 0, errors
    assert_same_trial(whole_trial, runner.trial(1))
    assert json.loads((runner.trial(2) / "hparams.json").read_text()) == {"learning_rate": 0.02}
    assert "tiny: none of 2 trials reached the target" in output


@pytest.mark.slow
def test_a_failing_parallel_trial_ends_the_run_and_says_why(runner: Runner) -> None:
    runner.space.write_text(json.dumps([{"lr": 0.1}, {"lr": 0.2}]))
    process = runner.start(num_tuning_trials=2, parallel_trials=2)
    _, errors = process.communicate()
    assert process.returncode == 1
    assert "lacks hyperparameter 'learning_rate'" in errors
    assert "failed with exit status 1" in errors
    assert "Traceback" not in errors
    assert not runner.trial().parent.exists(), "the mended command must not meet its own folder"


@pytest.mark.slow
def test_two_processes_train_one_model(runner: Runner) -> None:
    """Torchrun with gloo: the same batches, cut in two; rank 0 alone writes and speaks."""
    path = write_submission(
        runner.folder / "quiet", SUBMISSION.replace("noise = 1e-3", "noise = 0")
    )
    given = runner.flags(workload="tiny_too", submission_path=path)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    first, second = (
        subprocess.run(
            [*torchrun, str(TINY_RUNNER), *given],
            env=ONE_THREAD,
            capture_output=True,
            text=True,
            timeout=120,
        )
        for _ in range(2)
    )
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("trials reached the target") == 1
    assert second.returncode != 0
    assert second.stderr.count("error: experiment folder") == 1
    options = {"workload": "tiny_too", "submission_path": path, "experiment_name": "alone"}
    assert runner.call(**options) == 0
    together, alone = (
        rows(runner.trial(study=study, workload="tiny_too") / "eval_measurements.csv")
        for study in ("study_0", "alone")
    )
    assert [row["global_step"] for row in together] == ["1", "10", "20", "30"]
    for name in ("train/loss", "validation/loss", "test/loss"):
        assert [float(row[name]) for row in together] == pytest.approx(
            [float(row[name]) for row in alone], rel=1e-4
        )
