"""Operations, synchronisations and bytes of a step on the official shapes, beside the peers' figures.

Exact and repeatable: everything is counted on the "meta" device. The peers' figures were measured once
with the same options and are in ``peers_measured.json`` with their source.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.flags import chosen, out_folder, parser_of
from benchmarks.models import has_table, state_bytes, workload_groups, workload_parameters
from benchmarks.tables import DEFAULT_FOLDER, publish
from shampoo_core import DistributedShampoo, FixedRefresh, ShampooConfig
from shampoo_core.config import STORAGES
from shampoo_core.counting import OperationCounter
from shampoo_core.model_shapes import official_workloads
from shampoo_core.preconditioners.base import PreconditionerConfig

PEERS = json.loads(Path(__file__).with_name("peers_measured.json").read_text(encoding="utf-8"))
THEIRS = "facebookresearch Distributed Shampoo"
MIB = 2**20
PLAIN_LIMITS = {
    "imagenet_resnet": (160, 290),
    "imagenet_vit": (100, 150),
    "ogbg": (70, 110),
    "librispeech_conformer": (100, 150),
    "wmt": (60, 80),
}
"""Most operations of a plain step: with vectors diagonal, and with everything preconditioned."""
REFRESH_SHARE = 15
"""A refresh step may dispatch one in so many of the peer's operations."""
STATE_LIMITS = {"imagenet_resnet": (1.05, 0.75), "imagenet_vit": (1.2, 0.8), "ogbg": (1.45, 0.9)}
"""Most bytes of state in units of the peer's: dense, packed."""
ROUTINGS = ("vectors diagonal", "everything")
ROUTINGS_BESIDE_A_TABLE = ("vectors, table diagonal", "all but the table")
"""What is preconditioned where a lookup table is stepped by Adam."""


def count_steps(
    workload: str, config: PreconditionerConfig
) -> tuple[OperationCounter, OperationCounter]:
    """Count a plain step and a refresh step of one workload.

    Args:
        workload: Official.
        config: Of the preconditioner.

    Returns:
        Counts of step 9 and of step 12, at refresh interval 4 from step 4 on: behind the second refresh,
        which asks whether all factors have been refreshed.
    """
    optimizer = DistributedShampoo(
        workload_groups(workload, config),
        betas=(0.9, 0.99),
        refresh=FixedRefresh(interval=4, start=4),
    )
    counted = []
    for _ in range(12):
        with OperationCounter() as counter:
            optimizer.step()
        counted.append(counter)
    return counted[8], counted[11]


def allocated_bytes(workload: str, config: PreconditionerConfig) -> int:
    """Bytes of state of one workload's optimizer."""
    return state_bytes(DistributedShampoo(workload_groups(workload, config)))


def operation_rows(workloads: Sequence[str]) -> list[dict[str, Any]]:
    """One row per workload and routing."""
    rows = []
    for workload in workloads:
        theirs = PEERS.get(workload, {}).get(THEIRS, {})
        routings = ROUTINGS_BESIDE_A_TABLE if has_table(workload) else ROUTINGS
        for everything, routing in enumerate(routings):
            config = ShampooConfig(precondition_vectors=bool(everything))
            plain, refresh = count_steps(workload, config)
            limits = PLAIN_LIMITS.get(workload)
            refreshed = theirs.get("refresh_step_ops")
            rows.append(
                {
                    "workload": workload,
                    "preconditioned": routing,
                    "plain": plain.num_operations,
                    "plain_limit": limits[everything] if limits else None,
                    "plain_theirs": theirs.get("plain_step_ops"),
                    "refresh": refresh.num_operations,
                    "refresh_limit": refreshed // REFRESH_SHARE if limits else None,
                    "refresh_theirs": refreshed,
                    "plain_kernels": plain.num_kernels,
                    "plain_waits": plain.num_synchronisations,
                    "refresh_waits": refresh.num_synchronisations,
                    "plain_gflop": plain.flops / 1e9,
                    "refresh_gflop": refresh.flops / 1e9,
                    "plain_mib_moved": plain.bytes_moved / MIB,
                    "refresh_mib_moved": refresh.bytes_moved / MIB,
                }
            )
    return rows


def state_rows(workloads: Sequence[str]) -> list[dict[str, Any]]:
    """One row per workload: bytes of state in each storage, and in units of the peer's."""
    rows = []
    for workload in workloads:
        theirs = PEERS.get(workload, {}).get(THEIRS, {}).get("state_MB")
        size = sum(p.numel() * p.element_size() for p in workload_parameters(workload)) / MIB
        row: dict[str, Any] = {"workload": workload, "parameters": size, "theirs": theirs}
        limits = dict(zip(STORAGES, STATE_LIMITS.get(workload, ()), strict=False))
        for storage in STORAGES:
            ours = allocated_bytes(workload, ShampooConfig(storage=storage)) / MIB
            row[storage] = ours
            row[f"{storage}_ratio"] = ours / theirs if theirs else None
            row[f"{storage}_limit"] = limits.get(storage)
        rows.append(row)
    return rows


TAKES = "any, by default all"
OPERATION_COLUMNS = {
    "workload": "workload",
    "preconditioned": "preconditioned",
    "plain": "plain",
    "plain_limit": "limit",
    "plain_theirs": "theirs",
    "refresh": "refresh",
    "refresh_limit": "limit",
    "refresh_theirs": "theirs",
    "plain_kernels": "kernels",
    "plain_waits": "waits",
    "refresh_waits": "at refresh",
    "plain_gflop": "GFLOP",
    "refresh_gflop": "at refresh",
    "plain_mib_moved": "MiB moved",
    "refresh_mib_moved": "at refresh",
}
STATE_COLUMNS = {
    "workload": "workload",
    "parameters": "parameters MiB",
    "theirs": "theirs MiB",
    "dense": "dense MiB",
    "dense_ratio": "ratio",
    "dense_limit": "limit",
    "packed": "packed MiB",
    "packed_ratio": "ratio",
    "packed_limit": "limit",
}


def run(workloads: Sequence[str] | None = None, folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """Print both tables and write their JSON.

    Args:
        workloads: Official ones; None is all of them.
        folder: For the JSON.

    Returns:
        Files that were written.
    """
    counted = chosen(workloads, official_workloads())
    operations = publish(
        "Operations: dispatched in a plain and in a refresh step; Shampoo, blocks of 1024, Adam graft",
        operation_rows(counted),
        OPERATION_COLUMNS,
        folder,
        "theirs: facebookresearch/optimizers f606606, measured once, see peers_measured.json. "
        "kernels: of the plain step on a GPU, by torch's rules for _foreach, not measured. "
        "waits: host synchronisations. MiB moved: arguments and results of every operation, no cache. "
        "table: of embeddings, stepped by Adam as by the planner and the submission.",
    )
    state = publish(
        "State: bytes of the same optimizers, vectors diagonal, beside theirs (packed)",
        state_rows(counted),
        STATE_COLUMNS,
        folder,
    )
    return operations + state


def main() -> None:
    """Command line."""
    options = parser_of(__doc__, TAKES).parse_args()
    run(options.workload, out_folder(options))


if __name__ == "__main__":
    main()
