"""Checkpoints of a trial: written whole or not at all, read with care.

A checkpoint has the official contents - model, optimizer state, model state, train state, evaluation
results, step, number of resumptions - and one entry more, `runner_state`: the random generators,
how many batches were drawn, and how many rows the logs had. With it a resumed trial goes on with
the same bits on one process.

Rank 0 writes. It does so after `prepare_for_eval`, so the model holds the evaluation weights and the
optimizer state must lead back from them.

Source: behaviour of mlcommons/algorithmic-efficiency v0.6, `algoperf/checkpoint_utils.py`.
"""

import functools
import random
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import logging
from torch.nn.parallel import DataParallel, DistributedDataParallel

from workloads_smoke.atomic_files import atomic_write
from workloads_smoke.errors import UserError

_NAME = re.compile(r"checkpoint_(\d+)")
_KEYS = {
    "model_params",
    "optimizer_state",
    "model_state",
    "train_state",
    "eval_results",
    "global_step",
    "preemption_count",
    "runner_state",
}


@dataclass
class TrainingState:
    """All that changes while a trial runs.

    Attributes:
        optimizer_state: The submission's dict; every value needs `state_dict`/`load_state_dict`.
        model_params: The model, possibly wrapped for several processes.
        model_state: The workload's auxiliary state, often None.
        train_state: Times and verdicts, with the official keys.
        eval_results: `(global_step, metrics)` of each evaluation.
        global_step: Steps taken.
        preemption_count: How often the trial was resumed.
    """

    optimizer_state: Any
    model_params: Any
    model_state: Any
    train_state: dict[str, Any]
    eval_results: list[tuple[int, dict[str, Any]]]
    global_step: int = 0
    preemption_count: int = 0


def save_checkpoint(
    folder: Path, state: TrainingState, runner_state: dict[str, Any], keep_earlier: bool
) -> Path:
    """Write `checkpoint_<step>`; an earlier file of that name is replaced in one go.

    Args:
        folder: The trial's folder.
        state: What to save.
        runner_state: Batches drawn and log rows; the random generators are added here.
        keep_earlier: Whether earlier checkpoints stay (`--save_intermediate_checkpoints`).

    Returns:
        The file written.
    """
    path = folder / f"checkpoint_{state.global_step}"
    content = {
        "model_params": _unwrapped(state.model_params).state_dict(),
        "optimizer_state": _optimizer_state_dicts(state.optimizer_state),
        "model_state": state.model_state,
        "train_state": state.train_state,
        "eval_results": tuple(state.eval_results),
        "global_step": state.global_step,
        "preemption_count": state.preemption_count,
        "runner_state": {**runner_state, "random": _random_state()},
    }
    with atomic_write(path, durable=True) as file:
        torch.save(content, file)
    if not keep_earlier:
        for earlier in find_checkpoints(folder):
            if earlier != path:
                earlier.unlink()
    return path


def find_checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in a trial's folder, earliest step first."""
    found = [(match, path) for path in folder.iterdir() if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found, key=lambda pair: int(pair[0][1]))]


def read_checkpoint(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """Read the latest checkpoint of a trial.

    Args:
        folder: The trial's folder.
        device: Where to put its tensors.

    Returns:
        The content, or None where there is no checkpoint yet.

    Raises:
        UserError: The file is damaged. It is left as it is; the message names the one before it.
    """
    checkpoints = find_checkpoints(folder) if folder.is_dir() else []
    if not checkpoints:
        return None
    path = checkpoints[-1]
    problem = _damage(path)
    if problem is None:
        # Optimizer states of other people's submissions hold more than tensors, hence no
        # `weights_only`: resume a run only from a folder that you trust.
        content = torch.load(path, map_location=device, weights_only=False)
        missing = _KEYS - set(content) if isinstance(content, dict) else _KEYS
        if not missing:
            return content
        problem = f"it lacks {', '.join(sorted(missing))}"
    remedy = (
        f"move it away to resume from {checkpoints[-2].name}"
        if len(checkpoints) > 1
        else "move it away to start this trial anew; there is no earlier checkpoint"
    )
    raise UserError(f"checkpoint {path} is damaged: {problem}. Nothing was changed; {remedy}")


def restore(content: dict[str, Any], state: TrainingState) -> dict[str, Any]:
    """Put a checkpoint's content into a freshly initialised trial.

    Model and optimizer take the values in place, so that wrappers and references stay valid.

    Args:
        content: What `read_checkpoint` returned.
        state: Changed in place.

    Returns:
        The checkpoint's `runner_state`. The generators are not set yet: call `restore_random_state`
        once nothing more will be drawn on the way back.

    Raises:
        UserError: Something in `optimizer_state` cannot be restored.
    """
    _unwrapped(state.model_params).load_state_dict(content["model_params"])
    saved = content["optimizer_state"]
    for key, value in state.optimizer_state.items():
        if key not in saved or not hasattr(value, "load_state_dict"):
            raise UserError(
                f"optimizer_state[{key!r}] of the submission cannot be resumed: "
                f"{type(value).__name__} needs state_dict and load_state_dict "
                "(the official runner cannot resume it either)"
            )
        value.load_state_dict(saved[key])
    state.model_state = content["model_state"]
    state.train_state = content["train_state"]
    state.eval_results = list(content["eval_results"])
    state.global_step = content["global_step"]
    state.preemption_count = content["preemption_count"] + 1
    return content["runner_state"]


def restore_random_state(runner_state: dict[str, Any]) -> None:
    """Set Python's, NumPy's and torch's generators to where they were when the checkpoint was made."""
    states = runner_state["random"]
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"].cpu())
    if states["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([state.cpu() for state in states["cuda"]])


def _random_state() -> dict[str, Any]:
    """States of all global generators that a submission or workload may use."""
    return {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _optimizer_state_dicts(optimizer_state: dict[str, Any]) -> dict[str, Any]:
    """State dict of each value that has one; the others are named in a warning."""
    saved = {}
    for key, value in optimizer_state.items():
        if hasattr(value, "state_dict"):
            saved[key] = value.state_dict()
        else:
            _announce_unsaved(key, type(value).__name__)
    return saved


@functools.cache  # once a process is enough: checkpoints are many
def _announce_unsaved(key: str, type_name: str) -> None:
    logging.warning(
        "optimizer_state[%r] is not in the checkpoint: %s has no state_dict", key, type_name
    )


def _unwrapped(model: Any) -> Any:
    """The model inside the wrapper for several processes or devices."""
    return model.module if isinstance(model, DataParallel | DistributedDataParallel) else model


def _damage(path: Path) -> str | None:
    """What is wrong with a file as an archive: cut off, overwritten, a bit changed. None if sound."""
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        return f"not a whole checkpoint file ({error})"
    return None if broken is None else f"the checksum of {broken} does not fit"
