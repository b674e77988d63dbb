"""Which method a parameter gets, by its shape and type alone.

    at most one side longer than 1    diagonal: a bias or scale has no matrix structure
    a side of TABLE_ROWS or more      diagonal: a lookup table; its rows are rarely touched and a
                                      factor over them would mean nothing
    everything else                   matrix: the method the setting asks for

The type is the benchmark's `ParameterType`, read by name so that no vocabulary has to be imported.
"""

from __future__ import annotations

import enum
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

#: From this many rows on a tensor is a lookup table.
TABLE_ROWS = 65_536
#: From this many rows on a parameter that calls itself an embedding is a lookup table.
EMBEDDING_ROWS = 65_536
_WRAPPERS = ("_orig_mod.", "module.")


class Route(enum.Enum):
    """The kinds of treatment."""

    MATRIX = "matrix"
    DIAGONAL = "diagonal"


def route(shape: Iterable[int], parameter_type: str | None = None) -> Route:
    """Return the treatment of a parameter.

    Args:
        shape: Its sides.
        parameter_type: Name of its `ParameterType`, e.g. "CONV_WEIGHT"; None if unknown.
    """
    sides = [side for side in shape if side != 1]
    rows = EMBEDDING_ROWS if parameter_type == "EMBEDDING" else TABLE_ROWS
    if len(sides) < 2 or max(sides) >= rows:
        return Route.DIAGONAL
    return Route.MATRIX


def bare_name(name: str) -> str:
    """Return a parameter's name without what `torch.compile` and DDP put before it.

    >>> bare_name("_orig_mod.module.encoder.weight")
    'encoder.weight'
    """
    stripped = True
    while stripped:
        stripped = False
        for wrapper in _WRAPPERS:
            if name.startswith(wrapper):
                name, stripped = name.removeprefix(wrapper), True
    return name


def routed(model: nn.Module, parameter_types: Mapping[str, Any]) -> dict[Route, list[nn.Parameter]]:
    """Sort the trainable parameters of `model` by route; routes without parameters are left out.

    Args:
        model: The model, possibly wrapped by DDP and `torch.compile`.
        parameter_types: The workload's `model_params_types`, by unwrapped name.
    """
    groups: dict[Route, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        parameter_type = parameter_types.get(bare_name(name))
        chosen = route(parameter.shape, getattr(parameter_type, "name", None))
        groups.setdefault(chosen, []).append(parameter)
    return groups
