"""Build the optimizer that a setting asks for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from shampoo_core import (
    AdamConfig,
    AveragingConfig,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    HeavyBall,
    OrthogonalIterationSolver,
    PrimalAveraging,
    RefreshPolicy,
    ScheduleFree,
    ShampooConfig,
    SpectralConfig,
    WeightEMA,
)

from .hyperparameters import Hyperparameters
from .pace import Pace
from .routing import Kind, Route, routed

#: Tables are cut into so many rows at a time.
TABLE_BLOCK_ROWS = 8192


def build_optimizer(
    model: nn.Module,
    parameter_types: Mapping[str, Any],
    hyperparameters: Hyperparameters,
    pace: Pace,
    refresh: RefreshPolicy,
) -> DistributedShampoo:
    """Build the optimizer for all trainable parameters of `model`.

    Args:
        model: The model, possibly wrapped by DDP and `torch.compile`.
        parameter_types: The workload's `model_params_types`.
        hyperparameters: The setting.
        pace: The setting's time scales for this run.
        refresh: When roots and bases are recomputed.
    """
    spectral = hyperparameters.preconditioner == "spectral"
    # A group more costs time, so that it has to have a reason.
    apart = spectral or hyperparameters.embedding_rate_factor != 1.0
    # A block cut out of a matrix has other singular vectors, however short the run.
    size = hyperparameters.max_block_size if spectral else pace.max_block_size
    routes = routed(model, parameter_types, size, embeddings_apart=apart)
    return DistributedShampoo(
        _groups(routes, hyperparameters),
        betas=(pace.beta1, pace.beta2),
        # Reading the first moment with the squared rate is NAdam's look-ahead.
        beta3=pace.beta1**2 if hyperparameters.nesterov else None,
        eps=hyperparameters.epsilon,
        weight_decay=hyperparameters.weight_decay,
        refresh=refresh,
        averaging=_averaging(hyperparameters, pace),
    )


def _groups(
    routes: Mapping[Route, Sequence[nn.Parameter]], hyperparameters: Hyperparameters
) -> list[dict[str, Any]]:
    """Return parameter groups: routes that differ in the size of their blocks alone share one.

    However small a group is, it adds 34 operations to a step.
    """
    kinds: list[dict[str, Any]] = []
    members: list[dict[str, list[Any]]] = []
    for chosen, parameters in routes.items():
        options = route_options(chosen, hyperparameters)
        if options not in kinds:
            kinds.append(options)
            members.append({"params": [], "max_block_size": []})
        member = members[kinds.index(options)]
        member["params"] += parameters
        member["max_block_size"] += [_block_size(chosen, options)] * len(parameters)
    return [{**member, **options} for member, options in zip(members, kinds, strict=True)]


def route_options(chosen: Route, hyperparameters: Hyperparameters) -> dict[str, Any]:
    """Return what a route's group overrides, but for the size of blocks."""
    factor = hyperparameters.embedding_rate_factor if chosen.is_embedding else 1.0
    rate = factor * hyperparameters.learning_rate
    # The schedule overwrites lr; initial_lr says in which proportion.
    options: dict[str, Any] = {"lr": rate, "initial_lr": rate}
    method = _preconditioner(hyperparameters)
    # Rows of an embedding meet in no product: as a matrix it has no norm that means anything.
    is_matrix = chosen.kind is Kind.MATRIX and not (
        chosen.is_embedding and isinstance(method, SpectralConfig)
    )
    if is_matrix or (chosen.kind is Kind.DIAGONAL and _steps_vectors_by_adam(method)):
        return {**options, "preconditioner": method}
    # An elementwise method needs no blocks: one vector per parameter.
    options.update(preconditioner=AdamConfig(), target_order=1)
    if chosen.kind is Kind.TABLE and hyperparameters.averaging == "weight_ema":
        # An average and, during evaluation, the training weights would be two more copies of what
        # fills the memory already; a row moves seldom, so that there is little to average.
        options["averaging"] = None
    return options


def _block_size(chosen: Route, options: Mapping[str, Any]) -> int | None:
    """Return the longest side of a block of a route whose group has the given options."""
    if isinstance(options["preconditioner"], AdamConfig) and chosen.kind is not Kind.DIAGONAL:
        # Ranks share the work by blocks, and a table can be most of a model.
        return TABLE_BLOCK_ROWS
    return chosen.max_block_size


def _steps_vectors_by_adam(
    method: ShampooConfig | EigenvalueCorrectedConfig | SpectralConfig,
) -> bool:
    """Return whether what a method does to a vector is what Adam does to it."""
    if isinstance(method, EigenvalueCorrectedConfig):
        return method.exponent == 0.5  # without an eigenbasis its second moments are Adam's
    return isinstance(method, ShampooConfig)  # grafted to Adam, which steps what has no factor


def _preconditioner(
    hyperparameters: Hyperparameters,
) -> ShampooConfig | EigenvalueCorrectedConfig | SpectralConfig:
    if hyperparameters.preconditioner == "spectral":
        return SpectralConfig(
            momentum=1.0 - hyperparameters.one_minus_beta1, nesterov=hyperparameters.nesterov
        )
    exponent = hyperparameters.inverse_exponent
    if hyperparameters.preconditioner == "shampoo":
        return ShampooConfig(exponent=exponent)
    # One iteration a refresh, as SOAP: on a GPU a small part of an eigendecomposition's time, so that bases
    # are refreshed the more often (refresh_cost.py).
    return EigenvalueCorrectedConfig(
        exponent=0.5 if exponent is None else exponent, solver=OrthogonalIterationSolver()
    )


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
