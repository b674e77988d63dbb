"""What the guards on the device counted, read at a time of the caller's choosing.

Nothing in a step waits for these counters. Reading them is one host synchronisation, which belongs next
to an evaluation or a log line.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_core.optimizer import DistributedShampoo

LOGGER = logging.getLogger("shampoo_core")


@dataclass(frozen=True)
class HealthReport:
    """Totals over all blocks of an optimizer."""

    non_finite_gradients: int
    """Steps that blocks sat out because their gradient was not finite."""
    failed_refreshes: int
    """Refreshes of factors that kept the old root or basis because the new one was no good."""
    refreshes: int
    """Refreshes of factors that gave a new root or basis."""

    def since(self, earlier: HealthReport) -> HealthReport:
        """What was counted after an earlier report."""
        return HealthReport(
            self.non_finite_gradients - earlier.non_finite_gradients,
            self.failed_refreshes - earlier.failed_refreshes,
            self.refreshes - earlier.refreshes,
        )


def health_report(optimizer: torch.optim.Optimizer) -> HealthReport:
    """Read the counters of a `DistributedShampoo`; one host synchronisation per device.

    Args:
        optimizer: Whose counters to read.

    Raises:
        TypeError: It is another optimizer, which counts nothing.
    """
    if not isinstance(optimizer, DistributedShampoo):
        raise TypeError(
            f"health_report: optimizer must be a DistributedShampoo, got {type(optimizer).__name__}, which "
            "keeps no counters"
        )
    names = (".guard.non_finite", ".failures.", ".refreshes.")
    return HealthReport(*_totals(optimizer, names))


def log_health(
    optimizer: torch.optim.Optimizer, earlier: HealthReport | None = None
) -> HealthReport:
    """Warn once about what went wrong since an earlier report; silent where nothing did.

    Args:
        optimizer: Whose counters to read.
        earlier: What the last call returned; None counts from the start.

    Returns:
        The totals, for the next call.
    """
    report = health_report(optimizer)
    news = report if earlier is None else report.since(earlier)
    if news.non_finite_gradients or news.failed_refreshes:
        LOGGER.warning(
            "blocks sat out %d steps for gradients that were not finite; "
            "%d of %d refreshes kept the old root or basis",
            news.non_finite_gradients,
            news.failed_refreshes,
            news.failed_refreshes + news.refreshes,
        )
    return report


def _totals(optimizer: torch.optim.Optimizer, names: Sequence[str]) -> list[int]:
    """Sums of all counters whose name contains one of ``names``; each device is asked once."""
    counters: dict[torch.device, list[list[Tensor]]] = {}
    for entries in optimizer.state.values():
        for key, value in entries.items():
            for index, name in enumerate(names):
                # Bases that roots are made in are refreshed with these.
                if name in key and ".basis." not in key:
                    kinds = counters.setdefault(value.device, [[] for _ in names])
                    kinds[index].append(value)
    totals = [0] * len(names)
    for device, kinds in counters.items():
        nothing = torch.zeros((), dtype=torch.int64, device=device)
        sums = torch.stack([torch.stack([nothing, *kind]).sum() for kind in kinds])
        totals = [a + b for a, b in zip(totals, sums.tolist(), strict=True)]
    return totals
