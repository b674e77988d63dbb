"""How the work is shared among ranks: what a user may choose, and what follows from where we run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal
from weakref import WeakKeyDictionary

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
            ranks. Ranks that hold a DTensor together always share its work: under HSDP this is their
            number times that of the replicas that share it with them, and their number alone leaves
            every replica to itself. Of DTensors that ranks hold in full it is counted along the last axis
            of their mesh.
        overlap: Send the updates of every device, dtype and parameter group as soon as they are
            there, while the next are computed, instead of all together.
        process_group: Ranks that share the work; None means all.

    Raises:
        TypeError: An argument is of the wrong type.
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
        group = self.process_group
        if group is not None and not (dist.is_available() and isinstance(group, dist.ProcessGroup)):
            raise TypeError(
                f"{owner}: process_group must be a group of torch.distributed that this rank is in, or "
                f"None for all ranks, got {group!r}"
            )
        if self.ranks_per_group is not None and self.process_group is not None:
            raise ValueError(
                f"{owner}: ranks_per_group={self.ranks_per_group} together with a process_group: "
                "give one of them; a process_group can be a part of all ranks already"
            )

    def facts(self) -> dict[str, str]:
        """What ranks that share the work have to agree on, in words; their group is each one's own."""
        names = ("communication_dtype", "ranks_per_group", "overlap")
        return {f"{name} of Distribution": str(getattr(self, name)) for name in names}


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
    """The ranks that share the work on plain parameters with this one; a collective of all ranks.

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
    return part_of_ranks([list(range(size))], ranks_per_group)


def neighbours(
    owner: str, distribution: Distribution, mesh: DeviceMesh, axis: int
) -> dist.ProcessGroup:
    """The ranks along an axis of a mesh that share the work on what all of them hold in full.

    Raises:
        ValueError: ``ranks_per_group`` is less than their number and does not divide it.
    """
    size, asked = mesh.size(axis), distribution.ranks_per_group
    if asked is None or asked >= size:
        return mesh.get_group(axis)
    if size % asked != 0:
        raise ValueError(
            f"{owner}: Distribution(ranks_per_group={asked}) does not fit parameters that {size} ranks of "
            f"a mesh hold in full: give a divisor of {size}"
        )
    return part_of_ranks(_along(mesh, axis), asked)


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
    return None if sharing == 1 else part_of_ranks(_along(mesh, axes[0]), sharing)


def _along(mesh: DeviceMesh, axis: int) -> list[list[int]]:
    """The rows of ranks along an axis of a mesh."""
    rows: list[list[int]] = mesh.mesh.movedim(axis, -1).reshape(-1, mesh.size(axis)).tolist()
    return rows


def part_of_ranks(rows: Sequence[Sequence[int]], size: int) -> dist.ProcessGroup:
    """The group of ``size`` neighbours in a row that this rank is one of; made once and used again.

    A collective: of all ranks where the rows have all of them, otherwise of those neighbours, who then
    have to be in as many groups each.
    """
    rank, world = dist.get_rank(), dist.group.WORLD
    assert world is not None
    parts = [tuple(row[start : start + size]) for row in rows for start in range(0, len(row), size)]
    (mine,) = (part for part in parts if rank in part)
    known = _GROUPS.setdefault(world, {})
    if mine not in known:
        if sum(map(len, parts)) == dist.get_world_size():
            # Every rank has to take part in making every group.
            made = {part: dist.new_group(list(part)) for part in parts}
            known[mine] = made[mine]
        else:
            known[mine] = dist.new_group(list(mine), use_local_synchronization=True)
    return known[mine]


_GROUPS: WeakKeyDictionary[dist.ProcessGroup, dict[tuple[int, ...], dist.ProcessGroup]] = (
    WeakKeyDictionary()
)
"""Groups made here by the world that they are part of: a process group takes threads, files and, on a GPU,
a communicator, and is not freed with the optimizer that asked for it."""
