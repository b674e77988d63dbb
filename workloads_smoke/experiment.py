"""The folder of an experiment: may it be used, and what is already in it."""

import datetime
import shutil
from pathlib import Path

from workloads_smoke.errors import UserError
from workloads_smoke.logs import read_json_object


def experiment_folder(experiment_dir: str, experiment_name: str, timestamp: bool) -> Path:
    """Absolute folder of an experiment.

    Args:
        experiment_dir: Folder of all experiments, '~' allowed.
        experiment_name: Folder below it.
        timestamp: Whether date and time follow the name.

    Returns:
        The folder, which may not exist yet.
    """
    if timestamp:
        experiment_name += datetime.datetime.now().strftime("-%Y-%m-%d-%H-%M-%S")
    return Path(experiment_dir).expanduser().absolute() / experiment_name


def check_folders(folders: list[Path], overwrite: bool, resume: bool) -> None:
    """Refuse to write where something is, unless told how; changes nothing.

    Raises:
        UserError: A folder exists and neither flag was given.
    """
    for folder in folders:
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
