"""The benchmark's baseline: NAdamW with warm-up and cosine, at its five published points."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from workloads_smoke.baselines.training import (
    batch_size,
    forward,
    mean_loss,
    set_learning_rate,
    short_run_factor,
    warmup_then_cosine,
)

from .optimizer import NAdamW

#: The published setting of the self-tuning ruleset.
SELF_TUNING = SimpleNamespace(
    dropout_rate=0.0,
    label_smoothing=0.0,
    learning_rate=0.00190834618600756,
    one_minus_beta1=0.09090652249,
    beta2=0.998898321921855,
    weight_decay=0.08121616522670176,
    warmup_factor=0.1,
)


def get_batch_size(workload_name: str) -> int:
    """Return the global batch size."""
    return batch_size(workload_name)


def init_optimizer_state(
    workload: Any, model_params: nn.Module, model_state: Any, hyperparameters: Any, rng: Any
) -> dict[str, Any]:
    """Build the optimizer."""
    del workload, model_state, rng
    setting = hyperparameters or SELF_TUNING
    optimizer = NAdamW(
        model_params.parameters(),
        lr=setting.learning_rate,
        betas=(1.0 - setting.one_minus_beta1, setting.beta2),
        weight_decay=setting.weight_decay,
    )
    return {"optimizer": optimizer}


def update_params(
    workload: Any,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: Mapping[str, Any],
    loss_type: Any,
    optimizer_state: dict[str, Any],
    eval_results: list[tuple[int, Any]],
    global_step: int,
    rng: Any,
    train_state: Mapping[str, Any] | None = None,
) -> tuple[dict[str, Any], nn.Module, Any]:
    """Take one step."""
    del current_params_types, loss_type, eval_results, train_state
    setting = hyperparameters or SELF_TUNING
    model, optimizer = current_param_container, optimizer_state["optimizer"]
    model.train()
    optimizer.zero_grad(set_to_none=True)
    logits, model_state = forward(
        workload, model, model_state, batch, rng, dropout_rate=setting.dropout_rate
    )
    mean_loss(workload, batch, logits, setting.label_smoothing).backward()
    grad_clip = getattr(setting, "grad_clip", None)
    if grad_clip is not None:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    factor = warmup_then_cosine(global_step, workload.step_hint, setting.warmup_factor)
    peak = setting.learning_rate * short_run_factor(workload.step_hint)
    set_learning_rate(optimizer, peak * factor)
    optimizer.step()
    return optimizer_state, model, model_state


def prepare_for_eval(
    workload: Any,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: Any,
    optimizer_state: dict[str, Any],
    eval_results: list[tuple[int, Any]],
    global_step: int,
    rng: Any,
) -> tuple[dict[str, Any], nn.Module, Any]:
    """Evaluate the weights as they are."""
    del workload, current_params_types, hyperparameters, loss_type, eval_results, global_step, rng
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload: Any,
    input_queue: Iterator[dict[str, Any]],
    optimizer_state: dict[str, Any],
    current_param_container: nn.Module,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> dict[str, Any]:
    """Take the next batch."""
    del workload, optimizer_state, current_param_container, model_state, hyperparameters
    del global_step, rng
    return next(input_queue)
