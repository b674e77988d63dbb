"""Every rank holds some rows of every parameter and its gradient: FSDP2, HSDP, sharded DTensors.

Blocks are those of the whole parameter, so that results depend neither on the number of ranks nor on
how they share the rows. A step is one all-to-all each way for every device and dtype:

    collect   holders send their pieces of gradients, and of weights where a step reads them, to owners
    deliver   owners send pieces of updates back to holders, who add them

Ranks that hold the same shard (the replicas of HSDP) are in different shard groups; each group does
the same work.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_core.blocking import Shape
from shampoo_core.exchange.base import Collected, Request, Result, local_of, placed_as
from shampoo_core.exchange.division import Division, divide
from shampoo_core.exchange.pieces import Piece, pieces_of
from shampoo_core.stacks import StackSet


class ShardedExchange:
    """Moves pieces of blocks among the ranks of a shard group."""

    num_messages = 1  # what the others send makes one together

    def __init__(
        self, group: dist.ProcessGroup, *, communication_dtype: torch.dtype | None = None
    ) -> None:
        """Start with nothing to do for any rank.

        Args:
            group: Ranks that hold the rows of a parameter together, in this order.
            communication_dtype: See `Distribution`; of updates.
        """
        self._group = group
        self._rank = dist.get_rank(group)
        self._num_ranks = dist.get_world_size(group)
        self._communication_dtype = communication_dtype
        self._loads = [0.0] * self._num_ranks
        self._routes: dict[Division, _Route] = {}

    def divide(self, whole: StackSet, cost_of: Callable[[Shape], float]) -> Division:
        """See `Exchange`; balances what it is asked about on top of what it was asked before."""
        return divide(whole, cost_of, self._loads, self._rank)

    def __deepcopy__(self, memo: object) -> ShardedExchange:
        """Copies of an optimizer use the same process group."""
        return self

    def collect(self, requests: Sequence[Request]) -> Iterator[Collected]:
        """See `Exchange`; one all-to-all per device and dtype, in which nothing is rounded."""
        for request, stacks in zip(requests, self._bring(requests), strict=True):
            weights = StackedWeights(stacks.pop() if request.reads_weights else [])
            yield Collected(stacks.pop() if stacks else [], weights)

    def _bring(self, requests: Sequence[Request]) -> list[list[list[Tensor]]]:
        """Stacks of what each request wants; what they came in is freed when this is done."""
        shipments = _Shipments(self._num_ranks)
        arrivals: list[list[list[Tensor]]] = []
        for request in requests:
            division, parameters = request.division, request.parameters
            route = self._route(division, parameters)
            shipment = shipments.on(division.own.device, _common_dtype(request))
            arrivals.append([])
            for tensors in _wanted(request):
                shards = {
                    index: _merged_shard(tensors[index], parameters[index], merged_shape)
                    for index, merged_shape in route.merged_shapes.items()
                }
                arrivals[-1].append(division.own.empty())
                slots = division.own.tile_slots(arrivals[-1][-1])
                for peer in range(self._num_ranks):
                    for piece in route.held[peer]:
                        shard = shards[piece.tile.parameter]
                        source = None if shard is None else piece.in_shard(shard)
                        shipment.send(peer, piece.shape, source)
                    for piece in route.owned[peer]:
                        shipment.receive(peer, piece.in_slot(slots[piece.slot]))
        for (_, dtype), shipment in shipments.items():
            targets, sources = shipment.travel(self._group, as_dtype=dtype)
            if targets:
                torch._foreach_copy_(targets, sources)
        return arrivals

    def deliver(self, results: Iterable[Result], *, exact: bool = False) -> None:
        """See `Exchange`; one all-to-all per device and dtype."""
        shipments = _Shipments(self._num_ranks)
        shards: list[tuple[Tensor, Tensor]] = []
        for result in results:
            division, parameters = result.division, result.parameters
            updates = result.to_add()
            route = self._route(division, parameters)
            shipment = shipments.on(division.own.device, division.own.dtype)
            rows: dict[int, Tensor] = {}
            for index, merged_shape in route.merged_shapes.items():
                shard = local_of(parameters[index]).detach()
                shards.append((shard, shard.contiguous()))
                rows[index] = shards[-1][1].view(-1, *merged_shape[1:])
            slots = None if updates is None else division.own.tile_slots(updates)
            for peer in range(self._num_ranks):
                for piece in route.owned[peer]:
                    source = None if slots is None else piece.in_slot(slots[piece.slot])
                    shipment.send(peer, piece.shape, source)
                for piece in route.held[peer]:
                    shipment.receive(peer, piece.in_shard(rows[piece.tile.parameter]))
        for (_, dtype), shipment in shipments.items():
            wire = None if exact else self._communication_dtype
            targets, sources = shipment.travel(self._group, as_dtype=wire or dtype)
            if targets:
                torch._foreach_add_(targets, [source.to(dtype) for source in sources])
        for shard, changed in shards:
            if changed is not shard:
                shard.copy_(changed)

    def _route(self, division: Division, parameters: Sequence[Tensor]) -> _Route:
        """Which pieces travel between this rank and the others; found out once."""
        if division not in self._routes:
            shapes = {index: tuple(parameters[index].shape) for index in division.whole.parameters}
            ranks = range(self._num_ranks)
            merged = {tile.parameter: tile.merged_shape for tile in division.whole.tiles}
            route = _Route([[] for _ in ranks], [[] for _ in ranks], merged)
            self._routes[division] = route
            for piece in pieces_of(division, shapes):
                if piece.holder == self._rank:
                    route.held[piece.owner].append(piece)
                if piece.owner == self._rank:
                    route.owned[piece.holder].append(piece)
        return self._routes[division]


@dataclass(frozen=True)
class StackedWeights:
    """Weights that were sent, see `TrainingWeights`."""

    collected: list[Tensor]

    def add_to(self, stacks: list[Tensor], scale: float) -> None:
        """See `TrainingWeights`."""
        torch._foreach_add_(stacks, self.collected, alpha=scale)

    def stacks(self) -> list[Tensor]:
        """See `TrainingWeights`."""
        return [stack.clone() for stack in self.collected]


class _Route(NamedTuple):
    """The pieces of a division that concern this rank, in the order in which both sides list them."""

    held: list[list[Piece]]
    """By owner: what this rank holds."""
    owned: list[list[Piece]]
    """By holder: what this rank owns."""
    merged_shapes: dict[int, Shape]
    """By parameter."""


class _Shipment:
    """One all-to-all: views to send from and views to fill, by peer and in an order known to both."""

    def __init__(self, num_ranks: int, device: torch.device) -> None:
        self._device = device
        self._sent: list[list[tuple[Shape, Tensor | None]]] = [[] for _ in range(num_ranks)]
        self._received: list[list[Tensor]] = [[] for _ in range(num_ranks)]

    def send(self, peer: int, shape: Shape, source: Tensor | None) -> None:
        """Add a tensor to what goes to a peer; None sends zeros."""
        self._sent[peer].append((shape, source))

    def receive(self, peer: int, target: Tensor) -> None:
        """Add a tensor to what comes from a peer."""
        self._received[peer].append(target)

    def travel(
        self, group: dist.ProcessGroup, *, as_dtype: torch.dtype
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Send and receive; return the targets and what arrived for each."""
        sizes_out = [[math.prod(shape) for shape, _ in to_peer] for to_peer in self._sent]
        sizes_in = [[target.numel() for target in from_peer] for from_peer in self._received]
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
        targets = [target for from_peer in self._received for target in from_peer]
        arrived = incoming.split([target.numel() for target in targets])
        return targets, [part.view(t.shape) for part, t in zip(arrived, targets, strict=True)]


