"""The librispeech_deepspeech workload: recurrent layers with batch norm and CTC on speech."""

from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from workloads_smoke import spec
from workloads_smoke.data.speech import NUM_BINS, NUM_TOKENS
from workloads_smoke.workloads.base import WorkloadFacts
from workloads_smoke.workloads.layers import MaskedBatchNorm, ScaleLayerNorm
from workloads_smoke.workloads.speech import SpeechWorkload
from workloads_smoke.workloads.speech_layers import Conv2dSubsampling, mask_spectrum


class Subsample(nn.Module):
    """Two convolutions and a dense layer: a quarter of the frames."""

    def __init__(self, channels: int, width: int) -> None:
        super().__init__()
        self.conv1 = Conv2dSubsampling(1, channels)
        self.conv2 = Conv2dSubsampling(channels, channels)
        self.lin = nn.Linear(channels * NUM_BINS // 4, width)

    def forward(self, features: Tensor, paddings: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
        """Return frames of shape (batch, time / 4, width) and their paddings."""
        outputs, paddings = self.conv1(features[:, None], paddings)
        outputs, paddings = self.conv2(outputs, paddings)
        frames = self.lin(outputs.permute(0, 2, 3, 1).flatten(start_dim=2))
        return functional.dropout(frames, dropout), paddings


class RecurrentBlock(nn.Module):
    """Batch norm and a bidirectional LSTM over the unpadded frames."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn_normalization_layer = MaskedBatchNorm(width, scale_name="weight")
        self.lstm = nn.LSTM(width, width // 2, bidirectional=True, batch_first=True)

    def forward(self, frames: Tensor, paddings: Tensor) -> Tensor:
        """Return the block's output, zero where padded."""
        # Packing wants at least one frame of each utterance, even of one that only fills a batch.
        lengths = (1 - paddings).sum(dim=1).clamp(min=1).cpu().long()
        packed = pack_padded_sequence(
            self.bn_normalization_layer(frames, paddings),
            lengths,
            batch_first=True,
            enforce_sorted=False,
        )
        outputs, _ = pad_packed_sequence(
            self.lstm(packed)[0], batch_first=True, total_length=frames.shape[1]
        )
        return outputs


class FeedForward(nn.Module):
    """Batch norm, dense layer, ReLU."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn_normalization_layer = MaskedBatchNorm(width, scale_name="weight")
        self.lin = nn.Linear(width, width)

    def forward(self, frames: Tensor, paddings: Tensor, dropout: float) -> Tensor:
        """Return the block's output, zero where padded."""
        hidden = functional.relu(self.lin(self.bn_normalization_layer(frames, paddings)))
        return functional.dropout(hidden * (1 - paddings[:, :, None]), dropout)


class DeepSpeech(nn.Module):
    """Deep Speech 2 (Amodei et al. 2016) with residual connections, as officially."""

    def __init__(
        self, channels: int = 32, width: int = 64, num_lstm_layers: int = 2, num_ffn_layers: int = 1
    ) -> None:
        super().__init__()
        self.subsample = Subsample(channels, width)
        self.lstms = nn.ModuleList(RecurrentBlock(width) for _ in range(num_lstm_layers))
        self.ffns = nn.ModuleList(FeedForward(width) for _ in range(num_ffn_layers))
        self.ln = ScaleLayerNorm(width)
        self.lin = nn.Linear(width, NUM_TOKENS)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(
        self, features: Tensor, paddings: Tensor, dropout_rate: float
    ) -> tuple[Tensor, Tensor]:
        """Return logits, shape (batch, time / 4, tokens), and their paddings."""
        dropout = dropout_rate if self.training else 0.0
        if self.training:
            features = mask_spectrum(features, paddings)
        frames, paddings = self.subsample(features, paddings, dropout)
        for recurrent in self.lstms:
            frames = frames + recurrent(frames, paddings)
        for dense in self.ffns:
            frames = frames + dense(frames, paddings, dropout)
        return self.lin(self.ln(frames)), paddings


class LibriSpeechDeepSpeechWorkload(SpeechWorkload):
    """The conformer's utterances; CTC, word error rate."""

    name = "librispeech_deepspeech"
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
        return DeepSpeech()
