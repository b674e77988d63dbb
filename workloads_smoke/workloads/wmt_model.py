"""Encoder-decoder transformer of the wmt workload, parametrised as the official one.

Pre-norm, one embedding for source, target and output, fused projections for queries, keys and
values where they have one input, no biases in attention, sinusoidal positions.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from workloads_smoke.data.translation import END_ID, PAD_ID

# Queries and keys of padding are masked with a large finite number, so that a row that is all
# padding has no NaN.
_MASKED = -1e9


def _split_heads(tokens: Tensor, num_heads: int) -> Tensor:
    return tokens.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Tensor, dropout: float) -> Tensor:
    """Multi-head attention on (batch, heads, length, width) tensors; returns merged heads."""
    mixed = functional.scaled_dot_product_attention(
        queries, keys, values, attn_mask=mask, dropout_p=dropout
    )
    return mixed.transpose(1, 2).flatten(start_dim=2)


class SelfAttention(nn.Module):
    """Attention of a sequence on itself; `in_proj` holds queries, keys and values."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.in_proj = nn.Linear(width, 3 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def project(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values by head."""
        queries, keys, values = (
            _split_heads(part, self.num_heads) for part in self.in_proj(inputs).chunk(3, dim=-1)
        )
        return queries, keys, values

    def forward(self, inputs: Tensor, mask: Tensor, dropout: float) -> Tensor:
        """Return the attended sequence."""
        outputs: Tensor = self.out_proj(attend(*self.project(inputs), mask, dropout))
        return outputs


class CrossAttention(nn.Module):
    """Attention of the target on the encoded source."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.kv_proj = nn.Linear(width, 2 * width, bias=False)
        self.out_proj = nn.Linear(width, width, bias=False)

    def project_memory(self, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return keys and values of the encoded source by head."""
        keys, values = (
            _split_heads(part, self.num_heads) for part in self.kv_proj(memory).chunk(2, dim=-1)
        )
        return keys, values

    def forward(
        self, inputs: Tensor, memory: tuple[Tensor, Tensor], mask: Tensor, dropout: float
    ) -> Tensor:
        """Return the attended source for each target position."""
        queries = _split_heads(self.q_proj(inputs), self.num_heads)
        outputs: Tensor = self.out_proj(attend(queries, *memory, mask, dropout))
        return outputs


