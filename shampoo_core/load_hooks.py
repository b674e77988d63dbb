"""Hooks around `load_state_dict`, for an optimizer that does not use the one of `torch.optim.Optimizer`.

That calls the hooks itself, and offers no way to call them for a method that takes its place. As there,
a copy of an optimizer, or one that was pickled, has none of the original's hooks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

PreHook = Callable[[torch.optim.Optimizer, dict[str, Any]], dict[str, Any] | None]
PostHook = Callable[[torch.optim.Optimizer], None]


class WithLoadHooks(torch.optim.Optimizer):
    """Keeps the hooks of loading; see `torch.optim.Optimizer` for what they are given and return."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._before_loading: OrderedDict[int, PreHook] = OrderedDict()
        self._after_loading: OrderedDict[int, PostHook] = OrderedDict()
        super().__init__(params, defaults)

    def register_load_state_dict_pre_hook(
        self, hook: PreHook, prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(optimizer, state_dict)`` before loading; what it returns is loaded instead."""
        return _registered(self._before_loading, hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: PostHook, prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(optimizer)`` after a state was loaded."""
        return _registered(self._after_loading, hook, prepend)

    def without_hooks(self) -> dict[str, Any]:
        """Everything in the instance but hooks of all kinds, for `__getstate__`."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if not (name.startswith("_optimizer_") or name in ("_before_loading", "_after_loading"))
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` of a subclass gave, without hooks."""
        self._before_loading, self._after_loading = OrderedDict(), OrderedDict()
        super().__setstate__(state)

    def hooked(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What the hooks before loading make of a state, the outermost dict of which they may change."""
        changed = dict(state_dict)
        for hook in self._before_loading.values():
            replaced = hook(self, changed)
            changed = changed if replaced is None else replaced
        return changed

    def call_hooks_after_loading(self) -> None:
        """To be called when all is loaded."""
        for hook in self._after_loading.values():
            hook(self)


def _registered(hooks: OrderedDict[int, Any], hook: Any, prepend: bool) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    if prepend:
        hooks.move_to_end(handle.id, last=False)
    return handle
