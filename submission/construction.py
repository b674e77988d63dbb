"""Build the optimizer that a setting asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from shampoo_core import (
    AdamGrafting,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    PrimalAveraging,
    ScheduleFree,
    ShampooConfig,
    StaggeredRefresh,
    WeightEMA,
)

from .hyperparameters import Hyperparameters
from .pace import Pace
from .routing import Route, routed


def build_optimizer(
    model: nn.Module,
    parameter_types: Mapping[str, Any],
    hyperparameters: Hyperparameters,
    pace: Pace,
) -> DistributedShampoo:
    """Build the optimizer for all trainable parameters of `model`.

    Args:
        model: The model, possibly wrapped by DDP and `torch.compile`.
        parameter_types: The workload's `model_params_types`.
        hyperparameters: The setting.
        pace: The setting's time scales for this run.
    """
    groups = [
        {"params": parameters, **_options(chosen, hyperparameters)}
        for chosen, parameters in routed(model, parameter_types).items()
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
        averaging=_averaging(hyperparameters.averaging, pace),
    )


def _options(chosen: Route, hyperparameters: Hyperparameters) -> dict[str, Any]:
    """Return what a route's group overrides."""
    if chosen is Route.DIAGONAL:
        # One vector per parameter: vectors have no factors and follow the grafting method.
        return {
            "preconditioner": ShampooConfig(),
            "grafting": AdamGrafting(),
            "max_block_size": None,
            "target_order": 1,
        }
    return {
        "preconditioner": _preconditioner(hyperparameters),
        "max_block_size": hyperparameters.max_block_size,
    }


def _preconditioner(
    hyperparameters: Hyperparameters,
) -> ShampooConfig | EigenvalueCorrectedConfig:
    exponent = hyperparameters.inverse_exponent
    if hyperparameters.preconditioner == "shampoo":
        return ShampooConfig(exponent=exponent)
    return EigenvalueCorrectedConfig(exponent=0.5 if exponent is None else exponent)


def _averaging(averaging: str, pace: Pace) -> WeightEMA | ScheduleFree | PrimalAveraging | None:
    if averaging == "weight_ema":
        return WeightEMA(decay=pace.average_decay, interval=pace.average_interval)
    if averaging == "schedule_free":
        return ScheduleFree()
    if averaging == "primal":
        return PrimalAveraging()
    return None
