"""Facts that make a log worth keeping: workload constants, machine, software.

Key names are those of the official `meta_data_<p>.json`; facts that would need packages beyond ours
(psutil, GPUtil) are present when these are installed.

Source: behaviour of mlcommons/algorithmic-efficiency v0.6, `algoperf/logger_utils.py`.
"""

import contextlib
import importlib
import importlib.util
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

# Properties that raise before the model exists, or are trees rather than numbers.
_NOT_CONSTANTS = ("param_shapes", "model_params_types")


def get_meta_data(workload: Any, rng_seed: int, submission_sha256: str) -> dict[str, Any]:
    """Collect the facts of a run.

    Args:
        workload: Its public attributes that are numbers, strings or booleans are recorded.
        rng_seed: Seed of the run; `--resume_last_run` reads it back.
        submission_sha256: Of the submission's file.

    Returns:
        A flat dict that JSON can hold.
    """
    return {
        **_workload_constants(workload),
        **_utilization(),
        **_software(),
        **_hardware(),
        "rng_seed": rng_seed,
        **get_code(submission_sha256),
    }


def get_code(submission_sha256: str) -> dict[str, str]:
    """What should be the same when a trial is resumed: torch, and the submission's file."""
    return {"torch_version": torch.__version__, "submission_sha256": submission_sha256}


def _workload_constants(workload: Any) -> dict[str, Any]:
    """`workload.<name>` of every simple public attribute."""
    constants = {}
    for name in dir(workload):
        if name.startswith("_") or name in _NOT_CONSTANTS:
            continue
        # A property of someone's workload may need a state that does not exist yet.
        with contextlib.suppress(NotImplementedError, ValueError, AttributeError):
            value = getattr(workload, name)
            if isinstance(value, float | int | str | bool):
                constants[f"workload.{name}"] = value
    return constants


def _utilization() -> dict[str, Any]:
    """Load and memory at the start."""
    if importlib.util.find_spec("psutil") is None:
        return {}
    psutil = importlib.import_module("psutil")

    memory = psutil.virtual_memory()
    return {
        "cpu.util.avg_percent_since_last": psutil.cpu_percent(interval=None),
        "mem.total": memory.total,
        "mem.available": memory.available,
        "mem.used": memory.used,
        "mem.percent_used": memory.percent,
    }


def _software() -> dict[str, Any]:
    """Versions. No host name and no repository address: they may be private."""
    return {
        "os_platform": platform.platform(),
        "python_version": platform.python_version(),
        "python_compiler": platform.python_compiler(),
        "torch_num_threads": torch.get_num_threads(),
        **_git(),
    }


def _git() -> dict[str, str]:
    """Branch and commit of the working directory, if it is in a repository."""
    commands = {
        "git_branch": ["git", "rev-parse", "--abbrev-ref", "HEAD"],
        "git_commit_hash": ["git", "rev-parse", "HEAD"],
    }
    try:
        return {
            key: subprocess.run(command, capture_output=True, check=True, text=True).stdout.strip()
            for key, command in commands.items()
        }
    except (OSError, subprocess.CalledProcessError):
        return {}


def _hardware() -> dict[str, Any]:
    """Names and numbers of processors."""
    hardware: dict[str, Any] = {
        "cpu_model_name": _cpu_model_name(),
        "cpu_count": os.cpu_count(),
    }
    if torch.cuda.is_available():
        hardware["gpu_model_name"] = torch.cuda.get_device_name(0)
        hardware["gpu_count"] = torch.cuda.device_count()
    return hardware


def _cpu_model_name() -> str:
    """The processor's name; Linux tells it in a file, elsewhere the platform knows."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
