"""Counts the operations that torch dispatches, and host synchronisations among them."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

NOT_FLAGGED_AS_VIEWS = frozenset({"aten::_unsafe_view", "aten::lift_fresh"})
SYNCHRONISATIONS = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::nonzero"})


class OpCounter(TorchDispatchMode):
    """``with OpCounter() as ops: ...``; then ``ops.num_kernels`` and ``ops.num_synchronisations``."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if not func.is_view and func.name() not in NOT_FLAGGED_AS_VIEWS:
            self.counts[func.name()] += 1
        return func(*args, **(kwargs or {}))

    @property
    def num_kernels(self) -> int:
        """Operations that are not views."""
        return self.counts.total()

    @property
    def num_synchronisations(self) -> int:
        """Operations that wait for the device."""
        return sum(n for name, n in self.counts.items() if name in SYNCHRONISATIONS)
