"""Which method a parameter gets, and in blocks of which size, by its shape and type alone.

    at most one side longer than 1    diagonal: a bias or scale has no matrix structure
    a side of TABLE_ROWS or more,     table: its rows are looked up, most of them rarely, and a
    or many rows much longer than     factor over them would mean nothing
    the other side
    an embedding                      matrix, in blocks not much longer than an embedded vector: a
                                      longer factor over rows that meet in no product would cost its
                                      cube and tell little
    fused query, key and value        matrix, in blocks that each lie within one of the three (of the
                                      two, without query): they are different layers
    everything else                   matrix, in the largest blocks allowed

The type is the benchmark's `ParameterType`, known here by its name so that nothing of the harness
has to be imported.
"""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

#: From this many rows on a tensor is a lookup table.
TABLE_ROWS = 65_536
#: And from this many, where rows outnumber columns by more than any dense layer's do.
MANY_ROWS = 4_096
TABLE_ASPECT = 256
#: Blocks of an embedding may be this long even where its vectors are shorter.
EMBEDDING_BLOCK_SIZE = 128
_EMBEDDING = "EMBEDDING"
_NUM_FUSED = {"ATTENTION_QKV": 3, "ATTENTION_KV": 2}
_WRAPPERS = ("_orig_mod.", "module.")


class Kind(enum.Enum):
    """The kinds of treatment."""

    MATRIX = "matrix"
    DIAGONAL = "diagonal"
    TABLE = "table"


@dataclasses.dataclass(frozen=True)
class Route:
    """What a parameter gets.

    Attributes:
        kind: Of treatment.
        max_block_size: Longest side of a block; None where blocks have no meaning.
        is_embedding: Whether it is an embedding that is to be apart from others of its kind.
    """

    kind: Kind
    max_block_size: int | None = None
    is_embedding: bool = False


def route(shape: Iterable[int], parameter_type: str | None, max_block_size: int) -> Route:
    """Return the treatment of a parameter.

    Args:
        shape: Its sides.
        parameter_type: Name of its `ParameterType`, e.g. "CONV_WEIGHT"; None if unknown.
        max_block_size: Largest side of a block that the setting allows.
    """
    sides = [side for side in shape if side != 1]
    if len(sides) < 2:
        return Route(Kind.DIAGONAL)
    if _is_table(sides):
        return Route(Kind.TABLE)
    if parameter_type == _EMBEDDING:
        max_block_size = min(max_block_size, max(EMBEDDING_BLOCK_SIZE, min(sides)))
    elif parameter_type in _NUM_FUSED and sides[0] == _NUM_FUSED[parameter_type] * sides[1]:
        # Rows are cut into equal lengths, which fit a whole number of times if the side has such a divisor,
        # as all official ones have; else a block can hold rows of two of the matrices.
        max_block_size = -(-sides[1] // -(-sides[1] // max_block_size))
    return Route(Kind.MATRIX, max_block_size)


def _is_table(sides: list[int]) -> bool:
    rows, columns = max(sides), math.prod(sides) // max(sides)
    return rows >= TABLE_ROWS or (rows >= MANY_ROWS and rows >= TABLE_ASPECT * columns)


def bare_name(name: str) -> str:
    """Return a parameter's name without what `torch.compile` and DDP put before it.

    >>> bare_name("_orig_mod.module.encoder.weight")
    'encoder.weight'
    """
    while name.startswith(_WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def routed(
    model: nn.Module,
    parameter_types: Mapping[str, Any],
    max_block_size: int,
    *,
    embeddings_apart: bool = False,
) -> dict[Route, list[nn.Parameter]]:
    """Sort the trainable parameters of a model by route; routes without parameters are left out.

    Args:
        model: The model, possibly wrapped by DDP and `torch.compile`.
        parameter_types: The workload's `model_params_types`, by unwrapped name.
        max_block_size: Largest side of a block that the setting allows.
        embeddings_apart: Whether embeddings get routes of their own.
    """
    groups: dict[Route, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parameter_type = getattr(parameter_types.get(bare_name(name)), "name", None)
            chosen = route(parameter.shape, parameter_type, max_block_size)
            if embeddings_apart and parameter_type == _EMBEDDING:
                chosen = dataclasses.replace(chosen, is_embedding=True)
            groups.setdefault(chosen, []).append(parameter)
    return groups
