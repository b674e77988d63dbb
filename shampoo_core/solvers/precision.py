"""Full-precision matrix products, whatever the settings around the call."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Switch TF32, reduced-precision float32 products, autocast and autograd off inside the block.

    The float32 setting is global to the process in torch and is put back on the way out; another
    thread that multiplies meanwhile gets full precision too, never less.
    """
    with torch.no_grad(), _without_autocast(device.type), _true_float32():
        yield


@contextmanager
def without_autocast(devices: Iterable[torch.device]) -> Iterator[None]:
    """Switch autocast off for some devices inside the block."""
    with ExitStack() as settings:
        for device_type in sorted({device.type for device in devices}):
            settings.enter_context(_without_autocast(device_type))
        yield


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    if device_type == "meta":  # has no autocast to switch off, and torch refuses the attempt
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


@contextmanager
def _true_float32() -> Iterator[None]:
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:
        # Torch 2.9 and newer, when somebody has used the newer settings: then we have to as well.
        with _true_float32_by_backend():
            yield
        return
    if before == "highest":
        yield
        return
    try:
        torch.set_float32_matmul_precision("highest")
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _true_float32_by_backend() -> Iterator[None]:
    settings = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    precisions = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, precision in zip(settings, precisions, strict=True):
            setting.fp32_precision = precision
