"""The fastmri workload: a U-Net that restores undersampled phantoms."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from workloads_smoke import spec
from workloads_smoke.data.phantoms import load_phantoms
from workloads_smoke.data.queue import Batch, Gather, gather_rows, map_tensors
from workloads_smoke.workloads.base import SmokeWorkload, WorkloadFacts
from workloads_smoke.workloads.layers import lecun_normal_
from workloads_smoke.workloads.losses import masked_loss
from workloads_smoke.workloads.metrics.ssim import structural_similarity

NUM_EVAL_TRAIN = 240


class Dropout2d(nn.Module):
    """Dropout of whole channels at a rate that is set before each forward pass."""

    rate: float = 0.0

    def forward(self, images: Tensor) -> Tensor:
        """Return images with channels set to zero."""
        return functional.dropout2d(images, self.rate, training=self.training)


class ConvBlock(nn.Module):
    """Twice: convolution, instance norm, leaky ReLU, dropout."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for channels in (inputs, outputs):
            layers += [
                nn.Conv2d(channels, outputs, 3, padding=1, bias=False),
                nn.InstanceNorm2d(outputs),
                nn.LeakyReLU(0.2, inplace=True),
                Dropout2d(),
            ]
        self.conv_layers = nn.Sequential(*layers)

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output."""
        outputs: Tensor = self.conv_layers(images)
        return outputs


class TransposeConvBlock(nn.Module):
    """Doubles height and width."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.ConvTranspose2d(inputs, outputs, 2, stride=2, bias=False),
            nn.InstanceNorm2d(outputs),
            nn.LeakyReLU(0.2, inplace=True),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Return the enlarged images."""
        outputs: Tensor = self.layers(images)
        return outputs


class UNet(nn.Module):
    """U-Net (Ronneberger et al. 2015) of the fastMRI baseline, with three poolings."""

    def __init__(self, width: int = 8, num_pool_layers: int = 3) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(num_pool_layers + 1)]
        inputs = [1, *widths[:-2]]
        self.down_sample_layers = nn.ModuleList(
            ConvBlock(i, o) for i, o in zip(inputs, widths[:-1], strict=True)
        )
        self.conv = ConvBlock(widths[-2], widths[-1])
        upwards = widths[-2::-1]
        self.up_transpose_conv = nn.ModuleList(TransposeConvBlock(2 * w, w) for w in upwards)
        blocks: list[nn.Module] = [ConvBlock(2 * w, w) for w in upwards]
        blocks[-1] = nn.Sequential(blocks[-1], nn.Conv2d(width, 1, 1))
        self.up_conv = nn.ModuleList(blocks)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                lecun_normal_(module)

    def forward(self, images: Tensor, dropout_rate: float) -> Tensor:
        """Return restored images of images of shape (batch, 1, side, side)."""
        for module in self.modules():
            if isinstance(module, Dropout2d):
                module.rate = dropout_rate
        kept = []
        for layer in self.down_sample_layers:
            images = layer(images)
            kept.append(images)
            images = functional.avg_pool2d(images, 2)
        images = self.conv(images)
        for enlarge, conv in zip(self.up_transpose_conv, self.up_conv, strict=True):
            images = conv(torch.cat([enlarge(images), kept.pop()], dim=1))
        return images


class FastMRIWorkload(SmokeWorkload):
    """2400 phantoms of 32 x 32 at a quarter of their spectrum; mean absolute error and SSIM."""

    name = "fastmri"
    facts = WorkloadFacts(
        target_metric="ssim",
        larger_is_better=True,
        loss_type=spec.LossType.MEAN_ABSOLUTE_ERROR,
        num_train_examples=2_400,
        num_eval_train_examples=NUM_EVAL_TRAIN,
        num_validation_examples=240,
        num_test_examples=240,
        eval_batch_size=120,
        step_hint=600,
        max_allowed_runtime_sec=300,
        eval_period_time_sec=2,
    )
    smoke_batch_size = 16
    output_parameters = ("up_conv.2.1.weight", "up_conv.2.1.bias")

    def _build_model(self) -> nn.Module:
        return UNet()

    def _split_data(self, split: str) -> tuple[Gather, int]:
        arrays: dict[str, Any] = load_phantoms("train" if split == "eval_train" else split)
        if split == "eval_train":
            arrays = {
                name: map_tensors(lambda rows: rows[:NUM_EVAL_TRAIN], rows)
                for name, rows in arrays.items()
            }
        return gather_rows(arrays), len(arrays["inputs"])

    def _forward(self, model: nn.Module, batch: Batch, dropout_rate: float) -> Tensor:
        restored: Tensor = model(batch["inputs"].unsqueeze(1), dropout_rate)
        return restored.squeeze(1)

    def loss_fn(
        self,
        label_batch: spec.Tensor,
        logits_batch: spec.Tensor,
        mask_batch: spec.Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, spec.Tensor]:
        """Mean absolute error per image; see `Workload.loss_fn`. Label smoothing is ignored."""
        return masked_loss((logits_batch - label_batch).abs().mean(dim=(1, 2)), mask_batch)

    def _batch_metrics(self, model: nn.Module, batch: Batch) -> dict[str, float]:
        outputs = self._evaluate_logits(model, batch)
        weights = batch["weights"]
        loss = self.loss_fn(batch["targets"], outputs, weights)

        def brightness(images: Tensor) -> Tensor:
            return images * batch["std"][:, None, None] + batch["mean"][:, None, None]

        ssim = structural_similarity(
            brightness(outputs), brightness(batch["targets"]), batch["volume_max"]
        )
        return {
            "ssim": float((ssim * weights).sum()),
            "loss": float(loss["summed"]),
            "count": float(loss["n_valid_examples"]),
        }

    def _final_metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {name: sums[name] / sums["count"] for name in ("ssim", "loss")}
