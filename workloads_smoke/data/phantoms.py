"""Images of ellipses, measured as a fast MRI scanner would: most of the spectrum is missing.

Phantoms are drawn in the manner of Shepp and Logan: a bright skull, tissue, and inclusions of
random place, size, tilt and brightness, with a smooth shading and fine texture. Of the spectrum's
columns the central ones and some of the rest by chance are kept, a quarter in all, the others set to
zero; the input is the magnitude of what the inverse transform makes of that. As in fastMRI, input and
target are normalised by the input's mean and deviation.
"""

import functools

import torch
from torch import Tensor

SIDE = 32
ACCELERATION = 4
CENTER_FRACTION = 0.12
SPLIT_SIZES = {"train": 2_400, "validation": 240, "test": 240}
_NUM_INCLUSIONS = 8
_SEED = 80240


@functools.cache
def load_phantoms(split: str) -> dict[str, Tensor]:
    """Return the examples of a split.

    Args:
        split: 'train', 'validation' or 'test'.

    Returns:
        'inputs' and 'targets' of shape (images, SIDE, SIDE); 'mean' and 'std', which turn them back
        into brightness; 'volume_max', the brightest value of the true image.
    """
    generator = torch.Generator().manual_seed(_SEED + list(SPLIT_SIZES).index(split))
    images = draw_phantoms(SPLIT_SIZES[split], generator)
    measured = undersample(images, generator)
    mean = measured.mean(dim=(1, 2))
    std = measured.std(dim=(1, 2))

    def normalised(pictures: Tensor) -> Tensor:
        return (pictures - mean[:, None, None]) / std[:, None, None]

    return {
        "inputs": normalised(measured),
        "targets": normalised(images),
        "mean": mean,
        "std": std,
        "volume_max": images.amax(dim=(1, 2)),
    }


def draw_phantoms(count: int, generator: torch.Generator) -> Tensor:
    """Return phantoms, shape (count, SIDE, SIDE), brightness mostly in [0, 1.5]."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, 1, 1, generator=generator)

    axis = torch.linspace(-1, 1, SIDE)
    rows, columns = torch.meshgrid(axis, axis, indexing="ij")

    def ellipses(
        places: tuple[Tensor, Tensor], radii: tuple[Tensor, Tensor], tilt: Tensor
    ) -> Tensor:
        down, across = rows - places[0], columns - places[1]
        along = (down * tilt.cos() + across * tilt.sin()) / radii[0]
        beside = (across * tilt.cos() - down * tilt.sin()) / radii[1]
        # A soft border half a pixel wide, as a scanner's finite resolution gives.
        distance = (along.square() + beside.square()).sqrt() - 1
        return torch.sigmoid(-distance * torch.minimum(*radii) * SIDE * 2)

    center = (uniform(-0.1, 0.1), uniform(-0.1, 0.1))
    height, width, tilt = uniform(0.7, 0.9), uniform(0.55, 0.8), uniform(-0.3, 0.3)
    skull = ellipses(center, (height, width), tilt)
    brain = ellipses(center, (height - 0.12, width - 0.12), tilt)
    shading = 1 + uniform(-0.3, 0.3) * rows + uniform(-0.3, 0.3) * columns
    images = skull - brain * (1 - uniform(0.2, 0.5) * shading)
    for _ in range(_NUM_INCLUSIONS):
        place = (center[0] + uniform(-0.5, 0.5), center[1] + uniform(-0.4, 0.4))
        radii = (uniform(0.06, 0.3), uniform(0.06, 0.3))
        inclusion = ellipses(place, radii, uniform(0, 3.1416))
        images = images + inclusion * brain * uniform(-0.3, 0.4)
    texture = 0.03 * torch.randn(images.shape, generator=generator)
    return (images + texture * brain).clamp(min=0)


def undersample(images: Tensor, generator: torch.Generator) -> Tensor:
    """Return the magnitude images that remain of a quarter of the spectrum's columns.

    Args:
        images: Shape (count, SIDE, SIDE).
        generator: Draws the columns, anew for each image.
    """
    count, _, side = images.shape
    spectrum = torch.fft.fftshift(torch.fft.fft2(images), dim=(1, 2))
    num_center = round(side * CENTER_FRACTION)
    first = (side - num_center + 1) // 2
    chance = (side / ACCELERATION - num_center) / (side - num_center)
    kept = torch.rand(count, 1, side, generator=generator) < chance
    kept[:, :, first : first + num_center] = True
    return torch.fft.ifft2(torch.fft.ifftshift(spectrum * kept, dim=(1, 2))).abs()
