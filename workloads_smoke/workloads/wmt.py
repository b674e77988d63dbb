"""The wmt workload: an encoder-decoder transformer that restores the vowels of English prose."""

from typing import Any

from torch import Tensor, nn

from workloads_smoke import spec
from workloads_smoke.data.queue import Batch, Gather, gather_rows
from workloads_smoke.data.translation import MAX_TOKENS, VOCABULARY_SIZE, load_translation
from workloads_smoke.workloads.base import SmokeWorkload, WorkloadFacts, unwrap
from workloads_smoke.workloads.losses import softmax_cross_entropy
from workloads_smoke.workloads.metrics.bleu import bleu_score, bleu_statistics
from workloads_smoke.workloads.wmt_model import Transformer


class WmtWorkload(SmokeWorkload):
    """3000 sentence pairs of at most 15 words; BLEU of greedy translations."""

    name = "wmt"
    facts = WorkloadFacts(
        target_metric="bleu",
        larger_is_better=True,
        loss_type=spec.LossType.SOFTMAX_CROSS_ENTROPY,
        num_train_examples=3_000,
        num_eval_train_examples=160,
        num_validation_examples=320,
        num_test_examples=320,
        eval_batch_size=160,
        step_hint=800,
        max_allowed_runtime_sec=400,
        eval_period_time_sec=3,
        default_dropout_rate=0.1,
    )
    made_of_python_text = True
    smoke_batch_size = 32
    sets_training_mode = False
    output_parameters = ("shared_embedding.weight",)

    def _build_model(self) -> nn.Module:
        return Transformer(VOCABULARY_SIZE, MAX_TOKENS)

    def _split_data(self, split: str) -> tuple[Gather, int]:
        data = load_translation()
        part = "train" if split == "eval_train" else split
        sources, targets = data.sources[part], data.targets[part]
        if split == "eval_train":
            sources, targets = (
                tokens[: self.facts.num_eval_train_examples] for tokens in (sources, targets)
            )
        arrays = {"inputs": sources, "targets": targets, "weights": (targets > 0).long()}
        return gather_rows(arrays), len(targets)

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Tensor:
        logits: Tensor = model(batch["inputs"], batch["targets"], dropout_rate)
        return logits

    def loss_fn(
        self,
        label_batch: spec.Tensor,
        logits_batch: spec.Tensor,
        mask_batch: spec.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, spec.Tensor]:
        """Cross-entropy per token; see `Workload.loss_fn`. Valid examples are tokens."""
        return softmax_cross_entropy(label_batch, logits_batch, mask_batch, label_smoothing)

    def _batch_metrics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        targets, weights = batch["targets"], batch["weights"]
        logits = self._evaluate_logits(model, batch)
        loss = self.loss_fn(targets, logits, weights)
        sums = {
            "loss": float(loss["summed"]),
            "accuracy": float(((logits.argmax(dim=-1) == targets) * weights).sum()),
            "tokens": float(loss["n_valid_examples"]),
        }
        return sums | self._translation_statistics(unwrap(model), batch)

    def _translation_statistics(self, model: Any, batch: Batch) -> dict[str, float]:
        present = batch["weights"].any(dim=1)
        totals = [0] * 10
        if bool(present.any()):
            decode = load_translation().decode
            translated = model.translate(batch["inputs"][present], MAX_TOKENS).tolist()
            for tokens, expected in zip(
                translated, batch["targets"][present].tolist(), strict=True
            ):
                statistics = bleu_statistics(decode(tokens), decode(expected))
                totals = [t + s for t, s in zip(totals, statistics, strict=True)]
        return {f"bleu_{number}": float(total) for number, total in enumerate(totals)}

    def _final_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {
            "loss": sums["loss"] / sums["tokens"],
            "accuracy": sums["accuracy"] / sums["tokens"],
            "bleu": bleu_score([sums[f"bleu_{number}"] for number in range(10)]),
        }
