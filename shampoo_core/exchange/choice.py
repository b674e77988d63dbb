"""Which exchange a parameter travels by: found out from the parameter and the process group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from shampoo_core.exchange.agreement import check_agreement, check_replicas
from shampoo_core.exchange.base import Exchange
from shampoo_core.exchange.distribution import (
    Distribution,
    neighbours,
    process_group_of,
    sharing_group,
    sharing_replicas,
)
from shampoo_core.exchange.local import LocalExchange
from shampoo_core.exchange.replicated import ReplicatedExchange
from shampoo_core.exchange.sharded import ShardedExchange


class Exchanges:
    """The exchanges of one optimizer."""

    def __init__(
        self, owner: str, distribution: Distribution | None, facts: Mapping[str, str]
    ) -> None:
        """Look around; a collective of all ranks that train together.

        Args:
            owner: For messages.
            distribution: How to share the work; None means not at all.
            facts: What the ranks have to agree on.

        Raises:
            ValueError: Ranks differ, or ``ranks_per_group`` does not divide their number.
        """
        self._owner = owner
        self._distribution = distribution
        self.group = None if distribution is None else process_group_of(distribution)
        """All ranks that train together; None where there is only one, or each is on its own."""
        self._of_plain: Exchange = LocalExchange()
        self._of_meshes: dict[tuple[DeviceMesh, int, bool], Exchange] = {}
        if distribution is not None and self.group is not None:
            self.check_agreement({**facts, **distribution.facts()})
            self._of_plain = ReplicatedExchange(
                sharing_group(distribution, self.group),
                communication_dtype=distribution.communication_dtype,
                overlap=distribution.overlap,
            )

    def of(self, parameter: Tensor) -> Exchange:
        """The exchange for a parameter.

        Raises:
            ValueError: It is sharded in a way that is not supported, or should not be shared.
        """
        if not isinstance(parameter, DTensor):
            return self._of_plain
        if self._distribution is None:
            raise ValueError(
                f"{self._owner}: distributed must not be None for parameters that are DTensors, such "
                f"as one of shape {tuple(parameter.shape)}: no rank can step them alone"
            )
        mesh, axis, is_sharded = parameter.device_mesh, *_sharing_axis(self._owner, parameter)
        key = (mesh, axis, is_sharded)
        if key not in self._of_meshes:
            self._of_meshes[key] = self._for_mesh(mesh, axis, is_sharded, self._distribution)
        return self._of_meshes[key]

    def _for_mesh(
        self, mesh: DeviceMesh, axis: int, is_sharded: bool, distribution: Distribution
    ) -> Exchange:
        dtype = distribution.communication_dtype
        if not is_sharded:
            return ReplicatedExchange(
                neighbours(self._owner, distribution, mesh, axis),
                communication_dtype=dtype,
                overlap=distribution.overlap,
            )
        if dtype == torch.float16:
            raise ValueError(
                f"{self._owner}: communication_dtype float16 is for replicated parameters; sharded "
                "ones can be sent in bfloat16 or float32"
            )
        replicas = sharing_replicas(self._owner, distribution, mesh, axis)
        return ShardedExchange(mesh.get_group(axis), replicas, communication_dtype=dtype)

    @contextmanager
    def loads_unless_refused(self) -> Iterator[None]:
        """Give ranks the loads of before back if what is done inside raises: its blocks are not kept."""
        before = {exchange: list(exchange.loads) for exchange in self._all()}

        def restore() -> None:
            for exchange in self._all():
                exchange.loads[:] = before.get(exchange, [0.0] * len(exchange.loads))

        with ExitStack() as undo:
            undo.callback(restore)
            yield
            undo.pop_all()

    def _all(self) -> list[Exchange]:
        return [self._of_plain, *self._of_meshes.values()]

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Raise on all ranks if they differ; a collective."""
        if self.group is not None:
            check_agreement(self._owner, facts, self.group)

    def check_replicas(self, parameters: Sequence[Tensor]) -> None:
        """Raise on all ranks if they hold other weights; a collective that waits for the device."""
        if self.group is not None:
            check_replicas(self._owner, parameters, self.group)

    def __getstate__(self) -> dict[str, Any]:
        """For pickling.

        Raises:
            TypeError: There are process groups, which live in one process.
        """
        if self.group is not None or self._of_meshes:
            raise TypeError(
                f"{self._owner}: an optimizer that shares its work among ranks cannot be pickled, for a "
                "process group lives in one process alone; save state_dict() after gather_state(), or use "
                "torch.distributed.checkpoint"
            )
        return self.__dict__

    def __deepcopy__(self, memo: object) -> Exchanges:
        """Copies of an optimizer use the same process groups."""
        return self


def _sharing_axis(owner: str, parameter: DTensor) -> tuple[int, bool]:
    """The axis of a parameter's mesh whose ranks share its work, and whether its rows are split there.

    Raises:
        ValueError: It is split along another dimension than its first, or more than once.
    """
    split = {
        axis: placement
        for axis, placement in enumerate(parameter.placements)
        if not placement.is_replicate()
    }
    if not split:
        return parameter.device_mesh.ndim - 1, False
    axis, placement = split.popitem()
    # Subclasses of Shard order the rows in other ways.
    if split or type(placement) is not Shard or placement.dim != 0:
        raise ValueError(
            f"{owner}: a parameter of shape {tuple(parameter.shape)} has placements "
            f"{parameter.placements}; supported are Replicate() everywhere, or Shard(0) on one axis "
            "of the mesh and Replicate() on the others, as fully_shard makes them"
        )
    return axis, True


def placed_like(parameter: Tensor, tensor: Tensor) -> Tensor:
    """A copy of a tensor, distributed and placed as a parameter of its shape is."""
    if isinstance(tensor, DTensor) and not isinstance(parameter, DTensor):
        tensor = tensor.full_tensor()
    if isinstance(parameter, DTensor) and not isinstance(tensor, DTensor):
        tensor = distribute_tensor(
            tensor.to(parameter.device), parameter.device_mesh, parameter.placements
        )
    copy = torch.empty_like(parameter)
    copy.detach().copy_(tensor)
    return copy.detach()
