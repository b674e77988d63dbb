"""Small models trained for real: steps to target of options.

The workloads are those of `workloads_smoke`, the recipe is that of `benchmarks.courses`; variants see the
same batches and start from the same weights. The target is the validation loss of the first variant after
80 % of its steps; the studies of storage, which have to tell two per cent, follow `benchmarks.pairs`.
"""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import pairs
from benchmarks.courses import BETAS, BLOCK_SIZE, LEARNING_RATE, Course, Variant, train
from benchmarks.flags import add_out, count, out_folder, positive
from benchmarks.parts import Part
from benchmarks.tables import publish
from shampoo_core import (
    AdaptiveRefresh,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLSOAPConfig,
    OrthogonalIterationSolver,
    ShampooConfig,
    StaggeredAdaptiveRefresh,
    StaggeredRefresh,
)
from shampoo_core.refresh import FactorStackSize, RefreshPolicy
from workloads_smoke.registry import WORKLOADS

TARGET_AT = 0.8
ROUNDING = 1e-6
"""Relative noise on weights that only makes runs round otherwise."""


def compare(
    workload: str, variants: Sequence[Variant], num_steps: int, seeds: Sequence[int]
) -> list[dict[str, Any]]:
    """Rows of one workload: each variant beside the first, means over seeds."""
    courses = {v.name: [train(workload, v, num_steps, seed) for seed in seeds] for v in variants}
    first = courses[variants[0].name]
    targets = [_loss_at(course, TARGET_AT) for course in first]
    rows: list[dict[str, Any]] = []
    for variant in variants:
        runs = courses[variant.name]
        reached = [run.steps_to(target) for run, target in zip(runs, targets, strict=True)]
        steps = [step for step in reached if step is not None]
        whole = len(steps) == len(runs)
        due = _num_due(variant.refresh, runs[0].factors, num_steps)
        rows.append(
            {
                "workload": workload,
                "variant": variant.name,
                "steps": statistics.mean(steps) if whole else None,
                "spread": statistics.stdev(steps) if whole and len(steps) > 1 else None,
                "final_loss": statistics.mean(run.losses[-1] for run in runs),
                "refreshes": statistics.mean(run.refreshes for run in runs),
                "due": due,
                "operations": statistics.mean(run.operations for run in runs),
                "mflop": statistics.mean(run.flops for run in runs) / 1e6,
                "share": statistics.median(run.share for run in runs),
                "update_ms": 1e3 * statistics.median(runs[0].update_seconds),
            }
        )
    for row in rows:
        if row["steps"] is not None and rows[0]["steps"]:
            row["steps_ratio"] = row["steps"] / rows[0]["steps"]
    return rows


def _num_due(policy: RefreshPolicy, num_factors: int, num_steps: int) -> int:
    """Refreshes, or tests, of factors of one size that a policy makes due."""
    sizes = (FactorStackSize(num_factors, BLOCK_SIZE),)
    return sum(
        item.stop - item.start
        for step in range(1, num_steps + 1)
        for item in policy.due(step, sizes)
    )


def _loss_at(course: Course, progress: float) -> float:
    """The loss that a run has once it has come so far, and its lowest until then."""
    index = max(1, round(progress * len(course.losses)))
    return min(course.losses[:index])


def storage_variants() -> list[Variant]:
    """Methods in full precision, likewise but perturbed by rounding alone, in eight and in four bits."""
    variants = []
    configs: list[Callable[..., Any]] = [ShampooConfig, EigenvalueCorrectedConfig, KLSOAPConfig]
    for config in configs:
        name = config.__name__.removesuffix("Config")
        dense = Variant(f"{name} dense", config(storage="dense"))
        variants += [
            dense,
            replace(dense, name=f"{name} dense, perturbed", perturbation=ROUNDING),
            *(Variant(f"{name} {bits}", config(storage=bits)) for bits in ("8bit", "4bit")),
        ]
    return variants


def parts_variants() -> list[Variant]:
    """Methods in full precision, and with one part of the state alone in four bits."""
    configs: dict[Callable[..., Any], Part] = {
        ShampooConfig: "roots",
        EigenvalueCorrectedConfig: "bases",
    }
    variants = []
    for config, matrices in configs.items():
        name = config.__name__.removesuffix("Config")
        parts: list[Part] = ["factors", matrices, "first", "second"]
        variants += [
            Variant(f"{name} dense", config(storage="dense")),
            *(Variant(f"{name} 4bit {p}", config(storage="4bit"), coded=p) for p in parts),
        ]
    return variants


