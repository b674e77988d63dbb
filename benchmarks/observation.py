"""One step on a GPU, watched: its times, kernels, waits and memory.

Three times. *Device* is that of the kernels: what a step costs a training loop that is ahead of the device.
*Host* is until the call returns with nothing queued before it: where that is longer than the device time of
the whole training step, a loop is behind the device. *Wall* is from an idle device to an idle one.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.profiler import ProfilerActivity, profile

NOT_KERNELS = ("Memcpy", "Memset")


class Observed(NamedTuple):
    """One step."""

    wall: float
    """Seconds from an idle device to an idle one."""
    host: float
    """Seconds until the call returned."""
    device: float
    """Seconds of all kernels, copies included."""
    kernels: int
    """Launched, copies not among them."""
    waits: int
    """Of the host for the device, as torch sees them."""
    peak: int
    """Bytes of the allocator's beyond those at the beginning."""


def observe(step: Callable[[], object], between: Callable[[], object], steps: int) -> Observed:
    """Take steps of one kind: some timed, one more watched by the profiler and for waits and memory.

    Args:
        step: What is observed.
        between: Called before every step, for new gradients; not observed.
        steps: That are timed; the shortest wall and host times count, maybe of two of them.

    Raises:
        RuntimeError: By torch, where there is no GPU.
    """
    walls, hosts = [], []
    for _ in range(steps):
        between()
        torch.cuda.synchronize()
        begun = time.perf_counter()
        step()
        returned = time.perf_counter()
        torch.cuda.synchronize()
        walls.append(time.perf_counter() - begun)
        hosts.append(returned - begun)
    between()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        waits = _waits(step)
        torch.cuda.synchronize()
    on_device = [event for event in profiled.events() or () if event.device_type.name == "CUDA"]
    return Observed(
        wall=min(walls),
        host=min(hosts),
        device=1e-6 * sum(event.time_range.elapsed_us() for event in on_device),
        kernels=sum(not event.name.startswith(NOT_KERNELS) for event in on_device),
        waits=waits,
        peak=torch.cuda.max_memory_allocated() - before,
    )


def _waits(step: Callable[[], object]) -> int:
    """How often a step makes the host wait, of the calls that torch warns of."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return sum("synchroniz" in str(warning.message) for warning in caught)
