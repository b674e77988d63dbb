"""What a piece of code asks of a device: operations, synchronisations, arithmetic, bytes.

`OperationCounter` sees every operation that torch dispatches, the ones inside others included. On the
"meta" device it counts a step of a model of any size in milliseconds, for nothing is computed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from shampoo_core.costs import EIGH_FLOPS_PER_CUBE
from shampoo_core.live_memory import tensors_in

NOT_FLAGGED_AS_VIEWS = frozenset({"aten::_unsafe_view", "aten::lift_fresh"})
READS = {Tensor.tolist: "Tensor.tolist", Tensor.numpy: "Tensor.numpy", Tensor.cpu: "Tensor.cpu"}
"""Methods of tensors that bring all of one to the host."""
SYNCHRONISATIONS = frozenset(
    {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", *READS.values()}
)
ALLOCATIONS = ("aten::empty", "aten::new_empty")
"""Begin the names of operations that launch nothing."""
FUSED_TENSORS = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}
"""Tensors that ``_foreach`` takes in one launch, by number of lists, results counted; before CUDA 13."""
CHUNK_NUMEL, FUSED_CHUNKS = 65536, 320
"""They are cut into chunks, and so many are in a launch."""
QR_FLOPS_PER_CUBE = 16.0 / 3.0
"""Householder QR of a square matrix with its orthogonal factor formed: 4/3 for R, 4 for Q."""
FLOPS_PER_CUBE = {
    "_linalg_eigh": EIGH_FLOPS_PER_CUBE,
    "linalg_qr": QR_FLOPS_PER_CUBE,
    "geqrf": 4.0 / 3.0,
    "linalg_householder_product": 4.0,
    "linalg_cholesky_ex": 1.0 / 3.0,
}
"""Of decompositions of square matrices of side d, in units of d^3."""


class Operation(NamedTuple):
    """One dispatched operation."""

    name: str
    """Such as "aten::bmm"."""
    flops: float
    """Multiplications and additions of a matrix product or decomposition; 0 for all others."""
    bytes_moved: int
    """Bytes of its arguments and results."""
    side: int | None = None
    """Side of the matrices of a decomposition; None for all other operations."""
    num_matrices: int = 0
    """How many matrices a decomposition has in its batch."""
    num_kernels: int = 1
    """Kernels that a GPU has to launch, at least: see `_num_kernels`."""


class OperationCounter(TorchDispatchMode):
    """``with OperationCounter() as counted: ...``, then read its numbers.

    On the "meta" device a value that is asked for is answered with 0 or False: a test on the device
    for something gone wrong is answered that nothing has.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        """In order, views left out."""
        self._reads = _ReadsCounter(self.operations)

    def __enter__(self) -> Self:
        """Begin to count."""
        self._reads.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        """Count no more."""
        super().__exit__(*exception)
        self._reads.__exit__(*exception)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Count one operation and run it."""
        del types
        kwargs = kwargs or {}
        name = func.name()
        if func.is_view or name in NOT_FLAGGED_AS_VIEWS:
            return func(*args, **kwargs)
        if name == "aten::_local_scalar_dense" and args[0].is_meta:
            self.operations.append(Operation(name, 0.0, 0))
            return False if args[0].dtype == torch.bool else 0
        result = func(*args, **kwargs)
        # What is given to be written to is among the results.
        given = [value for key, value in kwargs.items() if key != "out"]
        touched = tensors_in((args, given, result))
        num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in touched)
        operation = _operation(name, args, num_bytes)
        self.operations.append(operation._replace(num_kernels=_num_kernels(name, args)))
        return result

    @property
    def counts(self) -> Counter[str]:
        """How often each operation was dispatched."""
        return Counter(operation.name for operation in self.operations)

    @property
    def flops(self) -> float:
        """Multiplications and additions of all matrix products and decompositions."""
        return sum(operation.flops for operation in self.operations)

    @property
    def bytes_moved(self) -> int:
        """Bytes of all arguments and results: traffic without any cache."""
        return sum(operation.bytes_moved for operation in self.operations)

    @property
    def num_operations(self) -> int:
        """Operations that are not views."""
        return len(self.operations)

    @property
    def num_kernels(self) -> int:
        """Kernels that they are on a GPU, at least, by the rules of `_num_kernels`; not measured."""
        return sum(operation.num_kernels for operation in self.operations)

    @property
    def num_synchronisations(self) -> int:
        """Operations that make the host wait for the device."""
        return sum(operation.name in SYNCHRONISATIONS for operation in self.operations)


class _ReadsCounter(TorchFunctionMode):
    """Counts reads of whole tensors by the host, which dispatch nothing on a CPU."""

    def __init__(self, operations: list[Operation]) -> None:
        super().__init__()
        self._operations = operations

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        del types
        if func not in READS:
            return func(*args, **(kwargs or {}))
        self._operations.append(Operation(READS[func], 0.0, args[0].nbytes))
        if func is Tensor.tolist and args[0].is_meta:
            return torch.zeros_like(args[0], device="cpu").tolist()
        return func(*args, **(kwargs or {}))


def _operation(name: str, args: Any, bytes_moved: int) -> Operation:
    """Work out the arithmetic of an operation from its name and arguments."""
    kind = name.removeprefix("aten::").split(".")[0].rstrip("_")
    if kind in ("bmm", "mm"):
        return Operation(name, 2.0 * args[0].numel() * args[1].shape[-1], bytes_moved)
    if kind in ("baddbmm", "addmm"):
        return Operation(name, 2.0 * args[1].numel() * args[2].shape[-1], bytes_moved)
    if kind == "linalg_solve_triangular":
        return Operation(name, 1.0 * args[1].numel() * args[0].shape[-1], bytes_moved)
    if kind in FLOPS_PER_CUBE:
        side, count = args[0].shape[-1], math.prod(args[0].shape[:-2])
        flops = FLOPS_PER_CUBE[kind] * count * float(side) ** 3
        return Operation(name, flops, bytes_moved, side, count)
    return Operation(name, 0.0, bytes_moved)


def _num_kernels(name: str, args: Sequence[Any]) -> int:
    """Kernels of an operation: one, or one for every tensor where ``_foreach`` cannot take them together.

    It can where the tensors of a place in all lists have one dtype, shape and strides, and no gaps: not
    where one is broadcast, or a part of a matrix.

    Source: ``can_use_fast_route`` in torch's ``ForeachUtils.h``, and ``MultiTensorApply.cuh``.
    """
    if name.startswith(ALLOCATIONS):
        return 0
    lists = [
        arg for arg in args if isinstance(arg, list | tuple) and all(map(torch.is_tensor, arg))
    ]
    if not name.startswith("aten::_foreach") or not lists:
        return 1
    if not all(map(_fit_together, *lists)):
        return len(lists[0])
    is_in_place = name.split(".")[0].endswith("_")
    num_lists = len(lists) + (not is_in_place)
    chunks = sum(-(-tensor.numel() // CHUNK_NUMEL) for tensor in lists[0])
    return max(-(-len(lists[0]) // FUSED_TENSORS[num_lists]), -(-chunks // FUSED_CHUNKS))


def _fit_together(*tensors: Tensor) -> bool:
    """Whether tensors have one dtype, shape and strides, and their elements lie side by side."""
    layouts = set()
    for tensor in tensors:
        sides = [pair for pair in zip(tensor.stride(), tensor.shape, strict=True) if pair[1] != 1]
        layouts.add((tensor.dtype, tensor.shape, tuple(sides)))
    if len(layouts) > 1:
        return False
    reach = 1
    for stride, side in sorted(sides):
        if stride != reach:
            return False
        reach *= side
    return True