def refresh_variants() -> list[Variant]:
    """Ways to spend refreshes, and what each costs and buys."""
    config = EigenvalueCorrectedConfig()
    iterated = EigenvalueCorrectedConfig(solver=OrthogonalIterationSolver())
    return [
        Variant("every 10 steps", config, FixedRefresh(10, 1)),
        Variant("staggered over 10", config, StaggeredRefresh(10)),
        Variant("staggered and adaptive, 0.1", config, StaggeredAdaptiveRefresh(10)),
        *(
            Variant(f"adaptive, tested every 10, {t}", config, AdaptiveRefresh(10, 1, t))
            for t in (0.1, 0.3)
        ),
        Variant("warm-started, every 10", iterated, FixedRefresh(10, 1)),
        Variant("every 50 steps", config, FixedRefresh(50, 1)),
    ]


def statistics_variants() -> list[Variant]:
    """Statistics of every step, and of some: over as many steps, or of as many gradients."""
    same_steps = [
        Variant(f"statistics every {n}", ShampooConfig(statistics_interval=n))
        for n in (1, 2, 4, 10)
    ]
    same_number = [
        Variant(
            f"statistics every {n}, as many gradients",
            ShampooConfig(statistics_interval=n, factor_decay=BETAS[1] ** (1 / n)),
        )
        for n in (4, 10)
    ]
    return same_steps + same_number


@dataclass(frozen=True)
class Study:
    """Variants, how those of one method are compared, and what of it is printed."""

    variants: Callable[[], list[Variant]]
    compare: Callable[[str, Sequence[Variant], int, Sequence[int]], list[dict[str, Any]]]
    columns: Mapping[str, str]


COLUMNS = {
    "workload": "workload",
    "variant": "variant",
    "steps": "steps to target",
    "spread": "over seeds",
    "steps_ratio": "ratio",
    "final_loss": "final loss",
    "refreshes": "refreshes",
    "due": "due",
    "operations": "operations",
    "mflop": "MFLOP",
    "update_ms": "update ms",
    "share": "share of step",
}
STUDIES = {
    "storage": Study(storage_variants, pairs.compare_pairs, pairs.COLUMNS),
    "parts": Study(parts_variants, pairs.compare_pairs, pairs.COLUMNS),
    "refresh": Study(refresh_variants, compare, COLUMNS),
    "statistics": Study(statistics_variants, compare, COLUMNS),
}


def _pattern(text: str) -> re.Pattern[str]:
    try:
        return re.compile(text)
    except re.error as error:
        raise argparse.ArgumentTypeError(
            f"must be a regular expression, got {text!r}: {error}"
        ) from None


def main(arguments: list[str] | None = None) -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--workload", action="append", choices=sorted(WORKLOADS))
    parser.add_argument(
        "--only",
        type=_pattern,
        default="",
        help="variants whose name has this regular expression; targets are those of the first",
    )
    parser.add_argument("--lr", type=positive, default=LEARNING_RATE, help="of all variants")
    parser.add_argument("--steps", type=count, default=300)
    parser.add_argument("--seeds", type=count, default=2)
    add_out(parser)
    options = parser.parse_args(arguments)
    study = STUDIES[options.study]
    variants = [
        replace(variant, lr=options.lr)
        for variant in study.variants()
        if options.only.search(variant.name)
    ]
    if not variants:
        names = [variant.name for variant in study.variants()]
        parser.error(
            f"argument --only: must match a variant of {names}, got {options.only.pattern!r}"
        )
    rows = []
    for workload in options.workload or ["mnist"]:
        # A study of several methods compares each with its own first variant.
        for kind in dict.fromkeys(type(variant.config) for variant in variants):
            own = [variant for variant in variants if type(variant.config) is kind]
            rows += study.compare(workload, own, options.steps, range(options.seeds))
    publish(f"Training-{options.study}: steps to target", rows, study.columns, out_folder(options))


if __name__ == "__main__":
    main()
