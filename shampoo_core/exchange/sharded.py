"""Every rank holds some rows of every parameter and its gradient: FSDP2, HSDP, sharded DTensors.

Blocks are those of the whole parameter, so that results depend neither on the number of ranks nor on
how they share the rows. A step is one all-to-all each way for every device and dtype:

    collect   holders send their pieces of gradients, and of weights where a step reads them, to owners
    deliver   owners send pieces of updates back to holders, who add them

Decay alone does not make weights travel: with an update comes a number per block, whether it moves, and
holders shrink what they hold of blocks that do.

Replicas that hold the same shards (HSDP) share the work as well. Every block has one owner among all
their ranks; gradients come to it from its own replica, for all have the same, and what comes back to a
holder is passed on to those that hold the same rows in the other replicas, by an all-gather:

    replica 0 |  block 0 -> owner rank 0  |  back to ranks 0, 1 |  and on to ranks 2, 3
    replica 1 |  block 1 -> owner rank 2  |  back to ranks 2, 3 |  and on to ranks 0, 1
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_core.blocking import Shape
from shampoo_core.exchange.base import Collected, Request, Result, local_of, placed_as
from shampoo_core.exchange.division import Division, divide
from shampoo_core.exchange.pieces import Piece, View, pieces_of
from shampoo_core.exchange.shipments import Arrival, Shipments, fill
from shampoo_core.stacks import StackSet


class ShardedExchange:
    """Moves pieces of blocks among ranks that hold shards, and updates on to their replicas."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        replicas: dist.ProcessGroup | None = None,
        *,
        communication_dtype: torch.dtype | None = None,
    ) -> None:
        """Start with nothing to do for any rank.

        Args:
            group: Ranks that hold the rows of a parameter together, in this order.
            replicas: Ranks that hold the same rows as this one and share the work, one of each group;
                None where every group works for itself.
            communication_dtype: See `Distribution`; of updates.
        """
        self._group, self._replicas = group, replicas
        self._num_holders = dist.get_world_size(group)
        self._holder = dist.get_rank(group)
        # What the others of a group send makes one message together.
        self.num_messages = 1 if replicas is None else dist.get_world_size(replicas)
        self._first_owner = 0 if replicas is None else self._num_holders * dist.get_rank(replicas)
        """Owners are numbered replica by replica: the first one of this replica."""
        self._owner = self._first_owner + self._holder
        self._communication_dtype = communication_dtype
        self._loads = [0.0] * (self._num_holders * self.num_messages)
        self._routes: dict[Division, _Route] = {}

    def divide(self, whole: StackSet, cost_of: Callable[[Shape], float]) -> Division:
        """See `Exchange`; balances what it is asked about on top of what it was asked before."""
        return divide(whole, cost_of, self._loads, self._owner, num_replicas=self.num_messages)

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
        shipments = Shipments(self._num_holders)
        arrivals: list[list[list[Tensor]]] = []
        filled: list[list[Arrival]] = []
        for request in requests:
            division, parameters = request.division, request.parameters
            route = self._route(division, parameters)
            shipment = shipments.on(division.own.device, _common_dtype(request))
            arrivals.append([])
            filled.append([])
            for tensors in _wanted(request):
                shards = {
                    index: _merged_shard(tensors[index], parameters[index], merged_shape)
                    for index, merged_shape in route.merged_shapes.items()
                }
                arrivals[-1].append(division.own.empty())
                slots = division.own.tile_slots(arrivals[-1][-1])
                for peer in range(self._num_holders):
                    for piece, view in route.held[self._first_owner + peer]:
                        shard = shards[piece.tile.parameter]
                        shipment.send(peer, view.shape, None if shard is None else view.on(shard))
                    for piece, view in route.owned[peer]:
                        shipment.receive(peer, view.on(slots[piece.slot]), filled[-1])
        for (_, dtype), shipment in shipments.items():
            shipment.travel(self._group, None, as_dtype=dtype)
        for of_request in filled:
            fill(of_request)
        return arrivals

    def deliver(self, results: Iterable[Result], *, exact: bool = False) -> None:
        """See `Exchange`; one all-to-all per device and dtype, with replicas one all-gather as well."""
        shipments = Shipments(self._num_holders, self.num_messages)
        landings = [self._load(result, shipments) for result in results]
        for (_, dtype), shipment in shipments.items():
            wire = None if exact else self._communication_dtype
            shipment.travel(self._group, self._replicas, as_dtype=wire or dtype)
        for landing in landings:
            landing.add()

    def _load(self, result: Result, shipments: Shipments) -> _Landing:
        """Add a result to what travels; return what to do when it has arrived."""
        own, update = result.division.own, result.update
        updates = is_open = None
        if update is not None:
            stacks = [stack.contiguous() for stack in update.to_add(own, None)]
            updates = own.tile_slots(stacks)
            is_open = update.is_open
        route = self._route(result.division, result.parameters)
        landing = _Landing(own, route, result)
        shipment = shipments.on(own.device, own.dtype)
        for holder in range(self._num_holders):
            for piece, view in route.owned[holder]:
                source = None if updates is None else view.on(updates[piece.slot])
                shipment.send(holder, view.shape, source)
                if landing.decays:
                    numbers = None if is_open is None else piece.of_blocks(is_open)
                    shipment.send(holder, (piece.num_blocks,), numbers)
        for owner, pieces in enumerate(route.held):
            for piece, view in pieces:
                shipment.receive(owner, view.on(landing.rows_of(piece)), landing.updates)
                if landing.decays:
                    shipment.receive(owner, landing.room_for(piece), landing.open_blocks)
        return landing

    def _route(self, division: Division, parameters: Sequence[Tensor]) -> _Route:
        """Which pieces travel between this rank and the others; found out once."""
        if division not in self._routes:
            shapes = {index: tuple(parameters[index].shape) for index in division.whole.parameters}
            merged = {tile.parameter: tile.merged_shape for tile in division.whole.tiles}
            held: list[list[tuple[Piece, View]]] = [[] for _ in self._loads]
            owned: list[list[tuple[Piece, View]]] = [[] for _ in range(self._num_holders)]
            self._routes[division] = _Route(held, owned, merged)
            rows = {
                index: torch.empty(
                    local_of(parameters[index]).numel(), dtype=torch.uint8, device="meta"
                ).view(-1, *merged_shape[1:])
                for index, merged_shape in merged.items()
            }
            for piece in pieces_of(division, shapes, self._num_holders, holder=self._holder):
                shard = rows[piece.tile.parameter]
                held[piece.owner].append((piece, View.of(piece.in_shard(shard), shard)))
            own = division.own
            slots = own.tile_slots(own.views(torch.empty(own.numel, device="meta")))
            for piece in pieces_of(division, shapes, self._num_holders, owner=self._owner):
                slot = slots[piece.slot]
                owned[piece.holder].append((piece, View.of(piece.in_slot(slot), slot)))
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

    held: list[list[tuple[Piece, View]]]
    """By owner: what this rank holds, and where in its rows of the merged parameter."""
    owned: list[list[tuple[Piece, View]]]
    """By holder: what this rank owns, and where in the slot of its tile."""
    merged_shapes: dict[int, Shape]
    """By parameter."""


