"""The librispeech_conformer workload: a conformer with CTC on generated speech."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from workloads_smoke import spec
from workloads_smoke.data.speech import NUM_BINS, NUM_TOKENS
from workloads_smoke.workloads.base import WorkloadFacts
from workloads_smoke.workloads.layers import MaskedBatchNorm, ScaleLayerNorm
from workloads_smoke.workloads.speech import SpeechWorkload
from workloads_smoke.workloads.speech_layers import Conv2dSubsampling, mask_spectrum


class Subsample(nn.Module):
    """Two convolutions, a dense layer and positions: a quarter of the frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = Conv2dSubsampling(1, width)
        self.conv2 = Conv2dSubsampling(width, width)
        self.linear = nn.Linear(width * NUM_BINS // 4, width)

    def forward(self, features: Tensor, paddings: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """Return frames of shape (batch, time / 4, width) and their paddings."""
        outputs, paddings = self.conv1(features[:, None], paddings)
        outputs, paddings = self.conv2(outputs, paddings)
        frames = self.linear(outputs.permute(0, 2, 3, 1).flatten(start_dim=2))
        frames = frames + positions(frames.shape[1], frames.shape[2]).to(frames)
        return functional.dropout(frames, dropout), paddings


def positions(length: int, width: int) -> Tensor:
    """Return sine and cosine positions, shape (length, width)."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10_000.0) / (width // 2 - 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class FeedForward(nn.Module):
    """Layer norm, two dense layers, swish between them."""

    def __init__(self, width: int, expansion: int = 4) -> None:
        super().__init__()
        self.ln = ScaleLayerNorm(width)
        self.linear1 = nn.Linear(width, expansion * width)
        self.linear2 = nn.Linear(expansion * width, width)

    def forward(self, inputs: Tensor, present: Tensor, dropout: float) -> Tensor:
        """Return the block's output, zero where padded."""
        hidden = functional.silu(self.linear1(self.ln(inputs)))
        return functional.dropout(self.linear2(hidden) * present, dropout)


class QueryScaler(nn.Module):
    """Learned positive scale of each feature of the queries, 1 at the start."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))

    def forward(self, queries: Tensor) -> Tensor:
        """Return scaled queries."""
        return queries * functional.softplus(self.scale) / math.log(2.0)


class ScaledAttention(nn.Module):
    """Self-attention with a query scale."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(width, 3 * width)
        self.out_proj = nn.Linear(width, width)
        self.qs = QueryScaler(width // num_heads)

    def forward(self, inputs: Tensor, paddings: Tensor) -> Tensor:
        """Return the attended frames."""
        queries, keys, values = (
            part.reshape(*part.shape[:2], self.num_heads, -1).transpose(1, 2)
            for part in self.in_proj(inputs).chunk(3, dim=-1)
        )
        # A large finite number: an utterance that is all padding has no NaN.
        mask = paddings[:, None, None] * -1e9
        mixed = functional.scaled_dot_product_attention(
            self.qs(queries), keys, values, attn_mask=mask
        )
        outputs: Tensor = self.out_proj(mixed.transpose(1, 2).flatten(start_dim=2))
        return outputs


class AttentionBlock(nn.Module):
    """Layer norm and attention."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ln = ScaleLayerNorm(width)
        self.self_attention = ScaledAttention(width, num_heads)

    def forward(self, inputs: Tensor, paddings: Tensor, dropout: float) -> Tensor:
        """Return the block's output."""
        return functional.dropout(self.self_attention(self.ln(inputs), paddings), dropout)


class ConvolutionBlock(nn.Module):
    """Gated dense layers, depthwise convolution over time, batch norm, dense layer."""

    def __init__(self, width: int, kernel_size: int = 5) -> None:
        super().__init__()
        self.ln = ScaleLayerNorm(width)
        self.lin1 = nn.Linear(width, width)
        self.lin2 = nn.Linear(width, width)
        self.conv1 = nn.Conv1d(width, width, kernel_size, padding="same", bias=False, groups=width)
        self.bn = MaskedBatchNorm(width)
        self.lin3 = nn.Linear(width, width)

    def forward(self, inputs: Tensor, paddings: Tensor, dropout: float) -> Tensor:
        """Return the block's output."""
        inputs = self.ln(inputs)
        gated = self.lin1(inputs) * torch.sigmoid(self.lin2(inputs)) * (1 - paddings[:, :, None])
        mixed = self.conv1(gated.transpose(1, 2)).transpose(1, 2)
        outputs = self.lin3(functional.silu(self.bn(mixed, paddings)))
        return functional.dropout(outputs, dropout)


class ConformerBlock(nn.Module):
    """Half feed-forward, attention, convolution, half feed-forward, layer norm."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.ff1 = FeedForward(width)
        self.mhsa = AttentionBlock(width, num_heads)
        self.conv = ConvolutionBlock(width)
        self.ff2 = FeedForward(width)
        self.ln = ScaleLayerNorm(width)

    def forward(self, frames: Tensor, paddings: Tensor, dropout: float) -> Tensor:
        """Return the frames after all residual blocks."""
        present = 1 - paddings[:, :, None]
        frames = frames + 0.5 * self.ff1(frames, present, dropout)
        frames = frames + self.mhsa(frames, paddings, dropout)
        frames = frames + self.conv(frames, paddings, dropout)
        frames = frames + 0.5 * self.ff2(frames, present, dropout)
        outputs: Tensor = self.ln(frames)
        return outputs


class Conformer(nn.Module):
    """Conformer encoder (Gulati et al. 2020) with a dense layer to token logits."""

    def __init__(self, width: int = 48, num_heads: int = 4, num_blocks: int = 2) -> None:
        super().__init__()
        self.subsample = Subsample(width)
        self.conformers = nn.ModuleList(ConformerBlock(width, num_heads) for _ in range(num_blocks))
        self.ln = ScaleLayerNorm(width)
        self.lin = nn.Linear(width, NUM_TOKENS)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv1d):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(
        self, features: Tensor, paddings: Tensor, dropout_rate: float
    ) -> tuple[Tensor, Tensor]:
        """Return logits, shape (batch, time / 4, tokens), and their paddings."""
        dropout = dropout_rate if self.training else 0.0
        if self.training:
            features = mask_spectrum(features, paddings)
        frames, paddings = self.subsample(features, paddings, dropout)
        for block in self.conformers:
            frames = block(frames, paddings, dropout)
        return self.lin(self.ln(frames)), paddings


class LibriSpeechConformerWorkload(SpeechWorkload):
    """3200 utterances of three words; CTC, word error rate."""

    name = "librispeech_conformer"
    facts = WorkloadFacts(
        target_metric="wer",
        larger_is_better=False,
        loss_type=spec.LossType.CTC_LOSS,
        num_train_examples=3_200,
        num_eval_train_examples=160,
        num_validation_examples=320,
        num_test_examples=320,
        eval_batch_size=80,
        step_hint=800,
        max_allowed_runtime_sec=400,
        eval_period_time_sec=2,
        default_dropout_rate=0.1,
    )
    made_of_python_text = True
    smoke_batch_size = 16
    output_parameters = ("lin.weight", "lin.bias")

    def _build_model(self) -> nn.Module:
        return Conformer()
