"""Hooks around states, for an optimizer that makes and loads its own.

`torch.optim.Optimizer` calls them itself: those of loading in a method that another one takes the place of,
those behind saving before the state is complete. As there, a copy of an optimizer, or one that was pickled,
has none of the original's hooks.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

StateHook = Callable[[torch.optim.Optimizer, dict[str, Any]], dict[str, Any] | None]
PlainHook = Callable[[torch.optim.Optimizer], None]

HOOKS = ("_before_loading", "_after_loading", "_after_saving")


class WithStateHooks(torch.optim.Optimizer):
    """Keeps the hooks of loading and behind saving; `torch.optim.Optimizer` says what they are given."""

    def __init__(self, params: Any, defaults: dict[str, Any]) -> None:
        self._before_loading: OrderedDict[int, StateHook] = OrderedDict()
        self._after_loading: OrderedDict[int, PlainHook] = OrderedDict()
        self._after_saving: OrderedDict[int, StateHook] = OrderedDict()
        super().__init__(params, defaults)

    def register_load_state_dict_pre_hook(
        self, hook: StateHook, prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(optimizer, state_dict)`` before loading; what it returns is loaded instead."""
        return _registered(self._before_loading, hook, prepend)

    def register_load_state_dict_post_hook(
        self, hook: PlainHook, prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(optimizer)`` after a state was loaded."""
        return _registered(self._after_loading, hook, prepend)

    def register_state_dict_post_hook(
        self, hook: StateHook, prepend: bool = False
    ) -> RemovableHandle:
        """Call ``hook(optimizer, state_dict)`` with a complete state; what it returns takes its place."""
        return _registered(self._after_saving, hook, prepend)

    def without_hooks(self) -> dict[str, Any]:
        """Everything in the instance but hooks of all kinds, for `__getstate__`."""
        return {
            name: value
            for name, value in self.__dict__.items()
            if not (name.startswith("_optimizer_") or name in HOOKS)
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Take over what `__getstate__` of a subclass gave, without hooks."""
        vars(self).update({name: OrderedDict() for name in HOOKS})
        super().__setstate__(state)

    def hooked(self, state_dict: Mapping[str, Any]) -> dict[str, Any]:
        """What the hooks before loading make of a state, the outermost dict of which they may change."""
        return self._changed(dict(state_dict), self._before_loading)

    def hooked_behind(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """What the hooks behind saving make of a complete state, which they may change."""
        return self._changed(state_dict, self._after_saving)

    def _changed(
        self, state_dict: dict[str, Any], hooks: OrderedDict[int, StateHook]
    ) -> dict[str, Any]:
        for hook in hooks.values():
            replaced = hook(self, state_dict)
            state_dict = state_dict if replaced is None else replaced
        return state_dict

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