class _Landing:
    """Where the updates of one result are added, and what the weights there shrink by."""

    def __init__(self, own: StackSet, route: _Route, result: Result) -> None:
        """Look up what this rank holds, and have room for a number per block of it if there is decay.

        Args:
            own: Geometry of the blocks that this rank owns; only dtype and device count.
            route: The pieces that it holds.
            result: Its parameters and decay.
        """
        self.decays = result.decay.factor != 0.0
        """The same on all ranks."""
        self.updates: list[Arrival] = []
        """By piece."""
        self.open_blocks: list[Arrival] = []
        """By piece, if there is decay: per block, 1 where it moves, else 0."""
        self._dtype = own.dtype
        self._decay = result.decay
        self._shards: list[tuple[Tensor, Tensor]] = []
        self._rows: dict[int, Tensor] = {}
        for index, merged_shape in route.merged_shapes.items():
            shard = local_of(result.parameters[index]).detach()
            self._shards.append((shard, shard.contiguous()))
            self._rows[index] = self._shards[-1][1].view(-1, *merged_shape[1:])
        self._pieces = [piece for piece, _ in itertools.chain.from_iterable(route.held)]
        sizes = [piece.num_blocks for piece in self._pieces] if self.decays else []
        self._numbers = torch.empty(sum(sizes), dtype=own.dtype, device=own.device)
        self._rooms = iter(self._numbers.split(sizes))

    def rows_of(self, piece: Piece) -> Tensor:
        """The weights that this rank holds of a piece's parameter."""
        return self._rows[piece.tile.parameter]

    def room_for(self, piece: Piece) -> Tensor:
        """Room for one number per block of a piece; pieces come in the order of the route."""
        room = next(self._rooms)
        assert len(room) == piece.num_blocks
        return room

    def add(self) -> None:
        """``W <- W + (update - lr decay W)`` where a block moves, rounded once."""
        if not self.updates:
            return
        targets = [target for target, _ in self.updates]
        amounts = [source.to(self._dtype) for _, source in self.updates]
        if self.decays:
            fill(self.open_blocks)
            self._numbers *= -self._decay.lr * self._decay.factor
            growths = [
                piece.spread(numbers)
                for piece, (numbers, _) in zip(self._pieces, self.open_blocks, strict=True)
            ]
            torch._foreach_addcmul_(
                amounts, [target.to(self._dtype) for target in targets], growths
            )
        torch._foreach_add_(targets, amounts)
        for shard, changed in self._shards:
            if changed is not shard:
                shard.copy_(changed)


def _wanted(request: Request) -> Iterator[Sequence[Tensor | None]]:
    """The tensors, by parameter, that a request asks for."""
    if request.gradients is not None:
        yield request.gradients
    if request.reads_weights:
        yield request.parameters


def _merged_shard(tensor: Tensor | None, parameter: Tensor, merged_shape: Shape) -> Tensor | None:
    """What this rank holds of a parameter-shaped tensor, as rows of the merged view, contiguous."""
    if tensor is None:
        return None
    local = local_of(placed_as(tensor, parameter)).detach()
    return local.reshape(-1, *merged_shape[1:]).contiguous()


def _common_dtype(request: Request) -> torch.dtype:
    """In which gradients and weights travel: their own, or that of the arithmetic if they differ."""
    indices = request.division.whole.parameters
    dtypes = {request.parameters[index].dtype for index in indices}
    if request.gradients is not None:
        gradients = [request.gradients[index] for index in indices]
        dtypes |= {gradient.dtype for gradient in gradients if gradient is not None}
    return dtypes.pop() if len(dtypes) == 1 else request.division.own.dtype
