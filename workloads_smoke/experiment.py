"""The folder of an experiment: may it be used, and what is already in it."""

import datetime
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from workloads_smoke.errors import UserError
from workloads_smoke.folders import check_deletable, check_folder
from workloads_smoke.logs import OUTCOME, read_json_object

# Flags that decide what a trial's numbers mean: a folder holds trials of one value each. Those of
# files are compared as paths. --rng_seed is `recorded_seed`'s; settings are in hparams.json.
_PATHS = ("submission_path", "tuning_search_space")
_DECISIVE = (
    *_PATHS,
    "tuning_ruleset",
    "step_budget",
    "eval_every_steps",
    "skip_evals",
    "use_submission_batch_size",
    "torch_compile",
)


def experiment_folder(experiment_dir: str, experiment_name: str, timestamp: bool) -> Path:
    """Absolute folder of an experiment.

    Args:
        experiment_dir: Folder of all experiments, '~' allowed.
        experiment_name: Folder below it.
        timestamp: Whether date and time follow the name.

    Returns:
        The folder, which may not exist yet.

    Raises:
        UserError: The name leads out of `experiment_dir`, where --overwrite would delete.
    """
    if Path(experiment_name).is_absolute() or ".." in Path(experiment_name).parts:
        raise UserError(
            f"--experiment_name is a folder in --experiment_dir, got {experiment_name!r}; "
            "give the folder above it as --experiment_dir"
        )
    if timestamp:
        experiment_name += datetime.datetime.now().strftime("-%Y-%m-%d-%H-%M-%S")
    return Path(experiment_dir).expanduser().absolute() / experiment_name


def check_folders(folders: list[Path], overwrite: bool, resume: bool) -> None:
    """Refuse to write where something is, unless told how; changes nothing.

    Raises:
        UserError: A folder exists and neither flag was given, a file is in its place, or a link to
            what would be deleted.
    """
    for folder in folders:
        check_folder(folder, "--experiment_dir")
        if overwrite:
            check_deletable(folder)
        if folder.exists() and not (overwrite or resume):
            raise UserError(
                f"experiment folder {folder} exists; --resume_last_run goes on with it, "
                "--overwrite deletes it first, --append_timestamp makes a new one beside it"
            )


def make_folder(folder: Path, overwrite: bool) -> None:
    """Make a workload's folder, deleting what is in it if told so."""
    if overwrite and folder.exists():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)


def recorded_seed(folder: Path) -> int | None:
    """Random seed that the trials in a folder were started with, or None if none was.

    Raises:
        UserError: A meta data file cannot be read.
    """
    for path in sorted(folder.glob("trial_*/meta_data_0.json")):
        seed = read_json_object(path).get("rng_seed")
        if isinstance(seed, int):
            return seed
    return None


def check_flags(folder: Path, flags: Mapping[str, Any], same_submission: bool = True) -> None:
    """Refuse to go on in a workload's folder with flags that make other results than those in it.

    A larger --max_global_steps goes on with trials that have not ended.

    Args:
        folder: The workload's folder.
        flags: All flags and values of the command.
        same_submission: Whether its trials are the command's, or another submission's to be
            compared with them.

    Raises:
        UserError: A trial there was run otherwise; the message names the flags.
    """
    for trial in sorted(folder.glob("trial_*")):
        recorded = latest_record(trial, "flags")
        names = [name for name in _DECISIVE if same_submission or name not in _PATHS]
        if _ended_at_step_limit(trial):
            names.append("max_global_steps")
        names = [
            name
            for name in names
            if name in recorded
            and _comparable(name, recorded[name]) != _comparable(name, flags[name])
        ]
        if names:
            was, now = (
                ", ".join(_shown(name, values[name]) for name in names)
                for values in (recorded, flags)
            )
            raise UserError(
                f"{trial} was run with {was}, and not with {now}; give the same to go on with it or to "
                "compare with it, or start elsewhere"
            )


def latest_record(trial: Path, name: str) -> dict[str, Any]:
    """Flags or meta data of a trial's last start; none if it never got that far."""
    numbered = {
        int(match[1]): path
        for path in trial.glob(f"{name}_*.json")
        if (match := re.fullmatch(rf"{name}_(\d+)\.json", path.name))
    }
    return read_json_object(numbered[max(numbered)]) if numbered else {}


def _ended_at_step_limit(trial: Path) -> bool:
    path = trial / OUTCOME
    return path.exists() and read_json_object(path).get("stopped_by") == "step limit"


def _comparable(name: str, value: Any) -> Any:
    """The value, a path made absolute."""
    return Path(value).expanduser().absolute() if name in _PATHS and value is not None else value


def _shown(name: str, value: Any) -> str:
    return f"no --{name}" if value is None else f"--{name}={value}"
