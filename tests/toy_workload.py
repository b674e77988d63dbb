"""A workload that a test can hold in its hand: conv, batch norm, embedding, attention, 4 classes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from workloads_smoke import spec

NUM_CLASSES = 4


class ToyModel(nn.Module):
    """Images (N, 1, 8, 8) -> 16 tokens of 8 channels -> attention -> logits."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, stride=2, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.position_embedding = nn.Embedding(16, 8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, NUM_CLASSES)

    def forward(self, images: Tensor, dropout_rate: float) -> Tensor:
        tokens = self.bn(self.conv(images)).flatten(2).mT  # (N, 16, 8)
        tokens = tokens + self.position_embedding(torch.arange(16))
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        tokens = functional.dropout(self.norm(tokens), dropout_rate, self.training)
        logits: Tensor = self.head(tokens.mean(dim=1))
        return logits


class RecordingLogger:
    """Keeps what it is told."""

    def __init__(self) -> None:
        self.entries: list[tuple[int, dict[str, float]]] = []

    def append_scalar_metrics(self, metrics: dict[str, float], global_step: int) -> None:
        self.entries.append((global_step, metrics))


class ToyWorkload:
    """The part of the benchmark's workload interface that a submission touches."""

    loss_type = spec.LossType.SOFTMAX_CROSS_ENTROPY

    def __init__(self, step_hint: int = 20) -> None:
        self.step_hint = step_hint
        self.metrics_logger: RecordingLogger | None = RecordingLogger()
        self.model_params_types: dict[str, spec.ParameterType] = {}
        self.calls: list[dict[str, Any]] = []

    def init_model_fn(self, seed: int = 0) -> tuple[nn.Module, None]:
        torch.manual_seed(seed)
        model = ToyModel()
        self.model_params_types = {
            name: spec.ParameterType.EMBEDDING if "embedding" in name else spec.ParameterType.WEIGHT
            for name, _ in model.named_parameters()
        }
        return model, None

    def model_fn(
        self,
        params: nn.Module,
        augmented_and_preprocessed_input_batch: dict[str, Tensor],
        model_state: Any,
        mode: spec.ForwardPassMode,
        rng: Any,
        update_batch_norm: bool,
        dropout_rate: float = 0.25,
    ) -> tuple[Tensor, Any]:
        self.calls.append({"mode": mode, "dropout_rate": dropout_rate})
        if mode == spec.ForwardPassMode.EVAL:
            params.eval()
        contexts = {
            spec.ForwardPassMode.EVAL: torch.no_grad,
            spec.ForwardPassMode.TRAIN: contextlib.nullcontext,
        }
        with contexts[mode]():
            logits = params(augmented_and_preprocessed_input_batch["inputs"], dropout_rate)
        return logits, model_state

    def loss_fn(
        self,
        label_batch: Tensor,
        logits_batch: Tensor,
        mask_batch: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:
        self.calls.append({"label_smoothing": label_smoothing})
        losses = functional.cross_entropy(
            logits_batch, label_batch, reduction="none", label_smoothing=label_smoothing
        )
        mask = torch.ones_like(losses) if mask_batch is None else mask_batch
        losses = losses * mask
        return {"summed": losses.sum(), "n_valid_examples": mask.sum(), "per_example": losses}

    def batches(self, size: int = 16, seed: int = 1) -> Iterator[dict[str, Tensor]]:
        """Yield batches whose last two examples are padding."""
        generator = torch.Generator().manual_seed(seed)
        weights = torch.ones(size)
        weights[-2:] = 0.0
        while True:
            images = torch.randn(size, 1, 8, 8, generator=generator)
            targets = images.mean(dim=(1, 2, 3)).mul(8).add(2).long().clamp(0, NUM_CLASSES - 1)
            yield {"inputs": images, "targets": targets, "weights": weights}
