"""Where the time of a trial goes, action by action (`--profile`)."""

import contextlib
import time
from collections import defaultdict
from collections.abc import Iterator

import torch


class Profiler:
    """Adds up the durations of named actions; off, it costs nothing."""

    def __init__(self, enabled: bool = True) -> None:
        self._enabled = enabled
        self._durations: defaultdict[str, list[float]] = defaultdict(list)
        self._start = time.monotonic()

    @contextlib.contextmanager
    def profile(self, action: str) -> Iterator[None]:
        """Time a block; work that it started on a GPU counts as its own."""
        if not self._enabled:
            yield
            return
        start = _idle_time()
        try:
            yield
        finally:
            self._durations[action].append(_idle_time() - start)

    def summary(self) -> str:
        """A table: action, calls, mean and total seconds, share of the time since the start."""
        elapsed = time.monotonic() - self._start
        lines = [f"{'action':<24}{'calls':>8}{'mean s':>12}{'total s':>12}{'share':>8}"]
        for action, durations in sorted(self._durations.items(), key=lambda item: -sum(item[1])):
            total = sum(durations)
            lines.append(
                f"{action:<24}{len(durations):>8}{total / len(durations):>12.6f}{total:>12.3f}"
                f"{total / elapsed:>8.1%}"
            )
        return "\n".join(lines)


def _idle_time() -> float:
    """Time once the GPU, if it is in use, has nothing left to do."""
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.monotonic()
