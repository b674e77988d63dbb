"""Memory that a step needs beside parameters, gradients and state, with and without waves.

Exact, on the "meta" device, and in units of the largest stack: all blocks of the shape that takes most.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.counts import MIB
from benchmarks.flags import chosen, count, out_folder, parser_of
from benchmarks.methods import measure, methods
from benchmarks.models import state_bytes, workload_groups
from benchmarks.tables import DEFAULT_FOLDER, publish
from shampoo_core import (
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    ShampooConfig,
    StaggeredRefresh,
)
from shampoo_core.preconditioners.base import PreconditionerConfig

METHODS: dict[str, PreconditionerConfig] = {
    "Shampoo": ShampooConfig(),
    "eigenvalue-corrected": EigenvalueCorrectedConfig(),
}
WORKLOADS = ("imagenet_resnet", "imagenet_vit", "ogbg", "librispeech_conformer", "wmt")
TAKES = f"any, by default {', '.join(WORKLOADS)}"
WAVES_OF_LARGEST_STACK = 2
"""The largest stack is cut into so many waves."""
INTERVAL = 100
LIMIT = 2.0
"""Largest stacks that a step may take, whether plain, of a staggered refresh or of one of everything, on
`WORKLOADS`: others may have a block that is nearly all of the largest stack, or factors that are larger."""


def largest_stack(workload: str) -> int:
    """Numbers in the largest stack of a workload's model."""
    optimizer = DistributedShampoo(workload_groups(workload, ShampooConfig()), max_wave_numel=None)
    return max(
        math.prod(layout.shape)
        for engines in optimizer._engines
        for engine in engines
        for layout in engine.stack_set.layouts
    )


def memory_rows(
    workloads: Sequence[str],
    configs: Mapping[str, PreconditionerConfig] = METHODS,
    waves_of_largest_stack: int = WAVES_OF_LARGEST_STACK,
) -> Iterator[dict[str, Any]]:
    """One row per workload, method and size of waves."""
    for workload in workloads:
        largest = largest_stack(workload)
        for method, config in configs.items():
            for max_wave_numel in (None, max(1, largest // waves_of_largest_stack)):
                yield {
                    "workload": workload,
                    "method": method,
                    **_entries(workload, config, max_wave_numel, largest),
                }


def _entries(
    workload: str, config: PreconditionerConfig, max_wave_numel: int | None, largest: int
) -> dict[str, Any]:
    (_, plain, refresh), optimizer = measure(
        workload, config, FixedRefresh(4, 1), [4, 5, 8], max_wave_numel=max_wave_numel
    )
    second = range(INTERVAL + 1, 2 * INTERVAL + 1, 7)
    spread, _ = measure(
        workload, config, StaggeredRefresh(INTERVAL), second, max_wave_numel=max_wave_numel
    )
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    stack_bytes = 4 * largest
    limit = LIMIT if max_wave_numel and workload in WORKLOADS else None
    return {
        "waves": max(len(engines) for engines in optimizer._engines),
        "max_wave_numel": max_wave_numel,
        "parameters_mib": sum(p.nbytes for p in parameters) / MIB,
        "state_mib": state_bytes(optimizer) / MIB,
        "largest_mib": stack_bytes / MIB,
        "plain_mib": plain.peak / MIB,
        "plain_stacks": plain.peak / stack_bytes,
        "limit": limit,
        "refresh_limit": limit,
        "staggered_stacks": max(step.peak for step in spread) / stack_bytes,
        "refresh_stacks": refresh.peak / stack_bytes,
        "operations": plain.counter.num_operations,
        "refresh_operations": refresh.counter.num_operations,
        "refresh_waits": refresh.counter.num_synchronisations,
    }


COLUMNS = {
    "workload": "workload",
    "method": "method",
    "parameters_mib": "parameters MiB",
    "state_mib": "state MiB",
    "largest_mib": "largest stack MiB",
    "max_wave_numel": "max_wave_numel",
    "waves": "waves",
    "plain_mib": "temporary MiB",
    "plain_stacks": "in stacks",
    "limit": "limit",
    "staggered_stacks": "staggered",
    "refresh_stacks": "all refreshed",
    "refresh_limit": "limit",
    "operations": "operations",
    "refresh_operations": "all refreshed",
    "refresh_waits": "waits",
}


def run(
    workloads: Sequence[str] | None = None,
    folder: Path = DEFAULT_FOLDER,
    configs: Mapping[str, PreconditionerConfig] = METHODS,
    waves_of_largest_stack: int = WAVES_OF_LARGEST_STACK,
) -> list[Path]:
    """Print and write the table, for `WORKLOADS` if none are given; return the files written."""
    names = chosen(workloads, WORKLOADS)
    return publish(
        "Memory: most bytes alive in a step beside parameters, gradients and state",
        list(memory_rows(names, configs, waves_of_largest_stack)),
        COLUMNS,
        folder,
        "in stacks: in units of the largest stack; so are the dearest step of a staggered refresh "
        "and one that refreshes everything. waits: of the host, in the latter.",
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = parser_of(__doc__, TAKES)
    parser.add_argument(
        "--every_method", action="store_true", help="and storage and solver; takes long"
    )
    parser.add_argument(
        "--waves_of_largest_stack",
        type=count,
        default=WAVES_OF_LARGEST_STACK,
        help="default %(default)s; more waves take less memory and more operations",
    )
    options = parser.parse_args(arguments)
    configs = {m.name: m.config for m in methods()} if options.every_method else METHODS
    run(options.workload, out_folder(options), configs, options.waves_of_largest_stack)


if __name__ == "__main__":
    main()
