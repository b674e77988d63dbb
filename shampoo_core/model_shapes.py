"""Shapes of the parameters of models: the benchmark's own, a transformer of any size, a file's.

For plans and benchmarks, which need a model's shapes but not the model.
"""

from __future__ import annotations

import functools
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from shampoo_core.blocking import Shape

_OFFICIAL = Path(__file__).with_name("official_shapes.json")

LARGEST_PARAMETER = 2**40
"""Numbers of one parameter in a file of shapes: a terabyte in 8 bits; more is a mistake."""

REFERENCE_STEP_MS = {
    "criteo1tb": 722.0,
    "fastmri": 245.0,
    "finewebedu_lm": 444.0,
    "imagenet_resnet": 338.0,
    "imagenet_vit": 415.0,
    "librispeech_conformer": 763.0,
    "librispeech_deepspeech": 1156.0,
    "ogbg": 231.0,
    "wmt": 361.0,
}
"""What a step may take on the benchmark's machine, 8 x V100: its runtime limit over its step hint.

Source: `max_allowed_runtime_sec` and `step_hint` of AlgoPerf v0.6; finewebedu_lm, which the pinned release
does not have yet, 32,000 s in 72,000 steps of a later one, not checked here.
"""

TRANSFORMERS: dict[str, dict[str, int]] = {
    "transformer_1b": dict(
        width=2048, num_layers=16, hidden=8192, vocabulary=32_000, key_value_width=512
    ),
    "transformer_70b": dict(
        width=8192, num_layers=80, hidden=28_672, vocabulary=32_000, key_value_width=1024
    ),
}
"""Arguments of `transformer_shapes` for decoders with 1.1 and 69 billion parameters."""


class NamedShape(NamedTuple):
    """One parameter of a model."""

    name: str
    shape: Shape


@functools.cache
def _official() -> dict[str, list[NamedShape]]:
    raw = json.loads(_OFFICIAL.read_text(encoding="utf-8"))
    return {
        workload: [NamedShape(name, tuple(shape)) for name, shape, _ in parameters]
        for workload, parameters in raw.items()
        if workload != "_source"
    }


def official_workloads() -> list[str]:
    """The nine workloads of the AlgoPerf benchmark, then its ``mnist`` and ``cifar``."""
    toys = ["mnist", "cifar"]
    return sorted(set(_official()) - set(toys)) + toys


def workload_shapes(workload: str) -> list[NamedShape]:
    """Parameters of an official workload's PyTorch model.

    Args:
        workload: One of `official_workloads`.

    Raises:
        ValueError: There is no such workload.
    """
    if workload not in _official():
        raise ValueError(
            f"workload must be one of {official_workloads()}, got {workload!r}; "
            "for another model give its shapes in a file"
        )
    return list(_official()[workload])


def transformer_shapes(
    *, width: int, num_layers: int, hidden: int, vocabulary: int, key_value_width: int | None = None
) -> list[NamedShape]:
    """A decoder-only transformer with gated feed-forward layers, untied embeddings and no biases.

    Args:
        width: Of the residual stream.
        num_layers: Number of blocks.
        hidden: Width of the feed-forward layers.
        vocabulary: Number of tokens.
        key_value_width: Of keys and values, smaller than ``width`` with grouped queries; None
            means ``width``.
    """
    key_value = width if key_value_width is None else key_value_width
    shapes = [NamedShape("embedding", (vocabulary, width))]
    for layer in range(num_layers):
        shapes += [
            NamedShape(f"layers.{layer}.{name}", shape)
            for name, shape in {
                "query": (width, width),
                "key": (key_value, width),
                "value": (key_value, width),
                "output": (width, width),
                "gate": (hidden, width),
                "up": (hidden, width),
                "down": (width, hidden),
                "attention_norm": (width,),
                "feed_forward_norm": (width,),
            }.items()
        ]
    return [*shapes, NamedShape("norm", (width,)), NamedShape("head", (vocabulary, width))]


def named_model(name: str) -> list[NamedShape]:
    """Shapes of an official workload's model or of one of `TRANSFORMERS`.

    Raises:
        ValueError: It is neither.
    """
    return (
        transformer_shapes(**TRANSFORMERS[name]) if name in TRANSFORMERS else workload_shapes(name)
    )


def shapes_from_file(path: Path) -> list[NamedShape]:
    """Read shapes from JSON: a list of shapes, or an object ``{name: shape}``.

    Args:
        path: The file.

    Raises:
        OSError: It cannot be read.
        ValueError: It is not JSON of one of the two forms; the message names the entry.
    """

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        names = Counter(name for name, _ in pairs)
        twice = [name for name, count in names.items() if count > 1]
        if twice:
            raise ValueError(f"{path}: the name {twice[0]!r} is there twice; give each its own")
        return dict(pairs)

    try:
        raw = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=once)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    except RecursionError as error:
        raise ValueError(
            f"{path} holds lists within lists; a shape is a list of numbers"
        ) from error
    if isinstance(raw, list):
        raw = {f"parameter_{index}": shape for index, shape in enumerate(raw)}
    if not isinstance(raw, dict) or not raw:
        raise ValueError(
            f"{path} must hold a list of shapes or an object of name: shape, at least one"
        )
    return [NamedShape(name, _checked(path, name, shape)) for name, shape in raw.items()]


def num_elements(parameters: Sequence[NamedShape]) -> int:
    """Elements of all parameters together."""
    return sum(math.prod(parameter.shape) for parameter in parameters)


def _checked(path: Path, name: str, shape: object) -> Shape:
    if not isinstance(shape, list) or not all(
        isinstance(side, int) and not isinstance(side, bool) and side >= 0 for side in shape
    ):
        raise ValueError(
            f"{path}: the shape of {name!r} must be a list of whole numbers, got {shape!r}"
        )
    if math.prod(shape) > LARGEST_PARAMETER:
        raise ValueError(
            f"{path}: {name!r} with shape {shape} has {math.prod(shape):.3g} numbers; a parameter has "
            f"{LARGEST_PARAMETER:.3g} at most"
        )
    return tuple(shape)
