"""Losses in the benchmark's form: summed, number of valid examples, and per example.

Each takes an optional mask of weights. An element of weight zero adds nothing to the sum or the count,
even where its loss is not finite, nor to a gradient where its logits are.
"""

import torch
from torch import Tensor
from torch.nn import functional


def masked_loss(elementwise: Tensor, weights: Tensor | None) -> dict[str, Tensor]:
    """Weight losses and sum them up.

    Args:
        elementwise: Loss of each example or token, any shape.
        weights: Same shape or None for all ones.

    Returns:
        'summed' (scalar), 'n_valid_examples' (scalar, sum of weights), 'per_example'.
    """
    if weights is None:
        count = torch.tensor(elementwise.numel(), device=elementwise.device)
        return {"summed": elementwise.sum(), "n_valid_examples": count, "per_example": elementwise}
    weights = weights.reshape(elementwise.shape)
    weighted = torch.where(weights != 0, elementwise * weights, 0.0)
    return {
        "summed": weighted.sum(),
        "n_valid_examples": weights.sum(),
        "per_example": weighted,
    }


def softmax_cross_entropy(
    labels: Tensor, logits: Tensor, weights: Tensor | None, label_smoothing: float
) -> dict[str, Tensor]:
    """Cross-entropy of integer or one-hot labels over the last dimension of the logits.

    Args:
        labels: Shape (batch, ...) of class indices, or that of the logits for probabilities.
        logits: Shape (batch, ..., classes).
        weights: Shape (batch, ...) or None.
        label_smoothing: Mass spread evenly over the classes, in [0, 1].
    """
    classes_second = logits if logits.ndim == 2 else logits.movedim(-1, 1)
    if labels.ndim == logits.ndim:
        labels = labels if logits.ndim == 2 else labels.movedim(-1, 1)
    elementwise = functional.cross_entropy(
        classes_second, labels, reduction="none", label_smoothing=label_smoothing
    )
    return masked_loss(elementwise, weights)
