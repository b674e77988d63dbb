"""Parameters of many shapes with reproducible gradients: what the optimizer tests step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shampoo_core import DistributedShampoo

SHAPES: tuple[tuple[int, ...], ...] = ((20, 30), (7,), (4, 3, 3, 3), (50, 9), (), (1, 5), (17, 17))


def parameters(
    shapes: Sequence[tuple[int, ...]] = SHAPES, dtype: torch.dtype = torch.float64, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Standard normal parameters."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype))
        for shape in shapes
    ]


def gradient(parameter: Tensor, step: int, index: int) -> Tensor:
    """The gradient of parameter ``index`` at ``step``: noise around a pull to the origin."""
    generator = torch.Generator().manual_seed(1000 * step + index)
    noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return (noise.to(parameter) + 0.1 * parameter.detach()).contiguous()


def run(optimizer: DistributedShampoo, params: Sequence[torch.nn.Parameter], steps: range) -> None:
    """Step with the gradients above."""
    for step in steps:
        for index, parameter in enumerate(params):
            parameter.grad = gradient(parameter, step, index)
        optimizer.step()


def optimizer_for(params: Sequence[torch.nn.Parameter], **options: Any) -> DistributedShampoo:
    """Small blocks, everything else as asked."""
    return DistributedShampoo(params, **{"lr": 0.01, "max_block_size": 16, **options})


def assert_same(
    actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float = 0.0
) -> None:
    """Largest absolute difference at most ``tolerance``; 0 means bitwise."""
    for left, right in zip(actual, expected, strict=True):
        torch.testing.assert_close(left.detach(), right.detach(), rtol=0.0, atol=tolerance)
