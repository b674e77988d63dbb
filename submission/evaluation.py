"""Evaluate averaged weights, train on the others, lose neither.

The harness evaluates, and saves its checkpoint, with the evaluation weights in the model. The
training weights are therefore kept here, bit for bit, and travel in the checkpoint beside the
model: a run that is killed after a save goes on from them.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor


class AveragingOptimizer(Protocol):
    """An optimizer that can put its evaluation weights into the parameters."""

    param_groups: list[dict[str, Any]]

    def train(self) -> None:
        """Put the training weights into the parameters."""

    def eval(self) -> None:
        """Put the evaluation weights into the parameters."""


class EvaluationWeights:
    """Swaps evaluation weights in and training weights back.

    Args:
        optimizer: Says what the evaluation weights are.
        averaging: Whether they differ from the training weights. Without averaging both swaps do
            nothing and copy nothing.
    """

    def __init__(self, optimizer: AveragingOptimizer, averaging: bool) -> None:
        self._optimizer = optimizer
        self._averaging = averaging
        self._training_weights: list[Tensor] = []

    @torch.no_grad()
    def swap_in(self) -> None:
        """Put the evaluation weights into the model; a second call changes nothing."""
        if self._averaging and not self._training_weights:
            self._training_weights = [weight.detach().clone() for weight in self._weights()]
            self._optimizer.eval()

    @torch.no_grad()
    def restore(self) -> None:
        """Put the training weights back, exactly as they were, if they were swapped out."""
        if not self._training_weights:
            return
        # First the optimizer, for its own book-keeping: its way back may round.
        self._optimizer.train()
        for weight, kept in zip(self._weights(), self._training_weights, strict=True):
            weight.copy_(kept)
        self._training_weights = []

    def state_dict(self) -> dict[str, list[Tensor]]:
        """Return the training weights if they are swapped out, in the optimizer's order."""
        return {"training_weights": list(self._training_weights)}

    def load_state_dict(self, state: dict[str, list[Tensor]]) -> None:
        """Take the state of a saved run.

        Raises:
            ValueError: The weights are not those of this model, or the saved run averaged weights
                and this one does not.
        """
        kept = state["training_weights"]
        if kept and not self._averaging:
            raise ValueError(
                "the checkpoint holds averaged weights, but this setting does not average: "
                "resume with the hyperparameters of the saved run"
            )
        shapes = [tuple(weight.shape) for weight in kept]
        wanted = [tuple(weight.shape) for weight in self._weights()]
        if kept and shapes != wanted:
            raise ValueError(
                "the checkpoint's training weights do not fit this model: "
                f"shapes {shapes} saved, {wanted} needed"
            )
        self._training_weights = [weight.clone() for weight in kept]

    def _weights(self) -> list[Tensor]:
        return [weight for group in self._optimizer.param_groups for weight in group["params"]]
