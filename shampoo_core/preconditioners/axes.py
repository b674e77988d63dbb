"""Which axes of which stacks get a Kronecker factor, and with which exponent."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from shampoo_core.config import check_range
from shampoo_core.stacks import StackSet
from shampoo_core.statistics import FactorAxis

ExponentOverride = float | Mapping[int, float] | None


def preconditioned_axes(stack_set: StackSet, *, precondition_vectors: bool) -> list[FactorAxis]:
    """All axes of all stacks of order two or more, and of vectors where these are wanted too.

    An axis of length 1 has a factor that is a mere number, which a step length takes care of; it gets
    none unless the whole block is one number.
    """
    axes = []
    for index, layout in enumerate(stack_set.layouts):
        order = len(layout.block_shape)
        if order == 1 and not precondition_vectors:
            continue
        for axis, side in enumerate(layout.block_shape):
            if side > 1 or order == 1:
                axes.append(FactorAxis(index, axis, side, order))
    return axes


def exponent_of_order(order: int, override: ExponentOverride, default: float) -> float:
    """Exponent e > 0 of the inverse root A^(-e) for blocks with ``order`` axes."""
    if override is None:
        return default
    if isinstance(override, Mapping):
        return override.get(order, default)
    return override


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
        check_range(owner, "exponent", value, low=0.0, low_open=True)
