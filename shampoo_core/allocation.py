"""From the parameters of a group to engines: blocks, who owns them, and their state."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from shampoo_core.blocking import Tile, merge_dimensions, tiles_of
from shampoo_core.engine import Engine
from shampoo_core.exchange.base import Exchange
from shampoo_core.exchange.choice import Exchanges
from shampoo_core.groups import (
    block_size_of,
    constant_options,
    grafting_of,
    portion_limit,
    state_dtype,
    wave_limit,
)
from shampoo_core.stacks import StackSet


def make_engines(
    group: Mapping[str, Any], indices: Sequence[int], exchanges: Exchanges
) -> Iterator[Engine]:
    """Allocate the state of some parameters: an engine per device, dtype, exchange and wave.

    Args:
        group: A parameter group, checked.
        indices: Which of its parameters.
        exchanges: Say how each of them is distributed.
    """
    tiles: dict[tuple[torch.device, torch.dtype], dict[Exchange, list[Tile]]] = {}
    for index in indices:
        parameter = group["params"][index]
        found = _tiles(group, index)
        if found:
            key = (parameter.device, state_dtype(parameter))
            by_exchange = tiles.setdefault(key, {})
            by_exchange.setdefault(exchanges.of(parameter), []).extend(found)
    for (device, dtype), by_exchange in tiles.items():
        stack_set = partial(StackSet, dtype=dtype, device=device)
        # Schedules are made for all together, however their parameters are distributed.
        everything = [tile for some in by_exchange.values() for tile in some]
        together = stack_set(sorted(everything, key=lambda tile: tile.parameter))
        for exchange, some in by_exchange.items():
            whole = together if len(by_exchange) == 1 else stack_set(some, whole=together)
            yield from _engines(group, exchange, whole)


def _tiles(group: Mapping[str, Any], index: int) -> list[Tile]:
    parameter, max_block_size = group["params"][index], block_size_of(group, index)
    merged = merge_dimensions(
        tuple(parameter.shape),
        max_block_size or parameter.numel(),
        target_order=group["target_order"],
        direction=group["merge_direction"],
    )
    return tiles_of(index, merged, max_block_size, group["cut"])


def _engines(group: Mapping[str, Any], exchange: Exchange, whole: StackSet) -> Iterator[Engine]:
    method, refresh = group["preconditioner"], group["refresh"]
    division = exchange.divide(
        whole, partial(method.block_flops, refresh_interval=refresh.interval)
    )
    most = max(own.numel for own in division.by_rank)
    limit = wave_limit(
        group["max_wave_numel"],
        whole.device,
        num_messages=exchange.num_messages,
        numel=most,
    )
    create = partial(
        method.create,
        options=constant_options(
            group, portion_limit(group["max_wave_numel"], whole.device, limit)
        ),
        grafting=grafting_of(group),
        refresh=refresh,
    )
    for wave in division.waves(limit):
        yield Engine(
            exchange,
            wave,
            create,
            group["averaging"],
            first_step=group["step"] + 1,
            alone=limit is not None,
        )
