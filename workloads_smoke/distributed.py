"""One or several processes: who am I, on which device, and what time is it for all of us.

The same facts as the official `algoperf.pytorch_utils`, with one addition: without a GPU for every
process the group talks over gloo on the CPU, so that `torchrun` works on a laptop.

Source: behaviour of mlcommons/algorithmic-efficiency v0.6, `algoperf/pytorch_utils.py`.
"""

import gc
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from workloads_smoke.errors import UserError

Result = TypeVar("Result")


def pytorch_setup() -> tuple[bool, int, torch.device, int]:
    """Tell this process its place; starts nothing and may be called before the process group.

    Returns:
        `(use_pytorch_ddp, rank, device, n_gpus)`: whether `torchrun` started us, the local rank (0
        without `torchrun`), the device to put tensors on, and the number of GPUs in the machine.
    """
    use_pytorch_ddp = "LOCAL_RANK" in os.environ
    rank = int(os.environ["LOCAL_RANK"]) if use_pytorch_ddp else 0
    device = torch.device(f"cuda:{rank}" if torch.cuda.is_available() else "cpu")
    return use_pytorch_ddp, rank, device, torch.cuda.device_count()


def pytorch_init(use_pytorch_ddp: bool, rank: int, profiler: Any = None) -> None:
    """Join the process group: nccl on GPUs, gloo on a CPU.

    Args:
        use_pytorch_ddp: Whether `torchrun` started this process; False does nothing.
        rank: Local rank, from `pytorch_setup`.
        profiler: Unused; the official function takes one in this place.

    Raises:
        UserError: There are GPUs, but fewer than processes.
    """
    del profiler
    if not use_pytorch_ddp:
        return
    _, _, device, n_gpus = pytorch_setup()
    if device.type == "cpu":
        dist.init_process_group("gloo")
        return
    if n_gpus < world_size():
        raise UserError(
            f"torchrun started {world_size()} processes for {n_gpus} GPUs; start one for each, or "
            "set CUDA_VISIBLE_DEVICES to nothing to use the CPU"
        )
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")


def leave_process_group() -> None:
    """End the process group, once all processes are done with it."""
    dist.barrier()
    # In torch 2.5, gloo's threads need the interpreter lock to let go of the last tensors, and
    # destroying the group waits for them with the lock held: one run in five never ended. Sleeping
    # gives the lock away. Delete this with support for torch 2.5.
    time.sleep(0.2)
    dist.destroy_process_group()


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


def release_device_memory() -> None:
    """Give cached GPU memory back, as the official runner does around every evaluation.

    A submission meets the consequence in both: captured CUDA graphs do not survive it.
    """
    if torch.cuda.is_available():
        torch._C._cuda_clearCublasWorkspaces()
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def on_rank_zero(action: Callable[[], Result]) -> Result:
    """Run something on rank 0 only and give every rank its result, or its `UserError`.

    For decisions about files, random seeds and time stamps: ranks that decided for themselves could
    disagree, and one that raised alone would leave the others waiting.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return action()
    box: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            box[0] = action()
        except UserError as error:
            box[1] = error
    dist.broadcast_object_list(box, src=0)
    if box[1] is not None:
        raise box[1]
    return box[0]
