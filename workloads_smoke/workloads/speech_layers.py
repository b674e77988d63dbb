"""Layers of both speech models: subsampling in time, and masking of the spectrum."""

import torch
from torch import Tensor, nn
from torch.nn import functional


class Conv2dSubsampling(nn.Module):
    """Convolution over time and bins with stride 2 in both, ReLU, padded frames set to zero."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(nn.init.xavier_uniform_(torch.empty(outputs, inputs, 3, 3)))
        self.bias = nn.Parameter(torch.zeros(outputs))

    def forward(self, spectra: Tensor, paddings: Tensor) -> tuple[Tensor, Tensor]:
        """Return features and paddings at half the length.

        Args:
            spectra: Shape (batch, channels, time, bins), time and bins even.
            paddings: Shape (batch, time).
        """
        outputs = functional.conv2d(
            functional.pad(spectra, (0, 1, 0, 1)), self.kernel, self.bias, stride=2
        )
        paddings = paddings[:, ::2]
        return functional.relu(outputs) * (1 - paddings[:, None, :, None]), paddings


def mask_spectrum(
    features: Tensor, paddings: Tensor, num_masks: int = 2, max_bins: int = 4, max_frames: int = 8
) -> Tensor:
    """Set random bands of bins and stretches of frames to zero (SpecAugment, Park et al. 2019).

    Args:
        features: Shape (batch, time, bins).
        paddings: Shape (batch, time); stretches begin before an utterance's end.
        num_masks: Number of bands, and of stretches.
        max_bins: Widest band.
        max_frames: Longest stretch.
    """
    batch, time, bins = features.shape
    device = features.device
    lengths = (1 - paddings).sum(dim=1, keepdim=True)
    keep_bins = torch.ones(batch, bins, dtype=torch.bool, device=device)
    keep_time = torch.ones(batch, time, dtype=torch.bool, device=device)
    for _ in range(num_masks):
        draws = torch.rand(4, batch, 1, device=device)
        keep_bins &= ~_stretch(bins, draws[0] * bins, draws[1] * (max_bins + 1))
        keep_time &= ~_stretch(time, draws[2] * lengths, draws[3] * (max_frames + 1))
    return features * (keep_time[:, :, None] & keep_bins[:, None, :])


def _stretch(size: int, start: Tensor, length: Tensor) -> Tensor:
    """Return where a stretch lies, shape (batch, size)."""
    places = torch.arange(size, device=start.device)
    start = start.floor()
    return (places >= start) & (places < start + length.floor())
