"""Steps and decompositions on a GPU, measured, beside what is counted and planned without one."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.counts import MIB
from benchmarks.flags import chosen, out_folder, parser_of
from benchmarks.memory import largest_stack
from benchmarks.methods import measure
from benchmarks.models import workload_groups, workload_parameters
from benchmarks.observation import Observed, observe
from benchmarks.peers import LATE, MakePeer, available, part_of_peers
from benchmarks.tables import DEFAULT_FOLDER, publish
from benchmarks.timing import (
    BETAS,
    CYCLE,
    FLOOR,
    INTERVALS,
    LIMIT_TO_FLOOR,
    TOO_LARGE,
    WORKLOADS,
    method_flops,
    products,
)
from shampoo_core import (
    ChebyshevSolver,
    CoupledNewtonSolver,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    EighSolver,
    FixedRefresh,
    NewtonDBSolver,
    OrthogonalIterationSolver,
    ShampooConfig,
)
from shampoo_core.counting import OperationCounter
from shampoo_core.plan.devices import DEVICES, Device
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.solvers import BasisSolver, RootSolver

TAKES = f"any but criteo1tb, by default {', '.join(WORKLOADS)}"
NO_GPU = "device: not measured (torch sees no GPU)"
FLOOR_SIDE = 4096
"""A GPU is not filled by products of smaller matrices."""
WARM_CYCLES = 1
TIMED = 6
SIDES = (64, 128, 256, 512, 1024, 2048)
NUMBERS_OF_MATRICES = (1, 16)
OURS: dict[str, PreconditionerConfig] = {
    "ours": ShampooConfig(),
    # As facebookresearch's; the other peers leave vectors to Adam, as "ours" does.
    "ours, vectors too": ShampooConfig(precondition_vectors=True),
    "ours, eigenvalue-corrected": EigenvalueCorrectedConfig(),
    "ours, warm-started": EigenvalueCorrectedConfig(solver=OrthogonalIterationSolver()),
    "ours, 4bit": ShampooConfig(storage="4bit"),
}


class Candidate(NamedTuple):
    """An optimizer on the parameters of a model."""

    step: Callable[[], object]
    """Takes one step."""
    parameters: Sequence[torch.nn.Parameter] = ()
    """What it steps; none where it is no optimizer."""
    refreshes: bool = False
    """At every step whose number is a multiple of `CYCLE`,"""
    late: int = 0
    """or so many steps later."""


def candidates(workload: str, peers: str) -> Iterator[tuple[str, Callable[[], Candidate]]]:
    """Names of all that are measured, and functions that put one of them on the device.

    Args:
        workload: Official.
        peers: What the name of a peer has to contain.
    """
    for name, options in {"AdamW": {"foreach": True}, "AdamW, fused": {"fused": True}}.items():
        yield name, partial(_adamw, workload, options)
    yield FLOOR, lambda: Candidate(products(method_flops(workload), "cuda", FLOOR_SIDE))
    for name, config in OURS.items():
        yield name, partial(_ours, workload, config)
    for name, make in available()[0].items():
        if peers in name:
            yield name, partial(_theirs, workload, make, LATE.get(name, 0))


def _adamw(workload: str, options: dict[str, bool]) -> Candidate:
    parameters = workload_parameters(workload, "cuda")
    return Candidate(torch.optim.AdamW(parameters, betas=BETAS, **options).step, parameters)


def _ours(workload: str, config: PreconditionerConfig) -> Candidate:
    groups = workload_groups(workload, config, "cuda")
    refresh = FixedRefresh(CYCLE, start=CYCLE)
    optimizer = DistributedShampoo(groups, betas=BETAS, refresh=refresh)
    parameters = [parameter for group in groups for parameter in group["params"]]
    return Candidate(optimizer.step, parameters, refreshes=True)


def _theirs(workload: str, make: MakePeer, late: int) -> Candidate:
    parameters = workload_parameters(workload, "cuda")
    return Candidate(make(parameters, CYCLE).step, parameters, refreshes=True, late=late)


def step_rows(workload: str, peers: str) -> Iterator[dict[str, Any]]:
    """Rows of one workload: AdamW, the floor, ours, and the peers at hand.

    Args:
        workload: Official.
        peers: See `candidates`.
    """
    units: dict[str, float] = {}
    for name, make in candidates(workload, peers):
        plain, refresh = _both(make())
        torch.cuda.empty_cache()
        units[name] = plain.device
        row: dict[str, Any] = {
            "workload": workload,
            "optimizer": name,
            "device_ms": 1e3 * plain.device,
            "host_ms": 1e3 * plain.host,
            "wall_ms": 1e3 * plain.wall,
            "to_adamw": plain.device / units["AdamW"],
            "to_floor": plain.device / units[FLOOR] if FLOOR in units else None,
            "limit": LIMIT_TO_FLOOR if name == "ours" and workload in WORKLOADS else None,
            "kernels": plain.kernels,
            "waits": plain.waits,
            "peak_mib": plain.peak / MIB,
        }
        if refresh is not None:
            row |= {
                "refresh_ms": 1e3 * refresh.wall,
                "refresh_device_ms": 1e3 * refresh.device,
                "refresh_kernels": refresh.kernels,
                "refresh_waits": refresh.waits,
                "refresh_peak_mib": refresh.peak / MIB,
            }
            for interval in INTERVALS:
                mean = plain.wall + (refresh.wall - plain.wall) / interval
                row[f"mean_{interval}_ms"] = 1e3 * mean
        if name in OURS:
            row |= planned(workload, OURS[name])
        _tell(row)
        yield row


def _tell(row: Mapping[str, Any]) -> None:
    """Show that something happens: refreshes of a model take seconds."""
    known = {
        key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()
    }
    sys.stderr.write(", ".join(f"{key} {value}" for key, value in known.items()) + "\n")


def _both(candidate: Candidate) -> tuple[Observed, Observed | None]:
    """A plain step, and one that refreshes everything where there are such."""
    number = 0

    def step() -> None:
        nonlocal number
        number += 1
        candidate.step()

    def prepare(*, refresh: bool) -> None:
        while True:
            for parameter in candidate.parameters:
                if parameter.grad is None:  # one of the peers takes them away
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.normal_()
            is_due = (number + 1 - candidate.late) % CYCLE == 0
            if not candidate.refreshes or refresh == is_due:
                return
            step()

    for _ in range(WARM_CYCLES):
        prepare(refresh=True)
        step()
    plain = observe(step, partial(prepare, refresh=False), TIMED)
    if not candidate.refreshes:
        return plain, None
    return plain, observe(step, partial(prepare, refresh=True), 1)


def this_device() -> Device | None:
    """The planner's device that this is, if it knows it."""
    name = torch.cuda.get_device_name().lower()
    # An H200 is an H100 with more memory, and a faster one; an A1000 is no A100.
    name = name.replace("h200", "h100")
    found = (device for known, device in DEVICES.items() if re.search(rf"{known}\b", name))
    return next(found, None)


