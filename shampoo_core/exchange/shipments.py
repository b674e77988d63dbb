"""What ranks of a group send one another in one all-to-all, and where it belongs.

With replicas an all-gather follows: what came to a rank, to all ranks that hold the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_core.blocking import Shape
from shampoo_core.exchange.collectives import start_all_gather


class Arrival(NamedTuple):
    """What has arrived, and where it belongs."""

    target: Tensor
    source: Tensor


class Shipment:
    """One all-to-all: views to send from and views to fill, by peer and in an order known to both."""

    def __init__(self, num_ranks: int, num_replicas: int, device: torch.device) -> None:
        self._device = device
        self._num_replicas = num_replicas
        self._sent: list[list[tuple[Shape, Tensor | None]]] = [[] for _ in range(num_ranks)]
        self._received: list[list[tuple[Tensor, list[Arrival]]]] = [
            [] for _ in range(num_replicas * num_ranks)
        ]

    def send(self, peer: int, shape: Shape, source: Tensor | None) -> None:
        """Add a tensor to what goes to a peer; None sends zeros."""
        self._sent[peer].append((shape, source))

    def receive(self, peer: int, target: Tensor, arrivals: list[Arrival]) -> None:
        """Add a tensor to what comes from a peer; it will stand in ``arrivals``, beside the target.

        With replicas, peers are those of the first one, then those of the second, and so on.
        """
        self._received[peer].append((target, arrivals))

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
        num_ranks = len(self._sent)
        splits_out = [sum(math.prod(shape) for shape, _ in to_peer) for to_peer in self._sent]
        sizes_in = [sum(target.numel() for target, _ in items) for items in self._received]
        of_replicas = [
            sizes_in[first : first + num_ranks] for first in range(0, len(sizes_in), num_ranks)
        ]
        splits_in = of_replicas[0 if replicas is None else dist.get_rank(replicas)]
        outgoing = self._packed(as_dtype)
        message = outgoing.new_empty(max(map(sum, of_replicas)))
        incoming = message[: sum(splits_in)]
        dist.all_to_all_single(incoming, outgoing, splits_in, splits_out, group=group)
        del outgoing  # before room for the messages of all replicas is needed
        messages = _to_replicas(message, self._num_replicas, replicas)
        for replica, received in enumerate(messages):
            self._hand_out(received, range(replica * num_ranks, (replica + 1) * num_ranks))

    def _packed(self, dtype: torch.dtype) -> Tensor:
        """All that is sent, one after the other; where it came from is let go."""
        cargo = [item for to_peer in self._sent for item in to_peer]
        self._sent.clear()
        sizes = [math.prod(shape) for shape, _ in cargo]
        outgoing = torch.zeros(sum(sizes), dtype=dtype, device=self._device)
        full = [
            (part.view(shape), source)
            for part, (shape, source) in zip(outgoing.split(sizes), cargo, strict=True)
            if source is not None
        ]
        _copy(full)
        return outgoing

    def _hand_out(self, message: Tensor, peers: range) -> None:
        """Say what has arrived from some peers."""
        start = 0
        for peer in peers:
            for target, arrivals in self._received[peer]:
                part = message[start : start + target.numel()]
                arrivals.append(Arrival(target, part.view(target.shape)))
                start += target.numel()


class Shipments(dict[tuple[torch.device, torch.dtype], Shipment]):
    """One shipment per device and dtype."""

    def __init__(self, num_ranks: int, num_replicas: int = 1) -> None:
        super().__init__()
        self._sizes = num_ranks, num_replicas

    def on(self, device: torch.device, dtype: torch.dtype) -> Shipment:
        """The shipment that goes from a device in a dtype."""
        return self.setdefault((device, dtype), Shipment(*self._sizes, device))


def _to_replicas(
    message: Tensor, num_replicas: int, replicas: dist.ProcessGroup | None
) -> Sequence[Tensor]:
    """The messages of all replicas, of equal length."""
    if replicas is None:
        return [message]
    messages = message.new_empty(num_replicas * len(message))
    start_all_gather(messages, message, replicas).wait()
    return messages.view(num_replicas, -1).unbind()


def fill(arrivals: Sequence[Arrival]) -> None:
    """Copy what has arrived to where it belongs."""
    _copy(arrivals)


def _copy(pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Copy to the first of each pair what the second holds."""
    # One tensor that is not contiguous makes a GPU take a kernel for every one of a list.
    dense = [target.is_contiguous() and source.is_contiguous() for target, source in pairs]
    for wanted in (True, False):
        some = [pair for pair, is_dense in zip(pairs, dense, strict=True) if is_dense == wanted]
        if some:
            torch._foreach_copy_([target for target, _ in some], [source for _, source in some])
