"""Colour images of handwritten digits painted over pieces of photographs.

Digits and photographs are those that scikit-learn ships. A digit has a random place, size, tilt
and colour; the background is a random piece of a photograph. Real digits and regions of the
photographs are divided among the splits first, so that neither is shared between them.
"""

import functools
import math

import torch
from torch import Tensor
from torch.nn import functional

from workloads_smoke.data.digits import NUM_CLASSES, real_digits
from workloads_smoke.data.queue import Batch

SIDE = 24
CHANNELS = 3
# Images made of each real digit.
VERSIONS = {"train": 10, "validation": 3, "test": 3}
# Part of each photograph's width that a split's backgrounds come from.
REGIONS = {"train": (0.0, 0.66), "validation": (0.66, 0.83), "test": (0.83, 1.0)}
LABEL_NOISE = 0.05
# Mean and standard deviation of training pixels, per channel alike.
MEAN, STDDEV = 0.38, 0.235
_SEED = 50240


@functools.cache
def photographs() -> tuple[Tensor, ...]:
    """Return the two photographs of scikit-learn, (3, height, width) in [0, 1], halved in size."""
    from sklearn.datasets import load_sample_images

    pictures = []
    for picture in load_sample_images().images:
        channels_first = torch.tensor(picture).permute(2, 0, 1) / 255
        pictures.append(functional.avg_pool2d(channels_first, 2))
    return tuple(pictures)


def backgrounds(split: str, count: int, generator: torch.Generator) -> Tensor:
    """Return random pieces of the split's region, shape (count, 3, SIDE, SIDE)."""
    pieces = torch.empty(count, CHANNELS, SIDE, SIDE)
    low, high = REGIONS[split]
    places = torch.rand(count, 3, generator=generator)
    for piece, (which, down, across) in zip(pieces, places.tolist(), strict=True):
        picture = photographs()[int(which * len(photographs()))]
        height, width = picture.shape[1:]
        left, right = int(low * width), int(high * width) - SIDE
        x = left + int(across * (right - left))
        y = int(down * (height - SIDE))
        piece.copy_(picture[:, y : y + SIDE, x : x + SIDE])
    return pieces


def placed_masks(digits: Tensor, generator: torch.Generator) -> Tensor:
    """Place digits (count, 1, 8, 8) on canvases (count, 1, SIDE, SIDE) as masks in [0, 1]."""
    count = len(digits)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(count, generator=generator)

    angle, zoom = uniform(-math.pi / 10, math.pi / 10), uniform(1.0, 1.4)
    cos, sin = zoom * angle.cos(), zoom * angle.sin()
    # A shrunken digit has room to move without leaving the canvas.
    room = zoom - 1
    rows = [
        torch.stack([cos, -sin, uniform(-1, 1) * room], dim=1),
        torch.stack([sin, cos, uniform(-1, 1) * room], dim=1),
    ]
    shape = [count, 1, SIDE, SIDE]
    grid = functional.affine_grid(torch.stack(rows, dim=1), shape, align_corners=False)
    return functional.grid_sample(digits, grid, align_corners=False)


@functools.cache
def load_street_digits(split: str) -> tuple[Tensor, Tensor]:
    """Return images and labels of a split.

    Args:
        split: 'train', 'validation' or 'test'.

    Returns:
        Normalised images of shape (examples, 3, 24, 24), labels of shape (examples,).
    """
    real, labels = real_digits(split)
    generator = torch.Generator().manual_seed(_SEED + list(REGIONS).index(split))
    real = real.repeat_interleave(VERSIONS[split], dim=0)
    labels = labels.repeat_interleave(VERSIONS[split])
    # Darkened, with digits in light colours: otherwise many could not be read by anybody.
    images = 0.7 * backgrounds(split, len(real), generator)
    mask = placed_masks(real, generator)
    colours = 0.5 + 0.5 * torch.rand(len(real), CHANNELS, 1, 1, generator=generator)
    images = images * (1 - mask) + colours * mask
    if split == "train":
        noisy = torch.rand(len(labels), generator=generator) < LABEL_NOISE
        drawn = torch.randint(NUM_CLASSES, labels.shape, generator=generator)
        labels = torch.where(noisy, drawn, labels)
    return (images - MEAN) / STDDEV, labels


def shift(batch: Batch, generator: torch.Generator, most: int = 2) -> Batch:
    """Move each image by up to `most` pixels in both directions, edges repeated."""
    images = batch["inputs"]
    padded = functional.pad(images, (most,) * 4, mode="replicate")
    offsets = torch.randint(2 * most + 1, (2, len(images), 1), generator=generator)
    rows, columns = (offsets + torch.arange(SIDE)).unbind(0)
    index = torch.arange(len(images))[:, None, None]
    moved = padded.permute(0, 2, 3, 1)[index, rows[:, :, None], columns[:, None, :]]
    return batch | {"inputs": moved.permute(0, 3, 1, 2).contiguous()}


def mix_up(batch: Batch, generator: torch.Generator, alpha: float = 0.2) -> Batch:
    """Blend each example with its neighbour (Zhang et al. 2018); targets become soft.

    One weight of a Beta(alpha, alpha) distribution per batch, as in the benchmark.
    """
    gammas = torch._standard_gamma(torch.full((2,), alpha), generator=generator)
    weight = gammas[0] / gammas.sum()
    targets = functional.one_hot(batch["targets"], NUM_CLASSES).float()
    mixed = {
        "inputs": torch.lerp(batch["inputs"].roll(1, dims=0), batch["inputs"], weight),
        "targets": torch.lerp(targets.roll(1, dims=0), targets, weight),
    }
    return batch | mixed
