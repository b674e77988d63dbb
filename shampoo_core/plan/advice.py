"""What could be changed about a plan, each change with what it would do."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from shampoo_core.config import STORAGES
from shampoo_core.groups import LARGEST_WAVE_NUMEL
from shampoo_core.plan.layout import Placement
from shampoo_core.plan.planning import Plan, Request, make_plan

WAVES_OF_LARGEST_STACK = 2
"""With a rank's share of the largest stack in so many waves a plain step takes less than twice that."""


@dataclass(frozen=True)
class Change:
    """One change to a request, and what the plan would be with it."""

    what: str
    peak_gib: float
    mean_ms: float
    fits: bool


def alternatives(request: Request, plan: Plan) -> list[Change]:
    """Changes to a plan that does not fit, those first that fit; nothing for one that does."""
    if plan.fits:
        return []
    changes = []
    # Only memory and a mean step are compared: no interval has to be searched.
    for what, changed in _changed(dataclasses.replace(request, step_ms=None), plan):
        result = make_plan(changed)
        changes.append(Change(what, result.peak_gib, result.mean_ms, result.fits))
    return sorted(changes, key=lambda change: (not change.fits, change.peak_gib))


def _changed(request: Request, plan: Plan) -> list[tuple[str, Request]]:
    changes = []
    wave = max(1, plan.largest_stack // (WAVES_OF_LARGEST_STACK * request.placement.num_owners))
    wave = min(wave, LARGEST_WAVE_NUMEL // WAVES_OF_LARGEST_STACK)
    if request.max_wave_numel in (None, "auto"):
        waves = dataclasses.replace(request, max_wave_numel=wave)
        changes.append((f"max_wave_numel={wave}", waves))
    storage = getattr(request.config, "storage", None)
    for kind in STORAGES:
        if storage is not None and kind not in ("dense", storage):
            config = dataclasses.replace(request.config, storage=kind)  # type: ignore[type-var]
            changes.append((f'storage="{kind}"', dataclasses.replace(request, config=config)))
    half = request.max_block_size // 2
    if half >= 128:
        smaller = dataclasses.replace(request, max_block_size=half)
        changes.append((f"max_block_size={half}", smaller))
    placement = request.placement
    if placement.sharding == "ddp" and placement.world_size > 1:
        sharded = dataclasses.replace(placement, sharding="fsdp2")
        changes.append(
            ("parameters sharded (FSDP2)", dataclasses.replace(request, placement=sharded))
        )
    more = Placement(2 * placement.world_size, placement.sharding, placement.group_size)
    what = f"{more.world_size} ranks"
    changes.append((what, dataclasses.replace(request, placement=more)))
    return changes
