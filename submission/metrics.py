"""What a run reports while it trains: loss, gradient norm and learning rate, now and then."""

from __future__ import annotations

from typing import Any

import torch
from absl import logging
from torch import Tensor, nn

from .objective import averaged_over_ranks
from .pace import Pace

#: Reports a run makes, about; more in the first steps, where things go wrong.
REPORTS_PER_RUN = 200
_FIRST_STEPS = 5


def is_due(global_step: int, step_hint: int) -> bool:
    """Return whether this step is reported. Reading a number off the device stalls it."""
    return global_step < _FIRST_STEPS or global_step % max(1, step_hint // REPORTS_PER_RUN) == 0


def gradient_norm(model: nn.Module) -> Tensor:
    """Return the norm of all gradients together, and leave them as they are.

    `clip_grad_norm_` without a limit would not: beside one gradient that is not finite it makes
    every other one NaN.
    """
    norms = [
        torch.linalg.vector_norm(weight.grad.detach())
        for weight in model.parameters()
        if weight.grad is not None
    ]
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())


def report(
    workload: Any, global_step: int, loss: Tensor, gradient_norm: Tensor, learning_rate: float
) -> None:
    """Write the numbers of one step to the workload's metrics logger and to the log.

    Every rank must call this, since the loss is averaged over ranks; only the harness's first rank
    has a metrics logger.
    """
    values = {
        "loss": averaged_over_ranks(loss.detach()).item(),
        "grad_norm": gradient_norm.item(),
        "learning_rate": learning_rate,
    }
    metrics_logger = getattr(workload, "metrics_logger", None)
    if metrics_logger is not None:
        metrics_logger.append_scalar_metrics(values, global_step)
    logging.info("%d) loss = %.4f, grad_norm = %.4f", global_step, *list(values.values())[:2])


def report_choices(pace: Pace) -> None:
    """Log, once a run, what follows from its length."""
    schedule = pace.schedule
    logging.info(
        "Schedule: %s over %d steps, %d of them warm-up, to a peak of %.3g. Blocks: at most %d. "
        "Refreshes: every %d steps. Decay rates: %.4g and %.4g; of averaged weights, %.4g every %d "
        "steps.",
        *(schedule.shape, schedule.total_steps, schedule.warmup_steps, schedule.peak),
        *(pace.max_block_size, pace.refresh_interval, pace.beta1, pace.beta2),
        *(pace.average_decay, pace.average_interval),
    )
