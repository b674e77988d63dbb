"""How blocks get to the ranks that work on them, and results to everyone who holds the parameter.

An exchange has three verbs:

    divide    which blocks are mine
    collect   bring gradients, and weights where a step reads them, to the owners of their blocks
    deliver   bring the owners' updates to everyone who holds a part of the parameter

Whoever holds a weight adds the same bits to it, the owner of its block too, so that copies of a weight
stay equal bit by bit. `collect` and `deliver` are called by all ranks, with the same divisions in the
same order, also by those that own nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor
from torch.distributed.tensor import DTensor

from shampoo_core.averaging import TrainingWeights, Update
from shampoo_core.blocking import Shape
from shampoo_core.exchange.division import Division
from shampoo_core.stacks import StackSet


class Request(NamedTuple):
    """What is to be collected for one division."""

    division: Division
    parameters: Sequence[Tensor]
    gradients: Sequence[Tensor | None] | None
    """By parameter; None where weights alone are asked for."""
    reads_weights: bool


class Collected(NamedTuple):
    """What arrived."""

    gradients: list[Tensor]
    """As stacks of the rank's own blocks; zero where there is none."""
    weights: TrainingWeights
    """Of the rank's own blocks; only if they were asked for."""


class Decay(NamedTuple):
    """Weight decay of the blocks that move: ``W <- W - lr * factor * W``. The same on all ranks."""

    factor: float = 0.0
    lr: float = 0.0
    """A number, or a tensor of one."""


class Result(NamedTuple):
    """What is to be delivered for one division."""

    division: Division
    update: Update | None
    """Of the rank's own blocks; None where nothing moves."""
    parameters: Sequence[Tensor]
    weights: TrainingWeights
    """Of the rank's own blocks, as they were collected."""
    decay: Decay = Decay()
    """As it is in updates; here for ranks that hold weights and make no update of them."""

    def to_add(self) -> Sequence[Tensor] | None:
        """What is to be added to the rank's own blocks, as stacks; None for zero."""
        own = self.division.own
        return None if self.update is None else self.update.to_add(own, self.weights)


class Exchange(Protocol):
    """Three verbs; the optimizer knows nothing else about ranks."""

    num_messages: int
    """Messages as long as a rank's own that come to each rank in `deliver`; 0 where nothing is sent."""
    loads: list[float]
    """Modelled cost of the blocks that each rank was given; none where nothing is shared."""

    def divide(self, whole: StackSet, cost_of: Callable[[Shape], float]) -> Division:
        """Decide who owns which blocks, the same on every rank.

        Args:
            whole: Geometry of all blocks.
            cost_of: Modelled cost of a block by its shape.
        """

    def collect(self, requests: Sequence[Request]) -> Iterator[Collected]:
        """Bring tensors to the owners of their blocks, one answer per request, maybe on demand."""

    def deliver(self, results: Iterable[Result], *, exact: bool = False) -> None:
        """Add updates to the parameters, wherever these are held.

        Args:
            results: Consumed one after the other.
            exact: Whether to send them as they are, whatever the communication dtype.
        """


@dataclass(frozen=True)
class WeightSlices:
    """Weights that this rank holds in full, see `TrainingWeights`."""

    stack_set: StackSet
    parameters: Sequence[Tensor]
    """Of the group; plain tensors, or DTensors that are not sharded."""

    def add_to(self, stacks: list[Tensor], scale: float) -> None:
        """See `TrainingWeights`."""
        self.stack_set.add_from(stacks, self._locals(), scale)

    def stacks(self) -> list[Tensor]:
        """See `TrainingWeights`."""
        return self.stack_set.gather(self._locals())

    def _locals(self) -> dict[int, Tensor]:
        return locals_of(self.parameters, self.stack_set.parameters)


def slices(request: Request) -> Collected:
    """Collect from parameters that this rank holds in full."""
    own = request.division.own
    gradients: list[Tensor] = []
    if request.gradients is not None and any(g is not None for g in request.gradients):
        held: dict[int, Tensor | None] = {}
        # A gradient that is still to be summed is summed for the division that it belongs to alone, by
        # every rank. Of a large group a wave has few parameters, and should not look at the others.
        for index in request.division.whole.parameters:
            gradient = request.gradients[index]
            if gradient is not None:
                gradient = local_of(placed_as(gradient, request.parameters[index]))
            held[index] = gradient
        gradients = own.gather(held)
    return Collected(gradients, WeightSlices(own, request.parameters))


def placed_as(tensor: Tensor, parameter: Tensor) -> Tensor:
    """The tensor with the placements of a parameter; a collective where they differ."""
    if (
        isinstance(tensor, DTensor)
        and isinstance(parameter, DTensor)
        and tensor.placements != parameter.placements
    ):
        return tensor.redistribute(parameter.device_mesh, parameter.placements)
    return tensor


def locals_of(tensors: Sequence[Tensor], indices: Iterable[int]) -> dict[int, Tensor]:
    """What this rank holds of some parameters of a group, by their index."""
    return {index: local_of(tensors[index]) for index in indices}


def local_of(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: a part of a DTensor, all of a plain one."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
