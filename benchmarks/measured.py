"""Seconds of a step of every method, solver and storage on a model, and where they go.

On one thread, in seconds of the processor. The floor is that of `benchmarks.timing`: the products of plain
Shampoo, for all methods. Solvers that iterate matrix products take minutes for a refresh of a real model on
a CPU, and are measured on a small one, whatever the workload.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.flags import chosen, out_folder, parser_of
from benchmarks.methods import Method, methods
from benchmarks.models import workload_parameters
from benchmarks.phases import PARTS, phases
from benchmarks.tables import DEFAULT_FOLDER, of_several, publish
from benchmarks.timing import BETAS, FLOOR, TOO_LARGE, interleaved, method_flops, products
from shampoo_core import (
    AdaptiveRefresh,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    ShampooConfig,
    StaggeredAdaptiveRefresh,
    StaggeredRefresh,
)
from shampoo_core.refresh import RefreshPolicy

DEFAULT_WORKLOAD = "ogbg"
SOLVER_WORKLOAD = "mnist"
TAKES = (
    f"any but criteo1tb, by default {DEFAULT_WORKLOAD}; solvers on {SOLVER_WORKLOAD} in any case"
)
CYCLE = 4
"""Every so many steps refreshes everything."""
INTERVAL = 20
"""Of the policies whose spikes are compared."""
POLICIES: dict[str, RefreshPolicy] = {
    "all at once": FixedRefresh(INTERVAL, 1),
    "staggered": StaggeredRefresh(INTERVAL),
    "adaptive": AdaptiveRefresh(INTERVAL, 1),
    "staggered, adaptive": StaggeredAdaptiveRefresh(INTERVAL),
}


def method_rows(workload: str, chosen: Sequence[Method]) -> Iterator[dict[str, Any]]:
    """One row per method: the shortest plain step, split, and one that refreshes everything.

    Args:
        workload: Official.
        chosen: Methods.
    """
    adamw = torch.optim.AdamW(workload_parameters(workload, "cpu"), betas=BETAS, foreach=True)
    unit = {"AdamW": adamw.step, FLOOR: products(method_flops(workload))}
    seconds = {name: min(times[1:]) for name, times in interleaved(unit, 4).items()}
    for method in chosen:
        optimizer = _optimizer(workload, method.config, FixedRefresh(CYCLE, 1))
        steps = [_measured(optimizer) for _ in range(2 * CYCLE)][CYCLE:]
        *plain, refresh = steps
        shortest = min(plain, key=lambda step: step["step"])
        yield {
            "workload": workload,
            "method": method.name,
            "plain_ms": 1e3 * shortest["step"],
            "to_adamw": shortest["step"] / seconds["AdamW"],
            "to_floor": shortest["step"] / seconds[FLOOR],
            **{f"{part}_ms": 1e3 * shortest[part] for part in PARTS if part != "refresh"},
            "refresh_ms": 1e3 * refresh["step"],
            "spike": refresh["step"] / shortest["step"],
        }


def spike_rows(workload: str) -> Iterator[dict[str, Any]]:
    """One row per method and policy: the dearest step of an interval over the median one."""
    for config in (ShampooConfig(), EigenvalueCorrectedConfig()):
        for name, policy in POLICIES.items():
            optimizer = _optimizer(workload, config, policy)
            steps = [_measured(optimizer)["step"] for _ in range(2 * INTERVAL)][INTERVAL:]
            yield {
                "workload": workload,
                "method": type(config).__name__.removesuffix("Config"),
                "policy": name,
                "median_ms": 1e3 * statistics.median(steps),
                "mean_ms": 1e3 * statistics.mean(steps),
                "largest_ms": 1e3 * max(steps),
                "spike": max(steps) / statistics.median(steps),
            }


def _optimizer(workload: str, config: Any, refresh: RefreshPolicy) -> DistributedShampoo:
    return DistributedShampoo(
        workload_parameters(workload, "cpu"), betas=BETAS, preconditioner=config, refresh=refresh
    )


def _measured(optimizer: DistributedShampoo) -> dict[str, float]:
    """Seconds of one step, and of its parts; gradients that change, as they do in training."""
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad.normal_()
    with phases() as clock:
        begun = time.process_time()
        optimizer.step()
        whole = time.process_time() - begun
    return {"step": whole, **{part: clock.seconds[part] for part in PARTS}}


METHOD_COLUMNS = {
    "workload": "workload",
    "method": "method",
    "plain_ms": "plain ms",
    "to_adamw": "to AdamW",
    "to_floor": "to floor",
    **{f"{part}_ms": part for part in PARTS if part != "refresh"},
    "refresh_ms": "refresh ms",
    "spike": "to plain",
}
SPIKE_COLUMNS = {
    "method": "method",
    "policy": "refresh",
    "median_ms": "median ms",
    "mean_ms": "mean ms",
    "largest_ms": "largest ms",
    "spike": "largest / median",
}


def run(workloads: Sequence[str] | None = None, folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """Print both tables and write their JSON.

    Args:
        workloads: Official ones; None is OGBG.
        folder: For the JSON.

    Returns:
        Files that were written.
    """
    torch.set_num_threads(1)
    names = chosen(workloads, [DEFAULT_WORKLOAD], TOO_LARGE)
    if not names:
        return []
    alone = [method for method in methods() if type(method.config).__name__ != "ShampooConfig"]
    of_shampoo = [method for method in methods() if method not in alone]
    solved = [method for method in of_shampoo if method.name.endswith("Solver")]
    stored = [method for method in of_shampoo if method not in solved]
    rows = [row for name in names for row in method_rows(name, [*stored, *alone])]
    written = publish(
        "Measured: milliseconds of every method, plain steps split",
        [*rows, *method_rows(SOLVER_WORKLOAD, solved)],
        METHOD_COLUMNS,
        folder,
        f"solvers: on {SOLVER_WORKLOAD}, whatever --workload is",
    )
    return written + publish(
        f"Spikes: steps of an interval of {INTERVAL} on the shapes of {', '.join(names)}",
        [row for name in names for row in spike_rows(name)],
        of_several(names, SPIKE_COLUMNS),
        folder,
    )


def main() -> None:
    """Command line."""
    options = parser_of(__doc__, TAKES).parse_args()
    run(options.workload, out_folder(options))


if __name__ == "__main__":
    main()
