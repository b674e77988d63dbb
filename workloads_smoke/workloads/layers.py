"""Layers that several smoke workloads share, with the official layers' parametrisation."""

import math

import torch
from torch import Tensor, distributed, nn
from torch.distributed import nn as distributed_nn
from torch.nn import functional


def lecun_normal_(module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d) -> None:
    """Initialise a layer as the benchmark's default: truncated normal of variance 1/fan_in.

    The constant is the standard deviation of a unit normal cut at two deviations, so that the
    weights keep the intended variance.
    """
    fan_in = nn.init._calculate_fan_in_and_fan_out(module.weight)[0]
    std = math.sqrt(1.0 / fan_in) / 0.87962566103423978
    nn.init.trunc_normal_(module.weight, std=std, a=-2 * std, b=2 * std)
    if module.bias is not None:
        nn.init.zeros_(module.bias)


class ScaleLayerNorm(nn.Module):
    """Layer norm whose learned scale starts at zero and counts from one, as in the conformer."""

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.zeros(width))
        self.bias = nn.Parameter(torch.zeros(width))
        self.eps = eps

    def forward(self, inputs: Tensor) -> Tensor:
        """Normalise over the last dimension."""
        return functional.layer_norm(inputs, self.scale.shape, 1 + self.scale, self.bias, self.eps)


class MaskedBatchNorm(nn.Module):
    """Batch norm over the unpadded frames of sequences, batch statistics over all processes.

    The scale starts at zero and counts from one. Its name is 'scale' in the conformer and
    'weight' in deepspeech, as `scale_name` says.

    Attributes:
        momentum: Weight of a batch's statistics in the running ones; 0 freezes them.
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(
        self, width: int, momentum: float = 0.05, eps: float = 1e-3, scale_name: str = "scale"
    ) -> None:
        super().__init__()
        self.scale_name = scale_name
        self.register_parameter(scale_name, nn.Parameter(torch.zeros(width)))
        self.bias = nn.Parameter(torch.zeros(width))
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        self.momentum = momentum
        self.eps = eps

    def forward(self, inputs: Tensor, paddings: Tensor) -> Tensor:
        """Normalise frames; padded ones come out as zeros.

        Args:
            inputs: Shape (batch, time, width).
            paddings: Shape (batch, time), 1 where padded.
        """
        present = (1 - paddings)[:, :, None]
        if self.training:
            mean, variance = self._batch_statistics(inputs, present)
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)
                self.running_var.lerp_(variance, self.momentum)
        else:
            mean, variance = self.running_mean, self.running_var
        scale = 1 + getattr(self, self.scale_name)
        outputs = (inputs - mean) * scale * torch.rsqrt(variance + self.eps) + self.bias
        return outputs.masked_fill(present == 0, 0.0)

    def _batch_statistics(self, inputs: Tensor, present: Tensor) -> tuple[Tensor, Tensor]:
        kept = inputs.masked_fill(present == 0, 0.0)
        sums = torch.cat([kept.sum(dim=(0, 1)), present.sum().reshape(1)])
        sums = _add_over_processes(sums)
        count = sums[-1].clamp(min=1.0)
        mean = sums[:-1] / count
        squares = ((inputs - mean).square() * present).sum(dim=(0, 1))
        return mean, _add_over_processes(squares) / count


def _add_over_processes(value: Tensor) -> Tensor:
    """Sum over processes, differentiably."""
    if distributed.is_available() and distributed.is_initialized():
        reduced: Tensor = distributed_nn.all_reduce(value)
        return reduced
    return value
