"""Checks at the door, and the numbers of one parameter group that every part of a step may need."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

MomentumNormaliser = Literal["exact", "algoperf_v05"]
Storage = Literal["dense", "packed", "8bit", "4bit"]
STORAGES: tuple[Storage, ...] = get_args(Storage)


ADDED_LATER = {"added later": True}
"""Metadata of a field that checkpoints of before do not have: in these it has its default."""


@dataclass(frozen=True)
class GroupOptions:
    """Numbers shared by the preconditioner, the grafting and the filter of one parameter group."""

    betas: tuple[float, float]
    beta3: float | None
    eps: float
    bias_correction: bool
    momentum_normaliser: MomentumNormaliser
    storage: Storage = "dense"
    """How moments are kept; set by the preconditioner."""
    portion_numel: int | None = None
    """Numbers in the factors that a refresh solves together, at most; None solves all that are due."""


def check_range(
    owner: str,
    name: str,
    value: float,
    *,
    low: float = -math.inf,
    high: float = math.inf,
    low_open: bool = False,
    high_open: bool = False,
) -> None:
    """Raise unless ``value`` is a number between ``low`` and ``high``.

    Args:
        owner: Class or function whose argument is checked, for the message.
        name: Argument.
        value: What was given.
        low: Smallest allowed value.
        high: Largest allowed value.
        low_open: Whether ``low`` itself is excluded.
        high_open: Whether ``high`` itself is excluded.

    Raises:
        TypeError: ``value`` is not a number.
        ValueError: ``value`` is outside the range or NaN.
    """
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{owner}: {name} must be a number, got {value!r}")
    above = value > low if low_open else value >= low
    below = value < high if high_open else value <= high
    if not (above and below):
        left, right = "(" if low_open else "[", ")" if high_open else "]"
        raise ValueError(f"{owner}: {name} must lie in {left}{low}, {high}{right}, got {value!r}")


def check_count(
    owner: str, name: str, value: object, *, minimum: int = 1, optional: bool = False
) -> None:
    """Raise unless ``value`` is a whole number of at least ``minimum``, or None where that is ``optional``.

    Raises:
        TypeError: ``value`` is not a whole number.
        ValueError: ``value`` is smaller than ``minimum``.
    """
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int):
        or_none = " or None" if optional else ""
        raise TypeError(f"{owner}: {name} must be a whole number{or_none}, got {value!r}")
    if value < minimum:
        raise ValueError(f"{owner}: {name} must be at least {minimum}, got {value!r}")


def check_choice(owner: str, name: str, value: object, choices: tuple[object, ...]) -> None:
    """Raise unless ``value`` is one of ``choices``.

    Raises:
        ValueError: It is not.
    """
    if value not in choices:
        raise ValueError(f"{owner}: {name} must be one of {list(choices)}, got {value!r}")


def check_flag(owner: str, name: str, value: object) -> None:
    """Raise unless ``value`` is True or False.

    Raises:
        TypeError: It is not.
    """
    if not isinstance(value, bool):
        raise TypeError(f"{owner}: {name} must be True or False, got {value!r}")


def check_flags(config: Any) -> None:
    """Raise unless every field of a dataclass whose default is True or False is one of them.

    Raises:
        TypeError: One is not, such as a 1 or the text of a command line, "False", which counts as true.
    """
    for field in fields(config):
        if isinstance(field.default, bool):
            check_flag(type(config).__name__, field.name, getattr(config, field.name))


def check_object(
    owner: str,
    name: str,
    value: object,
    method: str,
    wanted: str,
    *,
    others: tuple[str, ...] = (),
) -> None:
    """Raise unless ``value`` is an object, not a class, that has a method.

    Args:
        owner: Class or function whose argument is checked, for the message.
        name: Argument.
        value: What was given.
        method: Name of the method that tells objects of the wanted kind from others.
        wanted: Which objects are meant, for the message.
        others: Names of methods that objects of other kinds have, and those of the wanted kind have not.

    Raises:
        TypeError: It is a class, or has no such method, or one of another kind.
    """
    if isinstance(value, type):
        raise TypeError(
            f"{owner}: {name}: got the class {value.__name__}; "
            f"give an instance, {value.__name__}(...)"
        )
    is_other = any(hasattr(value, other) for other in others)
    if is_other or not callable(getattr(value, method, None)):
        raise TypeError(f"{owner}: {name} must be {wanted}, got {value!r}")
