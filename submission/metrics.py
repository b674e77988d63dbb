"""What a run reports while it trains: loss, gradient norm and learning rate, now and then."""

from __future__ import annotations

import logging
from typing import Any

from torch import Tensor

from .objective import averaged_over_ranks

#: Reports a run makes, about; more in the first steps, where things go wrong.
REPORTS_PER_RUN = 200
_FIRST_STEPS = 5

logger = logging.getLogger(__name__)


def is_due(global_step: int, step_hint: int) -> bool:
    """Return whether this step is reported. Reading a number off the device stalls it."""
    return global_step < _FIRST_STEPS or global_step % max(1, step_hint // REPORTS_PER_RUN) == 0


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
    logger.info("%d) loss = %.4f, grad_norm = %.4f", global_step, *list(values.values())[:2])
