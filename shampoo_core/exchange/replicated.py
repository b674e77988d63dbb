"""Every rank holds every parameter and its gradient: plain parameters, or wrapped by DDP.

Collecting is slicing. Delivering is one all-gather: the message of a rank holds the updates of all its
blocks, and whoever receives the messages adds them to the parameters.

    rank 0:  | blocks of rank 0     |
    rank 1:  | blocks of rank 1 |pad|     all-gather     every rank adds all of them
    rank 2:  | blocks of rank 2  |pad|

State exists at the owner alone.

Source: Shi et al. 2023 (arXiv 2309.06497), section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from shampoo_core.blocking import Shape
from shampoo_core.exchange.base import Collected, Request, Result, locals_of, slices
from shampoo_core.exchange.collectives import start_all_gather
from shampoo_core.exchange.division import Division, divide
from shampoo_core.exchange.wire import WireFormat, wire_format
from shampoo_core.stacks import StackSet, add_tiles


class ReplicatedExchange:
    """Shares the work on replicated parameters among the ranks of a process group."""

    def __init__(
        self,
        group: dist.ProcessGroup,
        *,
        communication_dtype: torch.dtype | None = None,
        overlap: bool = False,
    ) -> None:
        """Start with nothing to do for any rank.

        Args:
            group: Ranks that share the work; other groups do the same work again.
            communication_dtype: See `Distribution`.
            overlap: See `Distribution`.
        """
        self._group = group
        self._rank = dist.get_rank(group)
        self._num_ranks = self.num_messages = dist.get_world_size(group)
        self._communication_dtype = communication_dtype
        self._overlap = overlap
        self.loads = [0.0] * self._num_ranks

    def divide(self, whole: StackSet, cost_of: Callable[[Shape], float]) -> Division:
        """See `Exchange`; balances what it is asked about on top of what it was asked before."""
        return divide(whole, cost_of, self.loads, self._rank)

    def __deepcopy__(self, memo: object) -> ReplicatedExchange:
        """Copies of an optimizer use the same process group."""
        return self

    def collect(self, requests: Sequence[Request]) -> Iterator[Collected]:
        """See `Exchange`; slices, one request at a time."""
        return map(slices, requests)

    @torch.compiler.disable  # no compiler follows what ranks send each other
    def deliver(self, results: Iterable[Result], *, exact: bool = False) -> None:
        """See `Exchange`; one all-gather per device and dtype, or per result with overlap."""
        if self._overlap:
            mails = [self._send([result], exact=exact) for result in results]
        else:
            bundles: dict[tuple[torch.device, torch.dtype], list[Result]] = {}
            for result in results:
                whole = result.division.whole
                bundles.setdefault((whole.device, whole.dtype), []).append(result)
            mails = [self._send(bundle, exact=exact) for bundle in bundles.values()]
        for mail in mails:
            mail.work.wait()
            self._add(mail)

    def _send(self, results: list[Result], *, exact: bool) -> _Mail:
        """Start the all-gather of the updates of some results."""
        whole = results[0].division.whole
        wanted = whole.dtype if exact else self._communication_dtype or whole.dtype
        wire = wire_format(wanted)
        lengths = [
            [wire.length(result.division.by_rank[rank]) for result in results]
            for rank in range(self._num_ranks)
        ]
        message = torch.empty(max(map(sum, lengths)), dtype=wire.dtype, device=whole.device)
        start = 0
        for result, length in zip(results, lengths[self._rank], strict=True):
            part = message[start : start + length]
            updates = result.to_add()
            if updates is None:
                part.zero_()
            else:
                wire.write(result.division.own, updates, part)
            start += length
        messages = message.new_empty(self._num_ranks * len(message))
        work = start_all_gather(messages, message, self._group)
        return _Mail(results, wire, lengths, messages.view(self._num_ranks, -1), work)

    def _add(self, mail: _Mail) -> None:
        """Add what arrived from all ranks to the parameters."""
        starts = [0] * self._num_ranks
        for index, result in enumerate(mail.results):
            tiles, slots = [], []
            for rank, stack_set in enumerate(result.division.by_rank):
                length = mail.lengths[rank][index]
                part = mail.messages[rank, starts[rank] : starts[rank] + length]
                starts[rank] += length
                if stack_set.num_blocks:
                    tiles += stack_set.tiles
                    slots += stack_set.tile_slots(mail.wire.read(stack_set, part))
            held = locals_of(result.parameters, result.division.whole.parameters)
            add_tiles(held, tiles, slots)


class _Mail(NamedTuple):
    """An all-gather under way."""

    results: list[Result]
    wire: WireFormat
    lengths: list[list[int]]
    """Per rank and result: numbers in its part of the message."""
    messages: Tensor
    """(ranks, longest message)."""
    work: Any
    """Has ``wait()``."""
