"""Set up and run one trial in this process."""

import contextlib
from collections import namedtuple
from collections.abc import Sequence
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from absl import logging

from workloads_smoke.distributed import on_rank_zero, pytorch_setup
from workloads_smoke.errors import UserError
from workloads_smoke.experiment import latest_record
from workloads_smoke.locks import is_in_use, sole_user
from workloads_smoke.logs import OUTCOME, read_json_object, write_json
from workloads_smoke.metadata import get_code
from workloads_smoke.outcome import TrialOutcome
from workloads_smoke.profiling import Profiler
from workloads_smoke.progress import TrialProgress
from workloads_smoke.registry import load_workload
from workloads_smoke.settings import RunSettings, TrialRequest
from workloads_smoke.submissions import Submission
from workloads_smoke.trial import run_loop, step_limit
from workloads_smoke.trial_setup import TrialContext

_HPARAMS = "hparams.json"
_WRITTEN_FIRST = {_HPARAMS, "meta_data_0.json", "flags_0.json"}
"""All that a trial writes before it trains."""


def run_trial(
    request: TrialRequest, settings: RunSettings, submission: Submission, slot: int = 0
) -> TrialOutcome:
    """Run a trial to its end, from its latest checkpoint if it has one.

    Args:
        request: Which trial.
        settings: Options of the run.
        submission: The functions to call.
        slot: Line of the terminal for the progress bar.

    Returns:
        How it ended; `outcome.json` holds the same. A trial that has ended stays as it is.

    Raises:
        UserError: The trial cannot start or go on as asked.
    """
    with contextlib.ExitStack() as stack:
        # Entered on rank 0 alone, which is the one that writes.
        on_rank_zero(lambda: _enter(stack, request.folder))
        ended = on_rank_zero(lambda: read_outcome(request.folder))
        if ended is not None:
            # Another run in this folder has been through it since this one listed what to train.
            return ended
        return _run_alone(request, settings, submission, slot)


def _enter(stack: contextlib.ExitStack, folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    stack.enter_context(sole_user(folder))


def _run_alone(
    request: TrialRequest, settings: RunSettings, submission: Submission, slot: int
) -> TrialOutcome:
    workload = load_workload(request.workload)
    hyperparameters = on_rank_zero(lambda: _keep_hyperparameters(request))
    if workload.caveat is not None and pytorch_setup()[1] == 0:
        logging.warning("%s: %s", request.workload, workload.caveat)
    limit = step_limit(settings, workload)
    progress = TrialProgress(
        f"{request.workload} trial {request.number}/{request.num_trials}",
        workload.step_hint if limit is None else min(limit, workload.step_hint),
        workload.target_metric_name,
        workload.validation_target_value,
        slot=slot,
        quiet=pytorch_setup()[1] != 0,
    )
    setting = None
    if hyperparameters is not None:
        setting = namedtuple("Hyperparameters", list(hyperparameters))(**hyperparameters)
    profiler = Profiler(enabled=settings.profile)
    context = TrialContext(request, settings, submission, workload, setting, profiler)
    try:
        outcome = run_loop(context, progress)
    finally:
        progress.close()
    on_rank_zero(lambda: write_json(request.folder / OUTCOME, asdict(outcome)))
    progress.finish(outcome.summary(workload))
    if settings.profile:
        progress.finish(f"time by action\n{profiler.summary()}")
    return outcome


def read_outcome(folder: Path) -> TrialOutcome | None:
    """How the trial in a folder ended, or None while it has not.

    Raises:
        UserError: `outcome.json` was changed into something else.
    """
    path = folder / OUTCOME
    if not path.exists():
        return None
    content = read_json_object(path)
    names = {field.name for field in fields(TrialOutcome)}
    if set(content) != names:
        raise UserError(
            f"{path} must hold {', '.join(sorted(names))}; delete it to go on with the trial, or "
            "start with --overwrite"
        )
    return TrialOutcome(**content)


def discard_unused(folders: Sequence[Path]) -> None:
    """Remove trials that ended before their first log, so that the command can be mended.

    Args:
        folders: Of trials, none of which is running: one that starts would not find its folder's parent.
    """
    for folder in folders:
        files = list(folder.iterdir()) if folder.exists() else []
        unused = {path.name for path in files} <= _WRITTEN_FIRST
        if folder.exists() and unused and not is_in_use(folder):
            for path in files:
                path.unlink()
            folder.rmdir()
    for folder in {folder.parent for folder in folders}:
        with contextlib.suppress(OSError):  # other trials are in it
            folder.rmdir()


def _keep_hyperparameters(request: TrialRequest) -> dict[str, Any] | None:
    """Write `hparams.json`, or go on with the setting that it has from an earlier start."""
    path = request.folder / _HPARAMS
    if request.hyperparameters is None:
        return None
    if not path.exists():
        write_json(path, request.hyperparameters)
        return request.hyperparameters
    saved = read_json_object(path)
    if saved != request.hyperparameters:
        logging.warning("%s: going on with the setting that is saved there", path)
    return saved


def warn_of_other_settings(complete: Sequence[TrialRequest]) -> None:
    """Say which trials that are kept were run at another setting than the search space has now."""
    for request in complete:
        path = request.folder / _HPARAMS
        if path.exists() and read_json_object(path) != request.hyperparameters:
            logging.warning("%s: complete at this setting, not at the one of now; it is kept", path)


def warn_of_other_code(requests: Sequence[TrialRequest], submission: Submission) -> None:
    """Say which trials were run or begun by other code: torch's, or the submission's file's."""
    code = get_code(submission.sha256)
    names = {"torch_version": "torch", "submission_sha256": f"content of {submission.path}"}
    for request in requests:
        recorded = latest_record(request.folder, "meta_data")
        others = [names[key] for key in code if recorded.get(key, code[key]) != code[key]]
        if others:
            logging.warning(
                "%s was run with another %s: what it has stays; --overwrite runs it anew",
                request.folder,
                " and another ".join(others),
            )
