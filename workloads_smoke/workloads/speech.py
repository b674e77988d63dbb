"""What both speech workloads share: data, CTC loss, greedy decoding, word error rate."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from workloads_smoke import spec
from workloads_smoke.data.queue import Batch, Gather, gather_rows, map_tensors
from workloads_smoke.data.speech import BLANK_ID, load_speech, text_of
from workloads_smoke.workloads.base import SmokeWorkload
from workloads_smoke.workloads.metrics.word_errors import word_errors

SpeechTensors = tuple[Tensor, Tensor]


class SpeechWorkload(SmokeWorkload):
    """Inputs, targets and logits are pairs of a tensor and its paddings, 1 beyond the end.

    The official models begin with a fixed mel filter bank; here inputs are spectra already.
    """

    averages_statistics = True

    def _split_data(self, split: str) -> tuple[Gather, int]:
        data = load_speech("train" if split == "eval_train" else split)
        arrays = {
            "inputs": (data.features, data.feature_paddings),
            "targets": (data.tokens, data.token_paddings),
        }
        count = len(data.features)
        if split == "eval_train":
            count = self.facts.num_eval_train_examples
            arrays = {
                name: map_tensors(lambda rows: rows[:count], pair) for name, pair in arrays.items()
            }
        return gather_rows(arrays), count

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> SpeechTensors:
        features, paddings = batch["inputs"]
        logits: SpeechTensors = model(features, paddings, dropout_rate)
        return logits

    def loss_fn(
        self,
        label_batch: tuple[spec.Tensor, spec.Tensor],
        logits_batch: tuple[spec.Tensor, spec.Tensor],
        mask_batch: spec.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, spec.Tensor]:
        """CTC loss per utterance (Graves et al. 2006); label smoothing is ignored, as officially.

        Valid examples are, as officially, utterances where there is a mask and tokens where there
        is none, at least 1. Training batches have no mask, so the mean loss is one per token.
        """
        tokens, token_paddings = label_batch
        logits, logit_paddings = logits_batch
        token_counts = (1 - token_paddings).sum(dim=1).long()
        losses = functional.ctc_loss(
            logits.log_softmax(dim=-1).transpose(0, 1),
            tokens,
            (1 - logit_paddings).sum(dim=1).long(),
            token_counts,
            blank=BLANK_ID,
            reduction="none",
        )
        if mask_batch is None:
            valid = token_counts.sum()
        else:
            losses = torch.where(mask_batch != 0, losses * mask_batch, 0.0)
            valid = torch.logical_and(mask_batch, token_counts).sum()
        return {
            "summed": losses.sum(),
            "n_valid_examples": valid.to(losses).clamp(min=1),
            "per_example": losses,
        }

    def _batch_metrics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        logits, paddings = self._evaluate_logits(model, batch)
        present = batch["weights"].bool()
        targets = tuple(tensor[present] for tensor in batch["targets"])
        logits, paddings = logits[present], paddings[present]
        sums = {"loss": 0.0, "tokens": 0.0, "word_errors": 0.0, "words": 0.0}
        if not bool(present.any()):
            return sums
        loss = self.loss_fn(targets, (logits, paddings))
        sums["loss"] = float(loss["summed"])
        sums["tokens"] = float(loss["n_valid_examples"])
        references = (row.tolist() for row in targets[0])
        for transcript, reference in zip(greedy_decode(logits, paddings), references, strict=True):
            errors, words = word_errors(text_of(transcript), text_of(reference))
            sums["word_errors"] += errors
            sums["words"] += words
        return sums

    def _final_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {
            "ctc_loss": sums["loss"] / sums["tokens"],
            "wer": sums["word_errors"] / sums["words"],
        }


def greedy_decode(logits: Tensor, paddings: Tensor) -> list[list[int]]:
    """Return the tokens of each utterance: best per frame, repeats merged, blanks left out."""
    best = torch.where(paddings > 0, BLANK_ID, logits.argmax(dim=-1))
    changed = functional.pad(best[:, 1:] != best[:, :-1], (1, 0), value=True)
    kept = changed & (best != BLANK_ID)
    return [row[keep].tolist() for row, keep in zip(best, kept, strict=True)]
