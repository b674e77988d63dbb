"""The main job: planning, fairness, estimates, what it leaves behind. The runner is a stand-in."""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
from hand_made_logs import write_missing, write_reaching

from workloads_smoke import report, smoke, smoke_flags
from workloads_smoke.contenders import known_contenders, read_contenders
from workloads_smoke.errors import UserError
from workloads_smoke.locks import sole_user
from workloads_smoke.registry import load_workload

REPOSITORY = Path(__file__).resolve().parents[1]


class StandInRunner:
    """Writes logs where the runner would; remembers how it was called."""

    def __init__(self, fails_on: str | None = None, interrupted_on: str | None = None) -> None:
        self.fails_on = fails_on
        self.interrupted_on = interrupted_on
        self.commands: list[list[str]] = []

    def __call__(
        self, command: list[str], env: dict[str, str], check: bool
    ) -> subprocess.CompletedProcess[str]:
        assert not check and env["OMP_NUM_THREADS"] == "1"
        self.commands.append(command)
        flags = dict(part[2:].split("=", 1) for part in command if "=" in part)
        folder = Path(flags["experiment_dir"])
        if folder.name == self.interrupted_on:
            raise KeyboardInterrupt
        if folder.name == self.fails_on:
            return subprocess.CompletedProcess(command, 1)
        study = folder / flags["experiment_name"] / f"{flags['workload']}_pytorch"
        for number in range(1, int(flags["num_tuning_trials"]) + 1):
            trial = study / f"trial_{number}"
            if folder.name == "shampoo":
                write_reaching(trial, 200 * number, 4.0 * number)
            else:
                write_missing(trial)
        return subprocess.CompletedProcess(command, 0)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> StandInRunner:
    stand_in = StandInRunner()
    monkeypatch.setattr(smoke.subprocess, "run", stand_in)
    # The target of the hand-made logs, whatever those of the workloads are.
    workload = SimpleNamespace(
        target_metric_name="accuracy",
        validation_target_value=0.9,
        step_hint=600,
        max_allowed_runtime_sec=100,
    )
    monkeypatch.setattr(smoke, "load_workload", lambda name: workload)
    monkeypatch.chdir(tmp_path)
    return stand_in


