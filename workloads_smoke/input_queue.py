"""A training queue that knows its position, so that a resumed trial goes on with the next batch."""

from collections.abc import Iterator
from typing import Any


class CountingQueue(Iterator[dict[str, Any]]):
    """A workload's input queue; submissions may draw any number of batches a step."""

    def __init__(self, queue: Iterator[dict[str, Any]]) -> None:
        """Wrap a fresh queue.

        Args:
            queue: Batches; with a method `skip(num_batches)` it moves on without making them.
        """
        self._queue = queue
        self.num_drawn = 0

    def __next__(self) -> dict[str, Any]:
        batch = next(self._queue)
        self.num_drawn += 1
        return batch

    def skip(self, num_batches: int) -> None:
        """Move on by that many batches."""
        if hasattr(self._queue, "skip"):
            self._queue.skip(num_batches)
        else:
            for _ in range(num_batches):
                next(self._queue)
        self.num_drawn += num_batches
