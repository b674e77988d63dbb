"""The main job, ``make smoke``: train submissions on smoke workloads, compare them, show it.

Every submission gets the same number of trials, each at its own hyperparameter points, on the same
workloads and seeds. The runner does the training, one process a submission, workload and seed; this
module only decides the order, says how long it will take, and scores.
"""

from __future__ import annotations

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from absl import flags

from workloads_smoke import run_flags
from workloads_smoke.atomic_files import write_text
from workloads_smoke.contenders import (
    Contender,
    check_same_number_of_trials,
    read_contenders,
)
from workloads_smoke.errors import UserError
from workloads_smoke.experiment import check_flags
from workloads_smoke.folders import check_deletable, check_folder
from workloads_smoke.locks import sole_user_of_trials
from workloads_smoke.registry import WORKLOADS, load_workload
from workloads_smoke.report import write_report
from workloads_smoke.scoring.console import say
from workloads_smoke.scoring.folders import fresh_folder
from workloads_smoke.scoring.logs import read_results
from workloads_smoke.scoring.scoreboard import Scoreboard
from workloads_smoke.scoring.tables import score_text
from workloads_smoke.scoring.targets import Target
from workloads_smoke.scoring.verdict import headline, workload_verdict
from workloads_smoke.smoke_flags import parse_arguments, step_budget

INTERRUPTED = 130  # a shell's status of a command that Ctrl-C ended
TERMINATED = 143  # and of one that SIGTERM ended


