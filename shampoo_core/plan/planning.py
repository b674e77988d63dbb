"""Put together what a model needs on some ranks, and what to change where it does not fit."""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from shampoo_core.averaging import AveragingConfig
from shampoo_core.config import check_count, check_flags, check_range
from shampoo_core.model_shapes import NamedShape, num_elements
from shampoo_core.plan.devices import DEVICES, Device
from shampoo_core.plan.intervals import LONGEST_INTERVAL, reason, shortest_interval
from shampoo_core.plan.layout import (
    TABLE_ROWS,
    MethodBlocks,
    Placement,
    balance,
    blocks_by_method,
    held_numbers,
    largest_stack,
    loads,
    stack_sizes,
    tables_of,
)
from shampoo_core.plan.schedule import Schedule
from shampoo_core.plan.simulation import (
    RankSteps,
    Step,
    UpdateRule,
    factor_sides,
    first_alike,
    plain_and_refresh,
    simulate,
    state_bytes,
)
from shampoo_core.plan.times import Messages, Times, times_of
from shampoo_core.plan.travel import FLOAT32, Travel, travel
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.preconditioners.shampoo import ShampooConfig

GIB = 2**30


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
        weight_decay: As of the optimizer; with 0 and without averaging sharded weights stay where they are.
        max_block_size: Longest side of a block.
        max_wave_numel: As of the optimizer: most numbers stepped at once; None is all, ``"auto"`` all or
            2^27, see `DistributedShampoo`.
        refresh_interval: Steps from one refresh of a factor to its next, at most 10,000.
        table_rows: A parameter with a side of as many or more is a lookup table, in a group of its own and
            stepped by Adam, as the submission has it; None takes none for one.
        gradient_as_bucket_view: As of torch's DDP: whether gradients lie in the buckets that it averages
            them in, instead of beside them.
        reserved_gib: What activations and everything else take of the memory, less than all of it.
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
    weight_decay: float = 1e-2
    max_block_size: int = 1024
    max_wave_numel: int | Literal["auto"] | None = "auto"
    refresh_interval: int = 100
    table_rows: int | None = TABLE_ROWS
    gradient_as_bucket_view: bool = False
    reserved_gib: float = 0.0
    step_ms: float | None = None
    overhead_percent: float = 5.0

    def __post_init__(self) -> None:
        if not num_elements(self.parameters):
            raise ValueError("Request: parameters must have at least one element, got none")
        check_flags(self)
        check_range(
            "Request", "memory_gib", self.memory_gib, low=0.0, low_open=True, high_open=True
        )
        check_range("Request", "reserved_gib", self.reserved_gib, low=0.0)
        if self.reserved_gib >= self.memory_gib:
            raise ValueError(
                f"Request: reserved_gib must be less than memory_gib={self.memory_gib:g}, of which it is "
                f"a part, got {self.reserved_gib:g}"
            )
        check_count("Request", "max_block_size", self.max_block_size)
        if self.max_wave_numel != "auto":
            check_count("Request", "max_wave_numel", self.max_wave_numel, optional=True)
        check_count("Request", "refresh_interval", self.refresh_interval)
        check_range(
            "Request", "refresh_interval", self.refresh_interval, low=1, high=LONGEST_INTERVAL
        )
        check_count("Request", "table_rows", self.table_rows, optional=True)
        check_range("Request", "weight_decay", self.weight_decay, low=0.0)
        if self.step_ms is not None:
            check_range("Request", "step_ms", self.step_ms, low=0.0, low_open=True)
        check_range("Request", "overhead_percent", self.overhead_percent, low=0.0, low_open=True)

    @property
    def rule(self) -> UpdateRule:
        """What a step does with search directions."""
        return UpdateRule(self.averaging, self.weight_decay)


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank, beside parameters, gradients and DDP's buckets, of which all have as many."""

    rank: int
    state: int
    tables: int
    """Of indices, beside the state; see `shampoo_core.storage.triangles`."""
    travel: int
    """Temporary, while blocks travel between ranks."""
    plain: int
    """Temporary, in a plain step."""
    staggered: int
    """Temporary, in the dearest step of a staggered refresh."""
    refresh: int
    """Temporary, in a step that refreshes everything at once."""

    @property
    def most_staggered(self) -> int:
        """State and temporary bytes under a staggered refresh."""
        return self.state + self.tables + max(self.travel, self.plain, self.staggered)

    @property
    def most_at_once(self) -> int:
        """State and temporary bytes if everything is refreshed in one step."""
        return self.state + self.tables + max(self.travel, self.plain, self.refresh)


