"""Which exchange a parameter travels by: found out from the parameter and the process group."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch.distributed as dist
from torch import Tensor

from shampoo_core.exchange.agreement import check_agreement, check_replicas
from shampoo_core.exchange.base import Exchange
from shampoo_core.exchange.distribution import Distribution, process_group_of, sharing_group
from shampoo_core.exchange.local import LocalExchange
from shampoo_core.exchange.replicated import ReplicatedExchange


class Exchanges:
    """The exchanges of one optimizer."""

    def __init__(
        self, owner: str, distribution: Distribution | None, facts: Mapping[str, str]
    ) -> None:
        """Look around; a collective of all ranks that train together.

        Args:
            owner: For messages.
            distribution: How to share the work; None means not at all.
            facts: What the ranks have to agree on.

        Raises:
            ValueError: Ranks differ, or ``ranks_per_group`` does not divide their number.
        """
        self._owner = owner
        self.group: dist.ProcessGroup | None = None
        """All ranks that train together; None where there is only one, or each is on its own."""
        self.sharing: dist.ProcessGroup | None = None
        """Those that share the work with this rank."""
        self._plain: Exchange = LocalExchange()
        if distribution is not None:
            self.group = process_group_of(distribution)
        if distribution is not None and self.group is not None:
            self.check_agreement(facts)
            self.sharing = sharing_group(distribution, self.group)
            self._plain = ReplicatedExchange(
                self.sharing,
                communication_dtype=distribution.communication_dtype,
                overlap=distribution.overlap,
            )

    def of(self, parameter: Tensor) -> Exchange:
        """The exchange for a parameter."""
        del parameter
        return self._plain

    def check_agreement(self, facts: Mapping[str, str]) -> None:
        """Raise on all ranks if they differ; a collective."""
        if self.group is not None:
            check_agreement(self._owner, facts, self.group)

    def check_replicas(self, parameters: Sequence[Tensor]) -> None:
        """Raise on all ranks if they hold other weights; a collective that waits for the device."""
        if self.group is not None:
            check_replicas(self._owner, parameters, self.group)

    def __deepcopy__(self, memo: object) -> Exchanges:
        """Copies of an optimizer use the same process groups."""
        return self
