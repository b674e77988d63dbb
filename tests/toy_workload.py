"""A workload that a test can hold in its hand: conv, batch norm, embedding, attention, 4 classes."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from submission import submission
from submission.hyperparameters import SELF_TUNING
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


class Run:
    """One run on the toy workload, driven like the harness drives it."""

    def __init__(
        self,
        hyperparameters: Any = None,
        step_hint: int = 20,
        workload: ToyWorkload | None = None,
    ) -> None:
        self.workload = ToyWorkload(step_hint) if workload is None else workload
        self.hyperparameters = hyperparameters
        self.model: nn.Module
        self.model, self.model_state = self.workload.init_model_fn()
        self.queue = self.workload.batches()
        self.state = submission.init_optimizer_state(
            self.workload, self.model, self.model_state, hyperparameters, rng=None
        )
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            batch = submission.data_selection(
                self.workload,
                self.queue,
                self.state,
                self.model,
                self.model_state,
                self.hyperparameters,
                self.step,
                None,
            )
            torch.manual_seed(self.step)  # dropout
            self.state, self.model, self.model_state = submission.update_params(
                workload=self.workload,
                current_param_container=self.model,
                current_params_types=self.workload.model_params_types,
                model_state=self.model_state,
                hyperparameters=self.hyperparameters,
                batch=batch,
                loss_type=self.workload.loss_type,
                optimizer_state=self.state,
                eval_results=[],
                global_step=self.step,
                rng=None,
                train_state={"is_time_remaining": True},
            )
            self.step += 1

    def prepare_for_eval(self) -> None:
        self.state, self.model, self.model_state = submission.prepare_for_eval(
            workload=self.workload,
            current_param_container=self.model,
            current_params_types=self.workload.model_params_types,
            model_state=self.model_state,
            hyperparameters=self.hyperparameters,
            loss_type=self.workload.loss_type,
            optimizer_state=self.state,
            eval_results=[],
            global_step=self.step,
            rng=None,
        )

    def checkpoint(self) -> dict[str, Any]:
        """Save as the harness does: every value through state_dict."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "state": {key: value.state_dict() for key, value in self.state.items()},
                "step": self.step,
            }
        )

    def resume(self, saved: dict[str, Any]) -> None:
        """Restore as the harness does: the model, then every key of a fresh optimizer state."""
        self.model.load_state_dict(saved["model"])
        for key, value in self.state.items():
            value.load_state_dict(saved["state"][key])
        self.step = saved["step"]
        for _ in range(self.step):
            next(self.queue)

    def weights(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self.model.parameters()]


def namespace(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(SELF_TUNING), **changes})


def assert_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for ours, theirs in zip(left, right, strict=True):
        assert torch.equal(ours, theirs)
