"""Bytes that are alive while a piece of code runs, and their peak: on any device, "meta" included.

A storage counts from the operation that makes it until it is freed, once, however many views it has.
What is alive already when the block starts is not seen; what the operations use inside is not either.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class LiveMemory(TorchDispatchMode):
    """``with LiveMemory() as memory: ...``, then read ``memory.peak``.

    As in `shampoo_core.counting`, a value asked for on the "meta" device is answered with 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        """Bytes alive now that were allocated inside the block."""
        self.peak = 0
        """Largest value of ``live`` so far."""
        self._known: dict[int, int] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run one operation and count what it allocates."""
        del types
        kwargs = kwargs or {}
        if func.name() == "aten::_local_scalar_dense" and args[0].is_meta:
            return 0
        given = {id_of(tensor) for tensor in tensors_in((args, kwargs))}
        result = func(*args, **kwargs)
        for tensor in tensors_in(result):
            self._watch(tensor, given)
        return result

    def _watch(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known or key in given:
            return
        size = storage.nbytes()
        self._known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._forget, key)

    def _forget(self, key: int) -> None:
        self.live -= self._known.pop(key)


def id_of(tensor: Tensor) -> int:
    """What two views of one storage have in common."""
    return tensor.untyped_storage()._cdata


def tensors_in(value: Any) -> Iterator[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors_in(item)
