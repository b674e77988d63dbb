"""State as plain tensors and numbers: what is written, how it is keyed, how it is checked and read.

The state of a parameter is a flat dict. ``block.<i>.<j>.<name>`` is the entry ``name`` of the block at
position (i, j) of the parameter's grid of blocks. Neither the stacking of blocks nor the number of ranks
shows in it, no collective is needed to make it, and ``torch.load(weights_only=True)`` reads it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo_core.engine import Engine

FORMAT_VERSION = 1


def block_views(engine: Engine) -> dict[int, dict[str, Tensor]]:
    """Views of an engine's state by parameter index and block."""
    views: dict[int, dict[str, Tensor]] = {}
    for layout, state in zip(engine.stack_set.layouts, engine.state(), strict=True):
        block = 0
        for tile in layout.tiles:
            of_parameter = views.setdefault(tile.parameter, {})
            for position in tile.grid_indices():
                prefix = ".".join(["block", *map(str, position)])
                for name, tensor in state.items():
                    of_parameter[f"{prefix}.{name}"] = tensor[block]
                block += 1
    return views


def describe(value: object) -> Any:
    """Turn an option into plain numbers, strings, lists and dicts."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: describe(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    if isinstance(value, Mapping):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, tuple | list):
        return [describe(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    return repr(value)


def differences(
    own: Mapping[str, Any], saved: Mapping[str, Any], *, except_for: Sequence[str]
) -> list[str]:
    """One sentence for each option in which a parameter group differs from the saved one."""
    found = []
    for name in sorted(set(own) | set(saved)):
        if name in except_for:
            continue
        if name not in saved:
            found.append(f"{name} is {own[name]!r} here and absent in the checkpoint")
        elif name in own and own[name] != saved[name]:
            found.append(f"{name} is {own[name]!r} here and {saved[name]!r} in the checkpoint")
    return found


def check_entries(owner: str, own: Mapping[str, Tensor], saved: Mapping[str, Tensor]) -> None:
    """Raise unless the saved state of a parameter fits.

    Raises:
        ValueError: A name is missing, unknown, or of another shape; the message names it.
    """
    missing, unknown = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or unknown:
        raise ValueError(
            f"{owner}: the checkpoint does not fit: "
            f"missing {missing[:3]}{'...' if len(missing) > 3 else ''}, "
            f"unknown {unknown[:3]}{'...' if len(unknown) > 3 else ''}"
        )
    for name, tensor in own.items():
        if tensor.shape != saved[name].shape:
            raise ValueError(
                f"{owner}: {name} has shape {tuple(saved[name].shape)} in the checkpoint "
                f"and {tuple(tensor.shape)} here"
            )
