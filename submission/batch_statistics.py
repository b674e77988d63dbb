"""Running batch statistics that fit the weights to be evaluated.

Training collects the statistics of the training weights. Averaged weights give other activations,
and a batch norm that normalises them with the old numbers can cost more than averaging gains. So
the model looks at a few recent batches once more before an evaluation, on the clock.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from .objective import logits_of

#: Recent batches that are kept.
KEPT_BATCHES = 8
#: Forward passes go on until the old statistics weigh no more than this ...
OLD_SHARE = 0.05
#: ... but never for longer than this.
MOST_PASSES = 32


class RecentBatches:
    """The last few batches by reference, kept only where batch statistics will need them.

    Args:
        model: The model; batches are kept if it has running batch statistics ...
        averaging: ... and other weights are evaluated than trained.
    """

    def __init__(self, model: nn.Module, averaging: bool) -> None:
        self._momenta = momenta(model) if averaging else []
        self._batches: deque[Mapping[str, Any]] = deque(maxlen=KEPT_BATCHES)

    def keep(self, batch: Mapping[str, Any]) -> None:
        """Keep a batch, or nothing where none is needed."""
        if self._momenta:
            self._batches.append(batch)

    def in_turn(self) -> list[Mapping[str, Any]]:
        """Return the kept batches, over and over, as often as the statistics need."""
        if not self._batches:
            return []
        passes = passes_needed(self._momenta)
        return [self._batches[index % len(self._batches)] for index in range(passes)]

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a resumed run has new batches before its next evaluation."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back nothing."""
        del state
        self._batches.clear()


def momenta(model: nn.Module) -> list[float]:
    """Return the update rate of every running mean in the model, in (0, 1].

    A rate of None, torch's cumulative average, counts as slow: it never forgets.
    """
    rates: list[Any] = [
        module.momentum
        for module in model.modules()
        if getattr(module, "running_mean", None) is not None
    ]
    return [0.0 if rate is None else float(rate) for rate in rates]


def passes_needed(rates: Iterable[float]) -> int:
    """Return how many updates bring the share of old statistics down to `OLD_SHARE`.

    >>> passes_needed([0.1]), passes_needed([1.0]), passes_needed([0.001])
    (29, 1, 32)
    """
    slowest = min(rates)
    if slowest >= 1.0 - OLD_SHARE:
        return 1
    if slowest <= 0.0:
        return MOST_PASSES
    return min(MOST_PASSES, math.ceil(math.log(OLD_SHARE) / math.log1p(-slowest)))


@torch.no_grad()
def refresh(
    workload: Any,
    model: nn.Module,
    model_state: Any,
    batches: Iterable[Mapping[str, Any]],
    rng: Any,
    dropout_rate: float | None,
) -> Any:
    """Run the model forward on `batches` for its batch statistics; return the new model state."""
    for batch in batches:
        _, model_state = logits_of(workload, model, model_state, batch, rng, dropout_rate)
    return model_state
