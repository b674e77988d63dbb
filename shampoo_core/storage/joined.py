"""Rows of several stacks, one after the other in one tensor, so that one operation reads them all."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from shampoo_core.refresh import FactorSlice

Run = Sequence[FactorSlice]
"""Blocks of one or more stacks that are equally wide, to be had as one tensor."""
Span = tuple[int, int]
"""First row, and one past the last."""


class Joined:
    """Where the rows of every block stand."""

    def __init__(
        self, counts: Sequence[int], widths: Sequence[int], order: Sequence[int] | None = None
    ) -> None:
        """Lay out stacks.

        Args:
            counts: Blocks per stack.
            widths: Rows of a block, per stack.
            order: In which stacks stand behind each other; None takes their own. What stands next to
                each other is read without being copied together first.
        """
        self._counts = list(counts)
        self._widths = list(widths)
        self._starts = [0] * len(self._counts)
        self.total = 0
        """Rows of all stacks."""
        for stack in range(len(self._counts)) if order is None else order:
            self._starts[stack] = self.total
            self.total += self._counts[stack] * self._widths[stack]

    def start(self, item: FactorSlice) -> int:
        """First row of a slice of blocks."""
        return self._starts[item.stack] + item.start * self._widths[item.stack]

    def width(self, run: Run) -> int:
        """Rows of a block of a run."""
        return self._widths[run[0].stack]

    def rows_of(self, runs: Sequence[Run]) -> list[int]:
        """Rows of every run."""
        return [sum(item.stop - item.start for item in run) * self.width(run) for run in runs]

    def spans(self, runs: Sequence[Run]) -> list[Span]:
        """Rows of the runs, in their order; neighbours are one span."""
        joined: list[Span] = []
        for item in itertools.chain.from_iterable(runs):
            first = self.start(item)
            last = first + (item.stop - item.start) * self._widths[item.stack]
            if joined and joined[-1][1] == first:
                joined[-1] = joined[-1][0], last
            else:
                joined.append((first, last))
        return joined

    def by_stack(self, tensor: Tensor) -> list[Tensor]:
        """Views of a tensor of all rows, (N, rows of a block times numbers of a row) per stack."""
        parts = zip(self._starts, self._counts, self._widths, strict=True)
        return [
            tensor[start : start + count * width].view(count, -1) for start, count, width in parts
        ]


def taken(tensor: Tensor, spans: Sequence[Span]) -> Tensor:
    """Some rows of a tensor; a view where they are one span."""
    parts = [tensor[start:stop] for start, stop in spans]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def copy_to(
    tensor: Tensor, spans: Sequence[Span], new: Tensor, where: Tensor | None = None
) -> None:
    """Put rows into the place of others, those where ``where``, (rows,) bool, is false left out."""
    if where is not None:
        wanted = where.view(-1, *[1] * (new.dim() - 1))
        new = torch.where(wanted, new, taken(tensor, spans))
    parts = [tensor[start:stop] for start, stop in spans]
    torch._foreach_copy_(parts, list(new.split([len(part) for part in parts])))


def spread(of_blocks: Sequence[Tensor], widths: Sequence[int]) -> Tensor:
    """One entry per row from one per block: (K,) per run, each repeated for all rows of its block."""
    parts = zip(of_blocks, widths, strict=True)
    return torch.cat([part[:, None].expand(-1, width).reshape(-1) for part, width in parts])
