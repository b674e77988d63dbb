"""Parameters of real models' shapes, without the models, and the optimizers that are compared."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from shampoo_core.blocking import Shape
from shampoo_core.model_shapes import workload_shapes


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


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    """Bytes of all state tensors of ours; the entries are views that do not overlap."""
    return sum(
        tensor.numel() * tensor.element_size()
        for entries in optimizer.state.values()
        for tensor in entries.values()
        if isinstance(tensor, torch.Tensor)
    )
