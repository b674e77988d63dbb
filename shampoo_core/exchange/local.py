"""Every rank works on every block: one process, or replicas that all do the same work."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence

from shampoo_core.blocking import Shape
from shampoo_core.exchange.base import Collected, Request, Result, slices
from shampoo_core.exchange.division import Division
from shampoo_core.stacks import StackSet


class LocalExchange:
    """Needs no process group and sends nothing."""

    def divide(self, whole: StackSet, cost_of: Callable[[Shape], float]) -> Division:
        """Everything is this rank's."""
        del cost_of
        return Division(whole, (whole,), rank=0)

    def collect(self, requests: Sequence[Request]) -> Iterator[Collected]:
        """Copy blocks into stacks, one request at a time."""
        return map(slices, requests)

    def deliver(self, results: Iterable[Result], *, exact: bool = False) -> None:
        """Add blocks to parameters as they come."""
        del exact
        for division, updates, parameters in results:
            if updates is not None:
                division.own.add_to(parameters, updates)
