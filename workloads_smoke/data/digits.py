"""Handwritten digits that scikit-learn ships, enlarged and distorted to 28 x 28.

1797 real images of 8 x 8 pixels (UCI optical recognition of handwritten digits). The real images
are divided among the splits first and distorted afterwards, so that no validation or test image
has a distorted twin in the training split.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from workloads_smoke.data.queue import Batch

SIDE = 28
NUM_CLASSES = 10
# Real images of each split.
REAL_IMAGES = {"train": 997, "validation": 400, "test": 400}
# Fixed distorted versions of each real image where the model is evaluated.
EVAL_VERSIONS = {"eval_train": 1, "validation": 6, "test": 6}
INK_NOISE = 0.5
# Mean and standard deviation of distorted training images.
MEAN, STDDEV = 0.205, 0.345
_SEED = 20240


@functools.cache
def load_eval_digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the fixed distorted images and the labels of a split.

    Args:
        split: 'eval_train', 'validation' or 'test'.

    Returns:
        Normalised images of shape (examples, 1, 28, 28), labels of shape (examples,). The
        versions of one real image are neighbours.
    """
    versions = EVAL_VERSIONS[split]
    real, labels = real_digits("train" if split == "eval_train" else split)
    generator = torch.Generator().manual_seed(_SEED + 1 + list(EVAL_VERSIONS).index(split))
    images = normalise(distort(real.repeat_interleave(versions, dim=0), generator))
    return images, labels.repeat_interleave(versions)


def distort_batch(batch: Batch, generator: torch.Generator) -> Batch:
    """Turn a batch of real images into training examples."""
    return batch | {"inputs": normalise(distort(batch["inputs"], generator))}


def real_digits(split: str) -> tuple[Tensor, Tensor]:
    """Return the undistorted images (examples, 1, 8, 8) in [0, 1] and labels of a split."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    images = torch.as_tensor(digits.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.as_tensor(digits.target, dtype=torch.int64)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(_SEED))
    start = 0
    for name, count in REAL_IMAGES.items():
        if name == split:
            chosen = order[start : start + count]
            return images[chosen], labels[chosen]
        start += count
    raise ValueError(f"split must be one of {', '.join(REAL_IMAGES)}, got {split!r}.")


def distort(images: Tensor, generator: torch.Generator, side: int = SIDE) -> Tensor:
    """Rotate, scale, shear and shift images onto a larger canvas and make the ink uneven.

    The background stays clean, as in MNIST.

    Args:
        images: Shape (examples, channels, height, width).
        generator: Source of all randomness.
        side: Height and width of the result.
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle = uniform(-math.pi / 10, math.pi / 10)
    zoom = uniform(1.05, 1.4)
    shear = uniform(-0.2, 0.2)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    rows = [
        torch.stack([cos, -sin + shear, uniform(-0.25, 0.25)], dim=1),
        torch.stack([sin, cos, uniform(-0.25, 0.25)], dim=1),
    ]
    # affine_grid maps places of the result to places of the source, so a zoom > 1 shrinks.
    shape = [count, images.shape[1], side, side]
    grid = functional.affine_grid(torch.stack(rows, dim=1), shape, align_corners=False)
    moved = functional.grid_sample(images, grid, align_corners=False)
    noise = torch.randn(moved.shape, generator=generator)
    return moved * (1 + INK_NOISE * noise)


def normalise(images: Tensor) -> Tensor:
    """Shift and scale distorted images to mean 0 and deviation 1 over the training split."""
    return (images - MEAN) / STDDEV
