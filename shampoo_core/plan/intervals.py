"""A refresh interval that keeps the optimizer's share of a training step, while one step less does not.

A much shorter one may keep it as well: with the interval blocks get other owners, and mean steps jump.
"""

from __future__ import annotations

from collections.abc import Callable

from shampoo_core.plan.times import Times

LONGEST_INTERVAL = 10_000
ROUNDS_OF_ESTIMATES = 8
"""So often the next interval is estimated from the last one's times; then brackets are halved."""


def shortest_interval(
    allowed: float, start: int, times_at: Callable[[int], Times]
) -> tuple[int | None, Times]:
    """Find an interval that keeps to some mean milliseconds while the one before it does not.

    Blocks are divided over ranks by what they cost at an interval, so that every interval has times
    of its own and each that is considered is planned.

    Args:
        allowed: Milliseconds that an average step may take.
        start: An interval whose times are a first guess.
        times_at: Times of a plan with an interval.

    Returns:
        The interval, and its times. None, and the times with the longest interval, if that does not
        keep to them either.
    """
    failing, holding, found = 0, LONGEST_INTERVAL, None
    last = times_at(start)
    rounds = 0
    while holding - failing > 1 or found is None:
        guess = last.estimated_interval(allowed)
        if found is None and guess >= LONGEST_INTERVAL:
            candidate = LONGEST_INTERVAL
        elif rounds < ROUNDS_OF_ESTIMATES:
            # An interval that is its own estimate is the answer unless the one before holds as well.
            candidate = int(min(max(guess, failing + 1), holding - 1))
        else:
            candidate = (failing + holding) // 2
        rounds += 1
        last = times_at(candidate)
        if last.mean(candidate) <= allowed:
            holding, found = candidate, last
        elif candidate == LONGEST_INTERVAL:
            return None, last
        else:
            failing = candidate
    return holding, found


def reason(allowed: float, times: Times) -> str:
    """Why no interval keeps to it, by times with the longest one."""
    limit = f"{allowed:.2f} ms"
    if times.plain > allowed:
        return f"a plain step alone takes {times.plain:.2f} ms of {limit}"
    beside = times.plain + times.send
    if beside > allowed:
        return (
            f"a plain step takes {times.plain:.2f} ms and sending {times.send:.2f} ms, "
            f"together {beside:.2f} of {limit}"
        )
    return (
        f"with one of {LONGEST_INTERVAL:,} steps, the longest considered, a mean step takes "
        f"{times.mean(LONGEST_INTERVAL):.2f} ms of {limit}"
    )
