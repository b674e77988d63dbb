"""The mnist workload: the official two-layer perceptron on scikit-learn's digits."""

from collections import OrderedDict

import torch
from torch import Tensor, nn

from workloads_smoke import spec
from workloads_smoke.data.digits import (
    NUM_CLASSES,
    SIDE,
    distort_batch,
    load_eval_digits,
    real_digits,
)
from workloads_smoke.data.queue import Augment, Gather, gather_rows
from workloads_smoke.workloads.base import WorkloadFacts
from workloads_smoke.workloads.classification import ClassificationWorkload
from workloads_smoke.workloads.layers import lecun_normal_


class Perceptron(nn.Module):
    """784 inputs, 128 sigmoid units, 10 classes: the official model in its full size."""

    def __init__(self) -> None:
        super().__init__()
        layers = [
            ("layer1", nn.Linear(SIDE * SIDE, 128)),
            ("layer1_sig", nn.Sigmoid()),
            ("layer2", nn.Linear(128, NUM_CLASSES)),
        ]
        self.net = nn.Sequential(OrderedDict(layers))
        for module in self.modules():
            if isinstance(module, nn.Linear):
                lecun_normal_(module)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of images of shape (batch, 1, 28, 28)."""
        logits: Tensor = self.net(images.flatten(start_dim=1))
        return logits


class MnistWorkload(ClassificationWorkload):
    """997 real images of ten digits, freshly distorted in every batch."""

    name = "mnist"
    facts = WorkloadFacts(
        target_metric="accuracy",
        larger_is_better=True,
        loss_type=spec.LossType.SOFTMAX_CROSS_ENTROPY,
        num_train_examples=997,
        num_eval_train_examples=997,
        num_validation_examples=2_400,
        num_test_examples=2_400,
        eval_batch_size=1_200,
        step_hint=900,
        max_allowed_runtime_sec=200,
        eval_period_time_sec=1,
    )
    smoke_batch_size = 512
    sets_training_mode = False
    output_parameters = ("net.layer2.weight", "net.layer2.bias")

    @property
    def train_mean(self) -> float:
        """Inputs come normalised."""
        return 0.0

    @property
    def train_stddev(self) -> float:
        """Inputs come normalised."""
        return 1.0

    def _build_model(self) -> nn.Module:
        return Perceptron()

    def _split_data(self, split: str) -> tuple[Gather, int]:
        images, labels = real_digits("train") if split == "train" else load_eval_digits(split)
        weights = torch.ones(len(labels), dtype=torch.bool)
        return gather_rows({"inputs": images, "targets": labels, "weights": weights}), len(labels)

    def _augmentation(self) -> Augment:
        return distort_batch
