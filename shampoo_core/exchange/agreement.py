"""Do all ranks mean the same? Asked where a difference would be a hang or a silent drift later."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_core.exchange.base import local_of

Part = tuple[int, ...]
"""Places on the axes of a mesh that split a parameter; empty where a rank holds all of it."""


def check_agreement(owner: str, facts: Mapping[str, str], group: dist.ProcessGroup) -> None:
    """Raise on every rank unless all ranks bring the same facts.

    Args:
        owner: For the message.
        facts: Name and value of each.
        group: Ranks that are asked; all have to call this.

    Raises:
        ValueError: Two ranks differ; the message names the fact, the ranks and both values.
    """
    digest = hashlib.sha256(repr(sorted(facts.items())).encode()).hexdigest()
    if len(set(_from_all(digest, group))) == 1:
        return
    everyone: list[Mapping[str, str]] = _from_all(dict(facts), group)
    first = everyone[0]
    for rank, other in enumerate(everyone):
        for name in [*first, *(name for name in other if name not in first)]:
            mine, theirs = first.get(name, "absent"), other.get(name, "absent")
            if mine != theirs:
                raise ValueError(
                    f"{owner}: ranks 0 and {rank} of the process group differ: {name} is {mine} on "
                    f"rank 0 and {theirs} on rank {rank}. Ranks that share the work need the same "
                    "model and options; Distribution(process_group=...) names those that do, "
                    "distributed=None makes every rank work for itself"
                )


def check_replicas(owner: str, parameters: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Raise on every rank unless all ranks hold the same weights, bit by bit.

    Waits for the device, once: updates are sent instead of weights, so that weights that differ at
    first would differ for good.

    Args:
        owner: For the message.
        parameters: Held in full by every rank, or DTensors, whose equal parts are compared.
        group: Ranks that are asked; all have to call this.

    Raises:
        ValueError: Two ranks differ; the message names the parameter.
    """
    if not parameters:
        return
    sums = torch.stack([_sum_of_bits(local_of(parameter)).cpu() for parameter in parameters])
    parts = [_part(parameter) for parameter in parameters]
    first_with: dict[tuple[int, Part], tuple[int, int]] = {}
    for rank, other in enumerate(_from_all(list(zip(parts, sums.tolist(), strict=True)), group)):
        for index, (part, theirs) in enumerate(other):
            first, expected = first_with.setdefault((index, part), (rank, theirs))
            if theirs != expected:
                raise ValueError(
                    f"{owner}: parameter {index} of shape {tuple(parameters[index].shape)} has other "
                    f"values on rank {rank} of the process group than on rank {first}; "
                    "broadcast the model before the first step, as DistributedDataParallel does, or "
                    "pass distributed=None where ranks train models of their own"
                )


def _part(parameter: Tensor) -> Part:
    """Which part of a parameter this rank holds: its place on the axes of a mesh that split it."""
    if not isinstance(parameter, DTensor):
        return ()
    coordinate = parameter.device_mesh.get_coordinate() or ()
    return tuple(
        place
        for place, placement in zip(coordinate, parameter.placements, strict=True)
        if not placement.is_replicate()
    )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """Sum of all numbers, read as integers: differs for almost all different tensors, NaN or not."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    bits = tensor.detach().reshape(-1).view(integers[tensor.element_size()])
    return bits.sum(dtype=torch.int64)


def _from_all(value: Any, group: dist.ProcessGroup) -> list[Any]:
    box: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(box, value, group=group)
    return box
