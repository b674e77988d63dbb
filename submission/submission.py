"""AlgoPerf submission: Distributed Shampoo for the external and the self-tuning ruleset.

The five functions the harness calls. Each does its few lines with the parts beside this file:
`hyperparameters` checks the setting, `pace` fits it to the length of the run, `construction`
builds the optimizer, `objective` the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from .batch_sizes import batch_size
from .batch_statistics import RecentBatches, refresh
from .construction import build_optimizer
from .data_parallel import Wrapper
from .hyperparameters import Hyperparameters
from .metrics import gradient_norm, is_due, report, report_choices
from .objective import logits_of, make_dense, mean_loss
from .pace import SELF_TUNING_BUDGET, Pace, pace
from .refresh_cost import RefreshCost
from .saving import checkpoints_are_saved

OptimizerState = dict[str, Any]
UpdateReturn = tuple[OptimizerState, nn.Module, Any]


def get_batch_size(workload_name: str) -> int:
    """Return the global batch size for a workload; ValueError if it is unknown."""
    return batch_size(workload_name)


def init_optimizer_state(
    workload: Any, model_params: nn.Module, model_state: Any, hyperparameters: Any, rng: Any
) -> OptimizerState:
    """Build the optimizer for a model. `hyperparameters` None asks for the built-in setting."""
    del model_state, rng
    setting = Hyperparameters.from_namespace(hyperparameters)
    scales = _pace(workload, setting, hyperparameters is None)
    device = next(model_params.parameters()).device
    cost = RefreshCost(scales.refresh_interval, scales.schedule.total_steps, device)
    optimizer = build_optimizer(
        model_params, workload.model_params_types, setting, scales, cost.policy
    )
    report_choices(scales)
    # The harness saves and restores every value here through state_dict and load_state_dict.
    return {
        "optimizer": optimizer,
        "refresh_cost": cost,
        "recent_batches": RecentBatches(model_params, averaging=setting.averaging != "none"),
        "wrapper": Wrapper(model_params),
    }


def update_params(
    workload: Any,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    batch: Mapping[str, Any],
    loss_type: Any,
    optimizer_state: OptimizerState,
    eval_results: list[tuple[int, Any]],
    global_step: int,
    rng: Any,
    train_state: Mapping[str, Any] | None = None,
) -> UpdateReturn:
    """Take one step on `batch`; `global_step` counts from 0."""
    del current_params_types, loss_type, eval_results, train_state
    cost: RefreshCost = optimizer_state["refresh_cost"]
    cost.begin(global_step + 1)
    optimizer_state["recent_batches"].keep(batch)
    setting = Hyperparameters.from_namespace(hyperparameters)
    optimizer = optimizer_state["optimizer"]
    optimizer.train()
    model = optimizer_state["wrapper"].wrapped(current_param_container)
    model.train()

    optimizer.zero_grad(set_to_none=True)
    logits, model_state = logits_of(workload, model, model_state, batch, rng, setting.dropout_rate)
    loss = mean_loss(workload, batch, logits, setting.label_smoothing)
    loss.backward()
    make_dense(model)

    reported = is_due(global_step, workload.step_hint)
    if setting.grad_clip is not None:
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), setting.grad_clip)
    elif reported:
        norm = gradient_norm(model)
    learning_rate = _pace(workload, setting, hyperparameters is None).schedule(global_step + 1)
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * (group["initial_lr"] / setting.learning_rate)
    cost.begin_update(global_step + 1)
    optimizer.step()
    cost.end(global_step + 1)
    if reported:
        report(workload, global_step, loss, norm, learning_rate)
    return optimizer_state, model, model_state


def prepare_for_eval(
    workload: Any,
    current_param_container: nn.Module,
    current_params_types: Any,
    model_state: Any,
    hyperparameters: Any,
    loss_type: Any,
    optimizer_state: OptimizerState,
    eval_results: list[tuple[int, Any]],
    global_step: int,
    rng: Any,
) -> UpdateReturn:
    """Put the weights to evaluate into the model; the next step puts the training weights back.

    The optimizer keeps the training weights, bit for bit, and saves them with its state: a run that
    is resumed from a checkpoint taken during evaluation goes on from them.
    """
    del current_params_types, loss_type, eval_results, global_step
    optimizer = optimizer_state["optimizer"]
    optimizer.eval()
    if checkpoints_are_saved():
        # Rank 0 saves after this evaluation, alone: it needs the other ranks' state, too.
        optimizer.gather_state()
    batches = optimizer_state["recent_batches"].kept()
    dropout_rate = Hyperparameters.from_namespace(hyperparameters).dropout_rate
    model_state = refresh(
        workload, current_param_container, model_state, batches, rng, dropout_rate
    )
    return optimizer_state, current_param_container, model_state


def data_selection(
    workload: Any,
    input_queue: Iterator[dict[str, Any]],
    optimizer_state: OptimizerState,
    current_param_container: nn.Module,
    model_state: Any,
    hyperparameters: Any,
    global_step: int,
    rng: Any,
) -> dict[str, Any]:
    """Take the next batch of the queue."""
    del workload, optimizer_state, current_param_container, model_state, hyperparameters
    del global_step, rng
    return next(input_queue)


def _pace(workload: Any, setting: Hyperparameters, self_tuning: bool) -> Pace:
    return pace(setting, workload.step_hint, SELF_TUNING_BUDGET if self_tuning else 1.0)
