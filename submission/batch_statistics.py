"""Running batch statistics that fit the weights to be evaluated.

Training collects the statistics of the training weights. Averaged weights give other activations,
and a batch norm that normalises them with the old numbers can cost more than averaging gains. So
the model looks at the last few batches once more before an evaluation, on the clock.

A running statistic that keeps the share s of its old value over these passes ends at s old + (1 - s) new,
new being the mean over the passes. It is solved for new: nothing of the old weights is left, and a few
passes do what decay alone would take thirty for, or three thousand.

A resumed run has none of the batches of before, and may be evaluated after its first step. But its
checkpoint was taken at an evaluation: its statistics are those of averaged weights and stand for the
batches they were made of. As long as c of these would still be kept beside the k new ones, statistics
become (c old + k new) / (c + k), so that no single batch decides an evaluation.

Ranks look at batches of their own, and DDP gives all of them the statistics of rank 0 before the first pass
alone. So statistics are averaged over ranks before the passes, where they then count as the old ones on all
ranks alike, and behind them: every rank evaluates the same model, which has seen the batches of all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .objective import averaged_over_ranks, logits_of

#: Recent batches that are kept, and looked at once each.
KEPT_BATCHES = 8


class Kept(NamedTuple):
    """What batch statistics can be made of."""

    batches: list[Mapping[str, Any]]
    """The oldest first."""
    num_carried: int = 0
    """Earlier batches that are gone, but that the model's present statistics stand for."""


class RecentBatches:
    """The last few batches by reference, kept only where batch statistics will need them.

    Args:
        model: The model; batches are kept if it has running batch statistics ...
        averaging: ... and other weights are evaluated than trained.
    """

    def __init__(self, model: nn.Module, averaging: bool) -> None:
        self._are_needed = averaging and bool(modules_with_statistics(model))
        self._batches: deque[Mapping[str, Any]] = deque(maxlen=KEPT_BATCHES)
        self._num_loaded = 0

    def keep(self, batch: Mapping[str, Any]) -> None:
        """Keep a batch, or nothing where none is needed."""
        if self._are_needed:
            self._batches.append(batch)

    def kept(self) -> Kept:
        """Return the kept batches, and how many more there would be had the run not been resumed."""
        missing = KEPT_BATCHES - len(self._batches)
        return Kept(list(self._batches), min(self._num_loaded, missing))

    def state_dict(self) -> dict[str, Any]:
        """Return how many batches the statistics stand for; batches themselves are not saved."""
        return {"num_batches": len(self._batches) + self.kept().num_carried}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Start without batches beside statistics that stand for some; for all if nothing is said."""
        self._num_loaded = int(state.get("num_batches", KEPT_BATCHES))
        self._batches.clear()


class _Statistics(NamedTuple):
    """Running statistics of a module at some time."""

    mean: Tensor
    variance: Tensor
    num_updates: int | None
    """Ever made; None where the module does not count."""


def modules_with_statistics(model: nn.Module) -> list[nn.Module]:
    """Return the modules that keep a running mean and variance of what they see in training."""
    return [
        module for module in model.modules() if getattr(module, "running_mean", None) is not None
    ]


@torch.no_grad()
def refresh(
    workload: Any,
    model: nn.Module,
    model_state: Any,
    kept: Kept,
    rng: Any,
    dropout_rate: float | None,
) -> Any:
    """Replace the model's batch statistics by those of kept batches; return the new model state.

    Statistics stay as they are without batches, and in part with as few as a resumed run has at first.
    """
    batches = kept.batches
    if not batches:
        return model_state
    carried_share = kept.num_carried / (kept.num_carried + len(batches))
    modules: list[Any] = modules_with_statistics(model)
    _average_over_ranks(modules)
    old = [_statistics(module) for module in modules]
    for batch in batches:
        _, model_state = logits_of(workload, model, model_state, batch, rng, dropout_rate)
    for module, before in zip(modules, old, strict=True):
        share = kept_share(module, before.num_updates, len(batches))
        if share < 1.0:
            _remove(module.running_mean, before.mean, share).lerp_(before.mean, carried_share)
            variance = _remove(module.running_var, before.variance, share).clamp_min_(0.0)
            variance.lerp_(before.variance, carried_share)
    _average_over_ranks(modules)
    return model_state


def _average_over_ranks(modules: Sequence[Any]) -> None:
    """Give all ranks the same statistics, the means of theirs."""
    running = [stat for module in modules for stat in (module.running_mean, module.running_var)]
    averages = averaged_over_ranks(torch.cat([stat.flatten() for stat in running]))
    for stat, average in zip(running, averages.split([s.numel() for s in running]), strict=True):
        stat.copy_(average.view_as(stat))


def kept_share(module: Any, updates_before: int | None, num_passes: int) -> float:
    """Return the share of the old statistics in a module's present ones, in [0, 1].

    Args:
        module: With an update rate `momentum`; None is torch's cumulative average.
        updates_before: How many updates the module had counted; None if it does not count, then each
            pass is taken for one.
        num_passes: Forward passes since.
    """
    updates = num_passes
    if updates_before is not None:
        updates = int(module.num_batches_tracked) - updates_before
    if module.momentum is None:
        return (updates_before or 0) / max((updates_before or 0) + updates, 1)
    return float((1.0 - module.momentum) ** updates)


def _statistics(module: Any) -> _Statistics:
    tracked = getattr(module, "num_batches_tracked", None)
    num_updates = None if tracked is None else int(tracked)
    return _Statistics(module.running_mean.clone(), module.running_var.clone(), num_updates)


def _remove(statistic: Any, old: Tensor, share: float) -> Tensor:
    """Solve ``statistic = share * old + (1 - share) * new`` for new, in place."""
    solved: Tensor = statistic.sub_(old, alpha=share).div_(1.0 - share)
    return solved
