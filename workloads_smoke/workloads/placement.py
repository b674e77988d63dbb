"""Where this process computes and which slice of a global batch is its own."""

import os
from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class Placement:
    """A process's rank, how many there are, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def distributed(self) -> bool:
        """Whether collectives are needed to combine metrics and gradients."""
        return self.world_size > 1


def current_placement() -> Placement:
    """Read the placement off the initialised process group, or of a lone process.

    `torchrun` sets LOCAL_RANK; the process group must be initialised before a workload is built,
    as the official runner does it, or each process would train on the whole batch alone.

    Raises:
        RuntimeError: If LOCAL_RANK announces several processes without a process group.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    grouped = distributed.is_available() and distributed.is_initialized()
    if not grouped and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise RuntimeError(
            "WORLD_SIZE > 1 without a process group: call torch.distributed.init_process_group() "
            "before building a workload."
        )
    device = torch.device(f"cuda:{local_rank}" if torch.cuda.is_available() else "cpu")
    if not grouped:
        return Placement(0, 1, device)
    return Placement(distributed.get_rank(), distributed.get_world_size(), device)


def gather_rows_over_processes(rows: Tensor) -> Tensor:
    """Return the rows of all processes, in the order of ranks; each must bring equally many."""
    if not (distributed.is_available() and distributed.is_initialized()):
        return rows
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
