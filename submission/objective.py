"""The training loss, normalised over all ranks."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


def world_size() -> int:
    """Return the number of processes that train together."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def training_mode(workload: Any) -> Any:
    """Return `ForwardPassMode.TRAIN` of the vocabulary that `workload` speaks.

    The workload's own loss type tells which module that is. Asking it, instead of importing
    `algoperf.spec`, lets the submission train on workloads of a harness that is not installed under
    that name.
    """
    vocabulary = sys.modules[type(workload.loss_type).__module__]
    return vocabulary.ForwardPassMode.TRAIN


def logits_of(
    workload: Any,
    model: nn.Module,
    model_state: Any,
    batch: Mapping[str, Any],
    rng: Any,
    dropout_rate: float | None,
) -> tuple[Any, Any]:
    """Run the model forward for training; return its output and the new model state.

    Args:
        workload: The workload.
        model: The model.
        model_state: The workload's auxiliary state, e.g. batch statistics.
        batch: Inputs, targets and possibly weights.
        rng: Random state for the model.
        dropout_rate: Rate handed to the model; None keeps the model's own.
    """
    dropout = {} if dropout_rate is None else {"dropout_rate": dropout_rate}
    output: tuple[Any, Any] = workload.model_fn(
        params=model,
        augmented_and_preprocessed_input_batch=batch,
        model_state=model_state,
        mode=training_mode(workload),
        rng=rng,
        update_batch_norm=True,
        **dropout,
    )
    return output


def mean_loss(
    workload: Any, batch: Mapping[str, Any], logits: Any, label_smoothing: float
) -> Tensor:
    """Return a loss whose gradient, averaged over ranks as DDP does, is that of the global mean.

    Ranks hold different numbers of valid examples, so the mean of their means would be wrong.
    With W ranks, local sum s and global count n the returned value is W s / n: the average over
    ranks of its gradient is grad(sum of s) / n. Only the count travels, and nothing in the
    backward pass.
    """
    losses = workload.loss_fn(
        label_batch=batch["targets"],
        logits_batch=logits,
        mask_batch=batch.get("weights"),
        label_smoothing=label_smoothing,
    )
    summed: Tensor = losses["summed"]
    ranks = world_size()
    if ranks == 1:
        return summed / losses["n_valid_examples"]
    count = torch.as_tensor(losses["n_valid_examples"], device=summed.device).detach().clone()
    dist.all_reduce(count)
    return summed * ranks / count


def make_dense(model: nn.Module) -> None:
    """Turn sparse gradients, as embedding layers can make them, into dense ones."""
    for weight in model.parameters():
        if weight.grad is not None and weight.grad.is_sparse:
            weight.grad = weight.grad.to_dense()


def averaged_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a detached tensor over all ranks."""
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / world_size()
