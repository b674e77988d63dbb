"""Data parallel training, also once the harness has taken a model's wrapper away."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

from .objective import world_size

#: What a workload can choose of a wrapper, by the names of both argument and attribute.
_OPTIONS = (
    "broadcast_buffers",
    "find_unused_parameters",
    "gradient_as_bucket_view",
    "static_graph",
)


class Wrapper:
    """Wraps a bare model as it was wrapped at first.

    The harness unwraps the model when it resumes from a checkpoint and hands the bare module back: without
    a wrapper every rank would follow its own gradient from there on, and one with other options can refuse
    a model that has trained until then.

    Args:
        model: As the workload made it, in every process that starts or resumes.
    """

    def __init__(self, model: nn.Module) -> None:
        first = _uncompiled(model)
        self._options: dict[str, Any] = {}
        if isinstance(first, DistributedDataParallel):
            self._options = {name: getattr(first, name) for name in _OPTIONS}

    def wrapped(self, model: nn.Module) -> nn.Module:
        """Return the model in a wrapper, if other ranks exist and nothing wraps it."""
        if world_size() == 1 or isinstance(
            _uncompiled(model), DataParallel | DistributedDataParallel
        ):
            return model
        device = next(model.parameters()).device
        ids = None if device.type == "cpu" else [device]
        return DistributedDataParallel(model, device_ids=ids, **self._options)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the options are the workload's."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keep the options."""


def _uncompiled(model: nn.Module) -> nn.Module:
    compiled_from: nn.Module = getattr(model, "_orig_mod", model)
    return compiled_from
