"""A parameter under shampoo_core beside one plain float64 optimizer per block."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import reference
from quadratic import gradient, optimizer_for, parameters
from reference.algebra import Array


def assert_follows(
    plain: Callable[[Array], Any],
    shape: tuple[int, ...],
    *,
    steps: int = 25,
    absent: Iterable[int] = (),
    tolerance: float = 1e-9,
    on_absent: Callable[[Any], None] = lambda method: None,
    **options: Any,
) -> reference.Blocked:
    """Step both with the same gradients and compare the parameter after every step.

    A second parameter of the same shape is stepped along, so that stacks hold blocks of both and
    steps count while the first has no gradient.

    Args:
        plain: Makes the reference optimizer of a block.
        shape: Of the parameter.
        steps: How many.
        absent: Steps, counted from 1, at which there is no gradient.
        tolerance: Largest absolute difference.
        on_absent: Called on every reference optimizer where there is no gradient; none is stepped.
        options: Of `DistributedShampoo`.

    Returns:
        The reference.
    """
    parameter, neighbour = parameters([shape, shape])
    optimizer = optimizer_for([parameter, neighbour], **options)
    blocked = reference.Blocked(
        parameter.detach().numpy(),
        plain,
        max_block_size=options.get("max_block_size", 16) or np.inf,
        target_order=2,
        cut=options.get("cut", "balanced"),
    )
    for step in range(1, steps + 1):
        if step in absent:
            parameter.grad = None
            for method in blocked.methods:
                on_absent(method)
        else:
            parameter.grad = gradient(parameter, step, 0)
            blocked.step(parameter.grad.numpy())
        neighbour.grad = gradient(neighbour, step, 1)
        optimizer.step()
        np.testing.assert_allclose(
            parameter.detach().numpy(), blocked.parameter, rtol=0, atol=tolerance,
            err_msg=f"step {step}",
        )  # fmt: skip
    moved = np.abs(parameter.detach().numpy() - parameters([shape])[0].detach().numpy())
    assert moved.min() > 100 * tolerance, "a trajectory that stands still shows nothing"
    return blocked
