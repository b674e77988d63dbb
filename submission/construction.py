"""Build the optimizer that a setting asks for."""

from __future__ import annotations

from typing import Any

from torch import nn

from shampoo_core import (
    AdamConfig,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    HeavyBall,
    PrimalAveraging,
    ScheduleFree,
    ShampooConfig,
    StaggeredRefresh,
    WeightEMA,
)
from shampoo_core.averaging import AveragingConfig

from .hyperparameters import Hyperparameters
from .pace import Pace
from .routing import Route, routed


def build_optimizer(
    model: nn.Module, hyperparameters: Hyperparameters, pace: Pace
) -> DistributedShampoo:
    """Build the optimizer for all trainable parameters of `model`.

    Args:
        model: The model, possibly wrapped by DDP and `torch.compile`.
        hyperparameters: The setting.
        pace: The setting's time scales for this run.
    """
    groups = [
        {"params": parameters, **_options(chosen, hyperparameters, pace)}
        for chosen, parameters in routed(model).items()
    ]
    return DistributedShampoo(
        groups,
        lr=hyperparameters.learning_rate,
        betas=(pace.beta1, pace.beta2),
        # Reading the first moment with the squared rate is NAdam's look-ahead.
        beta3=pace.beta1**2 if hyperparameters.nesterov else None,
        eps=hyperparameters.epsilon,
        weight_decay=hyperparameters.weight_decay,
        refresh=StaggeredRefresh(interval=pace.refresh_interval),
        averaging=_averaging(hyperparameters, pace),
    )


def _options(chosen: Route, hyperparameters: Hyperparameters, pace: Pace) -> dict[str, Any]:
    """Return what a route's group overrides."""
    if chosen is Route.MATRIX:
        return {
            "preconditioner": _preconditioner(hyperparameters),
            "max_block_size": pace.max_block_size,
        }
    # An elementwise method needs no blocks: one vector per parameter.
    diagonal = {"preconditioner": AdamConfig(), "max_block_size": None, "target_order": 1}
    if chosen is Route.TABLE and hyperparameters.averaging == "weight_ema":
        # An average and, during evaluation, the training weights would be two more copies of what
        # fills the memory already; a row moves seldom, so that there is little to average.
        return {**diagonal, "averaging": None}
    return diagonal


def _preconditioner(
    hyperparameters: Hyperparameters,
) -> ShampooConfig | EigenvalueCorrectedConfig:
    exponent = hyperparameters.inverse_exponent
    if hyperparameters.preconditioner == "shampoo":
        return ShampooConfig(exponent=exponent)
    return EigenvalueCorrectedConfig(exponent=0.5 if exponent is None else exponent)


def _averaging(hyperparameters: Hyperparameters, pace: Pace) -> AveragingConfig | None:
    momentum, averaging = hyperparameters.momentum, hyperparameters.averaging
    if momentum > 0.0:
        # Dampened by as much as it decays: an average of directions, as long as one of them.
        return HeavyBall(momentum=momentum, dampening=momentum, nesterov=True)
    if averaging == "weight_ema":
        return WeightEMA(decay=pace.average_decay, interval=pace.average_interval)
    if averaging == "schedule_free":
        return ScheduleFree()
    if averaging == "primal":
        return PrimalAveraging()
    return None
