"""Run independent trials in several processes at a time."""

import multiprocessing
import os
import sys
import threading
from multiprocessing.connection import wait
from multiprocessing.context import SpawnProcess
from typing import Any

import torch
from tqdm import tqdm

from workloads_smoke.errors import UserError
from workloads_smoke.settings import RunSettings, TrialRequest
from workloads_smoke.single_trial import run_trial
from workloads_smoke.submissions import load_submission


def run_in_parallel(requests: list[TrialRequest], settings: RunSettings, num_slots: int) -> None:
    """Run trials, each in a fresh process; the first failure ends them all.

    Args:
        requests: Trials to run; they share nothing but their workload's folder.
        settings: Options of the run.
        num_slots: Trials at a time; each gets its share of the CPU cores.

    Raises:
        UserError: A trial failed; its process has said why.
    """
    context = multiprocessing.get_context("spawn")
    terminal_lock = context.RLock()
    threads = max(1, (os.cpu_count() or 1) // num_slots)
    waiting = list(reversed(requests))
    running: dict[int, tuple[SpawnProcess, TrialRequest]] = {}
    try:
        while waiting or running:
            for slot in set(range(num_slots)) - set(running):
                if waiting:
                    request = waiting.pop()
                    arguments = (request, settings, slot, threads, terminal_lock)
                    process = context.Process(target=_work, args=arguments)
                    process.start()
                    running[slot] = (process, request)
            wait([process.sentinel for process, _ in running.values()])
            for slot, (process, request) in list(running.items()):
                if process.exitcode is not None:
                    del running[slot]
                    _check(process, request)
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.join()


def _check(process: SpawnProcess, request: TrialRequest) -> None:
    """Turn a process's bad end into an error."""
    if process.exitcode:
        raise UserError(
            f"trial {request.number} of {request.workload} failed with exit status "
            f"{process.exitcode}; see above. --resume_last_run goes on with the others"
        )


def _work(
    request: TrialRequest, settings: RunSettings, slot: int, threads: int, terminal_lock: Any
) -> None:
    """Body of a worker process."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    torch.set_num_threads(threads)
    tqdm.set_lock(terminal_lock)
    try:
        run_trial(request, settings, load_submission(settings.submission_path), slot)
    except UserError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _end_with_parent() -> None:
    """Do not train on, unseen, when the parent process was killed."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
