"""Read what runs left behind: folders in the official layout, or one file of evaluations."""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from workloads_smoke.logs import OUTCOME
from workloads_smoke.scoring.targets import Target

STEP = "global_step"
SECONDS = "accumulated_submission_time"

# A flag that our runner has and the official one has not; a trial of ours that has ended has an outcome.
_OWN_FLAG = "step_budget"

_TRIAL_FOLDER = re.compile(r"trial_\d+")
_FRAMEWORK_SUFFIX = re.compile(r"_(jax|pytorch)$")
_EVALUATION_FILE_COLUMNS = (
    "submission",
    "study",
    "workload",
    "trial",
    STEP,
    SECONDS,
    "metric",
    "value",
)


@dataclass(frozen=True, eq=False)
class Trial:
    """One training run.

    Attributes:
        submission: name of the training algorithm.
        study: name of the repetition, for example ``study_0``.
        workload: name without framework suffix.
        trial: name of the hyperparameter point, for example ``trial_1``.
        evaluations: one row an evaluation, in order: ``global_step``,
            ``accumulated_submission_time`` (seconds) and metrics such as ``validation/loss``.
            Empty where the run ended before its first evaluation.
        target: the target that the run itself recorded, None where it recorded none.
        hyperparameters: what ``hparams.json`` says, empty where there is none.
        metadata: what ``meta_data_0.json`` says about workload and machine, likewise.
        ruleset: ``external`` or ``self``, None where the logs do not say.
        flags: the command's, empty where the logs do not say.
        ended: whether the run came to its end; None where the logs do not say, as those of the official
            harness do not.
        outcome: what ``outcome.json`` says, empty where there is none.
        folder: the trial's folder, None where it came from one file of evaluations.
    """

    submission: str
    study: str
    workload: str
    trial: str
    evaluations: pd.DataFrame
    target: Target | None = None
    hyperparameters: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, Any] = field(default_factory=dict)
    ruleset: str | None = None
    flags: dict[str, Any] = field(default_factory=dict)
    ended: bool | None = None
    outcome: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None

    @property
    def key(self) -> tuple[str, str, str, str]:
        """Submission, workload, study and trial."""
        return (self.submission, self.workload, self.study, self.trial)


def read_results(sources: Iterable[str | Path]) -> list[Trial]:
    """Read every trial of several sources.

    Args:
        sources: each a folder, a file of evaluations (``.csv``, ``.csv.gz``), or
            ``NAME=FOLDER`` to give the submission in that folder another name. A folder may hold
            submissions (``submission/study/workload/trial_k``), be one submission
            (``study/workload/trial_k``) or be one study (``workload/trial_k``). Experiments in one
            folder that are not named ``study...`` are submissions of one study each, unless
            ``NAME=FOLDER`` says that they are studies of one.

    Returns:
        Trials sorted by submission, workload, study and trial.

    Raises:
        FileNotFoundError: if a source does not exist or holds no trial.
        ValueError: if two sources hold the same trial, or a log cannot be read.
    """
    found: dict[tuple[str, str, str, str], Trial] = {}
    for source in sources:
        num_before = len(found)
        for trial in _read_source(source):
            if trial.key in found:
                raise ValueError(
                    f"{' / '.join(trial.key)} is found twice, in {found[trial.key].folder} and in"
                    f" {trial.folder}; name one submission anew with NAME=FOLDER"
                )
            found[trial.key] = trial
        if len(found) == num_before:
            raise FileNotFoundError(
                f"no trial in {source}: expected folders"
                " [submission/][study/]workload/trial_<number>/ with eval_measurements.csv"
            )
    return [found[key] for key in sorted(found, key=_natural_order)]


def _read_source(source: str | Path) -> Iterator[Trial]:
    renamed, path = _name_and_path(str(source))
    if not path.exists():
        raise FileNotFoundError(f"no such folder or file of results: {path}")
    if path.is_file():
        if renamed is not None:
            raise ValueError(f"{source}: a file names its submissions itself, drop '{renamed}='")
        yield from read_evaluation_file(path)
        return
    for folder in _trial_folders(path):
        submission, study, workload, trial = _names(path, folder, renamed)
        yield _read_trial(folder, submission, study, workload, trial)


def _name_and_path(source: str) -> tuple[str | None, Path]:
    """New name, if one is given, and path of ``NAME=PATH`` or of ``PATH``.

    Both may themselves contain "=": what exists as written is a path, and else what exists behind the
    last "=" that has such a thing behind it.
    """
    cuts = [index for index, letter in enumerate(source) if letter == "=" and index > 0]
    if not cuts or Path(source).expanduser().exists():
        return None, Path(source).expanduser()
    splits = [(source[:cut], Path(source[cut + 1 :]).expanduser()) for cut in reversed(cuts)]
    return next((split for split in splits if split[1].exists()), splits[0])


def _trial_folders(root: Path) -> Iterator[Path]:
    for folder, subfolders, _ in os.walk(root):
        for name in sorted(subfolders):
            if _TRIAL_FOLDER.fullmatch(name):
                yield Path(folder, name)
        # Trials hold checkpoints, not trials.
        subfolders[:] = sorted(name for name in subfolders if not _TRIAL_FOLDER.fullmatch(name))


