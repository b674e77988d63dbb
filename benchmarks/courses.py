"""One training run of a smoke workload, and what is kept of it.

The recipe is one for all: cosine schedule, weight decay, blocks of 128. Times are of the processor, on one
thread: other work on the machine does not count.
"""

from __future__ import annotations

import itertools
import math
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.parts import Part, coded_alone
from shampoo_core import DistributedShampoo, ShampooConfig, StaggeredRefresh, health_report
from shampoo_core.counting import OperationCounter
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.refresh import RefreshPolicy
from workloads_smoke import spec
from workloads_smoke.registry import load_workload

LEARNING_RATE = 0.01
BETAS = (0.9, 0.97)
WEIGHT_DECAY = 0.1
BLOCK_SIZE = 128
EVALUATIONS = 60
WARMUP = 0.05
COUNTED = range(41, 61)
"""Steps whose operations are counted: every phase of an interval of 1, 2, 4, 5, 10 or 20 is among them."""


@dataclass(frozen=True)
class Variant:
    """One way to set the optimizer."""

    name: str
    config: PreconditionerConfig = field(default_factory=ShampooConfig)
    refresh: RefreshPolicy = field(default_factory=lambda: StaggeredRefresh(20))
    lr: float = LEARNING_RATE
    """At its peak."""
    perturbation: float = 0.0
    """Relative noise on the weights at first, of this standard deviation."""
    coded: Part | None = None
    """The only part of the state that is kept as the configuration says, the rest dense; None: all is."""


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
    """Of the optimizer in a step, a mean over those of `COUNTED`; NaN if the run ends before."""
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


def train(
    workload_name: str, variant: Variant, num_steps: int, seed: int = 0, eval_batches: int = 1
) -> Course:
    """Train one model.

    Args:
        workload_name: Of the smoke workloads.
        variant: The optimizer.
        num_steps: Length of the run and of its schedule.
        seed: Of weights and batches; examples held out are the same for all seeds.
        eval_batches: Batches of validation examples that the loss is the mean of.
    """
    torch.set_num_threads(1)
    workload = load_workload(workload_name)
    torch.manual_seed(seed)
    model: Any = workload.init_model_fn([seed, 1])[0]
    _perturb(model, variant.perturbation)
    batches = workload._build_input_queue([seed, 2], "train", "", workload.smoke_batch_size)
    validation = workload._build_input_queue([seed, 3], "validation", "", workload.eval_batch_size)
    held_out = list(itertools.islice(validation, eval_batches))
    with coded_alone(variant.coded):
        optimizer = DistributedShampoo(
            model.parameters(),
            lr=variant.lr,
            betas=BETAS,
            weight_decay=WEIGHT_DECAY,
            max_block_size=BLOCK_SIZE,
            preconditioner=variant.config,
            refresh=variant.refresh,
        )
    course = Course()
    every = max(1, num_steps // EVALUATIONS)
    num_counted = len([step for step in COUNTED if step <= num_steps])
    if not num_counted:
        course.operations = course.flops = math.nan
    for step in range(1, num_steps + 1):
        start = time.process_time()
        batch = next(batches)
        optimizer.zero_grad()
        model.train()  # some workloads leave the mode of an evaluation
        loss_of(workload, model, [batch], spec.ForwardPassMode.TRAIN).backward()
        for group in optimizer.param_groups:
            group["lr"] = variant.lr * schedule(step / num_steps)
        middle = time.process_time()
        if step in COUNTED:
            with OperationCounter() as counter:
                optimizer.step()
            course.operations += counter.num_operations / num_counted
            course.flops += counter.flops / num_counted
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


def loss_of(workload: Any, model: Any, batches: Sequence[Any], mode: Any) -> torch.Tensor:
    """Mean loss of the examples of some batches."""
    summed, count = torch.zeros(()), torch.zeros(())
    for batch in batches:
        logits = workload.model_fn(
            model, batch, None, mode, None, update_batch_norm=mode == spec.ForwardPassMode.TRAIN
        )[0]
        losses = workload.loss_fn(batch["targets"], logits, batch.get("weights"))
        summed = summed + losses["summed"]
        count = count + losses["n_valid_examples"]
    return summed / count


def _perturb(model: torch.nn.Module, size: float) -> None:
    """Multiply every weight by 1 + ``size`` times a normal number; nothing at 0."""
    if not size:
        return
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(1.0 + size * torch.randn(weight.shape, generator=generator))


def _summarise(course: Course, optimizer: DistributedShampoo) -> None:
    for entries in optimizer.state.values():
        for name, tensor in entries.items():
            course.state_bytes += tensor.numel() * tensor.element_size()
            course.factors += ".refreshes." in name
    course.refreshes = health_report(optimizer).refreshes
