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
from shampoo_core.plan.advice import alternatives
from shampoo_core.plan.devices import DEVICES
from shampoo_core.plan.layout import Placement, Sharding
from shampoo_core.plan.planning import Request, make_plan
from shampoo_core.plan.report import report
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.preconditioners.eigenvalue_corrected import EigenvalueCorrectedConfig
from shampoo_core.preconditioners.kl import KLShampooConfig
from shampoo_core.preconditioners.kl_soap import KLSOAPConfig
from shampoo_core.preconditioners.per_factor import PerFactorCorrectedConfig
from shampoo_core.preconditioners.shampoo import ShampooConfig
from shampoo_core.preconditioners.spectral import SpectralConfig

METHODS: dict[str, type] = {
    "shampoo": ShampooConfig,
    "eigenvalue_corrected": EigenvalueCorrectedConfig,
    "kl_shampoo": KLShampooConfig,
    "kl_soap": KLSOAPConfig,
    "per_factor": PerFactorCorrectedConfig,
    "spectral": SpectralConfig,
}
AVERAGING: dict[str, type[AveragingConfig] | None] = {
    "none": None,
    "heavy_ball": HeavyBall,
    "schedule_free": ScheduleFree,
    "primal": PrimalAveraging,
    "weight_ema": WeightEMA,
    "latest": LatestWeightAverage,
}


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = _parser()
    options = parser.parse_args(arguments)
    try:
        request = _request(options)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    plan = make_plan(request)
    changes = alternatives(request, plan)
    if options.json:
        document = {**plan.as_dict(), "alternatives": [dataclasses.asdict(c) for c in changes]}
        sys.stdout.write(json.dumps(document, indent=1) + "\n")
    else:
        sys.stdout.write(report(_title(options), request, plan, changes) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m shampoo_core.plan", description=__doc__)
    model = parser.add_mutually_exclusive_group(required=True)
    model.add_argument("--workload", choices=[*official_workloads(), *TRANSFORMERS])
    model.add_argument("--shapes", type=Path, help="JSON: a list of shapes, or {name: shape}")
    parser.add_argument("--world_size", type=int, required=True)
    parser.add_argument("--memory_gib", type=float, required=True, help="of one device")
    parser.add_argument("--device", choices=sorted(DEVICES), default="a100")
    parser.add_argument("--sharding", choices=get_args(Sharding), default="ddp")
    parser.add_argument("--group_size", type=int, default=8, help="ranks of a replica under hsdp")
    parser.add_argument("--preconditioner", choices=sorted(METHODS), default="shampoo")
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
        help="step so many numbers at once, or 'all'; default all up to 2^27 of a rank and method, "
        "waves of as many beyond, as the optimizer does",
    )
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
    parser.add_argument("--overhead_percent", type=float, default=5.0, help="that it may add")
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
    step_ms = options.step_ms
    if step_ms is None:
        step_ms = REFERENCE_STEP_MS.get(options.workload)
    return Request(
        parameters,
        Placement(options.world_size, options.sharding, options.group_size),
        DEVICES[options.device],
        options.memory_gib,
        _config(options),
        None if averaging is None else averaging(),
        max_block_size=options.max_block_size,
        max_wave_numel=options.max_wave_numel,
        refresh_interval=options.refresh_interval,
        gradient_as_bucket_view=options.gradient_as_bucket_view,
        reserved_gib=options.reserved_gib,
        step_ms=step_ms,
        overhead_percent=options.overhead_percent,
    )


def _config(options: argparse.Namespace) -> PreconditionerConfig:
    method = METHODS[options.preconditioner]
    keeps_factors = any(field.name == "storage" for field in dataclasses.fields(method))
    if not keeps_factors:
        if options.storage != "dense":
            raise ValueError(
                f"--storage {options.storage} is for methods with factors in memory, "
                f"not for {options.preconditioner}"
            )
        chosen: PreconditionerConfig = method()
        return chosen
    stored: PreconditionerConfig = method(storage=options.storage)
    return stored


def _title(options: argparse.Namespace) -> str:
    model = options.workload or options.shapes
    averaging = "" if options.averaging == "none" else f", {options.averaging}"
    return (
        f"{model} by {options.preconditioner} ({options.storage}{averaging}) on "
        f"{options.world_size} x {options.device} {options.memory_gib:g} GiB, {options.sharding}"
    )


if __name__ == "__main__":
    main()
