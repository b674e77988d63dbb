"""Build the optimizer that a setting asks for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from shampoo_core import (
    AdamGrafting,
    DistributedShampoo,
    ShampooConfig,
    StaggeredRefresh,
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
    beta1 = pace.beta1
    return DistributedShampoo(
        groups,
        lr=hyperparameters.learning_rate,
        betas=(beta1, pace.beta2),
        # Reading the first moment with the squared rate is NAdam's look-ahead.
        beta3=beta1**2 if hyperparameters.nesterov else None,
        eps=hyperparameters.epsilon,
        weight_decay=hyperparameters.weight_decay,
        preconditioner=_preconditioner(hyperparameters),
        grafting=AdamGrafting(),
        refresh=StaggeredRefresh(interval=pace.refresh_interval),
    )


def _preconditioner(hyperparameters: Hyperparameters) -> ShampooConfig:
    return ShampooConfig(exponent=hyperparameters.inverse_exponent)


def _options(chosen: Route, hyperparameters: Hyperparameters) -> dict[str, Any]:
    """Return what a route's group overrides."""
    if chosen is Route.MATRIX:
        return {"max_block_size": hyperparameters.max_block_size}
    # One vector per parameter: vectors have no factors and follow the grafting method.
    return {"max_block_size": None, "target_order": 1}
