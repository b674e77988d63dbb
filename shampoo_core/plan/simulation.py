"""One rank's step without its device: state, operations and peak memory of its blocks, on "meta"."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from shampoo_core.averaging import AveragingConfig
from shampoo_core.blocking import Shape
from shampoo_core.counting import Operation, OperationCounter
from shampoo_core.live_memory import LiveMemory
from shampoo_core.optimizer import DistributedShampoo
from shampoo_core.plan.layout import MethodBlocks
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.refresh import (
    FactorSlice,
    FactorStackSize,
    FixedRefresh,
    RefreshPolicy,
)
from shampoo_core.storage.triangles import tables_apart


@dataclass(frozen=True)
class Step:
    """What one rank does in one step."""

    operations: list[Operation]
    peak_bytes: int
    """Most bytes alive at once beside parameters, gradients and state."""

    @property
    def flops(self) -> float:
        """Of matrix products and decompositions."""
        return sum(operation.flops for operation in self.operations)


@dataclass(frozen=True)
class RankSteps:
    """The kinds of steps that a rank takes."""

    plain: Step
    """Without a refresh, with statistics."""
    bare: Step
    """Without either; the same where statistics come at every step."""
    refresh: Step
    """Everything refreshed at once."""
    staggered: Step
    """The dearest step of an interval over which refreshes are spread."""
    table_bytes: int
    """Of indices that some storages keep beside the state."""


@dataclass(frozen=True)
class UpdateRule:
    """What a step does with search directions, as of the optimizer."""

    averaging: AveragingConfig | None = None
    weight_decay: float = 1e-2

    @property
    def reading_share(self) -> float:
        """Of the steps, those that need the weights of their blocks."""
        rule = self.averaging
        if rule is None:
            return 0.0
        if self.weight_decay != 0.0 and not rule.leaves_decay:
            return 1.0
        period = range(2, 2 + getattr(rule, "interval", 1))
        return sum(rule.reads_weights(step, first=False) for step in period) / len(period)

    @property
    def holders_decay(self) -> bool:
        """Whether a step leaves decay to the ranks that hold the weights."""
        return self.weight_decay != 0.0 and (self.averaging is None or self.averaging.leaves_decay)


@dataclass(frozen=True)
class _Given(FixedRefresh):
    """Makes due what it is told, and remembers which factors it was asked about."""

    slices: Sequence[FactorSlice] = ()
    asked: list[tuple[FactorStackSize, ...]] = field(default_factory=list)

    def due(self, step: int, sizes: tuple[FactorStackSize, ...]) -> list[FactorSlice]:
        """See `RefreshPolicy`."""
        self.asked.append(sizes)
        return list(self.slices)


class _RankOnMeta:
    """The blocks of one rank, each a parameter of its own, with their optimizer."""

    def __init__(
        self,
        methods: Sequence[MethodBlocks],
        rank: int,
        refreshes: Sequence[RefreshPolicy],
        rule: UpdateRule,
    ) -> None:
        groups: list[dict[str, Any]] = []
        for method, refresh in zip(methods, refreshes, strict=True):
            shapes = [tile.sizes for tile in method.of_rank(rank)]
            if shapes:
                groups.append(
                    {
                        "params": on_meta(shapes),
                        "preconditioner": method.config,
                        "max_wave_numel": method.option,
                        "refresh": refresh,
                    }
                )
        self._optimizer = optimizer_of(groups, rule)

    def step(self, number: int) -> Step:
        """Take the step of some number, measured."""
        for group in self._optimizer.param_groups:
            group["step"] = number - 1
        with LiveMemory() as memory, OperationCounter() as counter:
            self._optimizer.step()
        return Step(counter.operations, memory.peak)


def on_meta(shapes: Sequence[Shape]) -> list[torch.nn.Parameter]:
    """Parameters with gradients, for which no memory is taken."""
    parameters = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.empty(shape, device="meta"))
        parameter.grad = torch.empty_like(parameter)
        parameters.append(parameter)
    return parameters


def optimizer_of(groups: Sequence[dict[str, Any]], rule: UpdateRule) -> DistributedShampoo:
    """An optimizer whose parameters are blocks already."""
    return DistributedShampoo(
        groups,
        averaging=rule.averaging,
        weight_decay=rule.weight_decay,
        max_block_size=None,
        target_order=None,
    )


def block_state_bytes(
    block_shape: Shape, config: PreconditionerConfig, averaging: AveragingConfig | None = None
) -> int:
    """Bytes of state of one block, as in a checkpoint; that of many blocks is the sum."""
    (parameter,) = on_meta([block_shape])
    group = {"params": [parameter], "preconditioner": config}
    state = optimizer_of([group], UpdateRule(averaging)).state[parameter]
    return sum(tensor.numel() * tensor.element_size() for tensor in state.values())


def factor_sides(methods: Sequence[MethodBlocks]) -> list[dict[Shape, tuple[int, ...]]]:
    """Per method, the sides of the factors that a block of some shape has, in order."""
    found: list[dict[Shape, tuple[int, ...]]] = []
    for method in methods:
        sides: dict[Shape, tuple[int, ...]] = {}
        for shape, _ in method.stacks:
            nothing = _Given()
            group = {"params": on_meta([shape]), "preconditioner": method.config}
            optimizer_of([{**group, "refresh": nothing}], UpdateRule()).step()
            sizes = nothing.asked[0] if nothing.asked else ()
            sides[shape] = tuple(size.dimension for size in sizes)
        found.append(sides)
    return found


def state_bytes(
    methods: Sequence[MethodBlocks], num_owners: int, averaging: AveragingConfig | None = None
) -> list[int]:
    """Bytes of state of each owner."""
    totals = [0] * num_owners
    for method in methods:
        shapes = {tile.sizes for tile in method.tiles}
        sizes = {shape: block_state_bytes(shape, method.config, averaging) for shape in shapes}
        for tile, owner in zip(method.tiles, method.owners, strict=True):
            totals[owner] += sizes[tile.sizes]
    return totals


def simulate(
    methods: Sequence[MethodBlocks],
    rank: int,
    staggered: Sequence[Sequence[FactorSlice]],
    rule: UpdateRule = UpdateRule(),
) -> RankSteps:
    """Take the steps of one rank.

    Args:
        methods: The blocks of the model.
        rank: Whose blocks to step.
        staggered: Per method, what is due at the dearest step of a staggered refresh.
        rule: As of the optimizer.
    """
    if not _has_blocks(methods, rank):
        nothing = Step([], 0)
        return RankSteps(nothing, nothing, nothing, nothing, 0)
    with tables_apart() as tables:
        plain, bare, refresh = plain_and_refresh(methods, rank, rule)
        given = [_Given(start=1, slices=slices) for slices in staggered]
        dearest = _RankOnMeta(methods, rank, given, rule).step(_with_statistics(methods, 1))
        dearest = _of_at_least(dearest, plain.peak_bytes)
    table_bytes = sum(tensor.nbytes for pair in tables.values() for tensor in pair)
    return RankSteps(plain, bare, refresh, dearest, table_bytes)


def plain_and_refresh(
    methods: Sequence[MethodBlocks],
    rank: int,
    rule: UpdateRule = UpdateRule(),
) -> tuple[Step, Step, Step]:
    """Take three steps of one rank that has blocks: plain, without statistics, refreshing everything.

    Until the second refresh the host does not know that all have been refreshed, and a step keeps more; it
    is what a run has to have memory for.
    """
    early, second, third = (_with_statistics(methods, number) for number in (1, 2, 3))
    refresh = FixedRefresh(interval=second, start=1)
    blocks = _RankOnMeta(methods, rank, [refresh] * len(methods), rule)
    blocks.step(1)
    least = blocks.step(early).peak_bytes
    refreshed, plain = blocks.step(second), blocks.step(third)
    bare = plain if third == 4 else blocks.step(third + 1)
    return _of_at_least(plain, least), _of_at_least(bare, least), _of_at_least(refreshed, least)


def _of_at_least(step: Step, peak_bytes: int) -> Step:
    return replace(step, peak_bytes=max(step.peak_bytes, peak_bytes))


def _with_statistics(methods: Sequence[MethodBlocks], number: int) -> int:
    """A later step at which all methods take statistics, so many of their intervals after the first."""
    return 1 + number * math.lcm(*(statistics_interval(method.config) for method in methods))


def statistics_interval(config: PreconditionerConfig) -> int:
    """Steps from one update of a method's statistics to the next."""
    interval: int = getattr(config, "statistics_interval", 1)
    return interval


def first_alike(methods: Sequence[MethodBlocks], num_owners: int) -> list[int]:
    """For each rank the first one that has as many blocks of every shape, in the same order."""
    blocks: list[list[tuple[int, Shape]]] = [[] for _ in range(num_owners)]
    for number, method in enumerate(methods):
        for tile, owner in zip(method.tiles, method.owners, strict=True):
            blocks[owner].append((number, tile.sizes))
    firsts: dict[tuple[tuple[int, Shape], ...], int] = {}
    return [firsts.setdefault(tuple(own), rank) for rank, own in enumerate(blocks)]


def _has_blocks(methods: Sequence[MethodBlocks], rank: int) -> bool:
    return any(rank in method.owners for method in methods)
