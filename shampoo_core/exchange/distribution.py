"""How the work is shared among ranks: what a user may choose, and what follows from where we run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from shampoo_core.config import check_choice, check_count, check_flags

COMMUNICATION_DTYPES = (None, torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Distribution:
    """How ranks share the work of an optimizer.

    Args:
        communication_dtype: In which updates are sent: float32, bfloat16 or, of replicated parameters,
            float16; None sends them as they are computed. Owners add what the others receive, so that
            parameters stay equal on all ranks whatever the rounding. Gradients are never rounded.
        ranks_per_group: Neighbouring ranks that share the work, such as those of one machine; the
            other groups do the same work again and nothing is sent between groups. None means all
            ranks. Ranks that hold a sharded parameter together always share its work: under HSDP this is
            their number times that of the replicas that share it with them, and their number alone
            leaves every replica to itself.
        overlap: Send the updates of every device, dtype and parameter group as soon as they are
            there, while the next are computed, instead of all together.
        process_group: Ranks that share the work; None means all.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: An argument is out of range.
    """

    communication_dtype: torch.dtype | None = None
    ranks_per_group: int | None = None
    overlap: bool = False
    process_group: dist.ProcessGroup | None = None

    def __post_init__(self) -> None:
        owner = "Distribution"
        check_flags(self)
        check_choice(owner, "communication_dtype", self.communication_dtype, COMMUNICATION_DTYPES)
        check_count(owner, "ranks_per_group", self.ranks_per_group, optional=True)
        if self.ranks_per_group is not None and self.process_group is not None:
            raise ValueError(
                f"{owner}: ranks_per_group={self.ranks_per_group} together with a process_group: "
                "give one of them; a process_group can be a part of all ranks already"
            )


def checked_distribution(
    owner: str, distributed: Distribution | Literal["auto"] | None
) -> Distribution | None:
    """What the argument ``distributed`` stands for.

    Raises:
        TypeError: It is something else.
    """
    if distributed == "auto":
        return Distribution()
    if distributed is not None and not isinstance(distributed, Distribution):
        raise TypeError(
            f"{owner}: distributed must be a Distribution, 'auto' or None, got {distributed!r}"
        )
    return distributed


def process_group_of(distribution: Distribution) -> dist.ProcessGroup | None:
    """All ranks that train together, or None where there is only one."""
    if not (dist.is_available() and dist.is_initialized()):
        return None
    group = dist.group.WORLD if distribution.process_group is None else distribution.process_group
    return group if group is not None and dist.get_world_size(group) > 1 else None


def sharing_group(distribution: Distribution, group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The ranks that share the work with this one; a collective of all ranks.

    Raises:
        ValueError: ``ranks_per_group`` does not divide the number of ranks.
    """
    size, ranks_per_group = dist.get_world_size(group), distribution.ranks_per_group
    if ranks_per_group is None or ranks_per_group == size:
        return group
    if size % ranks_per_group != 0:
        raise ValueError(
            f"Distribution: ranks_per_group must divide the number of ranks, {size}; "
            f"got {ranks_per_group}"
        )
    rank = dist.get_rank(group)
    mine = group
    for start in range(0, size, ranks_per_group):
        # Every rank has to take part in making every group.
        made = dist.new_group(list(range(start, start + ranks_per_group)))
        if start <= rank < start + ranks_per_group:
            mine = made
    return mine


def sharing_replicas(
    owner: str, distribution: Distribution, mesh: DeviceMesh, axis: int
) -> dist.ProcessGroup | None:
    """The ranks that hold the same shards as this one and share the work; a collective of them.

    Args:
        owner: For the message.
        distribution: How to share.
        mesh: Of a parameter.
        axis: On which its rows are split; replicas lie along the first other one that has several ranks.

    Returns:
        None where every replica works for itself.

    Raises:
        ValueError: ``ranks_per_group`` is not a whole number of replicas, or does not divide theirs.
    """
    axes = [other for other in range(mesh.ndim) if other != axis and mesh.size(other) > 1]
    if not axes:
        return None
    num_holders, num_replicas = mesh.size(axis), mesh.size(axes[0])
    asked = distribution.ranks_per_group
    if asked is None:
        return mesh.get_group(axes[0])
    sharing = max(1, asked // num_holders)
    if asked > num_holders * sharing or num_replicas % sharing != 0:
        raise ValueError(
            f"{owner}: Distribution(ranks_per_group={asked}) does not fit parameters that "
            f"{num_holders} ranks hold together, in {num_replicas} replicas: give {num_holders} times a "
            f"divisor of {num_replicas}"
        )
    if sharing == 1:
        return None
    place = mesh.get_local_rank(axes[0])
    position: list[int | slice] = list(mesh.get_coordinate() or ())
    first = place - place % sharing
    position[axes[0]] = slice(first, first + sharing)
    ranks = mesh.mesh[tuple(position)].tolist()
    # The others, some of them maybe of another mesh, make their own.
    return dist.new_group(ranks, use_local_synchronization=True)
