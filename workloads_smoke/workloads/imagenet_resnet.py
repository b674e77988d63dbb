"""The imagenet_resnet workload: a residual network with batch norm on digits over photographs."""

from torch import Tensor, nn
from torch.nn import functional

from workloads_smoke import spec
from workloads_smoke.data.digits import NUM_CLASSES
from workloads_smoke.data.queue import Augment, Gather, gather_rows
from workloads_smoke.data.street_digits import CHANNELS, load_street_digits, shift
from workloads_smoke.workloads.base import WorkloadFacts
from workloads_smoke.workloads.classification import ClassificationWorkload

NUM_EVAL_TRAIN = 1_200


def convolution(inputs: int, outputs: int, side: int = 3, stride: int = 1) -> nn.Conv2d:
    """Return a convolution without bias that keeps the size but for its stride."""
    return nn.Conv2d(inputs, outputs, side, stride=stride, padding=side // 2, bias=False)


class Shortcut(nn.Module):
    """Projection where a block changes the number of channels."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = convolution(inputs, outputs, side=1, stride=stride)
        self.bn = nn.BatchNorm2d(outputs)

    def forward(self, images: Tensor) -> Tensor:
        """Return the projected images."""
        outputs: Tensor = self.bn(self.conv(images))
        return outputs


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut; the last norm starts at zero, as officially."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = convolution(inputs, outputs, stride=stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = convolution(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        same = inputs == outputs and stride == 1
        self.downsample = None if same else Shortcut(inputs, outputs, stride)
        nn.init.zeros_(self.bn2.weight)

    def forward(self, images: Tensor) -> Tensor:
        """Return the block's output."""
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = self.bn2(self.conv2(hidden))
        shortcut = images if self.downsample is None else self.downsample(images)
        return functional.relu(hidden + shortcut)


class ResNet(nn.Module):
    """Stem, three stages of one block each, pooling, classifier."""

    def __init__(self, widths: tuple[int, int, int] = (16, 32, 64)) -> None:
        super().__init__()
        first, second, third = widths
        self.conv1 = convolution(CHANNELS, first, side=5, stride=2)
        self.bn1 = nn.BatchNorm2d(first)
        self.layer1 = nn.Sequential(ResidualBlock(first, first, 1))
        self.layer2 = nn.Sequential(ResidualBlock(first, second, 2))
        self.layer3 = nn.Sequential(ResidualBlock(second, third, 2))
        self.fc = nn.Linear(third, NUM_CLASSES)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.fc.weight, std=1e-2)
        nn.init.zeros_(self.fc.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Return logits of images of shape (batch, 3, side, side)."""
        hidden = functional.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: Tensor = self.fc(hidden.mean(dim=(2, 3)))
        return logits


class ImagenetResNetWorkload(ClassificationWorkload):
    """9970 images of ten digits over photographs, shifted at random, 5 % random labels."""

    name = "imagenet_resnet"
    facts = WorkloadFacts(
        target_metric="accuracy",
        larger_is_better=True,
        loss_type=spec.LossType.SOFTMAX_CROSS_ENTROPY,
        num_train_examples=9_970,
        num_eval_train_examples=NUM_EVAL_TRAIN,
        num_validation_examples=1_200,
        num_test_examples=1_200,
        eval_batch_size=400,
        step_hint=500,
        max_allowed_runtime_sec=300,
        eval_period_time_sec=2,
    )
    smoke_batch_size = 96
    refuses_statistics_in_evaluation = True
    output_parameters = ("fc.weight", "fc.bias")

    def _build_model(self) -> nn.Module:
        return ResNet()

    def _split_data(self, split: str) -> tuple[Gather, int]:
        images, labels = load_street_digits("train" if split == "eval_train" else split)
        if split == "eval_train":
            # Evenly spread: the versions of one digit are neighbours.
            stride = len(labels) // NUM_EVAL_TRAIN
            images, labels = images[::stride][:NUM_EVAL_TRAIN], labels[::stride][:NUM_EVAL_TRAIN]
        return gather_rows({"inputs": images, "targets": labels}), len(labels)

    def _augmentation(self) -> Augment:
        return shift
