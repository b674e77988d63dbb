"""Parameters of real models' shapes, without the models, and the optimizers that are compared."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from shampoo_core.blocking import Shape
from shampoo_core.model_shapes import workload_shapes
from shampoo_core.plan.layout import TABLE_ROWS, tables_of
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.preconditioners.diagonal import AdamConfig

TABLE_BLOCK_ROWS = 8192
"""As in the submission; with 128 columns such blocks are as large as the planner's."""


def parameters(
    shapes: Sequence[Shape], device: str = "meta", *, seed: int = 0
) -> list[torch.nn.Parameter]:
    """Parameters of some shapes, each with a gradient.

    Args:
        shapes: Of the parameters.
        device: On "meta" nothing is stored or computed.
        seed: Of the gradients.
    """
    torch.manual_seed(seed)
    made = []
    for shape in shapes:
        parameter = torch.nn.Parameter(torch.zeros(shape, device=device))
        parameter.grad = torch.randn(shape, device=device)
        made.append(parameter)
    return made


def workload_parameters(workload: str, device: str = "meta") -> list[torch.nn.Parameter]:
    """Parameters of an official workload's model, each with a gradient."""
    return parameters([parameter.shape for parameter in workload_shapes(workload)], device)


def workload_groups(
    workload: str, config: PreconditionerConfig, device: str = "meta"
) -> list[dict[str, Any]]:
    """Parameter groups of an official workload's model.

    One for all parameters but lookup tables, one for these: planner and submission step them by Adam.

    Args:
        workload: Official.
        config: Steps everything but lookup tables.
        device: Of the parameters.
    """
    groups: list[dict[str, Any]] = [
        {"params": [], "preconditioner": config},
        {"params": [], "preconditioner": AdamConfig(), "max_block_size": TABLE_BLOCK_ROWS},
    ]
    tables = tables_of(workload_shapes(workload), TABLE_ROWS)
    for index, parameter in enumerate(workload_parameters(workload, device)):
        groups[index in tables]["params"].append(parameter)
    return [group for group in groups if group["params"]]


def has_table(workload: str) -> bool:
    """Whether a lookup table is among the parameters of an official workload's model."""
    return bool(tables_of(workload_shapes(workload), TABLE_ROWS))


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors of ours; the entries are views that do not overlap."""
    return sum(
        tensor.numel() * tensor.element_size()
        for entries in optimizer.state.values()
        for tensor in entries.values()
        if isinstance(tensor, torch.Tensor)
    )