@dataclass(frozen=True)
class Job:
    """All trials of one submission on one workload with one seed: one call of the runner."""

    contender: Contender
    workload: str
    seed: int

    @property
    def study(self) -> str:
        """Name of the experiment."""
        return f"study_{self.seed}"

    def folder(self, logs: Path) -> Path:
        """Where its trials are."""
        return logs / self.contender.name / self.study / f"{self.workload}_pytorch"

    def command(self, logs: Path, options: argparse.Namespace) -> list[str]:
        """The runner's command line; logs go to ``logs/<submission>/study_<seed>``."""
        every = max(1, load_workload(self.workload).step_hint // options.evaluations)
        command = [
            sys.executable,
            "-m",
            "workloads_smoke.run",
            f"--workload={self.workload}",
            f"--submission_path={self.contender.submission}",
            f"--num_tuning_trials={options.trials}",
            f"--experiment_dir={logs / self.contender.name}",
            f"--experiment_name={self.study}",
            f"--rng_seed={self.seed}",
            f"--eval_every_steps={every}",
            f"--step_budget={step_budget(options):g}",
            # A trial is short: one that was cut off starts anew.
            "--nosave_checkpoints",
        ]
        if options.tuning_ruleset == "self":
            command.append("--tuning_ruleset=self")
        else:
            command.append(f"--tuning_search_space={self.contender.search_space}")
        if options.resume_last_run:
            command.append("--resume_last_run")
        return command


@dataclass
class Pace:
    """Tells how long the remaining jobs will take, from those that are done."""

    seconds: dict[str, list[float]] = field(default_factory=dict)

    def add(self, job: Job, seconds: float) -> None:
        """A job took so long."""
        self.seconds.setdefault(job.workload, []).append(seconds)

    def estimate(self, remaining: Sequence[Job]) -> float:
        """Seconds for the remaining jobs: each as its workload's mean, a new one as all jobs'."""
        durations = [duration for known in self.seconds.values() for duration in known]
        overall = sum(durations) / len(durations)
        means = {name: sum(known) / len(known) for name, known in self.seconds.items()}
        return sum(means.get(job.workload, overall) for job in remaining)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    options = parse_arguments(arguments)
    try:
        jobs = plan(options)
        folder = run_folder(options)
        check_kept(jobs, folder / "logs", options)
        if options.overwrite:
            delete_logs(jobs, folder / "logs")
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    try:
        failed = run_jobs(jobs, folder / "logs", options)
        return show(folder, failed)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        return 1
    except KeyboardInterrupt:
        sys.stderr.write(
            f"interrupted; the same command with --run_name={folder.name} --resume_last_run goes on\n"
        )
        return INTERRUPTED


def plan(options: argparse.Namespace) -> list[Job]:
    """List the jobs: seed by seed, workload by workload, so that comparisons complete early.

    Raises:
        UserError: if a workload or submission is unknown, or points are too few.
    """
    workloads = list(WORKLOADS) if options.workloads == ["all"] else options.workloads
    unknown = [name for name in workloads if name not in WORKLOADS]
    if unknown:
        raise UserError(f"unknown workload(s) {', '.join(unknown)}; known: {', '.join(WORKLOADS)}")
    contenders = read_contenders(options.submissions, options.tuning_ruleset)
    if options.tuning_ruleset == "external":
        check_same_number_of_trials(contenders, options.trials)
    elif options.trials != 1:
        raise UserError(
            f"--tuning_ruleset=self has one trial a study, got --trials={options.trials}"
        )
    return [
        Job(contender, workload, seed)
        for seed in options.seeds
        for workload in workloads
        for contender in contenders
    ]


def run_folder(options: argparse.Namespace) -> Path:
    """Folder of this comparison, new unless the options say otherwise.

    Raises:
        UserError: if it exists and neither ``--resume_last_run`` nor ``--overwrite`` was given,
            or both were, or is to be resumed and does not exist, or cannot be a folder.
    """
    if options.resume_last_run and options.overwrite:
        raise UserError("--overwrite deletes what --resume_last_run goes on with; give one of them")
    if options.run_name is None:
        if options.resume_last_run or options.overwrite:
            raise UserError("--resume_last_run and --overwrite need --run_name: which comparison?")
        check_folder(options.results_dir, "--results_dir")
        return fresh_folder(options.results_dir, "smoke")
    name = options.run_name
    if not name or Path(name).name != name or name == "..":
        raise UserError(f"--run_name is the name of one folder in --results_dir, got {name!r}")
    folder: Path = options.results_dir / name
    check_folder(folder, "--results_dir")
    if options.resume_last_run and not folder.is_dir():
        raise UserError(f"--resume_last_run: there is no {folder}; leave it out to start that run")
    if folder.exists() and not (options.resume_last_run or options.overwrite):
        raise UserError(
            f"{folder} exists; --resume_last_run goes on with it, --overwrite deletes its logs"
            " first, another --run_name leaves it alone"
        )
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def check_kept(jobs: Sequence[Job], logs: Path, options: argparse.Namespace) -> None:
    """Look at the logs that stay, of every job or of what it is compared with, before any is run.

    Raises:
        UserError: if one was run with other flags.
    """
    deleted = {job.folder(logs) for job in jobs} if options.overwrite else set()
    for job in jobs:
        values = flags.FlagValues()
        run_flags.define(values)
        values(job.command(logs, options)[2:])
        for folder in sorted(set(logs.glob(f"*/*/{job.workload}_pytorch")) - deleted):
            own = folder == job.folder(logs)
            check_flags(folder, values.flag_values_dict(), same_submission=own)


def delete_logs(jobs: Sequence[Job], logs: Path) -> None:
    """Delete earlier logs of all jobs, before the first: resumed later, none may pass for a new one.

    Raises:
        UserError: if a process is training in one, or one is a link; nothing is deleted then.
    """
    folders = [job.folder(logs) for job in jobs]
    for folder in folders:
        check_deletable(folder)
    with sole_user_of_trials(folders):
        for folder in folders:
            if folder.exists():
                shutil.rmtree(folder)


def run_jobs(jobs: Sequence[Job], logs: Path, options: argparse.Namespace) -> list[Job]:
    """Run every job, one after the other so that times compare; returns those that failed."""
    say(
        f"{len(jobs)} runs of {options.trials} trial(s): {', '.join(options.submissions)} on"
        f" {', '.join(dict.fromkeys(job.workload for job in jobs))}; results in {logs.parent}"
    )
    commands = "".join(f"{shlex.join(job.command(logs, options))}\n" for job in jobs)
    record = logs.parent / "commands.txt"
    earlier = record.read_text(encoding="utf-8") if record.exists() else ""
    write_text(record, earlier + commands)
    environment = os.environ | {"OMP_NUM_THREADS": str(options.threads)}
    pace, failed = Pace(), []
    start = time.monotonic()
    for index, job in enumerate(jobs):
        command = job.command(logs, options)
        say(f"\n[{index + 1}/{len(jobs)}] {job.workload}: {job.contender.name}, {job.study}")
        job_start = time.monotonic()
        status = subprocess.run(command, env=environment, check=False).returncode
        if status:
            failed.append(job)
            say(f"failed with exit status {status}: {shlex.join(command)}")
        pace.add(job, time.monotonic() - job_start)
        remaining = jobs[index + 1 :]
        if remaining:
            say(f"{clock(time.monotonic() - start)} so far, about"
                f" {clock(pace.estimate(remaining))} left")  # fmt: skip
            if remaining[0].workload != job.workload:
                _show_table(logs)
    return failed


def show(folder: Path, failed: Sequence[Job]) -> int:
    """Print the final table and the verdicts, write the report; returns the exit status."""
    try:
        board = score_logs(folder / "logs")
    except (FileNotFoundError, ValueError) as error:
        sys.stderr.write(f"error: nothing to score: {error}\n")
        return 1
    say(f"\n{score_text(board)}\n\n{headline(board)}")
    for workload in board.workloads:
        say(f"{workload}: {workload_verdict(board, workload)}")
    report = write_report(board, folder, title="Smoke comparison")
    say(f"\nreport: {report}\nplots:  {folder / 'plots'}\nlogs:   {folder / 'logs'}")
    for job in failed:
        sys.stderr.write(f"failed: {job.contender.name} on {job.workload}, {job.study}\n")
    return 1 if failed else 0


def score_logs(logs: Path) -> Scoreboard:
    """Score a comparison against the targets of the smoke workloads.

    The logs record the same ones, except where a run failed at its start.
    """
    trials = read_results([logs])
    targets = {}
    for name in {trial.workload for trial in trials}:
        workload = load_workload(name)
        targets[name] = Target(
            metric=workload.target_metric_name,
            value=workload.validation_target_value,
            step_hint=workload.step_hint,
            max_seconds=workload.max_allowed_runtime_sec,
        )
    return Scoreboard.of(trials, targets)


def clock(seconds: float) -> str:
    """Minutes and seconds, or hours and minutes above an hour."""
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes}:{rest:02d}"


def _show_table(logs: Path) -> None:
    try:
        board = score_logs(logs)
    except FileNotFoundError:
        return
    say(f"\n{score_text(board)}")


if __name__ == "__main__":
    # Leaving by an exception, subprocess.run ends the runner too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    sys.exit(main())
