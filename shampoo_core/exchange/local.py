"""Every rank works on every block: one process, or replicas that all do the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from torch import Tensor

from shampoo_core.blocking import Shape
from shampoo_core.exchange.base import Collected, Request, Result, slices
from shampoo_core.exchange.division import Division
from shampoo_core.stacks import StackSet


class LocalExchange:
    """Needs no process group and sends nothing."""

    num_messages = 0

    def __init__(self) -> None:
        """Nothing is shared."""
        self.loads: list[float] = []

    def divide(self, whole: StackSet, cost_of: Callable[[Shape], float]) -> Division:
        """Everything is this rank's."""
        del cost_of
        return Division(whole, (whole,), rank=0)

    def collect(self, requests: Sequence[Request]) -> Iterator[Collected]:
        """Copy blocks into stacks, one request at a time."""
        return map(slices, requests)

    def deliver(self, results: Iterable[Result], *, exact: bool = False) -> None:
        """Change parameters as results come."""
        del exact
        for result in results:
            own, parameters = result.division.own, result.parameters
            if result.update is None:
                continue
            if _in_passes(own, parameters):
                update = result.update
                own.add_to(parameters, update.stacks, update.total_scale, update.growth)
            else:
                own.add_to(parameters, result.update.to_add(own, result.weights))


def _in_passes(own: StackSet, parameters: Sequence[Tensor]) -> bool:
    """Whether growth and scale are best applied to the parameters themselves.

    On a GPU they would be a kernel for every parameter, where adding is one for many. What is kept in fewer
    bits than the state should be rounded once, not in every pass.
    """
    same_dtype = all(parameters[index].dtype == own.dtype for index in own.parameters)
    return own.device.type == "cpu" and same_dtype
