"""Put together what a model needs on some ranks, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from shampoo_core.averaging import AveragingConfig
from shampoo_core.config import check_count, check_range
from shampoo_core.model_shapes import NamedShape, num_elements
from shampoo_core.plan.devices import DEVICES, Device
from shampoo_core.plan.layout import (
    MethodBlocks,
    Placement,
    balance,
    blocks_by_method,
    loads,
    numbers_owned,
    sent_bytes,
)
from shampoo_core.plan.simulation import RankSteps, simulate, state_bytes
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.preconditioners.shampoo import ShampooConfig

GIB = 2**30
FLOAT32 = 4
LONGEST_INTERVAL = 10_000


@dataclass(frozen=True)
class Request:
    """What is to be planned.

    Args:
        parameters: Of the model, at least one.
        placement: Ranks and sharding.
        device: Its rates.
        memory_gib: Of one device, positive.
        config: The method.
        averaging: As of the optimizer.
        max_block_size: Longest side of a block.
        max_wave_numel: As of the optimizer: most numbers stepped at once; None is all.
        refresh_interval: Steps from one refresh of a factor to its next.
        reserved_gib: What activations and everything else take of the memory.
        step_ms: A training step without the optimizer, positive; None leaves overheads out.
        overhead_percent: What the optimizer may add to that.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: A number is out of range.
    """

    parameters: Sequence[NamedShape]
    placement: Placement = field(default_factory=Placement)
    device: Device = DEVICES["a100"]
    memory_gib: float = 40.0
    config: PreconditionerConfig = field(default_factory=ShampooConfig)
    averaging: AveragingConfig | None = None
    max_block_size: int = 1024
    max_wave_numel: int | None = None
    refresh_interval: int = 100
    reserved_gib: float = 0.0
    step_ms: float | None = None
    overhead_percent: float = 5.0

    def __post_init__(self) -> None:
        if not num_elements(self.parameters):
            raise ValueError("Request: parameters must have at least one element, got none")
        check_range("Request", "memory_gib", self.memory_gib, low=0.0, low_open=True)
        check_range("Request", "reserved_gib", self.reserved_gib, low=0.0)
        check_count("Request", "max_block_size", self.max_block_size)
        check_count("Request", "max_wave_numel", self.max_wave_numel)
        check_count("Request", "refresh_interval", self.refresh_interval)
        if self.step_ms is not None:
            check_range("Request", "step_ms", self.step_ms, low=0.0, low_open=True)
        check_range("Request", "overhead_percent", self.overhead_percent, low=0.0, low_open=True)


@dataclass(frozen=True)
class Plan:
    """What a model needs; bytes and counts are exact, milliseconds estimates. Of the largest rank."""

    num_parameters: int
    num_blocks: int
    stacks: dict[str, int]
    """Block shape -> number of blocks."""
    largest_stack: int
    """Numbers in the blocks of one shape that have most, of all ranks."""
    parameter_bytes: int
    state_bytes_per_rank: list[int]
    """Of each owner."""
    plain_peak_bytes: int
    """Beside parameters, gradients, state and communication, in a plain step."""
    staggered_peak_bytes: int
    """In the dearest step of a staggered refresh."""
    refresh_peak_bytes: int
    """In a step that refreshes everything at once."""
    buffer_bytes: int
    """Of communication."""
    sent_bytes_per_rank: list[int]
    """By each owner in a step."""
    balance: float
    """Largest modelled load of a rank over the mean."""
    plain_flops: float
    refresh_flops: float
    """Of a step that refreshes everything at once."""
    plain_operations: int
    refresh_operations: int
    plain_ms: float
    refresh_ms: float
    staggered_ms: float
    send_ms: float
    memory_gib: float
    """Available: of the device, less what is reserved."""
    refresh_interval: int
    overhead_percent: float | None
    """Of the optimizer over a training step, at the interval given; None without ``step_ms``."""
    shortest_interval: int | None
    """Shortest that keeps the overhead as small as asked for; None if none does or none was asked."""

    @property
    def state_bytes(self) -> int:
        """Of the rank with most."""
        return max(self.state_bytes_per_rank)

    @property
    def mean_ms(self) -> float:
        """An average step, communication included."""
        extra = (self.refresh_ms - self.plain_ms) / self.refresh_interval
        return self.plain_ms + extra + self.send_ms

    @property
    def peak_gib(self) -> float:
        """Most memory at once under a staggered refresh."""
        temporary = max(self.plain_peak_bytes, self.staggered_peak_bytes)
        return self._gib(temporary)

    @property
    def refresh_peak_gib(self) -> float:
        """Most memory at once when everything is refreshed in one step."""
        return self._gib(max(self.plain_peak_bytes, self.refresh_peak_bytes))

    @property
    def fits(self) -> bool:
        """Whether the memory holds it, under a staggered refresh."""
        return self.peak_gib <= self.memory_gib

    def _gib(self, temporary: int) -> float:
        held = 2 * self.parameter_bytes + self.state_bytes + self.buffer_bytes
        return (held + temporary) / GIB

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        derived = {
            "mean_ms": self.mean_ms,
            "peak_gib": self.peak_gib,
            "refresh_peak_gib": self.refresh_peak_gib,
            "fits": self.fits,
        }
        return {**dataclasses.asdict(self), **derived}


def make_plan(request: Request) -> Plan:
    """Work out what a model needs."""
    placement = request.placement
    methods = blocks_by_method(
        request.parameters,
        request.config,
        placement,
        max_block_size=request.max_block_size,
        refresh_interval=request.refresh_interval,
    )
    load = loads(methods, placement)
    heaviest = max(range(len(load)), key=load.__getitem__)
    limit = request.max_wave_numel
    steps = simulate(methods, heaviest, request.refresh_interval, request.averaging, limit)
    sent = sent_bytes(request.parameters, methods, placement, max_wave_numel=limit)
    milliseconds = _milliseconds(request, steps, max(sent))
    return Plan(
        num_parameters=num_elements(request.parameters),
        num_blocks=sum(len(method.tiles) for method in methods),
        stacks=_stacks(methods),
        largest_stack=_largest_stack(methods),
        parameter_bytes=_parameter_bytes(request),
        state_bytes_per_rank=state_bytes(methods, placement.num_owners, request.averaging),
        plain_peak_bytes=steps.plain.peak_bytes,
        staggered_peak_bytes=steps.staggered.peak_bytes,
        refresh_peak_bytes=steps.refresh.peak_bytes,
        buffer_bytes=_buffer_bytes(methods, placement, limit),
        sent_bytes_per_rank=sent,
        balance=balance(methods, placement),
        plain_flops=steps.plain.flops,
        refresh_flops=steps.refresh.flops,
        plain_operations=len(steps.plain.operations),
        refresh_operations=len(steps.refresh.operations),
        memory_gib=request.memory_gib - request.reserved_gib,
        refresh_interval=request.refresh_interval,
        overhead_percent=_overhead(request, milliseconds),
        shortest_interval=_shortest_interval(request, milliseconds),
        **milliseconds,
    )


def _stacks(methods: Sequence[MethodBlocks]) -> dict[str, int]:
    counts = Counter(tile.sizes for method in methods for tile in method.tiles)
    by_size = sorted(counts.items(), key=lambda item: -item[1] * math.prod(item[0]))
    return {"x".join(map(str, shape)): count for shape, count in by_size}


def _largest_stack(methods: Sequence[MethodBlocks]) -> int:
    counts = Counter(tile.sizes for method in methods for tile in method.tiles)
    return max(count * math.prod(shape) for shape, count in counts.items())


def _parameter_bytes(request: Request) -> int:
    """Of one rank: all, or slices of the rows, each as long as the longest."""
    shards = request.placement.num_shards
    numbers = 0
    for parameter in request.parameters:
        rows = parameter.shape[0] if parameter.shape else 1
        numbers += -(-rows // shards) * math.prod(parameter.shape[1:])
    return numbers * FLOAT32


def _buffer_bytes(
    methods: Sequence[MethodBlocks], placement: Placement, max_wave_numel: int | None
) -> int:
    if placement.num_owners == 1:
        return 0
    longest = max(map(max, numbers_owned(methods, placement, max_wave_numel)))
    if placement.sharding == "ddp":  # one's own segment, and those of all
        return (placement.num_owners + 1) * longest * FLOAT32
    return 2 * longest * FLOAT32  # to send, and received


def _milliseconds(request: Request, steps: RankSteps, sent: int) -> dict[str, float]:
    device = request.device
    return {
        "plain_ms": 1e3 * device.step_seconds(steps.plain.operations),
        "refresh_ms": 1e3 * device.step_seconds(steps.refresh.operations),
        "staggered_ms": 1e3 * device.step_seconds(steps.staggered.operations),
        "send_ms": 1e3 * device.send_seconds(sent, request.placement.num_owners),
    }


def _overhead(request: Request, milliseconds: dict[str, float]) -> float | None:
    if request.step_ms is None:
        return None
    extra = (milliseconds["refresh_ms"] - milliseconds["plain_ms"]) / request.refresh_interval
    total = milliseconds["plain_ms"] + milliseconds["send_ms"] + extra
    return 100.0 * total / request.step_ms


def _shortest_interval(request: Request, milliseconds: dict[str, float]) -> int | None:
    if request.step_ms is None:
        return None
    allowed = request.step_ms * request.overhead_percent / 100.0
    left = allowed - milliseconds["plain_ms"] - milliseconds["send_ms"]
    extra = milliseconds["refresh_ms"] - milliseconds["plain_ms"]
    if left <= 0.0 or extra / left > LONGEST_INTERVAL:
        return None
    return max(1, math.ceil(extra / left))
