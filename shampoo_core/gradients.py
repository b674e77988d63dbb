"""The gradients of one step as stacks, and the guard that keeps bad ones out.

A block whose gradient is missing or not finite (or too long to be squared: 2e16 in float32) is *closed*
for this step: its parameters do not move
and its statistics stay as they were. Missing gradients are known on the host; non-finite ones only on
the device, where they are found, zeroed and counted without the host ever waiting.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from shampoo_core.stacks import StackSet


@dataclass(frozen=True)
class StackedGradients:
    """Gradients of one step, finite everywhere."""

    stacks: list[Tensor]
    """One (N, *block shape) tensor per stack; zero for closed blocks."""
    is_open: Tensor
    """Block vector: 1 where the block has a finite gradient, else 0; valid during the step."""
    presence: Tensor | None
    """Block vector: 1 where the parameter has a gradient at all; None when all have."""
    missing: tuple[int, ...] = ()
    """The parameters of the set that have none, by number in their group."""
    all_seen_open: bool = False
    """Whether the host has seen that every block is open; never where it would have to wait for that."""

    def decaying(self, *, corrected: bool) -> Tensor | None:
        """Block vector: 1 where an average decays at this step, else 0; None means in all blocks.

        Args:
            corrected: Whether the average is divided by its weight, which decays with it, so that a
                gradient that is not finite changes nothing. Without, such a block has to be left alone.
        """
        return self.presence if corrected else self.is_open

    def free_stacks(self) -> None:
        """Let go of the stacks after their last use: the rest of a step needs memory too."""
        self.stacks.clear()  # whoever handed the list on has the same one


def largest_gradient(dtype: torch.dtype) -> float:
    """Squares of norms up to this can be summed a million times without overflow."""
    return math.sqrt(torch.finfo(dtype).max) / 1024


class GradientGuard:
    """Closes blocks, and counts the ones whose gradient was not finite."""

    def __init__(self, stack_set: StackSet) -> None:
        """Start with nothing counted.

        Args:
            stack_set: Geometry of the gradients.
        """
        self._stack_set = stack_set
        self.num_non_finite = torch.zeros(
            stack_set.num_blocks, dtype=torch.int64, device=stack_set.device
        )
        """Per block, how many steps it sat out because its gradient was not finite."""
        self._is_open = stack_set.block_vector()
        self._ones = stack_set.block_vector(1.0)
        self._limit = largest_gradient(stack_set.dtype)
        self._pattern: tuple[bool, ...] = ()
        self._presence: Tensor | None = None
        self._missing: tuple[int, ...] = ()

    def close_bad_blocks(
        self, stacks: list[Tensor], gradients: Sequence[Tensor | None]
    ) -> StackedGradients:
        """Zero the blocks whose gradient is not finite and mark those that have none.

        Args:
            stacks: Gradients as stacks; changed in place.
            gradients: The same by parameter of the group, None where there is none.

        Returns:
            The guarded gradients.
        """
        presence = self._presence_of(gradients)
        if presence is None and self._are_seen_to_be_good(stacks):
            return StackedGradients(stacks, self._ones, None, all_seen_open=True)
        # A NaN compares false, so one comparison finds NaN, infinity, and what would become infinity
        # in a second moment and stay there for good. Written to a float tensor it is 1 or 0. On a CPU
        # torch takes twenty times as long for the largest entry as for the Euclidean norm.
        is_open = torch.lt(self._stack_set.norms(stacks), self._limit, out=self._is_open)
        self.num_non_finite += is_open == 0
        if presence is not None:
            is_open = is_open * presence
        # Zero times NaN is NaN. Both are faster than filling under a mask, and two operations for all.
        # A compiler makes one of many by itself, and does not know what lies behind the first stack.
        is_compiling = torch.compiler.is_compiling()
        for numbers in stacks if is_compiling else [self._stack_set.flat(stacks)]:
            numbers.nan_to_num_(0.0, 0.0, 0.0)
        torch._foreach_mul_(stacks, self._stack_set.split(is_open))
        return StackedGradients(stacks, is_open, presence, self._missing)

    def _are_seen_to_be_good(self, stacks: Sequence[Tensor]) -> bool:
        """Whether all blocks together are finite and short enough, as far as that is known without waiting.

        On a CPU the answer is there, one pass over the gradients that saves two.
        """
        flat = self._stack_set.flat(stacks)
        if flat.device.type != "cpu" or torch.compiler.is_compiling():
            return False
        return bool(torch.linalg.vector_norm(flat) < self._limit)

    def _presence_of(self, gradients: Sequence[Tensor | None]) -> Tensor | None:
        """Presence vector, made anew only when another set of parameters has gradients."""
        pattern = tuple(gradients[p] is not None for p in self._stack_set.parameters)
        if pattern != self._pattern:
            self._pattern = pattern
            self._presence = None if all(pattern) else self._stack_set.presence(gradients)
            self._missing = tuple(p for p in self._stack_set.parameters if gradients[p] is None)
        return self._presence
