"""Spectral descent (Muon): the momentum with all its singular values set to one.

    M <- mu M + G
    B  = G + mu M  (Nesterov)  or  M
    P  = scale * U V^T   for   B = U S V^T

It is Shampoo without accumulation: for beta2 = 0 and exponent 1/4, (G G^T)^(-1/4) G (G^T G)^(-1/4) = U V^T.

The method is about whole matrices: cut blocks are orthogonalised one by one, which is another method
with other lengths. Give its parameter group ``max_block_size=None``; a convolution is then the matrix
out x (in * kh * kw). Stacks of vectors are stepped by Adam with the group's ``betas`` and ``eps``.

Source: Carlson et al. 2015 (spectral descent); Jordan et al. 2024 (Muon); Liu et al. 2025 (arXiv
2502.16982) for the scale "adam_rms"; Amsel et al. 2025 (arXiv 2505.16932) for Polar Express.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from shampoo_core.blocking import Shape
from shampoo_core.config import GroupOptions, check_choice, check_count, check_flags, check_range
from shampoo_core.costs import method_flops
from shampoo_core.filtering import Direction, GradientFilter
from shampoo_core.gradients import StackedGradients
from shampoo_core.grafting import GraftingConfig
from shampoo_core.preconditioners.base import Preconditioner
from shampoo_core.preconditioners.checks import refuse_grafting
from shampoo_core.preconditioners.parts import with_adam_for_rest
from shampoo_core.refresh import RefreshPolicy
from shampoo_core.solvers.polar import COEFFICIENTS, orthogonalize
from shampoo_core.stacks import StackSet
from shampoo_core.state import StackState, merge_states

Scale = Literal["none", "rectangular", "adam_rms", "fan"]

PRODUCT_DTYPES = (None, torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass(frozen=True)
class SpectralConfig:
    """Spectral descent on matrices, Adam on vectors.

    Args:
        momentum: mu, in [0, 1); takes the place of ``betas[0]`` for matrices.
        nesterov: Whether to look ahead.
        scale: Length of the direction of a (rows x columns) matrix: ``"none"`` 1;
            ``"rectangular"`` sqrt(max(1, rows / columns)); ``"adam_rms"`` 0.2 sqrt(max(rows,
            columns)), the root mean square of Adam's, for AdamW's learning rates; ``"fan"``
            sqrt(rows / columns).
        method: How singular values are set to one: a table of `shampoo_core.solvers.polar`
            (``"polar_express"``, ``"original"``, ``"tuned"``, ``"convergent"``, ``"cubic"``), whose
            iterations leave them near one; or ``"svd"``, exact and slow.
        num_iterations: Of the table; at least 1.
        product_dtype: Of the matrix products of the iterations; None means that of the state.
            ``torch.bfloat16`` is usual where the hardware has it.

    Raises:
        TypeError: A number is of the wrong type.
        ValueError: An argument is out of range.
    """

    momentum: float = 0.95
    nesterov: bool = True
    scale: Scale = "rectangular"
    method: str = "polar_express"
    num_iterations: int = 5
    product_dtype: torch.dtype | None = None

    def __post_init__(self) -> None:
        owner = "SpectralConfig"
        check_flags(self)
        check_range(owner, "momentum", self.momentum, low=0.0, high=1.0, high_open=True)
        check_choice(owner, "scale", self.scale, get_args(Scale))
        check_choice(owner, "method", self.method, (*COEFFICIENTS, "svd"))
        check_count(owner, "num_iterations", self.num_iterations)
        check_choice(owner, "product_dtype", self.product_dtype, PRODUCT_DTYPES)

    @property
    def default_grafting(self) -> GraftingConfig | None:
        """None: ``scale`` sets the length."""
        return None

    def block_flops(self, block_shape: Shape, refresh_interval: int) -> float:
        """See `PreconditionerConfig`: an iteration makes X X^T, its square, and their product with X."""
        plain = method_flops(block_shape, [], 0.0, refresh_interval)
        if len(block_shape) == 1:
            return plain
        short, long = sorted((block_shape[0], math.prod(block_shape[1:])))
        return plain + self.num_iterations * (4.0 * short**2 * long + 2.0 * short**3)

    def create(
        self,
        stack_set: StackSet,
        options: GroupOptions,
        grafting: GraftingConfig | None,
        refresh: RefreshPolicy,
    ) -> Preconditioner:
        """See `PreconditionerConfig`.

        Raises:
            ValueError: Grafting was asked for.
        """
        refuse_grafting(self, grafting, "its scale sets the length already")
        matrices = [i for i, layout in enumerate(stack_set.layouts) if len(layout.block_shape) > 1]
        return with_adam_for_rest(
            stack_set, matrices, lambda mine: Spectral(self, mine, options), options, refresh
        )


class Spectral:
    """State and step of spectral descent for one set of stacks of matrices."""

    def __init__(self, config: SpectralConfig, stack_set: StackSet, options: GroupOptions) -> None:
        """Allocate the momentum."""
        self._config = config
        self._stack_set = stack_set
        # An average instead of a sum: a positive factor does not change U V^T.
        momentum = replace(
            options,
            betas=(config.momentum, options.betas[1]),
            beta3=config.momentum**2 if config.nesterov else None,
            bias_correction=False,
        )
        self.filter = GradientFilter(stack_set, momentum)
        self._scale = torch.cat(
            [
                torch.full(
                    (layout.num_blocks,),
                    update_scale(
                        layout.block_shape[0], math.prod(layout.block_shape[1:]), config.scale
                    ),
                    dtype=stack_set.dtype,
                    device=stack_set.device,
                )
                for layout in stack_set.layouts
            ]
        )

    def step(self, gradients: StackedGradients, step: int) -> Direction:
        """See `Preconditioner`."""
        del step
        ahead = self.filter.filter(gradients).stacks
        gradients.free_stacks()
        return Direction([self._orthogonalize(stack) for stack in ahead], self._scale)

    def _orthogonalize(self, stack: Tensor) -> Tensor:
        matrices = stack.reshape(*stack.shape[:2], -1)
        config = self._config
        if config.method == "svd":
            polar = polar_factor(matrices)
        else:
            polar = orthogonalize(
                matrices, config.method, config.num_iterations, config.product_dtype
            )
        return polar.view(stack.shape)

    def state(self) -> StackState:
        """See `Preconditioner`."""
        return merge_states(len(self._stack_set), {"filter": self.filter.state()})


def update_scale(rows: int, columns: int, kind: Scale) -> float:
    """Factor on the polar factor of a (rows x columns) matrix; see `SpectralConfig`."""
    if kind == "rectangular":
        return math.sqrt(max(1.0, rows / columns))
    if kind == "adam_rms":
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(rows / columns) if kind == "fan" else 1.0


def polar_factor(matrices: Tensor) -> Tensor:
    """``U V^T`` of every matrix ``U S V^T``; directions without a singular value are left out.

    Args:
        matrices: (N, m, n), finite.
    """
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    tolerance = max(matrices.shape[-2:]) * torch.finfo(matrices.dtype).eps
    kept = values > tolerance * values[:, :1]
    return torch.bmm(left * kept[:, None, :], right)
