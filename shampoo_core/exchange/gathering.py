"""All state on one rank, for checkpoints that one rank writes alone."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

Key = tuple[int, str]
"""Parameter and name of an entry."""

MESSAGE_BYTES = 64 * 2**20
"""A message is at most this long, unless one entry is longer: state is a multiple of the model, and
there may be no room for a second copy on the device."""


class _Entry(NamedTuple):
    key: Key
    shape: tuple[int, ...]
    dtype: torch.dtype


def gather(own: Mapping[Key, Tensor], group: dist.ProcessGroup) -> dict[Key, Tensor]:
    """Send the entries of all ranks to the group's first rank; a collective of the group.

    Args:
        own: Entries of this rank, all on one kind of device.
        group: Ranks that have the state together, some of it maybe twice.

    Returns:
        On the first rank the entries that it lacked, copied to the host; nothing on the others.
    """
    num_ranks, rank = dist.get_world_size(group), dist.get_rank(group)
    listed = [_Entry(key, tuple(tensor.shape), tensor.dtype) for key, tensor in own.items()]
    everyone: list[list[_Entry]] = [[] for _ in range(num_ranks)]
    dist.all_gather_object(everyone, listed, group=group)
    first = dist.get_global_rank(group, 0)
    device = _device_of(group)
    gathered: dict[Key, Tensor] = {}
    known = {entry.key for entry in everyone[0]}
    for sender in range(1, num_ranks):
        # Groups of ranks that do the same work have the same state.
        new = [entry for entry in everyone[sender] if entry.key not in known]
        known.update(entry.key for entry in new)
        for message in _messages(new):
            if rank == sender:
                parts = [own[entry.key].detach().to(device).reshape(-1) for entry in message]
                dist.send(torch.cat(parts), first, group=group)
            elif rank == 0:
                lengths = [math.prod(entry.shape) for entry in message]
                buffer = torch.empty(sum(lengths), dtype=message[0].dtype, device=device)
                dist.recv(buffer, dist.get_global_rank(group, sender), group=group)
                for entry, part in zip(message, buffer.cpu().split(lengths), strict=True):
                    gathered[entry.key] = part.view(entry.shape).clone()
    return gathered


def _messages(entries: list[_Entry]) -> Iterator[list[_Entry]]:
    """Entries of one dtype together, in messages of limited length."""
    by_dtype: dict[torch.dtype, list[_Entry]] = {}
    for entry in entries:
        by_dtype.setdefault(entry.dtype, []).append(entry)
    for dtype, same in by_dtype.items():
        message: list[_Entry] = []
        size = 0
        for entry in same:
            nbytes = math.prod(entry.shape) * dtype.itemsize
            if message and size + nbytes > MESSAGE_BYTES:
                yield message
                message, size = [], 0
            message.append(entry)
            size += nbytes
        yield message


def _device_of(group: dist.ProcessGroup) -> torch.device:
    """Where the group's messages have to be."""
    on_gpu = "nccl" in dist.get_backend(group)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")
