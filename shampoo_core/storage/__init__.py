"""How the matrices that belong to factors, and moments, are kept between steps.

"dense" keeps all numbers. "packed" keeps the upper triangle of a symmetric matrix, d (d + 1) / 2 of d^2
numbers, without loss. "8bit" and "4bit" round, see `shampoo_core.storage.quantization`; in bits per
number, the error of rounding included:

    ==========================  ========  ========
    what is kept                 "8bit"    "4bit"
    ==========================  ========  ========
    factors, half of them        8 + 8     4 + 8
    inverse roots, half of them  8         8
    eigenbases                   8         8
    first moments                8 + 8     8, or 4 + 8 with beta1 > 0.9
    second moments               8 + 8     8 + 8
    ==========================  ========  ========

All but "dense" cost passes over memory: a Gram matrix is formed densely before it is added, and a matrix
is unfolded whenever it is read.

One object keeps one (N, d, d) stack per preconditioned axis, so that what touches many stacks is one
operation. What is coded is decoded a batch of stacks at a time: as many as are dense no larger than
the set's gradients, or a single one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from shampoo_core.config import Storage
from shampoo_core.refresh import FactorStackSize, whole_stacks
from shampoo_core.stacks import StackSet
from shampoo_core.storage.base import FactorStore, MatrixStore, StackStore
from shampoo_core.storage.coded import CodedBases, CodedStacks, CodedSymmetric
from shampoo_core.storage.dense import DenseFactors, DenseMatrices, DenseStacks
from shampoo_core.storage.packed import PackedMatrices
from shampoo_core.storage.quantization import Format

__all__ = [
    "FactorStore",
    "MatrixKind",
    "MatrixStore",
    "MomentKind",
    "StackStore",
    "factor_store",
    "matrix_store",
    "stack_store",
]

CODE_BITS = {"8bit": 8, "4bit": 4}
BASIS_BITS = 8
"""Of eigenbases in either: what four bits leave would have to be made orthogonal again at every use."""
ROOT_BITS = 8
"""Of inverse roots in either: no error is fed back to them, and four bits alone cost 2 % more steps."""
SECOND_MOMENT_BITS = 8
"""Of second moments in either: with four, one with beta2 = 0.999 would stand still."""

QUICK_DECAY = 0.9
"""Averages that forget as fast move further in a step than a code's step, and need no error kept."""
QUICK_MOMENT_BITS = 8
"""Of a first moment without its error, at "4bit": three per cent of rounding, a part of it forgotten."""

MomentKind = Literal["first", "second"]
"""Averages of gradients, and of their squares."""
MatrixKind = Literal["roots", "bases"]
"""What is replaced as a whole: symmetric inverse roots, or eigenbases."""


def factor_store(
    stack_set: StackSet, sizes: Sequence[FactorStackSize], storage: Storage
) -> FactorStore:
    """Keep symmetric matrices that accumulate, zero at first.

    Args:
        stack_set: Geometry of the stacks that they belong to.
        sizes: Of every stack of matrices.
        storage: How to keep them.
    """
    if storage in CODE_BITS:
        form = Format(CODE_BITS[storage], keeps_error=True)
        return CodedSymmetric(stack_set, sizes, form)
    zeros = (
        torch.zeros(
            size.num_factors, size.dimension, size.dimension,
            dtype=stack_set.dtype, device=stack_set.device,
        )
        for size in sizes
    )  # fmt: skip
    return PackedMatrices(zeros) if storage == "packed" else DenseFactors(zeros)


def matrix_store(
    stack_set: StackSet, sizes: Sequence[FactorStackSize], storage: Storage, kind: MatrixKind
) -> MatrixStore:
    """Keep matrices that are replaced as a whole, the identity at first; eigenbases are never packed.

    Args:
        stack_set: Geometry of the stacks that they belong to.
        sizes: Of every stack of matrices.
        storage: How to keep them.
        kind: Of the matrices.
    """
    identities = (
        torch.eye(size.dimension, dtype=stack_set.dtype, device=stack_set.device).repeat(
            size.num_factors, 1, 1
        )
        for size in sizes
    )
    if storage not in CODE_BITS:
        packs = storage == "packed" and kind == "roots"
        return PackedMatrices(identities) if packs else DenseMatrices(identities)
    coded: MatrixStore
    if kind == "bases":
        coded = CodedBases(stack_set, sizes, Format(BASIS_BITS, keeps_error=False))
    else:
        coded = CodedSymmetric(stack_set, sizes, Format(ROOT_BITS, keeps_error=False))
    for place, matrices in zip(whole_stacks(tuple(sizes)), identities, strict=True):
        coded.blend([place], [matrices], [torch.ones_like(matrices[:, 0, 0])])
    return coded


def stack_store(
    initial: Sequence[Tensor], storage: Storage, kind: MomentKind, decay: float
) -> StackStore:
    """Keep (N, *block shape) tensors in the given way; "packed" is for matrices, and dense here.

    Args:
        initial: What is kept at first.
        storage: How to keep it.
        kind: What is averaged.
        decay: Of the average per step.
    """
    if storage not in CODE_BITS:
        return DenseStacks(initial)
    bits = CODE_BITS[storage]
    if kind == "second":
        form = Format(SECOND_MOMENT_BITS, keeps_error=True, curve="fourth_root")
    elif bits == 4 and decay <= QUICK_DECAY:
        form = Format(QUICK_MOMENT_BITS, keeps_error=False, curve="cube_root")
    else:
        form = Format(bits, keeps_error=True, curve="root")
    return CodedStacks(initial, form)