def _names(root: Path, folder: Path, renamed: str | None) -> tuple[str, str, str, str]:
    """Submission, study, workload and trial, from the folders between root and trial."""
    parts = folder.relative_to(root).parts
    if len(parts) < 2:
        raise ValueError(f"{root} holds trials itself; give the folder above it, a study")
    workload, trial = _FRAMEWORK_SUFFIX.sub("", parts[-2]), parts[-1]
    base = root.resolve()
    if len(parts) > 3:
        submission, study = parts[-4], parts[-3]
    elif len(parts) == 3:
        submission, study = _experiment_names(base.name, parts[0], known=renamed is not None)
    else:
        submission, study = _experiment_names(base.parent.name, base.name)
    return renamed or submission, study, workload, trial


def _experiment_names(folder: str, experiment: str, known: bool = False) -> tuple[str, str]:
    """Submission and study of an experiment in a folder.

    The official layout has a folder for each submission and its studies in it. Where an experiment
    is no study by its name, it stands for a submission, unless that is `known` to be the folder.
    """
    if known or experiment.startswith("study"):
        return folder, experiment
    return experiment, "study_0"


def _read_trial(folder: Path, submission: str, study: str, workload: str, trial: str) -> Trial:
    metadata = _read_json(folder / "meta_data_0.json")
    flags = _read_json(folder / "flags_0.json")
    return Trial(
        submission=submission,
        study=study,
        workload=workload,
        trial=trial,
        evaluations=_read_evaluations(folder / "eval_measurements.csv"),
        target=Target.from_mapping(metadata, prefix="workload."),
        hyperparameters=_read_json(folder / "hparams.json"),
        metadata=metadata,
        ruleset=_ruleset(flags.get("tuning_ruleset")),
        flags=flags,
        ended=(folder / OUTCOME).exists() if _OWN_FLAG in flags else None,
        outcome=_read_json(folder / OUTCOME),
        folder=folder,
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path} must hold a JSON object, got a {type(content).__name__}")
    return content


def _read_evaluations(path: Path) -> pd.DataFrame:
    if not path.exists() or path.stat().st_size == 0:
        return pd.DataFrame(columns=[STEP, SECONDS])
    evaluations = _read_csv(path)
    # The harness writes the same time twice; its scorer reads `score`.
    if SECONDS not in evaluations and "score" in evaluations:
        evaluations[SECONDS] = evaluations["score"]
    missing = [column for column in (STEP, SECONDS) if column not in evaluations]
    if missing:
        raise ValueError(f"{path} lacks the column(s) {', '.join(missing)}")
    return evaluations


def _read_csv(path: Path) -> pd.DataFrame:
    """A table; pandas unpacks what is called .gz, and raises another error for each way to fail."""
    try:
        return pd.read_csv(path)
    except (OSError, EOFError, zlib.error, ValueError) as error:
        raise ValueError(f"{path} is not a readable CSV file: {error}") from error


def _ruleset(name: object) -> str | None:
    """The benchmark writes ``external_tuning`` in its repositories and ``external`` in its flags."""
    return name.removesuffix("_tuning") if isinstance(name, str) else None


def read_evaluation_file(path: Path) -> list[Trial]:
    """Read many trials from one CSV file, gzipped or not.

    Args:
        path: one row an evaluation, with the columns ``submission``, ``study``, ``workload``,
            ``trial``, ``global_step``, ``accumulated_submission_time`` (seconds), ``metric``
            (for example ``validation/loss``) and ``value``; ``ruleset`` is read where it is there,
            others are ignored. Rows of a trial are in the order of training.

    Raises:
        ValueError: if a column is missing, or it cannot be read.
    """
    rows = _read_csv(path)
    missing = [column for column in _EVALUATION_FILE_COLUMNS if column not in rows]
    if missing:
        raise ValueError(f"{path} lacks the column(s) {', '.join(missing)}")
    trials = []
    for key, group in rows.groupby(["submission", "study", "workload", "trial"], sort=False):
        submission, study, workload, trial = (str(part) for part in key)
        if "ruleset" in group and group["ruleset"].nunique() > 1:
            raise ValueError(
                f"{path}: {submission} {study} {workload} {trial} was run under several rulesets,"
                f" {', '.join(map(str, group['ruleset'].unique()))}; give each a submission's name"
            )
        metrics = group["metric"].unique()
        if len(metrics) != 1:
            raise ValueError(
                f"{path}: {submission} {study} {workload} {trial} mixes metrics"
                f" {', '.join(map(str, metrics))}; one target metric a trial is expected"
            )
        evaluations = group[[STEP, SECONDS, "value"]].rename(columns={"value": str(metrics[0])})
        evaluations = evaluations.reset_index(drop=True)
        ruleset = _ruleset(group["ruleset"].iloc[0]) if "ruleset" in group else None
        trials.append(Trial(submission, study, workload, trial, evaluations, ruleset=ruleset))
    return trials


def _natural_order(key: tuple[str, ...]) -> list[list[tuple[int, int, str]]]:
    """Sort ``trial_10`` after ``trial_2``."""
    return [
        [(0, int(piece), "") if piece.isdigit() else (1, 0, piece) for piece in _pieces(part)]
        for part in key
    ]


def _pieces(text: str) -> list[str]:
    return [piece for piece in re.split(r"(\d+)", text) if piece]