class _Shipments(dict[tuple[torch.device, torch.dtype], _Shipment]):
    """One shipment per device and dtype."""

    def __init__(self, num_ranks: int) -> None:
        super().__init__()
        self._num_ranks = num_ranks

    def on(self, device: torch.device, dtype: torch.dtype) -> _Shipment:
        """The shipment that goes from a device in a dtype."""
        return self.setdefault((device, dtype), _Shipment(self._num_ranks, device))


def _wanted(request: Request) -> Iterator[Sequence[Tensor | None]]:
    """The tensors, by parameter, that a request asks for."""
    if request.gradients is not None:
        yield request.gradients
    if request.reads_weights:
        yield request.parameters


def _merged_shard(tensor: Tensor | None, parameter: Tensor, merged_shape: Shape) -> Tensor | None:
    """What this rank holds of a parameter-shaped tensor, as rows of the merged view."""
    if tensor is None:
        return None
    return local_of(placed_as(tensor, parameter)).detach().reshape(-1, *merged_shape[1:])


def _common_dtype(request: Request) -> torch.dtype:
    """In which gradients and weights travel: their own, or that of the arithmetic if they differ."""
    indices = request.division.whole.parameters
    dtypes = {request.parameters[index].dtype for index in indices}
    if request.gradients is not None:
        gradients = [request.gradients[index] for index in indices]
        dtypes |= {gradient.dtype for gradient in gradients if gradient is not None}
    return dtypes.pop() if len(dtypes) == 1 else request.division.own.dtype
