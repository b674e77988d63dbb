"""What a piece of code asks of a device: operations, synchronisations, arithmetic, bytes.

`OperationCounter` sees every operation that torch dispatches, the ones inside others included. On the
"meta" device it counts a step of a model of any size in milliseconds, for nothing is computed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_core.costs import EIGH_FLOPS_PER_CUBE

NOT_FLAGGED_AS_VIEWS = frozenset({"aten::_unsafe_view", "aten::lift_fresh"})
SYNCHRONISATIONS = frozenset({"aten::_local_scalar_dense", "aten::item", "aten::nonzero"})
QR_FLOPS_PER_CUBE = 16.0 / 3.0
"""Householder QR of a square matrix with its orthogonal factor formed: 4/3 for R, 4 for Q."""


class OperationCounter(TorchDispatchMode):
    """``with OperationCounter() as counted: ...``, then read its numbers.

    On the "meta" device a value that is asked for is answered with 0 or False: a test on the device
    for something gone wrong is answered that nothing has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        """Operations by name, views left out."""
        self.flops = 0.0
        """Multiplications and additions of matrix products and decompositions."""
        self.bytes_moved = 0
        """Bytes of every operation's arguments and results: traffic without any cache."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operation and run it."""
        del types
        kwargs = kwargs or {}
        name = func.name()
        if func.is_view or name in NOT_FLAGGED_AS_VIEWS:
            return func(*args, **kwargs)
        self.counts[name] += 1
        if name == "aten::_local_scalar_dense" and args[0].is_meta:
            return False if args[0].dtype == torch.bool else 0
        result = func(*args, **kwargs)
        self.flops += matrix_flops(name, args)
        touched = [*_tensors(args), *_tensors(kwargs.values()), *_tensors((result,))]
        self.bytes_moved += sum(tensor.numel() * tensor.element_size() for tensor in touched)
        return result

    @property
    def num_operations(self) -> int:
        """Operations that are not views; on a GPU each is at least one kernel."""
        return self.counts.total()

    @property
    def num_synchronisations(self) -> int:
        """Operations that make the host wait for the device."""
        return sum(n for name, n in self.counts.items() if name in SYNCHRONISATIONS)


def matrix_flops(name: str, args: Any) -> float:
    """Floating-point operations of a matrix product or decomposition; 0 for everything else.

    Args:
        name: Of the operation, such as "aten::bmm".
        args: Its arguments.
    """
    operation = name.removeprefix("aten::").split(".")[0].rstrip("_")
    if operation in ("bmm", "mm"):
        return 2.0 * args[0].numel() * args[1].shape[-1]
    if operation in ("baddbmm", "addmm"):
        return 2.0 * args[1].numel() * args[2].shape[-1]
    if operation == "_linalg_eigh":
        return EIGH_FLOPS_PER_CUBE * _cubes(args[0])
    if operation == "linalg_qr":
        return QR_FLOPS_PER_CUBE * _cubes(args[0])
    return 0.0


def _cubes(matrices: Tensor) -> float:
    return math.prod(matrices.shape[:-2]) * float(matrices.shape[-1]) ** 3


def _tensors(values: Any) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)
