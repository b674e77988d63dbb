"""Seconds of a step of every method, solver and storage on one model, and where they go.

On one thread, in seconds of the processor. The floor is that of `benchmarks.timing`: the products of plain
Shampoo, for all methods. Solvers that iterate matrix products take minutes for a refresh of a real model on
a CPU, and are measured on a small one.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.methods import Method, methods
from benchmarks.models import workload_parameters
from benchmarks.phases import PARTS, phases
from benchmarks.tables import DEFAULT_FOLDER, publish
from benchmarks.timing import BETAS, FLOOR, interleaved, method_flops, products
from shampoo_core import (
    AdaptiveRefresh,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    ShampooConfig,
    StaggeredAdaptiveRefresh,
    StaggeredRefresh,
)
from shampoo_core.model_shapes import official_workloads
from shampoo_core.refresh import RefreshPolicy

DEFAULT_WORKLOAD = "ogbg"
SOLVER_WORKLOAD = "mnist"
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


def run(workloads: Sequence[str], folder: Path = DEFAULT_FOLDER) -> None:
    """Print both tables and write their JSON.

    Args:
        workloads: Measured is OGBG, or the first one if that is not among them.
        folder: For the JSON.
    """
    torch.set_num_threads(1)
    chosen = DEFAULT_WORKLOAD if DEFAULT_WORKLOAD in workloads else workloads[0]
    alone = [method for method in methods() if type(method.config).__name__ != "ShampooConfig"]
    of_shampoo = [method for method in methods() if method not in alone]
    solved = [method for method in of_shampoo if method.name.endswith("Solver")]
    stored = [method for method in of_shampoo if method not in solved]
    rows = [*method_rows(chosen, [*stored, *alone]), *method_rows(SOLVER_WORKLOAD, solved)]
    publish(
        "Measured: milliseconds of every method, plain steps split",
        rows,
        METHOD_COLUMNS,
        folder,
    )
    publish(
        f"Spikes: steps of an interval of {INTERVAL} on the shapes of {chosen}",
        list(spike_rows(chosen)),
        SPIKE_COLUMNS,
        folder,
    )


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workload", choices=official_workloads(), default=DEFAULT_WORKLOAD)
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER)
    options = parser.parse_args()
    run([options.workload], options.out)


if __name__ == "__main__":
    main()
