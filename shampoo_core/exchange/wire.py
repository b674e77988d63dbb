"""In which form updates travel.

| communication dtype    | form                                                                |
|------------------------|---------------------------------------------------------------------|
| that of the arithmetic | as they are                                                         |
| bfloat16, float32      | rounded                                                             |
| float16                | rounded relative to the largest number of their block, with its     |
|                        | exponent: a learning rate would push half of the numbers out of the |
|                        | range of float16 otherwise                                          |
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shampoo_core.stacks import StackSet


class WireFormat(Protocol):
    """Writes stacks into flat messages and reads them back."""

    @property
    def dtype(self) -> torch.dtype:
        """Of a message."""

    def length(self, stack_set: StackSet) -> int:
        """Numbers in the message of a stack set."""

    def write(self, stack_set: StackSet, stacks: Sequence[Tensor], message: Tensor) -> None:
        """Fill a message of that length."""

    def read(self, stack_set: StackSet, message: Tensor) -> list[Tensor]:
        """Stacks of the set's dtype; maybe views of the message."""


class Rounded:
    """Every number by itself."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Send numbers as ``dtype``."""
        self.dtype = dtype

    def length(self, stack_set: StackSet) -> int:
        """See `WireFormat`."""
        return stack_set.numel

    def write(self, stack_set: StackSet, stacks: Sequence[Tensor], message: Tensor) -> None:
        """See `WireFormat`."""
        torch._foreach_copy_(stack_set.views(message), list(stacks))

    def read(self, stack_set: StackSet, message: Tensor) -> list[Tensor]:
        """See `WireFormat`."""
        return stack_set.views(message.to(stack_set.dtype))


class BlockFloat:
    """Numbers of a block relative to a power of two, and its exponent, one per block, at the end."""

    def __init__(self, dtype: torch.dtype) -> None:
        """Send numbers between -1 and 1 as ``dtype``."""
        self.dtype = dtype

    def length(self, stack_set: StackSet) -> int:
        """See `WireFormat`."""
        return stack_set.numel + stack_set.num_blocks

    def write(self, stack_set: StackSet, stacks: Sequence[Tensor], message: Tensor) -> None:
        """See `WireFormat`."""
        numbers, exponents = message.split([stack_set.numel, stack_set.num_blocks])
        # Powers of two: scaling by them is exact. Up to 126, so that their reciprocals are numbers too.
        power = torch.frexp(stack_set.norms(stacks, torch.inf)).exponent.clamp(-126, 126)
        ones = stack_set.block_vector(1.0)
        scaled = torch._foreach_mul(list(stacks), stack_set.split(torch.ldexp(ones, -power)))
        torch._foreach_copy_(stack_set.views(numbers), scaled)
        exponents.copy_(power)

    def read(self, stack_set: StackSet, message: Tensor) -> list[Tensor]:
        """See `WireFormat`."""
        numbers, exponents = message.split([stack_set.numel, stack_set.num_blocks])
        stacks = stack_set.views(numbers.to(stack_set.dtype))
        scales = torch.ldexp(stack_set.block_vector(1.0), exponents.to(torch.int32))
        return list(torch._foreach_mul(stacks, stack_set.split(scales)))


def wire_format(dtype: torch.dtype) -> WireFormat:
    """The form for a communication dtype."""
    return BlockFloat(dtype) if dtype == torch.float16 else Rounded(dtype)
