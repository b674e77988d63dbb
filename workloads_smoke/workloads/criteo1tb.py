"""The criteo1tb workload: a small deep recommendation model on generated clicks."""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn
from torch.nn import functional

from workloads_smoke import spec
from workloads_smoke.data.clicks import NUM_DENSE, NUM_SPARSE, VOCABULARY_SIZE, gather_clicks
from workloads_smoke.data.queue import Batch, Gather
from workloads_smoke.workloads.base import SmokeWorkload, WorkloadFacts
from workloads_smoke.workloads.losses import masked_loss

NUM_CHUNKS = 4


class RecommendationModel(nn.Module):
    """DLRM (Naumov et al. 2019) with one embedding table in four chunks, as officially."""

    def __init__(
        self,
        vocabulary_size: int = VOCABULARY_SIZE,
        width: int = 8,
        bottom: tuple[int, ...] = (64, 32),
        top: tuple[int, ...] = (64, 32),
    ) -> None:
        super().__init__()
        self.vocabulary_size = vocabulary_size
        # Parameters without 'weight' in their names: of type WEIGHT, not EMBEDDING, as officially.
        for number in range(NUM_CHUNKS):
            chunk = torch.rand(vocabulary_size // NUM_CHUNKS, width) / math.sqrt(vocabulary_size)
            self.register_parameter(f"embedding_chunk_{number}", nn.Parameter(chunk))
        self.bot_mlp = perceptron((NUM_DENSE, *bottom, width), last_relu=True)
        self.bot_mlp.apply(_initialise_bottom)
        features = NUM_SPARSE + 1
        self.register_buffer(
            "pairs", torch.triu_indices(features, features, offset=0), persistent=False
        )
        self.top_mlp = perceptron((width + self.pairs.shape[1], *top, 1), last_relu=False)
        self.top_mlp.apply(_initialise_top)

    pairs: Tensor

    def forward(self, inputs: Tensor, dropout_rate: float) -> Tensor:
        """Return logits of a click, shape (batch, 1), of inputs of shape (batch, 39)."""
        dense = self.bot_mlp(inputs[:, :NUM_DENSE])
        ids = inputs[:, NUM_DENSE:].long() % self.vocabulary_size
        chunks = [getattr(self, f"embedding_chunk_{number}") for number in range(NUM_CHUNKS)]
        embedded = torch.cat([dense[:, None], functional.embedding(ids, torch.cat(chunks))], dim=1)
        products = torch.bmm(embedded, embedded.transpose(1, 2))
        hidden = torch.cat([dense, products[:, self.pairs[0], self.pairs[1]]], dim=1)
        hidden = self.top_mlp[:-1](hidden)
        dropout = dropout_rate if self.training else 0.0
        logits: Tensor = self.top_mlp[-1](functional.dropout(hidden, dropout))
        return logits


def perceptron(widths: tuple[int, ...], last_relu: bool) -> nn.Sequential:
    """Return dense layers with ReLU between them, and after the last one if wanted."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.ReLU()]
    return nn.Sequential(*layers[: None if last_relu else -1])


def _initialise_bottom(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.normal_(module.bias, std=math.sqrt(1 / module.out_features))


def _initialise_top(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.normal_(module.bias, std=math.sqrt(1 / module.out_features))


class Criteo1TbWorkload(SmokeWorkload):
    """A million records, 45 056 rows of embeddings; the metric is the loss itself."""

    name = "criteo1tb"
    facts = WorkloadFacts(
        target_metric="loss",
        larger_is_better=False,
        loss_type=spec.LossType.SIGMOID_CROSS_ENTROPY,
        num_train_examples=1_000_000,
        num_eval_train_examples=8_000,
        num_validation_examples=8_000,
        num_test_examples=8_000,
        eval_batch_size=4_000,
        step_hint=600,
        max_allowed_runtime_sec=300,
        eval_period_time_sec=2,
    )
    smoke_batch_size = 1_024
    output_parameters = ("top_mlp.4.weight", "top_mlp.4.bias")

    def _build_model(self) -> nn.Module:
        return RecommendationModel()

    def _split_data(self, split: str) -> tuple[Gather, int]:
        return gather_clicks(split)

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Tensor:
        logits: Tensor = model(batch["inputs"], dropout_rate)
        return logits

    def loss_fn(
        self,
        label_batch: spec.Tensor,
        logits_batch: spec.Tensor,
        mask_batch: spec.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, spec.Tensor]:
        """Sigmoid cross-entropy per record; label smoothing is ignored, as officially."""
        losses = functional.binary_cross_entropy_with_logits(
            logits_batch.reshape(-1), label_batch.reshape(-1), reduction="none"
        )
        return masked_loss(losses, mask_batch)

    def _batch_metrics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        logits = self._evaluate_logits(model, batch)
        loss = self.loss_fn(batch["targets"], logits, batch["weights"])
        return {"loss": float(loss["summed"]), "count": float(loss["n_valid_examples"])}

    def _final_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {"loss": sums["loss"] / sums["count"]}
