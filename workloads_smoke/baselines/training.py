"""What the baselines share: batch sizes, the loss of a batch, and the published schedule.

Their settings are read as published, so that a point here means what it meant on the leaderboard,
with one addition in their favour: see `short_run_factor`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

#: Steps of the shortest runs that published learning rates were found on.
LONG_RUN = 10_000
#: Global batch sizes of the published baselines; mnist at the batch its step hint was made for.
BATCH_SIZES = {
    "cifar": 128,
    "criteo1tb": 262_144,
    "fastmri": 32,
    "finewebedu_lm": 64,
    "imagenet_resnet": 1024,
    "imagenet_vit": 1024,
    "librispeech_conformer": 256,
    "librispeech_deepspeech": 256,
    "mnist": 64,
    "ogbg": 512,
    "wmt": 128,
}


def batch_size(workload_name: str) -> int:
    """Return the global batch size for a workload; ValueError if it is unknown."""
    if workload_name not in BATCH_SIZES:
        raise ValueError(f"no batch size for workload {workload_name!r}")
    return BATCH_SIZES[workload_name]


def forward(
    workload: Any,
    model: nn.Module,
    model_state: Any,
    batch: Mapping[str, Any],
    rng: Any,
    *,
    dropout_rate: float | None = None,
    update_batch_norm: bool = True,
) -> tuple[Any, Any]:
    """Run the model forward for training; return its output and the new model state.

    Args:
        workload: The workload.
        model: The model.
        model_state: Auxiliary state, e.g. batch statistics.
        batch: Inputs, targets and possibly weights.
        rng: Random state for the model.
        dropout_rate: Rate handed to the model; None keeps the model's own.
        update_batch_norm: Whether the pass moves the running batch statistics.
    """
    vocabulary = sys.modules[type(workload.loss_type).__module__]
    output: tuple[Any, Any] = workload.model_fn(
        params=model,
        augmented_and_preprocessed_input_batch=batch,
        model_state=model_state,
        mode=vocabulary.ForwardPassMode.TRAIN,
        rng=rng,
        update_batch_norm=update_batch_norm,
        **({} if dropout_rate is None else {"dropout_rate": dropout_rate}),
    )
    return output


def mean_loss(
    workload: Any, batch: Mapping[str, Any], logits: Any, label_smoothing: float
) -> Tensor:
    """Return W * local sum / global count for W ranks; DDP's mean makes it the global mean."""
    losses = workload.loss_fn(
        label_batch=batch["targets"],
        logits_batch=logits,
        mask_batch=batch.get("weights"),
        label_smoothing=label_smoothing,
    )
    summed: Tensor = losses["summed"]
    if not (dist.is_available() and dist.is_initialized()):
        return summed / losses["n_valid_examples"]
    count = torch.as_tensor(losses["n_valid_examples"], device=summed.device).detach().clone()
    dist.all_reduce(count)
    return summed * dist.get_world_size() / count


def short_run_factor(step_hint: int) -> float:
    """Return what published learning rates are multiplied by in a run of `step_hint` steps.

    They were found on runs of ten thousand steps and more, where this is 1. On the few hundred steps
    of a smoke workload they would lose by their shortness alone. Our submission has a rule of the same
    form for the length of its own schedule.
    """
    return math.sqrt(max(1.0, LONG_RUN / step_hint))


def warmup_then_cosine(step: int, total_steps: int, warmup_factor: float) -> float:
    """Return the published learning-rate factor of a step that counts from 0.

    It climbs linearly from 0 for `warmup_factor` of the steps, then falls to 0 along a cosine. Past
    the end it stays at 0.
    """
    warmup = int(warmup_factor * total_steps)
    if step < warmup:
        return step / warmup
    progress = min((step - warmup) / max(total_steps - warmup, 1), 1.0)
    return 0.5 * (1.0 + math.cos(math.pi * progress))


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