def planned(workload: str, config: PreconditionerConfig) -> dict[str, Any]:
    """What is counted of the same steps without a GPU, and estimated if the planner knows this one."""
    (_, refresh, plain), _ = measure(
        workload, config, FixedRefresh(4, 1), [4, 8, 9], max_wave_numel="auto"
    )
    entries: dict[str, Any] = {
        "counted_kernels": plain.counter.num_kernels,
        "counted_waits": refresh.counter.num_synchronisations,
        "counted_peak_mib": plain.peak / MIB,
        "counted_refresh_peak_mib": refresh.peak / MIB,
        "largest_mib": 4 * largest_stack(workload) / MIB,
    }
    device = this_device()
    if device is not None:
        entries["planned_ms"] = 1e3 * device.step_seconds(plain.counter.operations)
        entries["planned_refresh_ms"] = 1e3 * device.step_seconds(refresh.counter.operations)
    return entries


SOLVERS: dict[str, RootSolver] = {
    "eigh": EighSolver(),
    "eigh, float64": EighSolver(double_precision=True),
    "coupled Newton": CoupledNewtonSolver(),
    "Newton-DB": NewtonDBSolver(),
    "Chebyshev": ChebyshevSolver(),
}
"""Of inverse fourth roots."""
BASIS_SOLVERS: dict[str, BasisSolver] = {
    "eigh, basis": EighSolver(),
    "QR, basis": OrthogonalIterationSolver(),
}


