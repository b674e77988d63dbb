"""Plan the optimizer of a model for some ranks: ``python -m shampoo_core.plan --help``."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path
from typing import Literal, get_args

from shampoo_core.averaging import (
    AveragingConfig,
    HeavyBall,
    LatestWeightAverage,
    PrimalAveraging,
    ScheduleFree,
    WeightEMA,
)
from shampoo_core.config import STORAGES
from shampoo_core.model_shapes import (
    REFERENCE_STEP_MS,
    TRANSFORMERS,
    named_model,
    official_workloads,
    shapes_from_file,
)
from shampoo_core.plan.advice import alternatives, quickest_sharing
from shampoo_core.plan.devices import DEVICES
from shampoo_core.plan.layout import TABLE_ROWS, Placement, Sharding
from shampoo_core.plan.planning import Request, make_plan
from shampoo_core.plan.report import report
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.preconditioners.eigenvalue_corrected import EigenvalueCorrectedConfig
from shampoo_core.preconditioners.kl import KLShampooConfig
from shampoo_core.preconditioners.kl_soap import KLSOAPConfig
from shampoo_core.preconditioners.per_factor import PerFactorCorrectedConfig
from shampoo_core.preconditioners.shampoo import ShampooConfig
from shampoo_core.preconditioners.spectral import SpectralConfig
from shampoo_core.solvers import CoupledNewtonSolver, EighSolver, OrthogonalIterationSolver

METHODS: dict[str, type] = {
    "shampoo": ShampooConfig,
    "eigenvalue_corrected": EigenvalueCorrectedConfig,
    "kl_shampoo": KLShampooConfig,
    "kl_soap": KLSOAPConfig,
    "per_factor": PerFactorCorrectedConfig,
    "spectral": SpectralConfig,
}
SOLVERS: dict[str, type] = {
    "eigh": EighSolver,
    "orthogonal_iteration": OrthogonalIterationSolver,
    "coupled_newton": CoupledNewtonSolver,
}
AVERAGING: dict[str, type[AveragingConfig] | None] = {
    "none": None,
    "heavy_ball": HeavyBall,
    "schedule_free": ScheduleFree,
    "primal": PrimalAveraging,
    "weight_ema": WeightEMA,
    "latest": LatestWeightAverage,
}

OVERHEAD_PERCENT = 5.0
GROUP_SIZE = 8


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        request = _request(options)
    except (OSError, TypeError, ValueError) as error:
        parser.error(str(error))
    plan = make_plan(request)
    changes = alternatives(request, plan)
    quickest = quickest_sharing(request, plan)
    if options.json:
        document = {
            **plan.as_dict(),
            "alternatives": [dataclasses.asdict(change) for change in changes],
            "quickest_sharing": None if quickest is None else dataclasses.asdict(quickest),
        }
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        sys.stdout.write(report(_title(options), request, plan, changes, quickest) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shampoo_core.plan", description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workload", choices=[*official_workloads(), *TRANSFORMERS])
    model.add_argument("--shapes", type=Path, help="JSON: a list of shapes, or {name: shape}")
    parser.add_argument("--world_size", type=int, required=True)
    parser.add_argument("--memory_gib", type=float, required=True, help="of one device")
    parser.add_argument("--device", choices=sorted(DEVICES), default="a100")
    parser.add_argument("--sharding", choices=get_args(Sharding), default="ddp")
    parser.add_argument(
        "--group_size", type=int, help=f"ranks of a replica under hsdp; default {GROUP_SIZE}"
    )
    parser.add_argument(
        "--ranks_per_group",
        type=int,
        help="ranks that share the work, as of Distribution: a divisor of all, under hsdp whole replicas; "
        "default all",
    )
    parser.add_argument("--preconditioner", choices=sorted(METHODS), default="shampoo")
    parser.add_argument(
        "--solver",
        choices=SOLVERS,
        help="of roots or bases; default the preconditioner's own; its fallbacks are not planned for",
    )
    parser.add_argument("--storage", choices=STORAGES, default="dense")
    parser.add_argument(
        "--averaging",
        choices=AVERAGING,
        default="none",
        help=f"momentum or weights to evaluate; latest keeps {LatestWeightAverage().length} copies",
    )
    parser.add_argument("--max_block_size", type=int, default=1024)
    parser.add_argument(
        "--max_wave_numel",
        type=_wave,
        default="auto",
        help="step so many numbers of a rank at once, or 'all'; default as the optimizer does, all up to "
        "2^27 of a method (ddp: 2^28 of all ranks), in waves of as many beyond",
    )
    parser.add_argument(
        "--table_rows",
        type=int,
        default=TABLE_ROWS,
        help="parameters with a side of as many or more are lookup tables, stepped by Adam in a group of "
        "their own as the submission has them; 0: none are; default %(default)s",
    )
    parser.add_argument("--weight_decay", type=float, default=1e-2, help="default %(default)s")
    parser.add_argument("--refresh_interval", type=int, default=100)
    parser.add_argument(
        "--gradient_as_bucket_view",
        action="store_true",
        help="as of torch's DDP, which else keeps buckets as large as the gradients beside them",
    )
    parser.add_argument("--reserved_gib", type=float, default=0.0, help="activations and the rest")
    parser.add_argument(
        "--step_ms",
        type=float,
        help="a training step without the optimizer; for official workloads what the benchmark allows",
    )
    parser.add_argument(
        "--overhead_percent", type=float, help=f"that it may add; default {OVERHEAD_PERCENT:g}"
    )
    parser.add_argument("--json", action="store_true")
    return parser


def _wave(text: str) -> int | Literal["auto"] | None:
    if text == "auto":
        return "auto"
    if text == "all":
        return None
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"must be a whole number, 'auto' or 'all', got {text!r}")
    return int(text)


def _request(options: argparse.Namespace) -> Request:
    if options.shapes is not None:
        parameters = shapes_from_file(options.shapes)
    else:
        parameters = named_model(options.workload)
    averaging = AVERAGING[options.averaging]
    step_ms, percent, group_size = options.step_ms, options.overhead_percent, options.group_size
    if step_ms is None:
        step_ms = REFERENCE_STEP_MS.get(options.workload)
    if percent is not None and step_ms is None:
        raise ValueError("--overhead_percent is of a training step: give its --step_ms, too")
    if group_size is not None and options.sharding != "hsdp":
        raise ValueError(f"--group_size is for --sharding hsdp, not for {options.sharding}")
    if options.gradient_as_bucket_view and options.sharding != "ddp":
        raise ValueError(
            f"--gradient_as_bucket_view is for --sharding ddp, not for {options.sharding}"
        )
    group_size = GROUP_SIZE if group_size is None else group_size
    return Request(
        parameters,
        Placement(options.world_size, options.sharding, group_size, options.ranks_per_group),
        DEVICES[options.device],
        options.memory_gib,
        _config(options),
        None if averaging is None else averaging(),
        weight_decay=options.weight_decay,
        max_block_size=options.max_block_size,
        max_wave_numel=options.max_wave_numel,
        table_rows=options.table_rows or None,
        refresh_interval=options.refresh_interval,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
        reserved_gib=options.reserved_gib,
        step_ms=step_ms,
        overhead_percent=OVERHEAD_PERCENT if percent is None else percent,
    )


def _config(options: argparse.Namespace) -> PreconditionerConfig:
    method = METHODS[options.preconditioner]
    known = {field.name for field in dataclasses.fields(method)}
    chosen = {"storage": options.storage} if options.storage != "dense" else {}
    if options.solver is not None:
        chosen["solver"] = SOLVERS[options.solver]()
    for name in chosen:
        if name not in known:
            raise ValueError(
                f"--{name} {getattr(options, name)} is for methods with factors in memory, "
                f"not for {options.preconditioner}"
            )
    config: PreconditionerConfig = method(**chosen)
    return config


def _title(options: argparse.Namespace) -> str:
    model = options.workload or options.shapes
    solver = "" if options.solver is None else f", {options.solver}"
    averaging = "" if options.averaging == "none" else f", {options.averaging}"
    return (
        f"{model} by {options.preconditioner} ({options.storage}{solver}{averaging}) on "
        f"{options.world_size} x {options.device} {options.memory_gib:g} GiB, {options.sharding}"
    )


if __name__ == "__main__":
    main()