@dataclass(frozen=True)
class Plan:
    """What a model needs; bytes of state and of messages are exact, operations but for a few copies.

    Milliseconds are estimates.

    Temporary bytes are those that are alive at once, counted, but while blocks travel an upper bound. What
    a solver does again where it failed is not among them: where roots of an `OrthogonalIterationSolver`
    fall back to eigendecompositions, a refresh of everything takes some quarter more.

    Memory is of the rank that needs most; arithmetic, operations and milliseconds are of the one with
    the largest modelled load.
    """

    num_parameters: int
    num_tables: int
    """Parameters that are stepped by Adam as lookup tables."""
    num_blocks: int
    stacks: dict[str, int]
    """Block shape -> number of blocks."""
    largest_stack: int
    """Numbers in the blocks of one shape that have most, of all ranks."""
    parameter_bytes: int
    state_bytes_per_rank: list[int]
    """Of each owner."""
    staggered_memory: RankMemory
    """Of the rank that needs most under a staggered refresh."""
    at_once_memory: RankMemory
    """Of the rank that needs most if everything is refreshed in one step."""
    bucket_bytes: int
    """Of DDP, beside gradients."""
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
    """On average: the others are of steps with statistics, which can come at some steps only."""
    refresh_ms: float
    staggered_ms: float
    send_ms: float
    """With adding what comes from others to the weights."""
    mean_ms: float
    """An average step under a refresh staggered for these ranks, communication included."""
    mean_at_once_ms: float
    """The same where everything is refreshed in one step of an interval."""
    memory_gib: float
    """Available: of the device, less what is reserved."""
    refresh_interval: int
    overhead_percent: float | None
    """Of the optimizer over a training step, at the interval given; None without ``step_ms``."""
    shortest_interval: int | None
    """Keeps the overhead as small as asked for, and one step less does not; None if none does or none
    was asked."""
    no_interval: str | None
    """Why none does."""

    @property
    def state_bytes(self) -> int:
        """Of the rank with most."""
        return max(self.state_bytes_per_rank)

    @property
    def peak_gib(self) -> float:
        """Most memory at once under a staggered refresh."""
        return self._gib(self.staggered_memory.most_staggered)

    @property
    def refresh_peak_gib(self) -> float:
        """Most memory at once when everything is refreshed in one step."""
        return self._gib(self.at_once_memory.most_at_once)

    @property
    def fits(self) -> bool:
        """Whether the memory holds it, under a staggered refresh."""
        return self.peak_gib <= self.memory_gib

    @property
    def fits_at_once(self) -> bool:
        """Whether the memory holds it if everything is refreshed in one step, as by default."""
        return self.refresh_peak_gib <= self.memory_gib

    def _gib(self, of_rank: int) -> float:
        return (2 * self.parameter_bytes + self.bucket_bytes + of_rank) / GIB

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers, for JSON."""
        derived = {
            "peak_gib": self.peak_gib,
            "refresh_peak_gib": self.refresh_peak_gib,
            "fits": self.fits,
            "fits_at_once": self.fits_at_once,
        }
        return {**dataclasses.asdict(self), **derived}


def make_plan(request: Request) -> Plan:
    """Work out what a model needs."""
    placement = request.placement
    methods = _methods(request, request.refresh_interval)
    schedule = _schedule(request, methods, request.refresh_interval)
    alike = first_alike(methods, placement.num_owners)
    members: dict[int, list[int]] = {}
    for rank, first in enumerate(alike):
        members.setdefault(first, []).append(rank)
    steps_of = {
        first: simulate(methods, *schedule.busiest(ranks), request.rule)
        for first, ranks in members.items()
    }
    heaviest = _heaviest(methods, placement)
    steps = steps_of[alike[heaviest]]
    messages = _messages(request, methods)
    of_heaviest = steps.plain, steps.bare, steps.refresh
    times = _times(request, methods, heaviest, of_heaviest, messages, schedule)
    states = state_bytes(methods, placement.num_owners, request.averaging)
    memory = [
        _rank_memory(rank, states[rank], steps_of[first], messages.most)
        for rank, first in enumerate(alike)
    ]
    interval, no_interval = _shortest_interval(request, times)
    parameter_bytes = FLOAT32 * held_numbers(request.parameters, placement)
    has_buckets = placement.sharding == "ddp" and placement.world_size > 1
    return Plan(
        num_parameters=num_elements(request.parameters),
        num_tables=len(tables_of(request.parameters, request.table_rows)),
        num_blocks=sum(len(method.tiles) for method in methods),
        stacks=stack_sizes(methods),
        largest_stack=largest_stack(methods),
        parameter_bytes=parameter_bytes,
        state_bytes_per_rank=states,
        staggered_memory=max(memory, key=lambda of_rank: of_rank.most_staggered),
        at_once_memory=max(memory, key=lambda of_rank: of_rank.most_at_once),
        bucket_bytes=parameter_bytes if has_buckets and not request.gradient_as_bucket_view else 0,
        sent_bytes_per_rank=list(map(operator.add, messages.sent.sent, messages.sent.passed_on)),
        balance=balance(methods, placement),
        plain_flops=steps.plain.flops,
        refresh_flops=steps.refresh.flops,
        plain_operations=len(steps.plain.operations),
        refresh_operations=len(steps.refresh.operations),
        plain_ms=times.plain,
        refresh_ms=1e3 * request.device.step_seconds(steps.refresh.operations),
        staggered_ms=1e3
        * max(request.device.step_seconds(s.staggered.operations) for s in steps_of.values()),
        send_ms=times.send,
        mean_ms=times.mean(request.refresh_interval),
        mean_at_once_ms=dataclasses.replace(times, waiting=1.0).mean(request.refresh_interval),
        memory_gib=request.memory_gib - request.reserved_gib,
        refresh_interval=request.refresh_interval,
        overhead_percent=_overhead(request, times),
        shortest_interval=interval,
        no_interval=no_interval,
    )


def _methods(request: Request, refresh_interval: int) -> list[MethodBlocks]:
    return blocks_by_method(
        request.parameters,
        request.config,
        request.placement,
        max_block_size=request.max_block_size,
        refresh_interval=refresh_interval,
        max_wave_numel=request.max_wave_numel,
        table_rows=request.table_rows,
    )


def _messages(request: Request, methods: Sequence[MethodBlocks]) -> Messages:
    share = request.rule.reading_share
    found = {
        reads: travel(
            request.parameters,
            methods,
            request.placement,
            reads_weights=reads,
            holders_decay=request.rule.holders_decay,
        )
        for reads in {share > 0.0, share == 1.0}
    }
    return Messages(found[share == 1.0], found[share > 0.0], share)


def _schedule(request: Request, methods: Sequence[MethodBlocks], interval: int) -> Schedule:
    return Schedule(methods, factor_sides(methods), interval, request.placement.num_owners)


def _heaviest(methods: Sequence[MethodBlocks], placement: Placement) -> int:
    load = loads(methods, placement)
    return max(range(len(load)), key=load.__getitem__)


def _rank_memory(rank: int, state: int, steps: RankSteps, travelling: Travel) -> RankMemory:
    weights = travelling.weights[rank]
    return RankMemory(
        rank=rank,
        state=state,
        tables=steps.table_bytes,
        travel=travelling.alive[rank],
        plain=steps.plain.peak_bytes + weights,
        staggered=steps.staggered.peak_bytes + weights,
        refresh=steps.refresh.peak_bytes + weights,
    )


def _times(
    request: Request,
    methods: Sequence[MethodBlocks],
    rank: int,
    steps: tuple[Step, Step, Step],
    messages: Messages,
    schedule: Schedule,
) -> Times:
    device, placement = request.device, request.placement
    return times_of(device, placement, methods, rank, steps, messages, schedule.waiting)


def _overhead(request: Request, times: Times) -> float | None:
    if request.step_ms is None:
        return None
    return 100.0 * times.mean(request.refresh_interval) / request.step_ms


def _shortest_interval(request: Request, times: Times) -> tuple[int | None, str | None]:
    """The interval, or why there is none; neither if nobody asked."""
    if request.step_ms is None:
        return None, None
    placement = request.placement

    def times_at(interval: int) -> Times:
        if interval == request.refresh_interval:
            return times
        methods = _methods(request, interval)
        rank = _heaviest(methods, placement)
        steps = plain_and_refresh(methods, rank, request.rule)
        schedule = _schedule(request, methods, interval)
        return _times(request, methods, rank, steps, _messages(request, methods), schedule)

    allowed = request.step_ms * request.overhead_percent / 100.0
    interval, of_interval = shortest_interval(allowed, request.refresh_interval, times_at)
    return interval, reason(allowed, of_interval) if interval is None else None
