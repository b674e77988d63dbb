"""One or several processes: who am I, on which device, and what time is it for all of us.

The same facts as the official `algoperf.pytorch_utils`, with one addition: without a GPU for every
process the group talks over gloo on the CPU, so that `torchrun` works on a laptop.

Source: behaviour of mlcommons/algorithmic-efficiency v0.6, `algoperf/pytorch_utils.py`.
"""

import os
import time
from typing import Any

import torch
import torch.distributed as dist


def pytorch_setup() -> tuple[bool, int, torch.device, int]:
    """Tell this process its place; starts nothing and may be called before the process group.

    Returns:
        `(use_pytorch_ddp, rank, device, n_gpus)`: whether `torchrun` started us, the local rank (0
        without `torchrun`), the device to put tensors on, and the number of GPUs that this run
        can use (0 where the processes share the CPU).
    """
    use_pytorch_ddp = "LOCAL_RANK" in os.environ
    rank = int(os.environ["LOCAL_RANK"]) if use_pytorch_ddp else 0
    n_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if n_gpus < world_size():
        n_gpus = 0
    device = torch.device(f"cuda:{rank}" if n_gpus else "cpu")
    return use_pytorch_ddp, rank, device, n_gpus


def pytorch_init(use_pytorch_ddp: bool, rank: int, profiler: Any = None) -> None:
    """Join the process group: nccl with a GPU each, gloo otherwise.

    Args:
        use_pytorch_ddp: Whether `torchrun` started this process; False does nothing.
        rank: Local rank, from `pytorch_setup`.
        profiler: Unused; the official function takes one in this place.
    """
    del profiler
    torch.backends.cudnn.benchmark = True
    if not use_pytorch_ddp:
        return
    _, _, device, _ = pytorch_setup()
    if device.type == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")


def world_size() -> int:
    """Number of processes that `torchrun` started, or 1."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "LOCAL_RANK" in os.environ else 1


def sync_ddp_time(seconds: float, device: torch.device) -> float:
    """The latest of the times that the processes bring, so that the slowest one is counted."""
    latest = torch.tensor(seconds, dtype=torch.float64, device=device)
    dist.all_reduce(latest, op=dist.ReduceOp.MAX)
    return latest.item()


def current_time() -> float:
    """Wall-clock time in seconds once the devices are idle; equal on all processes."""
    use_pytorch_ddp, _, device, _ = pytorch_setup()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    now = time.time()
    return sync_ddp_time(now, device) if use_pytorch_ddp else now


def from_rank_zero(value: Any) -> Any:
    """What rank 0 passed, on every rank: random seeds, time stamps, verdicts on files."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
