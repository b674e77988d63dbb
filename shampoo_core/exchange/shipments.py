"""What ranks of a group send one another in one all-to-all.

With replicas an all-gather follows: what came to a rank, to all ranks that hold the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_core.exchange.collectives import start_all_gather


class _Cargo(NamedTuple):
    """A part of every message."""

    content: Tensor | None
    """All that this rank sends of it, by peer; None for zeros."""
    sizes_out: Sequence[int]
    sizes_in: Sequence[int]


class Shipment:
    """One all-to-all of several cargoes; a message is a part of each, in the order they were added."""

    def __init__(self, num_ranks: int, num_replicas: int, device: torch.device) -> None:
        self._num_ranks = num_ranks
        self._num_replicas = num_replicas
        self._device = device
        self._cargoes: list[_Cargo] = []
        self._arrived: list[Tensor] = []

    def add(self, content: Tensor | None, sizes_out: Sequence[int], sizes_in: Sequence[int]) -> int:
        """Add a cargo.

        Args:
            content: What this rank sends, flat, by peer; None sends zeros.
            sizes_out: Numbers for each peer.
            sizes_in: Numbers from each peer; with replicas of the first one, the second one, and so on.

        Returns:
            Its number, see `arrived`.
        """
        self._cargoes.append(_Cargo(content, sizes_out, sizes_in))
        return len(self._cargoes) - 1

    def arrived(self, number: int) -> Tensor:
        """What came of a cargo from all peers, flat; once."""
        content = self._arrived[number]
        self._arrived[number] = content.new_empty(0)
        return content

    def travel(
        self,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None,
        *,
        as_dtype: torch.dtype,
    ) -> None:
        """Send and receive.

        Args:
            group: The ranks of this replica.
            replicas: Ranks that are to receive the same, one of each replica; None where there is one.
            as_dtype: Of what travels.
        """
        splits_out = [
            sum(c.sizes_out[peer] for c in self._cargoes) for peer in range(self._num_ranks)
        ]
        sizes_in = [cargo.sizes_in for cargo in self._cargoes]
        of_replicas = [
            [sum(sizes[first + peer] for sizes in sizes_in) for peer in range(self._num_ranks)]
            for first in range(0, self._num_replicas * self._num_ranks, self._num_ranks)
        ]
        splits_in = of_replicas[0 if replicas is None else dist.get_rank(replicas)]
        outgoing = self._packed(as_dtype)
        message = outgoing.new_empty(max(map(sum, of_replicas)))
        incoming = message[: sum(splits_in)]
        dist.all_to_all_single(incoming, outgoing, splits_in, splits_out, group=group)
        del outgoing, incoming  # before room for the messages of all replicas is needed
        messages = _of_replicas(message, self._num_replicas, replicas)
        del message
        self._arrived = self._unpacked(messages, sizes_in)

    def _packed(self, dtype: torch.dtype) -> Tensor:
        """What goes to all peers; cargoes are let go."""
        contents = [
            torch.zeros(sum(cargo.sizes_out), dtype=dtype, device=self._device)
            if cargo.content is None
            else cargo.content.to(dtype)
            for cargo in self._cargoes
        ]
        sizes = [list(cargo.sizes_out) for cargo in self._cargoes]
        self._cargoes.clear()
        if len(contents) == 1:
            return contents[0]
        by_cargo = [content.split(of) for content, of in zip(contents, sizes, strict=True)]
        return torch.cat([part for parts in zip(*by_cargo, strict=True) for part in parts])

    def _unpacked(
        self, messages: Sequence[Tensor], sizes_in: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """What came of each cargo."""
        if len(messages) == 1 and len(sizes_in) == 1:
            return [messages[0]]
        by_cargo: list[list[Tensor]] = [[] for _ in sizes_in]
        for replica, message in enumerate(messages):
            peers = range(replica * self._num_ranks, (replica + 1) * self._num_ranks)
            sizes = [of_cargo[peer] for peer in peers for of_cargo in sizes_in]
            parts = message[: sum(sizes)].split(sizes)
            for number, of_cargo in enumerate(by_cargo):
                of_cargo += parts[number :: len(sizes_in)]
        return [torch.cat(parts) for parts in by_cargo]


class Shipments(dict[tuple[torch.device, torch.dtype], Shipment]):
    """One shipment per device and dtype."""

    def __init__(self, num_ranks: int, num_replicas: int = 1) -> None:
        super().__init__()
        self._sizes = num_ranks, num_replicas

    def on(self, device: torch.device, dtype: torch.dtype) -> Shipment:
        """The shipment that goes from a device in a dtype."""
        return self.setdefault((device, dtype), Shipment(*self._sizes, device))


def _of_replicas(
    message: Tensor, num_replicas: int, replicas: dist.ProcessGroup | None
) -> Sequence[Tensor]:
    """The messages of all replicas, of equal length."""
    if replicas is None:
        return [message]
    messages = message.new_empty(num_replicas * len(message))
    start_all_gather(messages, message, replicas).wait()
    return messages.view(num_replicas, -1).unbind()
