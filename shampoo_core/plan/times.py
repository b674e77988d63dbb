"""How long the steps of a plan take, by the rates of its device."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from shampoo_core.plan.devices import Device
from shampoo_core.plan.layout import MethodBlocks, Placement
from shampoo_core.plan.simulation import Step, statistics_interval
from shampoo_core.plan.travel import FLOAT32, Travel


@dataclass(frozen=True)
class Times:
    """Milliseconds of the steps of one plan."""

    plain: float
    """On average: statistics can come at some steps only."""
    refresh: float
    """What a step that refreshes everything takes beyond a plain one."""
    send: float
    waiting: float = 1.0
    """What staggered refreshes take in an interval, in units of one of everything."""

    @property
    def staggered(self) -> float:
        """What all refreshes of an interval take, if staggered: at every step all wait for the slowest."""
        return self.refresh * self.waiting

    def mean(self, interval: int) -> float:
        """An average step under a staggered refresh, communication included."""
        return self.plain + self.send + self.staggered / interval

    def estimated_interval(self, allowed: float) -> float:
        """Shortest that would keep a mean, if times were the same for every interval; may be infinite."""
        left = allowed - self.plain - self.send
        if left <= 0.0:
            return math.inf
        return max(1, math.ceil(self.staggered / left))


class Messages(NamedTuple):
    """What travels, in steps that read no weights and in those that do."""

    usual: Travel
    reading: Travel
    share: float
    """Of the steps, those that read weights."""

    @property
    def most(self) -> Travel:
        """Of the steps that take most."""
        return self.reading if self.share > 0.0 else self.usual

    @property
    def sent(self) -> Travel:
        """Of most steps."""
        return self.reading if self.share == 1.0 else self.usual


def times_of(
    device: Device,
    placement: Placement,
    methods: Sequence[MethodBlocks],
    rank: int,
    steps: tuple[Step, Step, Step],
    messages: Messages,
    waiting: float,
) -> Times:
    """Estimate the times of a plan.

    Args:
        device: Its rates.
        placement: Ranks.
        methods: The blocks of the model.
        rank: With the largest load.
        steps: Of this rank: plain with statistics, without, and refreshing everything.
        messages: Of all ranks.
        waiting: See `Times`.
    """
    plain, bare, refresh = (1e3 * device.step_seconds(step.operations) for step in steps)
    every = max(statistics_interval(method.config) for method in methods)
    send = (1.0 - messages.share) * _send_seconds(device, placement, messages.usual)
    send += messages.share * _send_seconds(device, placement, messages.reading)
    # Updates of others' blocks are read and added to weights, which are read and written.
    numbers = sum(math.prod(tile.sizes) for method in methods for tile in method.tiles)
    own = sum(math.prod(tile.sizes) for method in methods for tile in method.of_rank(rank))
    of_others = max(0.0, numbers / placement.num_shards - own)
    send += device.traffic_seconds(3 * FLOAT32 * of_others)
    return Times(
        plain=(plain + (every - 1) * bare) / every,
        refresh=refresh - plain,
        send=1e3 * send,
        waiting=waiting,
    )


def _send_seconds(device: Device, placement: Placement, travelling: Travel) -> float:
    together = placement.num_owners if placement.sharding == "ddp" else placement.num_shards
    seconds = device.send_seconds(
        max(travelling.sent), together, to_all=placement.sharding == "ddp"
    )
    # Every rank of a replica has a ring of its own through the others, by its own link to the network.
    return seconds + device.send_seconds(
        max(travelling.passed_on), placement.num_owners, to_all=False
    )
