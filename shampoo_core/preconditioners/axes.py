"""Which axes of which stacks get a Kronecker factor, and with which exponent."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, get_args

import torch

from shampoo_core.blocking import Shape
from shampoo_core.config import check_range
from shampoo_core.stacks import StackSet
from shampoo_core.statistics import FactorAxis

ExponentOverride = float | Mapping[int, float] | None


Sides = Literal["all", "first", "last"]
SIDES: tuple[Sides, ...] = get_args(Sides)


def preconditioned_axes(
    stack_set: StackSet,
    *,
    precondition_vectors: bool,
    sides: Sides = "all",
    max_factor_dimension: int | None = None,
) -> list[FactorAxis]:
    """The axes that get a factor.

    An axis of length 1 has a factor that is a mere number, which a step length takes care of; it gets
    none unless the whole block is one number.

    Args:
        stack_set: Geometry.
        precondition_vectors: Whether blocks with one axis get factors.
        sides: Of the axes of a block with several: all, or only its first or last one.
        max_factor_dimension: Longer axes get none; None means no limit.
    """
    return [
        FactorAxis(index, axis, layout.block_shape[axis], len(layout.block_shape))
        for index, layout in enumerate(stack_set.layouts)
        for axis in axes_with_factor(
            layout.block_shape,
            precondition_vectors=precondition_vectors,
            sides=sides,
            max_factor_dimension=max_factor_dimension,
        )
    ]


def axes_with_factor(
    block_shape: Shape,
    *,
    precondition_vectors: bool,
    sides: Sides = "all",
    max_factor_dimension: int | None = None,
) -> list[int]:
    """The axes of one block that get a factor; arguments as of `preconditioned_axes`."""
    order = len(block_shape)
    if order == 1 and not precondition_vectors:
        return []
    return [
        axis
        for axis in _asked_for(order, sides)
        if (max_factor_dimension is None or block_shape[axis] <= max_factor_dimension)
        and (block_shape[axis] > 1 or order == 1)
    ]


def _asked_for(order: int, sides: Sides) -> range:
    return {"all": range(order), "first": range(1), "last": range(order - 1, order)}[sides]


def inverse_exponents(
    stack_set: StackSet, axes: Sequence[FactorAxis], override: ExponentOverride, sides: Sides
) -> list[float]:
    """Exponent e > 0 of the inverse root A^(-e) of every preconditioned axis.

    The default is 1/(2k) for a block of order k (Gupta et al. 2018), and for a block with factors on
    some of its axes only, k is their number: 1/2 for one side of a matrix. An axis of length 1 counts as if
    it had one, if ``sides`` asks for it: it is a short block beside others of the same matrix.

    Args:
        stack_set: Geometry.
        axes: From `preconditioned_axes`.
        override: One exponent, or one per order; None means the default.
        sides: As of `preconditioned_axes`.
    """
    exponents = []
    for axis in axes:
        with_factor = sum(other.stack == axis.stack for other in axes)
        block_shape = stack_set.layouts[axis.stack].block_shape
        numbers = sum(block_shape[other] == 1 for other in _asked_for(axis.order, sides))
        default = 0.5 / min(axis.order, with_factor + numbers)
        if isinstance(override, Mapping):
            exponents.append(override.get(axis.order, default))
        else:
            exponents.append(default if override is None else override)
    return exponents


def root_limits(
    stack_set: StackSet, axes: Sequence[FactorAxis], exponents: Sequence[float]
) -> list[float]:
    """What the norm of the inverse root of every preconditioned axis has to stay below.

    With k roots of that norm a gradient of 1.8e19 in float32, more than the guard lets pass, becomes as
    large as a number can be. Infinity for exponents up to 1/(2k): their roots stay below by themselves, or
    the squares in the factors would have underflowed.

    Args:
        stack_set: Geometry.
        axes: From `preconditioned_axes`.
        exponents: From `inverse_exponents`.
    """
    largest = float(torch.finfo(stack_set.dtype).max)
    numbers = Counter(axis.stack for axis in axes)
    shares = [0.5 / numbers[axis.stack] for axis in axes]
    return [
        math.inf if exponent <= share else largest**share
        for exponent, share in zip(exponents, shares, strict=True)
    ]


def check_exponents(owner: str, override: ExponentOverride) -> None:
    """Raise unless every exponent is a positive number.

    Raises:
        TypeError: One is not a number.
        ValueError: One is not positive.
    """
    values: Iterable[float] = ()
    if isinstance(override, Mapping):
        values = override.values()
    elif override is not None:
        values = (override,)
    for value in values:
        check_range(owner, "exponent", value, low=0.0, low_open=True, high_open=True)
