"""What could be changed about a plan, each change with what it would do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from shampoo_core.config import STORAGES
from shampoo_core.groups import LARGEST_WAVE_NUMEL
from shampoo_core.plan.layout import MOST_RANKS
from shampoo_core.plan.planning import Plan, Request, make_plan

WAVES_OF_LARGEST_STACK = 2
"""With a rank's share of the largest stack in so many waves a plain step takes less than twice that."""
SMALLEST_BLOCK_SIZE = 128
LEAST_SAVING = 0.01
"""Of the memory, for a change to be worth a line."""
FEWER_SHARING = (1, 2, 4, 8, 16)
"""Parts of the ranks that are tried as those that share, or what divides them and is nearest."""
LEAST_SPEED_UP = 0.1
"""Of a mean step, for fewer ranks that share to be worth a line."""


@dataclass(frozen=True)
class Change:
    """One change to a request, or several together, and what the plan would be."""

    what: str
    peak_gib: float
    mean_ms: float
    fits: bool


_Edit = tuple[str, Callable[[Request], Request]]
"""A name, and what makes the change."""


def alternatives(request: Request, plan: Plan) -> list[Change]:
    """What saves memory where a plan does not fit, what fits first; nothing where it does.

    If none does alone, those that change neither the ranks nor the blocks are tried together.
    """
    if plan.fits:
        return []
    # Only memory and a mean step are compared: no interval has to be searched.
    request = dataclasses.replace(request, step_ms=None)
    found = [
        (edit, _changed(request, [edit])) for edit in (*_gentle(request, plan), *_others(request))
    ]
    helpful = [
        (edit, change)
        for edit, change in found
        if change.peak_gib <= (1.0 - LEAST_SAVING) * plan.peak_gib
    ]
    changes = [change for _, change in helpful]
    if not any(change.fits for change in changes):
        names = [name for name, _ in _gentle(request, plan)]
        together = [edit for edit, _ in helpful if edit[0] in names]
        # Of several storages the last is the smallest.
        storages = [edit for edit in together if edit[0].startswith("storage")]
        together = [edit for edit in together if edit not in storages[:-1]]
        if len(together) > 1:
            changes.append(_changed(request, together))
    return sorted(changes, key=lambda change: (not change.fits, change.peak_gib))


def quickest_sharing(request: Request, plan: Plan) -> Change | None:
    """How many ranks should share the work for a shorter mean step; None if no number does much better.

    More ranks compute less each, but what is sent to all of them does not get less with their number, is as
    long as the longest message of any, and leaves a machine. Fewer keep more state each.
    """
    placement = request.placement
    request = dataclasses.replace(request, step_ms=None)
    possible = [
        ranks
        for ranks in range(placement.num_shards, placement.world_size + 1, placement.num_shards)
        if placement.world_size % ranks == 0
    ]
    nearest = {
        min(possible, key=lambda ranks: abs(math.log(ranks * fewer / placement.world_size)))
        for fewer in FEWER_SHARING
    }
    changes = [
        _changed(request, [_sharing(ranks)])
        for ranks in sorted(nearest - {placement.num_owners}, reverse=True)
    ]
    better = [
        change
        for change in changes
        if change.mean_ms <= (1.0 - LEAST_SPEED_UP) * plan.mean_ms and change.fits >= plan.fits
    ]
    return min(better, key=lambda change: change.mean_ms, default=None)


def _sharing(ranks: int) -> _Edit:
    def edit(before: Request) -> Request:
        placement = dataclasses.replace(before.placement, ranks_per_group=ranks)
        return dataclasses.replace(before, placement=placement)

    return f"ranks_per_group={ranks}", edit


def _changed(request: Request, edits: list[_Edit]) -> Change:
    for _, edit in edits:
        request = edit(request)
    plan = make_plan(request)
    return Change(", ".join(what for what, _ in edits), plan.peak_gib, plan.mean_ms, plan.fits)


def _gentle(request: Request, plan: Plan) -> Iterator[_Edit]:
    """Changes to how the same work is done on the same ranks."""
    if plan.bucket_bytes:
        yield (
            "gradient_as_bucket_view=True",
            lambda before: dataclasses.replace(before, gradient_as_bucket_view=True),
        )
    wave = plan.largest_stack // (WAVES_OF_LARGEST_STACK * request.placement.num_owners)
    if isinstance(request.max_wave_numel, int):
        wave = min(wave, request.max_wave_numel // 2)
    wave = max(1, min(wave, LARGEST_WAVE_NUMEL // 2))
    yield (
        f"max_wave_numel={wave}",
        lambda before: dataclasses.replace(before, max_wave_numel=wave),
    )
    storage = getattr(request.config, "storage", None)
    for kind in STORAGES[STORAGES.index(storage) + 1 :] if storage in STORAGES else ():
        config = dataclasses.replace(request.config, storage=kind)  # type: ignore[type-var]
        yield (
            f'storage="{kind}"',
            lambda before, config=config: dataclasses.replace(before, config=config),  # type: ignore[misc]
        )


def _others(request: Request) -> Iterator[_Edit]:
    """Changes to blocks, which change the method, and to ranks."""
    half = request.max_block_size // 2
    if half >= SMALLEST_BLOCK_SIZE:
        yield (
            f"max_block_size={half}",
            lambda before: dataclasses.replace(before, max_block_size=half),
        )
    placement = request.placement
    all_share = "" if placement.num_owners == placement.world_size else ", all of which share"
    if placement.sharding == "ddp" and placement.world_size > 1:
        sharded = dataclasses.replace(placement, sharding="fsdp2", ranks_per_group=None)
        yield (
            f"parameters sharded (FSDP2){all_share}",
            lambda before: dataclasses.replace(before, placement=sharded),
        )
    if placement.num_owners < placement.world_size:
        yield _sharing(placement.world_size)
    twice = 2 * placement.world_size
    if twice <= MOST_RANKS:
        more = dataclasses.replace(placement, world_size=twice, ranks_per_group=None)
        yield (
            f"{twice} ranks{all_share}",
            lambda before: dataclasses.replace(before, placement=more),
        )
