"""From flags to the list of trials to run, each with its setting, seed and folder."""

import struct
from os import urandom
from pathlib import Path

from absl import flags, logging

from workloads_smoke.errors import UserError
from workloads_smoke.experiment import (
    check_flags,
    check_folders,
    experiment_folder,
    make_folder,
    recorded_seed,
)
from workloads_smoke.locks import sole_user_of_trials
from workloads_smoke.settings import RunSettings, TrialRequest
from workloads_smoke.tuning import read_hyperparameters


def plan_trials(
    values: flags.FlagValues, settings: RunSettings, batch_sizes: dict[str, tuple[int, int]]
) -> list[TrialRequest]:
    """List the trials of a run; nothing on disk changes.

    Args:
        values: Parsed flags.
        settings: The options they amount to.
        batch_sizes: For training and for evaluation, by workload.

    Returns:
        Trials by workload, then by number. All have the same seed, as in the official runner.

    Raises:
        UserError: The search space, the slice of settings, or a folder that exists.
    """
    numbered, num_trials = _numbered_hyperparameters(values, settings)
    experiment = experiment_folder(
        values.experiment_dir, values.experiment_name, values.append_timestamp
    )
    folders = {name: experiment / f"{name}_{values.framework}" for name in batch_sizes}
    check_folders(list(folders.values()), values.overwrite, bool(values.resume_last_run))
    if values.resume_last_run:
        for folder in folders.values():
            check_flags(folder, values.flag_values_dict())
            if not folder.exists():
                logging.warning("--resume_last_run: there is no %s yet, it is started", folder)
    fresh_seed = struct.unpack("I", urandom(4))[0] if values.rng_seed is None else values.rng_seed
    requests = []
    for name, folder in folders.items():
        seed = _seed(folder, values, fresh_seed)
        for number, hyperparameters in numbered:
            requests.append(
                TrialRequest(
                    name,
                    number,
                    num_trials,
                    hyperparameters,
                    seed,
                    folder / f"trial_{number}",
                    *batch_sizes[name],
                )
            )
    return requests


def make_folders(plan: list[TrialRequest], overwrite: bool) -> None:
    """Make each workload's folder; the first thing that a run changes on disk.

    Raises:
        UserError: A process is training in what should be deleted; nothing is then.
    """
    folders = list(dict.fromkeys(request.folder.parent for request in plan))
    with sole_user_of_trials(folders if overwrite else ()):
        for folder in folders:
            make_folder(folder, overwrite)


def _numbered_hyperparameters(
    values: flags.FlagValues, settings: RunSettings
) -> tuple[list[tuple[int, dict[str, object] | None]], int]:
    """Trial numbers, from 1, with their settings, of those asked for; and how many there are in all."""
    if settings.tuning_search_space is None:
        return [(1, None)], 1
    points = read_hyperparameters(settings.tuning_search_space, values.num_tuning_trials)
    start, end = values.hparam_start_index or 0, values.hparam_end_index
    if start < 0 or (end is not None and end <= start):
        raise UserError(
            "--hparam_start_index and --hparam_end_index must satisfy 0 <= start < end, "
            f"got {start} and {end}"
        )
    chosen = list(enumerate(points, start=1))[start:end]
    if not chosen:
        raise UserError(
            f"--hparam_start_index={start}: {settings.tuning_search_space} gives "
            f"{len(points)} trials under --num_tuning_trials={values.num_tuning_trials}"
        )
    return [(number, point._asdict()) for number, point in chosen], len(points)


def _seed(folder: Path, values: flags.FlagValues, fresh: int) -> int:
    """The seed to use; a resumed run keeps the one it was started with."""
    recorded = recorded_seed(folder) if values.resume_last_run else None
    if recorded is None:
        return fresh
    if values.rng_seed not in (None, recorded):
        raise UserError(
            f"--rng_seed={values.rng_seed}: the run in {folder} was started with {recorded}; "
            "leave the flag out to go on with it"
        )
    return recorded
