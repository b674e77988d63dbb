"""Schedule-Free AdamW at the published points of both rulesets.

Their ``dropout_rate`` is read by neither of the published submissions: models keep their own.

Source of the settings: mlcommons/submissions_algorithms, schedule_free_adamw_v2 of both rulesets.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from workloads_smoke.baselines.training import batch_size, forward, mean_loss, short_run_factor

from .optimizer import ScheduleFreeAdamW

#: The published setting of the self-tuning ruleset.
SELF_TUNING = SimpleNamespace(
    label_smoothing=0.2,
    learning_rate=0.0025,
    one_minus_beta1=0.1,
    beta2=0.9955159689799007,
    weight_decay=0.08121616522670176,
    warmup_factor=0.02,
)
#: Of these many steps the published self-tuning submission takes batch statistics at the average x in
#: one, the external one in all but one.
_STATISTICS_INTERVAL = 3
#: The published warm-up is a share of this part of the step hint.
_WARMUP_BASE = 0.75


def get_batch_size(workload_name: str) -> int:
    """Return the global batch size."""
    return batch_size(workload_name)


def init_optimizer_state(
    workload: Any, model_params: nn.Module, model_state: Any, hyperparameters: Any, rng: Any
) -> dict[str, Any]:
    """Build the optimizer."""
    del model_state, rng
    setting = hyperparameters or SELF_TUNING
    optimizer = ScheduleFreeAdamW(
        model_params.parameters(),
        lr=setting.learning_rate * short_run_factor(workload.step_hint),
        betas=(1.0 - setting.one_minus_beta1, setting.beta2),
        weight_decay=setting.weight_decay,
        warmup_steps=int(setting.warmup_factor * workload.step_hint * _WARMUP_BASE),
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
    first_of_interval = global_step % _STATISTICS_INTERVAL == 0
    if first_of_interval == (hyperparameters is None) and _has_batch_statistics(model):
        with torch.no_grad():
            _, model_state = forward(workload, model, model_state, batch, rng)
    optimizer.extrapolate()
    optimizer.zero_grad(set_to_none=True)
    logits, model_state = forward(workload, model, model_state, batch, rng, update_batch_norm=False)
    mean_loss(workload, batch, logits, setting.label_smoothing).backward()
    optimizer.step()
    return optimizer_state, model, model_state


def _has_batch_statistics(model: nn.Module) -> bool:
    return any(hasattr(module, "running_mean") for module in model.modules())


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
    """Evaluate the average, which the parameters hold between steps."""
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