def solver_rows() -> Iterator[dict[str, Any]]:
    """One row per solver, side and number of matrices: milliseconds of one matrix of a batch."""
    for side in SIDES:
        for number in NUMBERS_OF_MATRICES:
            gradients = torch.randn(number, side, 2 * side, device="cuda")
            factors = torch.bmm(gradients, gradients.mT).div_(2 * side)
            start = EighSolver().basis(factors).eigenvectors
            noise = torch.randn_like(gradients)
            factors.baddbmm_(noise, noise.mT, beta=0.9, alpha=0.1 / (2 * side))
            solves: dict[str, Callable[[], object]] = {
                name: partial(solver.inverse_root, factors, 0.25)
                for name, solver in SOLVERS.items()
            }
            for name, basis_solver in BASIS_SOLVERS.items():
                solves[name] = partial(basis_solver.basis, factors, start)
            for name, solve in solves.items():
                row = {"solver": name, "side": side, "matrices": number, **_solved(solve, number)}
                _tell(row)
                yield row


def _solved(solve: Callable[[], object], number: int) -> dict[str, Any]:
    solve()  # what a library sets up at the first call
    seen = observe(solve, lambda: None, 1)
    row: dict[str, Any] = {
        "each_ms": 1e3 * seen.wall / number,
        "device_ms": 1e3 * seen.device / number,
        "kernels": seen.kernels,
        "waits": seen.waits,
        "peak_mib": seen.peak / MIB,
    }
    device = this_device()
    if device is not None:
        with OperationCounter() as counter:
            solve()
        row["planned_ms"] = 1e3 * device.step_seconds(counter.operations) / number
    return row


STEP_COLUMNS = {
    "workload": "workload",
    "optimizer": "optimizer",
    "device_ms": "device ms",
    "host_ms": "host ms",
    "wall_ms": "wall ms",
    "planned_ms": "planned",
    "to_adamw": "to AdamW",
    "to_floor": "to floor",
    "limit": "limit",
    "kernels": "kernels",
    "counted_kernels": "counted",
    "waits": "waits",
    "peak_mib": "peak MiB",
    "counted_peak_mib": "counted",
    "refresh_ms": "refresh ms",
    "planned_refresh_ms": "planned",
    "refresh_kernels": "kernels",
    "refresh_waits": "waits",
    "counted_waits": "counted",
    "refresh_peak_mib": "peak MiB",
    "counted_refresh_peak_mib": "counted",
    **{f"mean_{interval}_ms": f"mean at {interval}" for interval in INTERVALS},
}
SOLVER_COLUMNS = {
    "solver": "solver",
    "side": "side",
    "matrices": "matrices",
    "each_ms": "ms each",
    "device_ms": "device ms",
    "planned_ms": "planned",
    "kernels": "kernels",
    "waits": "waits",
    "peak_mib": "peak MiB",
}


def run(
    workloads: Sequence[str] | None = None, folder: Path = DEFAULT_FOLDER, *, peers: str = ""
) -> list[Path]:
    """Print both tables and write their JSON; without a GPU say so.

    Args:
        workloads: Official ones; None is `WORKLOADS`.
        folder: For the JSON.
        peers: What the name of a peer has to contain.

    Returns:
        Files that were written.
    """
    if not torch.cuda.is_available():
        sys.stdout.write(f"\n{NO_GPU}\n")
        return []
    rows = [
        row for name in chosen(workloads, WORKLOADS, TOO_LARGE) for row in step_rows(name, peers)
    ]
    notes = [
        "device: of the kernels of a plain step. host: until it returns. wall: from idle to idle; so are",
        "refresh ms and means. counted, planned: without a GPU. peak: beside parameters, gradients, state.",
        *available()[1],
    ]
    written = publish(
        "Device: steps with the default options on a GPU",
        rows,
        STEP_COLUMNS,
        folder,
        "\n".join(notes),
    )
    return written + publish(
        "Solvers: inverse fourth roots and bases of a batch on a GPU, by solver",
        list(solver_rows()),
        SOLVER_COLUMNS,
        folder,
    )


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = parser_of(__doc__, TAKES)
    parser.add_argument(
        "--peers", type=part_of_peers, default="", help="only those whose name has this"
    )
    options = parser.parse_args(arguments)
    run(options.workload, out_folder(options), peers=options.peers)


if __name__ == "__main__":
    main()
