"""Small models trained for real: steps to target of options.

The workloads are those of `workloads_smoke`, the recipe is one for all: cosine schedule, weight decay,
blocks of 128. The target is the validation loss of the first variant after 80 % of its steps; variants see
the same batches and start from the same weights. Times are of the processor, on one thread: other work on
the machine does not count.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.tables import DEFAULT_FOLDER, publish
from shampoo_core import (
    AdaptiveRefresh,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLSOAPConfig,
    OrthogonalIterationSolver,
    ShampooConfig,
    StaggeredRefresh,
    health_report,
)
from shampoo_core.averaging import AveragingConfig
from shampoo_core.counting import OperationCounter
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.refresh import FactorStackSize, RefreshPolicy
from workloads_smoke import spec
from workloads_smoke.registry import WORKLOADS, load_workload

LEARNING_RATE = 0.01
BETAS = (0.9, 0.97)
WEIGHT_DECAY = 0.1
BLOCK_SIZE = 128
EVALUATIONS = 60
TARGET_AT = 0.8
WARMUP = 0.05
COUNTED = range(41, 61)
"""Steps whose operations are counted: every phase of an interval of 1, 2, 4, 5, 10 or 20 is among them."""


@dataclass(frozen=True)
class Variant:
    """One way to set the optimizer."""

    name: str
    config: PreconditionerConfig = field(default_factory=ShampooConfig)
    refresh: RefreshPolicy = field(default_factory=lambda: StaggeredRefresh(20))
    averaging: AveragingConfig | None = None
    lr: float = LEARNING_RATE
    """At its peak."""


@dataclass
class Course:
    """What happened in one run."""

    steps: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    """Validation losses after these steps."""
    update_seconds: list[float] = field(default_factory=list)
    other_seconds: list[float] = field(default_factory=list)
    state_bytes: int = 0
    refreshes: int = 0
    factors: int = 0
    operations: float = 0.0
    """Of the optimizer in a step, a mean over some."""
    flops: float = 0.0
    """Of its matrix products and decompositions, likewise."""

    @property
    def share(self) -> float:
        """Of the optimizer in a median training step."""
        update = statistics.median(self.update_seconds)
        return update / (update + statistics.median(self.other_seconds))

    def steps_to(self, target: float) -> float | None:
        """Steps until the loss is at most ``target``, between evaluations by interpolation."""
        for i, (step, loss) in enumerate(zip(self.steps, self.losses, strict=True)):
            if loss <= target:
                if i == 0:
                    return float(step)
                before, drop = self.steps[i - 1], self.losses[i - 1] - loss
                return before + (step - before) * (self.losses[i - 1] - target) / drop
        return None


def train(workload_name: str, variant: Variant, num_steps: int, seed: int = 0) -> Course:
    """Train one model.

    Args:
        workload_name: Of the smoke workloads.
        variant: The optimizer.
        num_steps: Length of the run and of its schedule.
        seed: Of weights and batches.
    """
    torch.set_num_threads(1)
    workload = load_workload(workload_name)
    torch.manual_seed(seed)
    model: Any = workload.init_model_fn([seed, 1])[0]
    batches = workload._build_input_queue([seed, 2], "train", "", workload.smoke_batch_size)
    held_out = next(
        workload._build_input_queue([seed, 3], "validation", "", workload.eval_batch_size)
    )
    optimizer = DistributedShampoo(
        model.parameters(),
        lr=variant.lr,
        betas=BETAS,
        weight_decay=WEIGHT_DECAY,
        max_block_size=BLOCK_SIZE,
        preconditioner=variant.config,
        refresh=variant.refresh,
        averaging=variant.averaging,
    )
    course = Course()
    every = max(1, num_steps // EVALUATIONS)
    for step in range(1, num_steps + 1):
        start = time.process_time()
        batch = next(batches)
        optimizer.zero_grad()
        loss_of(workload, model, batch, spec.ForwardPassMode.TRAIN).backward()
        for group in optimizer.param_groups:
            group["lr"] = variant.lr * schedule(step / num_steps)
        middle = time.process_time()
        if step in COUNTED:
            with OperationCounter() as counter:
                optimizer.step()
            course.operations += counter.num_operations / len(COUNTED)
            course.flops += counter.flops / len(COUNTED)
        else:
            optimizer.step()
        course.other_seconds.append(middle - start)
        course.update_seconds.append(time.process_time() - middle)
        if step % every == 0:
            with torch.no_grad():
                loss = loss_of(workload, model, held_out, spec.ForwardPassMode.EVAL)
            course.steps.append(step)
            course.losses.append(loss.item())
    _summarise(course, optimizer)
    return course


def schedule(progress: float) -> float:
    """Warm-up, then cosine to zero."""
    if progress < WARMUP:
        return progress / WARMUP
    return 0.5 * (1.0 + math.cos(math.pi * (progress - WARMUP) / (1.0 - WARMUP)))


def loss_of(workload: Any, model: Any, batch: Any, mode: Any) -> torch.Tensor:
    """Mean loss of a batch."""
    logits = workload.model_fn(
        model, batch, None, mode, None, update_batch_norm=mode == spec.ForwardPassMode.TRAIN
    )[0]
    losses = workload.loss_fn(batch["targets"], logits, batch.get("weights"))
    mean: torch.Tensor = losses["summed"] / losses["n_valid_examples"]
    return mean


def _summarise(course: Course, optimizer: DistributedShampoo) -> None:
    for entries in optimizer.state.values():
        for name, tensor in entries.items():
            course.state_bytes += tensor.numel() * tensor.element_size()
            course.factors += ".refreshes." in name
    course.refreshes = health_report(optimizer).refreshes


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
                "state_ratio": runs[0].state_bytes / first[0].state_bytes,
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


def storage_variants(config: Callable[..., Any]) -> list[Variant]:
    """A method in full precision, in eight and in four bits."""
    name = config.__name__.removesuffix("Config")
    return [
        Variant(f"{name} {storage}", config(storage=storage))
        for storage in ("dense", "8bit", "4bit")
    ]


def refresh_variants() -> list[Variant]:
    """Ways to spend refreshes, and what each costs and buys."""
    config = EigenvalueCorrectedConfig()
    iterated = EigenvalueCorrectedConfig(solver=OrthogonalIterationSolver())
    return [
        Variant("every 10 steps", config, FixedRefresh(10, 1)),
        Variant("staggered over 10", config, StaggeredRefresh(10)),
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


COLUMNS = {
    "workload": "workload",
    "variant": "variant",
    "steps": "steps to target",
    "spread": "over seeds",
    "steps_ratio": "ratio",
    "final_loss": "final loss",
    "state_ratio": "state",
    "refreshes": "refreshes",
    "due": "due",
    "operations": "operations",
    "mflop": "MFLOP",
    "update_ms": "update ms",
    "share": "share of step",
}
STUDIES: dict[str, Callable[[], list[Variant]]] = {
    "storage": lambda: [
        variant
        for config in (ShampooConfig, EigenvalueCorrectedConfig, KLSOAPConfig)
        for variant in storage_variants(config)
    ],
    "refresh": refresh_variants,
    "statistics": statistics_variants,
}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("study", choices=sorted(STUDIES))
    parser.add_argument("--workload", action="append", choices=sorted(WORKLOADS))
    parser.add_argument(
        "--only", default="", help="variants whose name has this; targets are those of the first"
    )
    parser.add_argument("--lr", type=float, default=LEARNING_RATE, help="of all variants")
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=DEFAULT_FOLDER)
    options = parser.parse_args()
    variants = [
        replace(variant, lr=options.lr)
        for variant in STUDIES[options.study]()
        if options.only in variant.name
    ]
    rows = []
    for workload in options.workload or ["mnist"]:
        # A study of several methods compares each with its own first variant.
        for kind in dict.fromkeys(type(variant.config) for variant in variants):
            own = [variant for variant in variants if type(variant.config) is kind]
            rows += compare(workload, own, options.steps, range(options.seeds))
    publish(f"Training-{options.study}: steps to target", rows, COLUMNS, options.out)


if __name__ == "__main__":
    main()
