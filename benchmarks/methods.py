"""Every preconditioner, storage and solver on a model: operations, arithmetic, state.

Exact, on the "meta" device. The split is of estimated time on a stated device, by kind of operation:
products that add to factors (statistics), other products (apply), decompositions, everything else.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.counts import MIB
from benchmarks.flags import chosen, out_folder, parser_of
from benchmarks.models import state_bytes, workload_groups
from benchmarks.tables import DEFAULT_FOLDER, of_several, publish
from shampoo_core import (
    AdamConfig,
    ChebyshevSolver,
    CoupledNewtonSolver,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    EighSolver,
    FixedRefresh,
    HigherOrderNewtonSolver,
    KLShampooConfig,
    KLSOAPConfig,
    NewtonDBSolver,
    OrthogonalIterationSolver,
    PerFactorCorrectedConfig,
    ShampooConfig,
    SpectralConfig,
)
from shampoo_core.counting import Operation, OperationCounter
from shampoo_core.live_memory import LiveMemory
from shampoo_core.plan.devices import DEVICES
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.refresh import RefreshPolicy

DEFAULT_WORKLOAD = "imagenet_resnet"
TAKES = f"any, by default {DEFAULT_WORKLOAD}"
DEVICE = DEVICES["v100"]


@dataclass(frozen=True)
class Method:
    """A named configuration."""

    name: str
    config: PreconditionerConfig


def methods() -> list[Method]:
    """Every preconditioner with its defaults, Shampoo in every storage, and with every solver."""
    solvers = (
        EighSolver(double_precision=True),
        OrthogonalIterationSolver(),
        CoupledNewtonSolver(),
        HigherOrderNewtonSolver(),
        NewtonDBSolver(),
        ChebyshevSolver(),
    )
    return [
        Method("Adam", AdamConfig()),
        Method("Shampoo", ShampooConfig()),
        *(Method(f"Shampoo, {s}", ShampooConfig(storage=s)) for s in ("packed", "8bit", "4bit")),
        Method("Shampoo, one-sided", ShampooConfig(sides="first")),
        Method("eigenvalue-corrected", EigenvalueCorrectedConfig()),
        Method(
            "eigenvalue-corrected, QR",
            EigenvalueCorrectedConfig(solver=OrthogonalIterationSolver()),
        ),
        Method("eigenvalue-corrected, 4bit", EigenvalueCorrectedConfig(storage="4bit")),
        Method("KL-Shampoo", KLShampooConfig()),
        Method("KL-SOAP", KLSOAPConfig()),
        Method("per-factor corrected", PerFactorCorrectedConfig()),
        Method("spectral", SpectralConfig()),
        *(Method(f"Shampoo, {type(s).__name__}", _rooted_by(s)) for s in solvers),
    ]


def _rooted_by(solver: Any) -> ShampooConfig:
    # One exponent that every solver can do: Newton-DB refuses the sixth root of a tensor's factors.
    return ShampooConfig(solver=solver, exponent=0.25)


@dataclass(frozen=True)
class Measured:
    """One step."""

    counter: OperationCounter
    peak: int
    """Most bytes alive beside parameters, gradients and state."""


def measure(
    workload: str,
    config: PreconditionerConfig,
    refresh: RefreshPolicy,
    steps: Sequence[int],
    *,
    max_wave_numel: int | Literal["auto"] | None = None,
) -> tuple[list[Measured], DistributedShampoo]:
    """Take the steps of the given numbers, the first one unmeasured before them."""
    optimizer = DistributedShampoo(
        workload_groups(workload, config),
        betas=(0.9, 0.99),
        refresh=refresh,
        max_wave_numel=max_wave_numel,
    )
    with OperationCounter():  # answers what a refresh asks
        optimizer.step()
    measured = []
    for number in steps:
        for group in optimizer.param_groups:
            group["step"] = number - 1
        with LiveMemory() as memory, OperationCounter() as counter:
            optimizer.step()
        measured.append(Measured(counter, memory.peak))
    return measured, optimizer


def method_rows(workload: str) -> Iterator[dict[str, Any]]:
    """One row per method."""
    for method in methods():
        # The second refresh asks whether all factors have been refreshed; those after it do not.
        (_, refresh, plain), optimizer = measure(
            workload, method.config, FixedRefresh(4, 1), [4, 8, 9]
        )
        split = _milliseconds(
            plain.counter.operations, has_factors=hasattr(method.config, "storage")
        )
        yield {
            "workload": workload,
            "method": method.name,
            "plain": plain.counter.num_operations,
            "refresh": refresh.counter.num_operations,
            "waits": refresh.counter.num_synchronisations,
            "plain_gflop": plain.counter.flops / 1e9,
            "refresh_gflop": refresh.counter.flops / 1e9,
            "plain_mib_moved": plain.counter.bytes_moved / MIB,
            "state_mib": state_bytes(optimizer) / MIB,
            **split,
            "refresh_ms": 1e3 * DEVICE.step_seconds(refresh.counter.operations),
        }


def _milliseconds(operations: Sequence[Operation], *, has_factors: bool) -> dict[str, float]:
    """Estimated time by kind of operation; what is added to a product is statistics, if there are any."""
    split = dict.fromkeys(("statistics_ms", "apply_ms", "rest_ms"), 0.0)
    for operation in operations:
        kind = "rest_ms"
        if has_factors and operation.name.startswith("aten::baddbmm"):
            kind = "statistics_ms"
        elif operation.flops:
            kind = "apply_ms"
        split[kind] += 1e3 * DEVICE.step_seconds([operation])
    return split


METHOD_COLUMNS = {
    "method": "method",
    "plain": "operations",
    "refresh": "at refresh",
    "waits": "waits",
    "plain_gflop": "GFLOP",
    "refresh_gflop": "at refresh",
    "plain_mib_moved": "MiB moved",
    "state_mib": "state MiB",
    "statistics_ms": "statistics ms",
    "apply_ms": "apply ms",
    "rest_ms": "rest ms",
    "refresh_ms": "refresh ms",
}


def run(workloads: Sequence[str] | None = None, folder: Path = DEFAULT_FOLDER) -> list[Path]:
    """Print and write the table.

    Args:
        workloads: Official ones; None is ResNet-50.
        folder: For the JSON.

    Returns:
        Files that were written.
    """
    names = chosen(workloads, [DEFAULT_WORKLOAD])
    return publish(
        f"Methods: on the shapes of {', '.join(names)}, milliseconds estimated for {DEVICE.name}",
        [row for name in names for row in method_rows(name)],
        of_several(names, METHOD_COLUMNS),
        folder,
    )


def main() -> None:
    """Command line."""
    options = parser_of(__doc__, TAKES).parse_args()
    run(options.workload, out_folder(options))


if __name__ == "__main__":
    main()
