"""Several processes on this machine, joined in a gloo group: how the distributed tests run."""

from __future__ import annotations

import faulthandler
import os
from collections.abc import Callable
from datetime import timedelta
from multiprocessing import set_forkserver_preload
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, multiprocessing

from workloads_smoke.distributed import leave_process_group

set_forkserver_preload(["torch.distributed.checkpoint", "torch.distributed.tensor", "shampoo_core"])

Job = Callable[..., Any]
"""A function at the top level of a module; what it returns is saved by `torch.save`."""


def on_ranks(
    num_ranks: int, folder: Path, job: Job, *arguments: Any, backend: str = "gloo"
) -> list[Any]:
    """Run ``job(*arguments)`` on every rank of a new group and return what each returned.

    Args:
        num_ranks: Processes.
        folder: Empty, for the store and the answers.
        job: What to run.
        arguments: For it; have to be picklable.
        backend: Of the group.
    """
    folder.mkdir(parents=True, exist_ok=True)
    multiprocessing.start_processes(
        _process,
        (num_ranks, str(folder), backend, job, arguments),
        nprocs=num_ranks,
        # Starts from one process that has imported these already, and has no threads yet.
        start_method="forkserver",
    )
    return [torch.load(folder / f"answer_{rank}", weights_only=False) for rank in range(num_ranks)]


def join(rank: int, num_ranks: int, store: Path, *, seconds: float, backend: str = "gloo") -> None:
    """Join the group that meets at a file, as a rank with one thread.

    Args:
        rank: Of this process.
        num_ranks: Of the group.
        store: A file that is not there yet, the same for all.
        seconds: How long a rank waits for the others, at this and at each collective.
        backend: Of the group.
    """
    torch.set_num_threads(1)
    dist.init_process_group(
        backend,
        init_method=f"file://{store}",
        rank=rank,
        world_size=num_ranks,
        timeout=timedelta(seconds=seconds),
    )


def _process(
    rank: int, num_ranks: int, folder: str, backend: str, job: Job, arguments: tuple[Any, ...]
) -> None:
    os.environ["OMP_NUM_THREADS"] = "1"
    faulthandler.enable()  # a process that is killed by a signal says where it was
    join(rank, num_ranks, Path(folder) / "store", seconds=120, backend=backend)
    answer = job(*arguments)
    torch.save(answer, Path(folder) / f"answer_{rank}")
    leave_process_group()


def assert_equal_on_ranks(tensors: list[Tensor], what: str) -> None:
    """Raise unless all ranks hold the same bits."""
    flat = torch.cat([tensor.detach().reshape(-1).double() for tensor in tensors])
    everyone = [torch.empty_like(flat) for _ in range(dist.get_world_size())]
    dist.all_gather(everyone, flat)
    for rank, other in enumerate(everyone):
        assert torch.equal(flat.view(torch.int64), other.view(torch.int64)), (what, rank)
