"""Merge small dimensions, cut a parameter into blocks, run one reference per block.

ALGORITHMS.md 1.1. The threshold T of merging is the block size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .algebra import Array

Slices = tuple[slice, ...]


def merge_dims(
    shape: tuple[int, ...],
    threshold: float,
    target_order: float = 1,
    direction: str = "right_to_left",
) -> tuple[int, ...]:
    """The shape after merging neighbouring dimensions whose product is <= ``threshold``.

    Args:
        shape: Of the parameter.
        threshold: T, may be ``math.inf``.
        target_order: Merging stops when this many dimensions are left (right to left only);
            ``math.inf`` keeps the shape as it is.
        direction: "right_to_left", or "left_to_right" as in the v0.5 entry.
    """
    if direction not in ("right_to_left", "left_to_right"):
        raise ValueError(f"direction must be right_to_left or left_to_right, got {direction!r}")
    if direction == "left_to_right" and target_order not in (1, math.inf):
        raise ValueError(f"left_to_right has no target_order, got {target_order}")
    if 0 in shape:
        return (0,)
    if target_order == math.inf:
        return shape
    dims = [d for d in shape if d != 1] or [1]
    if direction == "left_to_right":
        dims.reverse()
    merged = [dims.pop()]
    while dims:
        too_many = len(merged) + len(dims) > target_order
        d = dims.pop()
        if too_many and d * merged[-1] <= threshold:
            merged[-1] *= d
        else:
            merged.append(d)
    return tuple(merged if direction == "left_to_right" else reversed(merged))


def chunk_sizes(d: int, size: float, cut: str = "greedy") -> list[int]:
    """Sizes of the chunks of an axis of length ``d``, in order.

    "greedy": chunks of ``size``, the last one smaller. "balanced": ``ceil(d / size)`` chunks that
    differ by at most one, the larger ones first.
    """
    if cut not in ("greedy", "balanced"):
        raise ValueError(f'cut must be "greedy" or "balanced", got {cut!r}')
    if d <= size:
        return [d] if d else []
    whole = int(size)
    count = math.ceil(d / whole)
    if cut == "balanced":
        return [d // count + (i < d % count) for i in range(count)]
    return [min(whole, d - i * whole) for i in range(count)]


def block_slices(shape: tuple[int, ...], size: float, cut: str = "greedy") -> list[Slices]:
    """Index of every block of an array of ``shape``, in row-major order of the blocks."""
    per_axis = []
    for d in shape:
        ends = list(itertools.accumulate(chunk_sizes(d, size, cut)))
        per_axis.append([slice(a, b) for a, b in zip([0, *ends], ends, strict=False)])
    return list(itertools.product(*per_axis))


class Blocked:
    """One optimizer per block of a parameter; nothing is shared between blocks.

    Args:
        parameter: Start value, any shape.
        make: Builds the optimizer of a block from its start value, for example
            ``lambda block: Shampoo(block, lr=0.1)``.
        max_block_size: T, may be ``math.inf``.
        target_order: See ``merge_dims``.
        merge: Direction, see ``merge_dims``.
        cut: See ``chunk_sizes``.

    Attributes:
        methods: The optimizers, in row-major order of the blocks.
    """

    def __init__(
        self,
        parameter: Array,
        make: Callable[[Array], Any],
        *,
        max_block_size: float,
        target_order: float = 1,
        merge: str = "right_to_left",
        cut: str = "greedy",
    ) -> None:
        start = np.array(parameter, dtype=np.float64)
        self.shape = start.shape
        self.merged_shape = merge_dims(self.shape, max_block_size, target_order, merge)
        self.slices = block_slices(self.merged_shape, max_block_size, cut)
        viewed = start.reshape(self.merged_shape)
        self.methods = [make(viewed[index]) for index in self.slices]

    def assemble(self, blocks: list[Array]) -> Array:
        """Put blocks together to an array of the parameter's shape."""
        whole = np.empty(self.merged_shape)
        for index, block in zip(self.slices, blocks, strict=True):
            whole[index] = block
        return whole.reshape(self.shape)

    @property
    def parameter(self) -> Array:
        """The weights that gradients are taken at."""
        return self.assemble([method.parameter for method in self.methods])

    @property
    def evaluation(self) -> Array:
        """The weights to evaluate, where the optimizers of the blocks average."""
        return self.assemble([method.evaluation for method in self.methods])

    def step(self, gradient: Array | None, lr: float | None = None) -> Array:
        """One step of every block; return the new parameter."""
        if gradient is None:
            return self.assemble([method.step(None, lr) for method in self.methods])
        viewed = np.asarray(gradient, dtype=np.float64).reshape(self.merged_shape)
        return self.assemble(
            [
                method.step(viewed[index], lr)
                for index, method in zip(self.slices, self.methods, strict=True)
            ]
        )
