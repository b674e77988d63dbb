"""Muon for matrices and AdamW for the rest, at the published setting."""

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

from .optimizer import Muon

#: The published setting of the self-tuning ruleset.
SELF_TUNING = SimpleNamespace(
    learning_rate=0.01,
    muon_weight_decay=0.0,
    muon_beta=0.9,
    muon_nesterov=True,
    muon_ns_steps=5,
    muon_ns_eps=1e-7,
    adamw_weight_decay=0.0,
    adamw_beta1=0.9,
    adamw_beta2=0.999,
    adamw_eps=1e-8,
    dropout_rate=0.1,
    label_smoothing=0.1,
    warmup_factor=0.05,
)
#: Names by which the published submission knows an embedding, which is not a matrix to Muon.
_EMBEDDING_NAMES = ("embedding", "embed_tokens")


def get_batch_size(workload_name: str) -> int:
    """Return the global batch size."""
    return batch_size(workload_name)


def is_for_muon(name: str, weight: torch.Tensor) -> bool:
    """Return whether Muon takes a parameter: all with two dimensions or more but embeddings."""
    return weight.ndim >= 2 and not any(part in name.lower() for part in _EMBEDDING_NAMES)


def init_optimizer_state(
    workload: Any, model_params: nn.Module, model_state: Any, hyperparameters: Any, rng: Any
) -> dict[str, Any]:
    """Build both optimizers; one that would have no parameters is left out."""
    del workload, model_state, rng
    setting = hyperparameters or SELF_TUNING
    named = [(name, weight) for name, weight in model_params.named_parameters()]
    matrices = [weight for name, weight in named if is_for_muon(name, weight)]
    others = [weight for name, weight in named if not is_for_muon(name, weight)]
    optimizers: dict[str, Any] = {}
    if matrices:
        optimizers["muon"] = Muon(
            matrices,
            lr=setting.learning_rate,
            beta=setting.muon_beta,
            nesterov=setting.muon_nesterov,
            iterations=setting.muon_ns_steps,
            eps=setting.muon_ns_eps,
            weight_decay=setting.muon_weight_decay,
        )
    if others:
        optimizers["adamw"] = torch.optim.AdamW(
            others,
            lr=setting.learning_rate,
            betas=(setting.adamw_beta1, setting.adamw_beta2),
            eps=setting.adamw_eps,
            weight_decay=setting.adamw_weight_decay,
            fused=True,
        )
    return optimizers


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
    model = current_param_container
    model.train()
    for optimizer in optimizer_state.values():
        optimizer.zero_grad(set_to_none=True)
    logits, model_state = forward(
        workload, model, model_state, batch, rng, dropout_rate=setting.dropout_rate
    )
    mean_loss(workload, batch, logits, setting.label_smoothing).backward()
    factor = warmup_then_cosine(global_step, workload.step_hint, setting.warmup_factor)
    peak = setting.learning_rate * short_run_factor(workload.step_hint)
    for optimizer in optimizer_state.values():
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
