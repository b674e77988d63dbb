"""The finewebedu_lm workload: a decoder-only transformer on Python's documentation."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from workloads_smoke import spec
from workloads_smoke.data.language import SEQUENCE_LENGTH, VOCABULARY_SIZE, load_language
from workloads_smoke.data.queue import Batch, Gather, gather_rows
from workloads_smoke.workloads.base import SmokeWorkload, WorkloadFacts
from workloads_smoke.workloads.losses import softmax_cross_entropy

_INIT_STD = 0.02


class CausalAttention(nn.Module):
    """Attention with rotary positions, normalised queries and keys and a learned scale."""

    def __init__(self, width: int, num_heads: int, max_length: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.w_qkv = nn.Linear(width, 3 * width, bias=False)
        self.w_out = nn.Linear(width, width, bias=False)
        # A scalar: of all official parameters the only ones without a dimension.
        self.attn_scale = nn.Parameter(torch.tensor(math.log2(max_length**2 - max_length)))

    def forward(self, inputs: Tensor, rotation: Tensor) -> Tensor:
        """Return the attended sequence; `rotation` is that of `rotary_angles`."""
        queries, keys, values = (
            part.reshape(*part.shape[:2], self.num_heads, -1).transpose(1, 2)
            for part in self.w_qkv(inputs).chunk(3, dim=-1)
        )
        queries = functional.normalize(rotate(queries, rotation), dim=-1) * self.attn_scale
        keys = functional.normalize(rotate(keys, rotation), dim=-1)
        mixed = functional.scaled_dot_product_attention(
            queries, keys, values, is_causal=True, scale=1.0
        )
        outputs: Tensor = self.w_out(mixed.transpose(1, 2).flatten(start_dim=2))
        return outputs


class GatedPerceptron(nn.Module):
    """Feed-forward block with a gated linear unit."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, width, bias=False)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return the block's output."""
        outputs: Tensor = self.fc2(functional.glu(self.fc1(inputs), dim=-1))
        return outputs


class Block(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, num_heads: int, hidden: int, max_length: int) -> None:
        super().__init__()
        self.attn = CausalAttention(width, num_heads, max_length)
        self.attn_norm = nn.RMSNorm(width, eps=1e-6)
        self.mlp = GatedPerceptron(width, hidden)
        self.mlp_norm = nn.RMSNorm(width, eps=1e-6)

    def forward(self, inputs: Tensor, rotation: Tensor) -> Tensor:
        """Return the sequence after both residual blocks."""
        inputs = inputs + self.attn(self.attn_norm(inputs), rotation)
        outputs: Tensor = inputs + self.mlp(self.mlp_norm(inputs))
        return outputs


class LanguageModel(nn.Module):
    """Transformer whose output layer is its embedding."""

    rotation: Tensor

    def __init__(
        self,
        vocabulary_size: int = VOCABULARY_SIZE,
        max_length: int = SEQUENCE_LENGTH,
        width: int = 64,
        num_heads: int = 4,
        hidden: int = 128,
        num_layers: int = 3,
    ) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(vocabulary_size, width)
        self.layers = nn.ModuleList(
            Block(width, num_heads, hidden, max_length) for _ in range(num_layers)
        )
        self.out_norm = nn.RMSNorm(width, eps=1e-6)
        self.lm_head = nn.Linear(width, vocabulary_size, bias=False)
        rotation = rotary_angles(max_length, width // num_heads)
        self.register_buffer("rotation", rotation, persistent=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                residual = name.endswith(("fc2.weight", "w_out.weight"))
                depth = math.sqrt(2 * num_layers) if residual else 1.0
                nn.init.normal_(parameter, std=_INIT_STD / depth)
        self.lm_head.weight = self.embed_tokens.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits of the next token, shape (batch, length, vocabulary)."""
        outputs = self.embed_tokens(tokens)
        rotation = self.rotation[: tokens.shape[1]]
        for layer in self.layers:
            outputs = layer(outputs, rotation)
        logits: Tensor = self.lm_head(self.out_norm(outputs))
        return logits


def rotary_angles(length: int, width: int) -> Tensor:
    """Return cosines and sines of rotary positions (Su et al. 2021), (length, width / 2, 2)."""
    rates = 10_000.0 ** (-torch.arange(0, width, 2) / width)
    angles = torch.arange(length)[:, None] * rates
    return torch.stack([angles.cos(), angles.sin()], dim=-1)


def rotate(heads: Tensor, rotation: Tensor) -> Tensor:
    """Rotate neighbouring pairs of features, shape (batch, heads, length, width), by position."""
    even, odd = heads[..., 0::2], heads[..., 1::2]
    cos, sin = rotation[..., 0], rotation[..., 1]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], dim=-1).flatten(-2)


class LmWorkload(SmokeWorkload):
    """5632 sequences of 64 subwords; perplexity per subword. No dropout, as officially."""

    name = "finewebedu_lm"
    facts = WorkloadFacts(
        target_metric="ppl",
        larger_is_better=False,
        loss_type=spec.LossType.SOFTMAX_CROSS_ENTROPY,
        num_train_examples=5_632,
        num_eval_train_examples=256,
        num_validation_examples=256,
        num_test_examples=256,
        eval_batch_size=64,
        step_hint=600,
        max_allowed_runtime_sec=300,
        eval_period_time_sec=2,
    )
    made_of_python_text = True
    smoke_batch_size = 16
    # The tied embedding is the output layer.
    output_parameters = ("embed_tokens.weight",)

    def _build_model(self) -> nn.Module:
        return LanguageModel()

    def _split_data(self, split: str) -> tuple[Gather, int]:
        sequences = load_language()["train" if split == "eval_train" else split]
        if split == "eval_train":
            # Spread over the stream, which goes through whole documents in order.
            stride = len(sequences) // self.facts.num_eval_train_examples
            sequences = sequences[::stride][: self.facts.num_eval_train_examples]
        inputs, targets = sequences[:, :-1], sequences[:, 1:]
        arrays = {"inputs": inputs, "targets": targets, "weights": torch.ones(targets.shape)}
        return gather_rows(arrays), len(sequences)

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Tensor:
        logits: Tensor = model(batch["inputs"])
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
        logits = self._evaluate_logits(model, batch)
        loss = self.loss_fn(batch["targets"], logits, batch["weights"])
        return {"loss": float(loss["summed"]), "tokens": float(loss["n_valid_examples"])}

    def _final_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        loss = sums["loss"] / sums["tokens"]
        # Of a run that diverged, infinite; `math.exp` would raise instead.
        ppl = torch.tensor(loss, dtype=torch.float64).exp().item()
        return {"loss": loss, "ppl": ppl}
