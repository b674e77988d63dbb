"""Structural similarity of images (Wang et al. 2004), with fastMRI's settings.

A uniform window of 7 x 7, sample covariances, constants 0.01 and 0.03, and the mean over the places
where the window lies inside the image.
"""

import torch
from torch import Tensor
from torch.nn import functional

WINDOW = 7
_K1, _K2 = 0.01, 0.03


def structural_similarity(images: Tensor, references: Tensor, data_range: Tensor) -> Tensor:
    """Return the similarity of each pair, shape (images,), within [-1, 1].

    Args:
        images: Shape (images, height, width), sides of at least WINDOW.
        references: Same shape.
        data_range: Brightness range of each pair, shape (images,); 0 counts as 1.
    """

    def window_mean(pictures: Tensor) -> Tensor:
        return functional.avg_pool2d(pictures.unsqueeze(1), WINDOW, stride=1).squeeze(1)

    # In double precision: variances are differences of nearly equal numbers.
    x, y = images.double(), references.double()
    limits = torch.where(data_range == 0, 1.0, data_range).double()[:, None, None]
    mean_x, mean_y = window_mean(x), window_mean(y)
    unbiased = WINDOW**2 / (WINDOW**2 - 1)
    var_x = unbiased * (window_mean(x * x) - mean_x**2)
    var_y = unbiased * (window_mean(y * y) - mean_y**2)
    covariance = unbiased * (window_mean(x * y) - mean_x * mean_y)
    c1, c2 = (_K1 * limits) ** 2, (_K2 * limits) ** 2
    luminance = (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1)
    structure = (2 * covariance + c2) / (var_x + var_y + c2)
    return (luminance * structure).mean(dim=(1, 2)).clamp(-1, 1)