class EncoderLayer(nn.Module):
    """Self-attention and a feed-forward block."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.self_attn = SelfAttention(width, num_heads)
        self.linear1 = nn.Linear(width, hidden)
        self.linear2 = nn.Linear(hidden, width)
        self.norm1 = nn.LayerNorm(width, eps=1e-6)
        self.norm2 = nn.LayerNorm(width, eps=1e-6)

    def feed_forward(self, inputs: Tensor, dropout: float) -> Tensor:
        """Return the output of the feed-forward block."""
        hidden = functional.dropout(functional.relu(self.linear1(inputs)), dropout)
        return functional.dropout(self.linear2(hidden), dropout)

    def forward(self, inputs: Tensor, mask: Tensor, dropout: float) -> Tensor:
        """Return the sequence after both residual blocks."""
        attended = self.self_attn(self.norm1(inputs), mask, dropout)
        inputs = inputs + functional.dropout(attended, dropout)
        return inputs + self.feed_forward(self.norm2(inputs), dropout)


class DecoderLayer(EncoderLayer):
    """Self-attention, attention on the source, and a feed-forward block."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__(width, num_heads, hidden)
        self.multihead_attn = CrossAttention(width, num_heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)

    def decode(
        self,
        inputs: Tensor,
        mask: Tensor,
        memory: tuple[Tensor, Tensor],
        memory_mask: Tensor,
        dropout: float,
        past: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the sequence after all blocks, and keys and values of it and its past."""
        queries, keys, values = self.self_attn.project(self.norm1(inputs))
        if past is not None:
            keys, values = torch.cat([past[0], keys], 2), torch.cat([past[1], values], 2)
        attended = self.self_attn.out_proj(attend(queries, keys, values, mask, dropout))
        inputs = inputs + functional.dropout(attended, dropout)
        attended = self.multihead_attn(self.norm2(inputs), memory, memory_mask, dropout)
        inputs = inputs + functional.dropout(attended, dropout)
        return inputs + self.feed_forward(self.norm3(inputs), dropout), (keys, values)


class Stack(nn.Module):
    """Layers and a closing norm."""

    def __init__(self, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.norm = nn.LayerNorm(width, eps=1e-6)


class Coder(nn.Module):
    """One side of the transformer; the extra level keeps the official parameter names."""

    def __init__(self, name: str, layers: list[nn.Module], width: int) -> None:
        super().__init__()
        self.stack_name = name
        self.add_module(name, Stack(layers, width))

    @property
    def stack(self) -> Stack:
        """The layers."""
        stack = getattr(self, self.stack_name)
        assert isinstance(stack, Stack)
        return stack


class Transformer(nn.Module):
    """Maps source and target tokens to the logits of each target token."""

    positions: Tensor

    def __init__(
        self,
        vocabulary_size: int,
        max_length: int,
        width: int = 64,
        num_heads: int = 4,
        hidden: int = 128,
        num_layers: int = 2,
    ) -> None:
        super().__init__()
        self.shared_embedding = nn.Embedding(vocabulary_size, width)
        sizes = (width, num_heads, hidden)
        encoder_layers: list[nn.Module] = [EncoderLayer(*sizes) for _ in range(num_layers)]
        decoder_layers: list[nn.Module] = [DecoderLayer(*sizes) for _ in range(num_layers)]
        self.encoder = Coder("encoder", encoder_layers, width)
        self.decoder = Coder("decoder", decoder_layers, width)
        # Small entries, scaled up on input (Vaswani et al. 2017, 3.4), where the official model has
        # unit entries, scaled down on output: the same function, but entries of unit size would
        # hardly move within a thousand steps.
        nn.init.normal_(self.shared_embedding.weight, std=width**-0.5)
        self.register_buffer("positions", sinusoids(max_length, width), persistent=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.normal_(module.bias, std=1e-6)

    def _embed(self, tokens: Tensor, start: int, dropout: float) -> Tensor:
        embedded = self.shared_embedding(tokens) * math.sqrt(self.shared_embedding.embedding_dim)
        embedded = embedded + self.positions[start : start + tokens.shape[1]]
        return functional.dropout(embedded, dropout)

    def encode(self, source: Tensor, dropout: float) -> Tensor:
        """Return the encoded source, shape (batch, length, width)."""
        mask = padding_mask(source)
        encoded = self._embed(source, 0, dropout)
        for layer in self.encoder.stack.layers:
            encoded = layer(encoded, mask, dropout)
        normed: Tensor = self.encoder.stack.norm(encoded)
        return normed

    def _logits(self, decoded: Tensor) -> Tensor:
        decoded = self.decoder.stack.norm(decoded)
        logits: Tensor = decoded @ self.shared_embedding.weight.T
        return logits

    def forward(self, source: Tensor, target: Tensor, dropout_rate: float) -> Tensor:
        """Return logits, shape (batch, target length, vocabulary).

        Args:
            source: Tokens, shape (batch, source length), zero where padded.
            target: Tokens to predict, shape (batch, target length); shifted right inside.
            dropout_rate: Dropout in training mode.
        """
        dropout = dropout_rate if self.training else 0.0
        memory = self.encode(source, dropout)
        shifted = functional.pad(target[:, :-1], (1, 0), value=PAD_ID)
        length = target.shape[1]
        causal = torch.full((length, length), _MASKED, device=target.device).triu(diagonal=1)
        memory_mask = padding_mask(source)
        decoded = self._embed(shifted, 0, dropout)
        for layer in self.decoder.stack.layers:
            assert isinstance(layer, DecoderLayer)
            projected = layer.multihead_attn.project_memory(memory)
            decoded, _ = layer.decode(decoded, causal, projected, memory_mask, dropout)
        return self._logits(decoded)

    @torch.no_grad()
    def translate(self, source: Tensor, max_length: int) -> Tensor:
        """Return the greedy translation, token by token with kept keys and values.

        Args:
            source: Tokens, shape (batch, source length).
            max_length: Most tokens to make.

        Returns:
            Tokens, shape (batch, at most max_length); what follows an end token has no meaning.
        """
        memory = self.encode(source, 0.0)
        memory_mask = padding_mask(source)
        layers = [layer for layer in self.decoder.stack.layers if isinstance(layer, DecoderLayer)]
        memories = [layer.multihead_attn.project_memory(memory) for layer in layers]
        pasts: list[tuple[Tensor, Tensor] | None] = [None] * len(layers)
        token = torch.full_like(source[:, :1], PAD_ID)
        all_visible = torch.zeros(1, 1, device=source.device)
        tokens = []
        ended = torch.zeros_like(token, dtype=torch.bool)
        for place in range(max_length):
            decoded = self._embed(token, place, 0.0)
            for number, layer in enumerate(layers):
                decoded, pasts[number] = layer.decode(
                    decoded, all_visible, memories[number], memory_mask, 0.0, pasts[number]
                )
            token = self._logits(decoded).argmax(dim=-1)
            tokens.append(token)
            ended |= token == END_ID
            if bool(ended.all()):
                break
        return torch.cat(tokens, dim=1)


def padding_mask(tokens: Tensor) -> Tensor:
    """Return the additive mask of padded keys, shape (batch, 1, 1, length)."""
    return (tokens == PAD_ID).float().mul(_MASKED)[:, None, None, :]


def sinusoids(length: int, width: int) -> Tensor:
    """Return sine and cosine positions, shape (length, width) (Vaswani et al. 2017)."""
    rates = torch.exp(torch.arange(width // 2) * (-math.log(10_000.0) / (width // 2 - 1)))
    angles = torch.arange(length)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)