@pytest.fixture
def no_report(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing takes seconds; one test looks at the report."""
    monkeypatch.setattr(smoke, "write_report", lambda board, folder, title: folder / "report.html")


@pytest.fixture
def no_plots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One image stands for all of them."""
    image = tmp_path / "plot.png"
    image.write_bytes(b"")
    monkeypatch.setattr(
        report, "write_plots", lambda board, folder: {plot.name: image for plot in report.PLOTS}
    )


def options(*arguments: str) -> argparse.Namespace:
    return smoke_flags.parse_arguments(arguments)


def test_default_job_compares_ours_with_nadamw_and_shows_it(
    runner: StandInRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smoke.main([]) == 0
    printed = capsys.readouterr().out
    run = Path("results/smoke-001")
    for name in ("report.html", "scores.csv", "plots/training_curves_steps.png", "commands.txt"):
        assert (run / name).stat().st_size > 0
    scores = pd.read_csv(run / "scores.csv", index_col="submission")["score"].to_dict()
    assert scores == {"shampoo": 1.0, "nadamw": 0.0}
    assert "[4/4] wmt: nadamw, study_0" in printed
    assert "left" in printed
    assert "shampoo has the highest AlgoPerf score, 1.0000 against nadamw 0.0000." in printed
    assert "nadamw did not reach accuracy >= 0.9; its best was 0.8." in printed
    # The table grows: once after mnist, once at the end with wmt.
    assert printed.count("submission   score") == 2
    calls = [
        [part for part in command if part.startswith("--workload")] for command in runner.commands
    ]
    assert calls == [["--workload=mnist"]] * 2 + [["--workload=wmt"]] * 2


@pytest.mark.usefixtures("no_report")
def test_everybody_gets_the_same_trials_seeds_and_evaluations(runner: StandInRunner) -> None:
    arguments = ["--seeds=0,7", "--trials=5", "--workloads=mnist", "--evaluations=10"]
    assert smoke.main(arguments) == 0
    shared = [
        sorted(
            part
            for part in command
            if part.startswith(("--num_tuning", "--eval_every", "--step_budget", "--rng_seed"))
        )
        for command in runner.commands
    ]
    assert shared[0] == shared[1] and shared[2] == shared[3]
    assert "--rng_seed=0" in shared[0] and "--rng_seed=7" in shared[2]
    assert "--num_tuning_trials=5" in shared[0] and "--eval_every_steps=60" in shared[0]


@pytest.mark.usefixtures("no_report")
def test_self_tuning_has_no_points_and_half_as_much_budget_again(runner: StandInRunner) -> None:
    assert smoke.main(["--workloads=mnist", "--tuning_ruleset=self"]) == 0
    for command in runner.commands:
        assert "--tuning_ruleset=self" in command and "--step_budget=1.5" in command
        assert not any(part.startswith("--tuning_search_space") for part in command)


@pytest.mark.usefixtures("no_report")
def test_a_rerun_makes_a_new_folder(runner: StandInRunner) -> None:
    for _ in range(2):
        assert smoke.main(["--workloads=mnist", "--submissions=nadamw"]) == 0
    assert sorted(path.name for path in Path("results").iterdir()) == ["smoke-001", "smoke-002"]


@pytest.mark.usefixtures("no_report")
def test_a_named_run_is_never_overwritten_silently(
    runner: StandInRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--workloads=mnist", "--submissions=nadamw", "--run_name=mine"]
    assert smoke.main(arguments) == 0
    assert smoke.main(arguments) == 1
    assert "results/mine exists; --resume_last_run goes on with it" in capsys.readouterr().err
    assert len(runner.commands) == 1
    run_folder = smoke.run_folder(options(*arguments, "--overwrite"))
    (job,) = smoke.plan(options(*arguments))
    assert "--resume_last_run" in job.command(run_folder, options(*arguments, "--resume_last_run"))
    with pytest.raises(UserError, match="need --run_name"):
        smoke.run_folder(options("--overwrite"))


@pytest.mark.usefixtures("no_report")
def test_overwriting_deletes_all_before_it_runs_any(
    runner: StandInRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    """Interrupted and then resumed, an old trial would be taken for a new one."""
    arguments = ["--workloads=mnist", "--run_name=mine"]
    assert smoke.main(arguments) == 0
    logs = Path("results/mine/logs")
    theirs = logs / "theirs/study_0/mnist_pytorch/trial_1"
    theirs.mkdir(parents=True)
    old = sorted(path for path in logs.glob("*/*/*/trial_1") if path != theirs)
    with sole_user(old[1]):
        assert smoke.main([*arguments, "--overwrite"]) == 1
    assert "another process is training in" in capsys.readouterr().err
    assert all(path.exists() for path in old) and len(old) == len(runner.commands) == 2
    moved = old[1].parent.rename(logs / "moved")
    old[1].parent.symlink_to(moved.absolute())
    assert smoke.main([*arguments, "--overwrite"]) == 1
    assert "is one to" in capsys.readouterr().err
    old[1].parent.unlink()
    moved.rename(old[1].parent)
    assert all(path.exists() for path in old)
    runner.interrupted_on = "shampoo"
    assert smoke.main([*arguments, "--overwrite"]) == 130
    assert sorted(logs.glob("*/*/*/trial_1")) == [theirs]
    assert smoke.main([*arguments, "--overwrite", "--resume_last_run"]) == 1
    assert "give one of them" in capsys.readouterr().err


@pytest.mark.usefixtures("no_report")
def test_only_what_exists_is_resumed(
    runner: StandInRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    assert smoke.main(["--workloads=mnist", "--run_name=typo", "--resume_last_run"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: --resume_last_run: there is no results/typo; ")
    assert error.count("\n") == 1
    assert not Path("results").exists() and not runner.commands


@pytest.mark.usefixtures("no_report")
def test_trials_of_other_settings_are_not_resumed(
    runner: StandInRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--workloads=mnist", "--submissions=nadamw", "--run_name=mine"]
    assert smoke.main(arguments) == 0
    commands = Path("results/mine/commands.txt")
    first = commands.read_text()
    trial = Path("results/mine/logs/nadamw/study_0/mnist_pytorch/trial_1")
    submission = str(known_contenders()["nadamw"])
    recorded = {"submission_path": submission, "step_budget": 1.0, "tuning_ruleset": "external"}
    (trial / "flags_0.json").write_text(json.dumps(recorded))
    muon = known_contenders()["muon"]
    for other, difference in (
        ("--step_budget=2", "--step_budget=1.0, and not with --step_budget=2.0;"),
        ("--tuning_ruleset=self", "--tuning_ruleset=external, --step_budget=1.0, and not with "),
        ("--submissions=shampoo --step_budget=2", "not with --step_budget=2.0;"),
        (shlex.quote(f"--submissions=nadamw={muon}"), f"and not with --submission_path={muon};"),
    ):
        assert smoke.main([*arguments, "--resume_last_run", *shlex.split(other)]) == 1
        error = capsys.readouterr().err
        assert difference in error and error.count("\n") == 1
    assert commands.read_text() == first and len(runner.commands) == 1
    # What stays beside the new runs has to compare with them; what they replace has not.
    arguments_of_another = ["--submissions=shampoo", "--step_budget=2", "--overwrite"]
    assert smoke.main([*arguments, *arguments_of_another]) == 1
    assert "not with --step_budget=2.0;" in capsys.readouterr().err
    assert commands.read_text() == first and len(runner.commands) == 1
    runner.fails_on = "nadamw"  # the stand-in writes no log twice
    smoke.main([*arguments, "--resume_last_run"])
    assert len(runner.commands) == 2
    assert commands.read_text() == first + first.replace("\n", " --resume_last_run\n")


@pytest.mark.usefixtures("no_report")
def test_a_failing_submission_is_reported_and_the_others_scored(
    runner: StandInRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.fails_on = "nadamw"
    assert smoke.main(["--workloads=mnist"]) == 1
    captured = capsys.readouterr()
    assert "failed: nadamw on mnist, study_0" in captured.err
    assert "shampoo reached the target of 1 of 1 workload." in captured.out


def test_nothing_to_score_is_an_error_without_a_traceback(
    runner: StandInRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.fails_on = "nadamw"
    assert smoke.main(["--workloads=mnist", "--submissions=nadamw"]) == 1
    assert "error: nothing to score" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
@pytest.mark.parametrize("file", ["commands.txt", "report.html"])
def test_a_full_disk_is_said_in_a_line(
    runner: StandInRunner, no_plots: None, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    folder = Path("results/mine")
    folder.mkdir(parents=True)
    (folder / f".{file}.partial").symlink_to("/dev/full")
    assert smoke.main(["--workloads", "mnist", "--run_name", "mine", "--overwrite"]) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {folder / file} cannot be written: No space left on device; ")
    assert error.count("\n") == 1


def test_an_interrupt_says_how_to_go_on(
    runner: StandInRunner, capsys: pytest.CaptureFixture[str]
) -> None:
    runner.interrupted_on = "nadamw"
    assert smoke.main(["--workloads=mnist"]) == 130
    assert "--run_name=smoke-001 --resume_last_run" in capsys.readouterr().err


def test_the_estimate_uses_each_workloads_own_pace() -> None:
    jobs = smoke.plan(options("--seeds=0,1"))
    mnist, wmt = (next(job for job in jobs if job.workload == name) for name in ("mnist", "wmt"))
    pace = smoke.Pace()
    pace.add(mnist, 10.0)
    pace.add(mnist, 20.0)
    assert pace.estimate([mnist, wmt]) == 30.0  # wmt is new: the mean of all
    pace.add(wmt, 90.0)
    assert pace.estimate([mnist, wmt, wmt]) == 15.0 + 90.0 + 90.0


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (59.6, "1:00"), (3725, "1 h 02 min")])
def test_clock(seconds: float, text: str) -> None:
    assert smoke.clock(seconds) == text


def test_any_submission_file_takes_part(tmp_path: Path) -> None:
    folder = tmp_path / "theirs"
    folder.mkdir()
    (folder / "submission.py").touch()
    with pytest.raises(UserError, match=r"no tuning_search_space\.json beside"):
        read_contenders([f"theirs={folder / 'submission.py'}"])
    (folder / "tuning_search_space.json").write_text("[{}]")
    (theirs, nadamw) = read_contenders([f"theirs={folder / 'submission.py'}", "nadamw"])
    assert theirs.search_space == folder / "tuning_search_space.json"
    assert nadamw.search_space == nadamw.submission.parent / "tuning_search_space.json"
    assert {"shampoo", "nadamw"} <= set(known_contenders())


@pytest.mark.usefixtures("no_report")
def test_self_tuning_needs_no_search_space(
    runner: StandInRunner, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """What `submission.bundle --ruleset self` writes has none."""
    (tmp_path / "submission.py").touch()
    arguments = ["--workloads=mnist", "--submissions=shampoo=submission.py"]
    assert smoke.main([*arguments, "--tuning_ruleset=self"]) == 0
    assert "--submission_path=submission.py" in runner.commands[0]
    assert smoke.main(arguments) == 1
    assert "add it, or compare under --tuning_ruleset=self\n" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--workloads=mnist,cifar100"], "unknown workload(s) cifar100; known: "),
        (["--submissions=adam"], "unknown submission 'adam'; known are shampoo, "),
        (["--submissions=x=none.py"], "submission 'x': no such file none.py"),
        (["--submissions=a/b=none.py"], "the name of a submission is one folder name, got 'a/b'"),
        (["--submissions=nadamw", "--trials=99"], "nadamw has 5 points in "),
        (["--tuning_ruleset=self", "--trials=5"], "one trial a study, got --trials=5"),
        (
            ["--run_name=../mine"],
            "--run_name is the name of one folder in --results_dir, got '../mine'",
        ),
        (["--run_name="], "--run_name is the name of one folder in --results_dir, got ''"),
        (["--results_dir=file"], "--results_dir: file is no folder; move it away or name another"),
        (
            ["--results_dir=file", "--run_name=mine"],
            "--results_dir: file is no folder; move it away",
        ),
    ],
)
def test_mistakes_are_named_before_anything_is_made(
    runner: StandInRunner, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    Path("file").touch()
    assert smoke.main(arguments) == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not Path("results").exists() and not runner.commands


def test_one_name_twice_is_refused() -> None:
    file = known_contenders()["nadamw"]
    with pytest.raises(UserError, match="'nadamw' is given 2 times"):
        read_contenders(["nadamw", f"nadamw={file}"])


@pytest.mark.parametrize(
    "flag",
    [
        *("--seeds=0,-1", "--seeds=a", "--trials=0", "--workloads=,"),
        *("--step_budget=0", "--step_budget=-1", "--step_budget=nan", "--step_budget=x"),
    ],
)
def test_flags_are_checked(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        smoke_flags.parse_arguments([flag])
    assert "expected" in capsys.readouterr().err


@pytest.mark.slow
def test_the_real_runner_does_the_job(tmp_path: Path) -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "workloads_smoke.smoke", "--workloads=mnist", "--step_budget=0.1",
         f"--results_dir={tmp_path}"],
        cwd=REPOSITORY, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert finished.returncode == 0, finished.stderr
    trials = pd.read_csv(tmp_path / "smoke-001" / "trials.csv")
    assert sorted(trials["submission"]) == ["nadamw", "shampoo"]
    assert (trials["last_step"] == load_workload("mnist").step_hint // 10).all()
    assert (trials["num_evaluations"] == 3).all()
    logs = tmp_path / "smoke-001" / "logs" / "shampoo" / "study_0" / "mnist_pytorch" / "trial_1"
    point = json.loads((logs / "hparams.json").read_text())
    assert point == json.loads((REPOSITORY / "tuning_search_space.json").read_text())[0]
