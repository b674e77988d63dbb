"""Image classification: what mnist and both ImageNet workloads share."""

import torch
from torch import nn

from workloads_smoke import spec
from workloads_smoke.data.queue import Batch
from workloads_smoke.workloads.base import SmokeWorkload
from workloads_smoke.workloads.losses import softmax_cross_entropy


class ClassificationWorkload(SmokeWorkload):
    """Softmax cross-entropy on (batch, classes) logits, measured by accuracy."""

    def loss_fn(
        self,
        label_batch: spec.Tensor,
        logits_batch: spec.Tensor,
        mask_batch: spec.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, spec.Tensor]:
        """Cross-entropy of integer or soft labels; see `Workload.loss_fn`."""
        return softmax_cross_entropy(label_batch, logits_batch, mask_batch, label_smoothing)

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> torch.Tensor:
        logits: torch.Tensor = model(batch["inputs"])
        return logits

    def _batch_metrics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        logits = self._evaluate_logits(model, batch)
        labels, weights = batch["targets"], batch["weights"]
        correct = (logits.argmax(dim=-1) == labels) * weights
        loss = self.loss_fn(labels, logits, weights)
        return {
            "accuracy": float(correct.sum()),
            "loss": float(loss["summed"]),
            "count": float(loss["n_valid_examples"]),
        }

    def _final_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {name: sums[name] / sums["count"] for name in ("accuracy", "loss")}
