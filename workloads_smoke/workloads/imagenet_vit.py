"""The imagenet_vit workload: a vision transformer on the same images, with mixed-up examples."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from workloads_smoke import spec
from workloads_smoke.data.digits import NUM_CLASSES
from workloads_smoke.data.queue import Augment, Batch
from workloads_smoke.data.street_digits import CHANNELS, SIDE, mix_up, shift
from workloads_smoke.workloads.base import WorkloadFacts
from workloads_smoke.workloads.imagenet_resnet import ImagenetResNetWorkload
from workloads_smoke.workloads.layers import lecun_normal_

PATCH = 6


class SelfAttention(nn.Module):
    """Attention with separate projections for queries, keys and values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query = nn.Linear(width, width)
        self.key = nn.Linear(width, width)
        self.value = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(self, inputs: Tensor, dropout: float) -> Tensor:
        """Return the attended patches."""
        queries, keys, values = (
            projection(inputs).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.query, self.key, self.value)
        )
        mixed = functional.scaled_dot_product_attention(queries, keys, values, dropout_p=dropout)
        outputs: Tensor = self.out(mixed.transpose(1, 2).flatten(start_dim=2))
        return outputs


class FeedForward(nn.Module):
    """Two layers with a GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)

    def forward(self, inputs: Tensor, dropout: float) -> Tensor:
        """Return the block's output."""
        hidden = functional.gelu(self.linear1(inputs), approximate="tanh")
        outputs: Tensor = self.linear2(functional.dropout(hidden, dropout))
        return outputs


class EncoderBlock(nn.Module):
    """Pre-norm attention and feed-forward."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.layer_norm0 = nn.LayerNorm(width, eps=1e-6)
        self.self_attention1 = SelfAttention(width, num_heads)
        self.layer_norm2 = nn.LayerNorm(width, eps=1e-6)
        self.mlp3 = FeedForward(width, hidden)

    def forward(self, inputs: Tensor, dropout: float) -> Tensor:
        """Return the patches after both residual blocks."""
        attended = self.self_attention1(self.layer_norm0(inputs), dropout)
        inputs = inputs + functional.dropout(attended, dropout)
        hidden = self.mlp3(self.layer_norm2(inputs), dropout)
        return inputs + functional.dropout(hidden, dropout)


class Encoder(nn.Module):
    """Blocks and a closing norm."""

    def __init__(self, depth: int, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.net = nn.ModuleList(EncoderBlock(width, num_heads, hidden) for _ in range(depth))
        self.encoder_norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, inputs: Tensor, dropout: float) -> Tensor:
        """Return the encoded patches."""
        for block in self.net:
            inputs = block(inputs, dropout)
        outputs: Tensor = self.encoder_norm(inputs)
        return outputs


class VisionTransformer(nn.Module):
    """Patches, encoder, mean over patches, tanh layer, zero-initialised classifier."""

    positions: Tensor

    def __init__(
        self, width: int = 48, depth: int = 2, num_heads: int = 3, hidden: int = 144
    ) -> None:
        super().__init__()
        self.pre_logits = nn.Linear(width, width)
        self.conv_patch_extract = nn.Conv2d(CHANNELS, width, PATCH, stride=PATCH)
        self.encoder = Encoder(depth, width, num_heads, hidden)
        self.head = nn.Linear(width, NUM_CLASSES)
        positions = plane_sinusoids(SIDE // PATCH, width)
        self.register_buffer("positions", positions, persistent=False)
        for module in self.encoder.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        lecun_normal_(self.conv_patch_extract)
        lecun_normal_(self.pre_logits)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Tensor, dropout_rate: float) -> Tensor:
        """Return logits of images of shape (batch, 3, SIDE, SIDE)."""
        dropout = dropout_rate if self.training else 0.0
        patches = self.conv_patch_extract(images).flatten(start_dim=2).transpose(1, 2)
        encoded = self.encoder(functional.dropout(patches + self.positions, dropout), dropout)
        logits: Tensor = self.head(torch.tanh(self.pre_logits(encoded.mean(dim=1))))
        return logits


def plane_sinusoids(side: int, width: int) -> Tensor:
    """Return positions of a square of patches, a quarter of the features for each of sin/cos x/y.

    Args:
        side: Patches in a row.
        width: Features; a multiple of 4.
    """
    if width % 4:
        raise ValueError(f"width must be a multiple of 4, got {width}.")
    rates = 10_000.0 ** (-torch.arange(width // 4) / (width // 4 - 1))
    rows, columns = torch.meshgrid(torch.arange(side), torch.arange(side), indexing="ij")
    down, across = (places.flatten()[:, None] * rates for places in (rows, columns))
    return torch.cat([across.sin(), across.cos(), down.sin(), down.cos()], dim=1)


class ImagenetVitWorkload(ImagenetResNetWorkload):
    """The ResNet's images, shifted and mixed up; training targets are soft."""

    name = "imagenet_vit"
    facts = WorkloadFacts(
        target_metric="accuracy",
        larger_is_better=True,
        loss_type=spec.LossType.SOFTMAX_CROSS_ENTROPY,
        num_train_examples=9_970,
        num_eval_train_examples=1_200,
        num_validation_examples=1_200,
        num_test_examples=1_200,
        eval_batch_size=400,
        step_hint=1400,
        max_allowed_runtime_sec=400,
        eval_period_time_sec=2,
    )
    smoke_batch_size = 128
    refuses_statistics_in_evaluation = False
    output_parameters = ("head.weight", "head.bias")

    def _build_model(self) -> nn.Module:
        return VisionTransformer()

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Tensor:
        logits: Tensor = model(batch["inputs"], dropout_rate)
        return logits

    def _augmentation(self) -> Augment:
        def shift_and_mix(batch: Batch, generator: torch.Generator) -> Batch:
            return mix_up(shift(batch, generator), generator)

        return shift_and_mix
