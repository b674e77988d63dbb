"""What ranks of a group send one another in one all-to-all, and where it belongs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_core.blocking import Shape


class Arrival(NamedTuple):
    """What has arrived, and where it belongs."""

    target: Tensor
    source: Tensor


class Shipment:
    """One all-to-all: views to send from and views to fill, by peer and in an order known to both."""

    def __init__(self, num_ranks: int, device: torch.device) -> None:
        self._device = device
        self._sent: list[list[tuple[Shape, Tensor | None]]] = [[] for _ in range(num_ranks)]
        self._received: list[list[tuple[Tensor, list[Arrival]]]] = [[] for _ in range(num_ranks)]

    def send(self, peer: int, shape: Shape, source: Tensor | None) -> None:
        """Add a tensor to what goes to a peer; None sends zeros."""
        self._sent[peer].append((shape, source))

    def receive(self, peer: int, target: Tensor, arrivals: list[Arrival]) -> None:
        """Add a tensor to what comes from a peer; it will stand in ``arrivals``, beside the target."""
        self._received[peer].append((target, arrivals))

    def travel(self, group: dist.ProcessGroup, *, as_dtype: torch.dtype) -> None:
        """Send and receive."""
        sizes_out = [[math.prod(shape) for shape, _ in to_peer] for to_peer in self._sent]
        sizes_in = [[target.numel() for target, _ in from_peer] for from_peer in self._received]
        outgoing = torch.zeros(sum(map(sum, sizes_out)), dtype=as_dtype, device=self._device)
        incoming = outgoing.new_empty(sum(map(sum, sizes_in)))
        cargo = [item for to_peer in self._sent for item in to_peer]
        parts = outgoing.split([size for sizes in sizes_out for size in sizes])
        full = [
            (part.view(shape), source)
            for part, (shape, source) in zip(parts, cargo, strict=True)
            if source is not None
        ]
        if full:
            torch._foreach_copy_([part for part, _ in full], [source for _, source in full])
        splits = list(map(sum, sizes_in)), list(map(sum, sizes_out))
        dist.all_to_all_single(incoming, outgoing, *splits, group=group)
        expected = [item for from_peer in self._received for item in from_peer]
        arrived = incoming.split([size for sizes in sizes_in for size in sizes])
        for (target, arrivals), part in zip(expected, arrived, strict=True):
            arrivals.append(Arrival(target, part.view(target.shape)))


class Shipments(dict[tuple[torch.device, torch.dtype], Shipment]):
    """One shipment per device and dtype."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self._num_ranks = num_ranks

    def on(self, device: torch.device, dtype: torch.dtype) -> Shipment:
        """The shipment that goes from a device in a dtype."""
        return self.setdefault((device, dtype), Shipment(self._num_ranks, device))


def fill(arrivals: Sequence[Arrival]) -> None:
    """Copy what has arrived to where it belongs."""
    if arrivals:
        targets, sources = zip(*arrivals, strict=True)
        torch._foreach_copy_(list(targets), list(sources))
