"""What an optimizer is in the middle of.

One object of its own: Lightning and Fabric wrap an optimizer in another one that shares the attributes it
finds, so that a flag set through the wrapper would be seen by the wrapper alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass
class Status:
    """Flags of an optimizer, and what it keeps for a while."""

    evaluates: bool = False
    """Whether parameters hold the weights to evaluate."""
    replicas_checked: bool = False
    """Whether ranks were seen to hold the same weights."""
    gathered: dict[tuple[int, str], Tensor] | None = None
    """State of the blocks of other ranks, on rank 0 between `gather_state` and the next step."""
