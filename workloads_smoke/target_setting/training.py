"""One training run of target setting: a point, a seed, a schedule, evaluations on the way."""

import math
import time
from dataclasses import dataclass

import torch
from torch import nn

from workloads_smoke.spec import ForwardPassMode
from workloads_smoke.target_setting.algorithms import ALGORITHMS, Point
from workloads_smoke.workloads.base import SmokeWorkload

WARMUP_FACTOR = 0.05


@dataclass(frozen=True)
class Run:
    """What to train.

    Attributes:
        algorithm: A key of `ALGORITHMS`.
        point: Its setting.
        seed: Of weights, data order and dropout.
        num_steps: Length of the schedule, warm-up and cosine to zero.
        num_evaluations: Evaluations at equal distances, the last one at the end.
    """

    algorithm: str
    point: Point
    seed: int
    num_steps: int
    num_evaluations: int


@dataclass(frozen=True)
class Curve:
    """Target metric along a run, and its processor time in seconds."""

    steps: list[int]
    validation: list[float]
    test: list[float]
    seconds: float


def schedule(step: int, num_steps: int) -> float:
    """Return the factor of the learning rate at a step counted from 0."""
    warmup = max(1, int(WARMUP_FACTOR * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (step - warmup) / (num_steps - warmup))))


def train(workload: SmokeWorkload, run: Run) -> Curve:
    """Train and evaluate.

    Args:
        workload: A fresh workload.
        run: What to train.

    Returns:
        The curve, without what was not finite.
    """
    started = time.process_time()
    params, _ = workload.init_model_fn([run.seed, 1])
    assert isinstance(params, nn.Module)
    torch.manual_seed(run.seed)
    optimizer = ALGORITHMS[run.algorithm].build(params.parameters(), run.point)
    queue = workload._build_input_queue([run.seed, 2], "train", "", workload.smoke_batch_size)
    marks = {run.num_steps * i // run.num_evaluations for i in range(1, run.num_evaluations + 1)}
    curve = Curve([], [], [], 0.0)
    for step in range(run.num_steps):
        for group in optimizer.param_groups:
            group["lr"] = run.point.learning_rate * schedule(step, run.num_steps)
        loss = training_step(workload, params, optimizer, next(queue), run.point.label_smoothing)
        if step + 1 in marks:
            if not math.isfinite(loss):
                break
            _evaluate(workload, params, step + 1, curve)
    seconds = time.process_time() - started
    return Curve(curve.steps, curve.validation, curve.test, round(seconds, 1))


def training_step(
    workload: SmokeWorkload,
    params: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: dict[str, object],
    label_smoothing: float,
) -> float:
    """Take one step on the mean loss of a batch and return that loss."""
    params.train()  # some workloads leave the mode of an evaluation
    logits, _ = workload.model_fn(
        params, batch, None, ForwardPassMode.TRAIN, None, update_batch_norm=True
    )
    parts = workload.loss_fn(batch["targets"], logits, batch.get("weights"), label_smoothing)
    loss = parts["summed"] / parts["n_valid_examples"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def _evaluate(workload: SmokeWorkload, params: nn.Module, step: int, curve: Curve) -> None:
    results = workload.eval_model(workload.eval_batch_size, params, None, [0, 3], "", None, step)
    metric = workload.target_metric_name
    validation, test = results[f"validation/{metric}"], results[f"test/{metric}"]
    # A model can be broken before its training loss shows it.
    if math.isfinite(validation) and math.isfinite(test):
        curve.steps.append(step)
        curve.validation.append(validation)
        curve.test.append(test)
