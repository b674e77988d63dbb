"""How parts of the optimizer show their state: per stack, a flat dict of tensors stacked by block.

Index ``b`` of the first dimension of every such tensor belongs to block ``b`` of the stack, so that the
state of one block is a view of each tensor and a checkpoint can be keyed by parameter and block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor

StackState = list[dict[str, Tensor]]
"""One dict per stack: name -> tensor of shape (N, ...)."""


def stacked_state(num_stacks: int, tensors: Mapping[str, Sequence[Tensor]]) -> StackState:
    """Turn ``{name: [one tensor per stack]}`` into a `StackState`."""
    return [{name: per_stack[i] for name, per_stack in tensors.items()} for i in range(num_stacks)]


def merge_states(num_stacks: int, parts: Mapping[str, StackState]) -> StackState:
    """Join the states of several parts, prefixing names with ``<part>.`` unless the part is ""."""
    merged: StackState = [{} for _ in range(num_stacks)]
    for part, state in parts.items():
        for into, stack in zip(merged, state, strict=True):
            prefix = f"{part}." if part else ""
            into.update({prefix + name: tensor for name, tensor in stack.items()})
    return merged
