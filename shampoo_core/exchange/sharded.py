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

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_core.blocking import Shape
from shampoo_core.exchange.base import Collected, Decay, Request, Result, local_of, placed_as
from shampoo_core.exchange.division import Division, divide
from shampoo_core.exchange.lanes import Crew, Lane, lanes_of
from shampoo_core.exchange.shipments import Shipment, Shipments
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
        # What the others of a group send makes one message together.
        self.num_messages = 1 if replicas is None else dist.get_world_size(replicas)
        self._crew = Crew(
            num_holders=dist.get_world_size(group),
            num_replicas=self.num_messages,
            holder=dist.get_rank(group),
            replica=0 if replicas is None else dist.get_rank(replicas),
        )
        self._communication_dtype = communication_dtype
        self.loads = [0.0] * self._crew.num_owners
        self._lanes: dict[Division, list[Lane]] = {}

    def divide(self, whole: StackSet, cost_of: Callable[[Shape], float]) -> Division:
        """See `Exchange`; balances what it is asked about on top of what it was asked before."""
        crew = self._crew
        return divide(whole, cost_of, self.loads, crew.owner, num_replicas=crew.num_replicas)

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
        shipments = Shipments(self._crew.num_holders)
        expected: list[list[tuple[Shipment, list[tuple[Lane, int]]]]] = []
        for request in requests:
            dtype = _common_dtype(request)
            shipment = shipments.on(request.division.own.device, dtype)
            lanes = self._lanes_of(request.division, request.parameters)
            like = torch.empty(0, dtype=dtype, device=request.division.own.device)
            expected.append([])
            for tensors in _wanted(request):
                numbers = []
                for lane in lanes:
                    parts = {
                        index: _part(tensors[index], request.parameters[index], dtype)
                        for index in lane.spans
                    }
                    has_any = any(part is not None for part in parts.values())
                    message = lane.held_here.read(lane.flat(parts, like)) if has_any else None
                    sizes = lane.held_here.sizes, lane.owned.sizes
                    numbers.append((lane, shipment.add(message, *sizes)))
                expected[-1].append((shipment, numbers))
        for (_, dtype), shipment in shipments.items():
            shipment.travel(self._group, None, as_dtype=dtype)
        return [
            [_stacked(request.division.own, *of_tensor) for of_tensor in of_request]
            for request, of_request in zip(requests, expected, strict=True)
        ]

    @torch.compiler.disable  # no compiler follows what ranks send each other
    def deliver(self, results: Iterable[Result], *, exact: bool = False) -> None:
        """See `Exchange`; one all-to-all per device and dtype, with replicas one all-gather as well."""
        shipments = Shipments(self._crew.num_holders, self._crew.num_replicas)
        landings = [landing for result in results for landing in self._load(result, shipments)]
        for (_, dtype), shipment in shipments.items():
            wire = None if exact else self._communication_dtype
            shipment.travel(self._group, self._replicas, as_dtype=wire or dtype)
        for landing in landings:
            landing.add()

    def _load(self, result: Result, shipments: Shipments) -> list[_Landing]:
        """Add a result to what travels; return what to do when it has arrived."""
        own, update = result.division.own, result.update
        flat = is_open = None
        if update is not None:
            flat = torch.cat([stack.reshape(-1) for stack in update.to_add(own, None)])
            is_open = update.open_blocks
        shipment = shipments.on(own.device, own.dtype)
        landings = []
        for lane in self._lanes_of(result.division, result.parameters):
            message = None if flat is None else lane.owned.read(flat)
            updates = shipment.add(message, lane.owned.sizes, lane.held.sizes)
            moves = None
            if result.decay.factor != 0.0:
                numbers = None if is_open is None else is_open.index_select(0, lane.blocks)
                moves = shipment.add(numbers, lane.owned_blocks, lane.held_blocks)
            landings.append(
                _Landing(lane, result.parameters, result.decay, own.dtype, shipment, updates, moves)
            )
        return landings

    def _lanes_of(self, division: Division, parameters: Sequence[Tensor]) -> list[Lane]:
        """Which pieces travel between this rank and the others; found out once."""
        if division not in self._lanes:
            indices = division.whole.parameters
            shapes = {index: tuple(parameters[index].shape) for index in indices}
            self._lanes[division] = lanes_of(division, shapes, self._crew)
        return self._lanes[division]


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


class _Landing(NamedTuple):
    """The updates of one lane of one result, under way to the weights that they are for."""

    lane: Lane
    parameters: Sequence[Tensor]
    decay: Decay
    dtype: torch.dtype
    """Of the arithmetic."""
    shipment: Shipment
    updates: int
    """Number of their cargo."""
    moves: int | None
    """Number of the cargo that says of every block whether it moves; None without decay."""

    def add(self) -> None:
        """``W <- W + (update - lr decay W)`` where a block moves, rounded once."""
        lane, dtype = self.lane, self.dtype
        shards = {index: local_of(self.parameters[index]).detach() for index in lane.spans}
        message = self.shipment.arrived(self.updates).to(dtype)
        if self.moves is not None:
            moves = self.shipment.arrived(self.moves).to(dtype)
            growth = moves * (-self.decay.lr * self.decay.factor)
            weights = {index: shard.to(dtype) for index, shard in shards.items()}
            lane.add_decay(message, lane.flat(weights, message), growth)
        amounts = lane.spread(message)
        del message
        # Of a shard that is not contiguous this is a copy.
        flat = {index: shard.reshape(-1) for index, shard in shards.items()}
        torch._foreach_add_([flat[index][span] for index, span in lane.spans.items()], amounts)
        for index, shard in shards.items():
            if not shard.is_contiguous():
                shard.copy_(flat[index].view(shard.shape))


def _stacked(own: StackSet, shipment: Shipment, lanes: list[tuple[Lane, int]]) -> list[Tensor]:
    """Stacks of this rank's blocks, of what came in a shipment."""
    stacks = own.empty()
    if stacks:
        for lane, number in lanes:
            lane.owned.write(shipment.arrived(number).to(own.dtype), own.flat(stacks))
    return stacks


def _wanted(request: Request) -> Iterator[Sequence[Tensor | None]]:
    """The tensors, by parameter, that a request asks for."""
    if request.gradients is not None:
        yield request.gradients
    if request.reads_weights:
        yield request.parameters


def _part(tensor: Tensor | None, parameter: Tensor, dtype: torch.dtype) -> Tensor | None:
    """What this rank holds of a tensor that is shaped as a parameter."""
    return None if tensor is None else local_of(placed_as(tensor, parameter)).detach().to(dtype)


def _common_dtype(request: Request) -> torch.dtype:
    """In which gradients and weights travel: their own, or that of the arithmetic if they differ."""
    indices = request.division.whole.parameters
    dtypes = {request.parameters[index].dtype for index in indices}
    if request.gradients is not None:
        gradients = [request.gradients[index] for index in indices]
        dtypes |= {gradient.dtype for gradient in gradients if gradient is not None}
    return dtypes.pop() if len(dtypes) == 1 else request.division.own.dtype
