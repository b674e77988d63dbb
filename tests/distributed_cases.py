"""Trajectories that several processes have to follow as one does, and how to step them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from quadratic import SHAPES, gradient, parameters
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from shampoo_core import (
    AdamConfig,
    AdaptiveRefresh,
    DistributedShampoo,
    Distribution,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    HeavyBall,
    KLShampooConfig,
    KLSOAPConfig,
    LatestWeightAverage,
    OrthogonalIterationSolver,
    PerFactorCorrectedConfig,
    PrimalAveraging,
    RowWiseAdaGradConfig,
    ScheduleFree,
    SGDGrafting,
    ShampooConfig,
    SpectralConfig,
    StaggeredAdaptiveRefresh,
    StaggeredRefresh,
    WeightEMA,
)
from shampoo_core.refresh import FactorSlice, FactorStackSize

STEPS = 9
EVALUATE_AT = (4, 8)


@dataclass(frozen=True)
class Divided(StaggeredRefresh):
    """Spreads factors over all phases, however small they are: at sides of 512 times theirs it would be."""

    def due(self, step: int, sizes: tuple[FactorStackSize, ...]) -> list[FactorSlice]:
        large = (size._replace(dimension=512 * size.dimension) for size in sizes)
        return super().due(step, tuple(large))


@dataclass(frozen=True)
class Case:
    """Options of an optimizer, and what happens during its steps."""

    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float64
    missing: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """Step: parameters without a gradient."""
    frozen_until: int = 0
    """First step at which parameters 1 and 3 require a gradient."""
    split_at: int | None = None
    """Where a second parameter group begins, with a method and a rate of its own."""
    poisoned: dict[int, int] = field(default_factory=dict)
    """Step: parameter with a number that is not finite in its gradient."""
    shapes: tuple[tuple[int, ...], ...] = SHAPES
    """Of the parameters."""


FULL_RANK = 5
"""First step at which every factor of the blocks has had gradients enough to have full rank. Before,
rounding turns its eigenbasis: results of a batch and of its parts need not be bitwise equal, and are not
on every processor."""

METHODS: dict[str, dict[str, Any]] = {
    "shampoo": {"refresh": FixedRefresh(3)},
    "staggered": {"refresh": Divided(4)},
    "adaptive": {"refresh": AdaptiveRefresh(2, 1, threshold=0.2)},
    "staggered and adaptive": {"refresh": StaggeredAdaptiveRefresh(2, 1, threshold=0.2)},
    "warm-started": {
        "refresh": Divided(3, ranks=2),
        "preconditioner": ShampooConfig(solver=OrthogonalIterationSolver(max_iterations=3)),
    },
    "packed one-sided": {
        "refresh": FixedRefresh(3),
        "preconditioner": ShampooConfig(sides="first", storage="packed", exponent=0.5),
    },
    "vectors too": {
        "refresh": Divided(3),
        "preconditioner": ShampooConfig(precondition_vectors=True),
    },
    "look-ahead": {"refresh": FixedRefresh(4), "betas": (0.9, 0.99), "beta3": 0.81},
    "l2": {"refresh": FixedRefresh(3), "weight_decay": 0.1, "weight_decay_kind": "l2"},
    "decay after": {"weight_decay": 0.1, "weight_decay_kind": "decoupled_after"},
    "statistics interval": {
        "refresh": FixedRefresh(4),
        "preconditioner": ShampooConfig(statistics_interval=3, factor_decay=0.9),
    },
    "whitened": {
        "refresh": FixedRefresh(3, 1),
        "preconditioner": ShampooConfig(statistics="whitened_mean", exponent=0.5),
    },
    "eigenvalue-corrected": {
        "refresh": Divided(3, FULL_RANK),
        "preconditioner": EigenvalueCorrectedConfig(),
    },
    "eigenvalue-corrected, lagged": {
        "refresh": FixedRefresh(2, FULL_RANK),
        "preconditioner": EigenvalueCorrectedConfig(lagged=True),
    },
    "per-factor corrected": {
        "refresh": Divided(4, FULL_RANK),
        "preconditioner": PerFactorCorrectedConfig(),
    },
    "kl-shampoo": {"refresh": FixedRefresh(3, FULL_RANK), "preconditioner": KLShampooConfig()},
    "kl-shampoo, lagged": {
        "refresh": Divided(4, FULL_RANK),
        "preconditioner": KLShampooConfig(lagged=True, second_moments="permute"),
    },
    "kl-soap": {"refresh": AdaptiveRefresh(2, FULL_RANK), "preconditioner": KLSOAPConfig()},
    "spectral": {"preconditioner": SpectralConfig()},
    "adam": {"preconditioner": AdamConfig()},
    "row-wise adagrad": {"preconditioner": RowWiseAdaGradConfig(decay=0.9)},
    "momentum": {
        "refresh": FixedRefresh(4),
        "betas": (0.0, 0.99),
        "grafting": SGDGrafting(),
        "averaging": HeavyBall(0.9, nesterov=True),
    },
    "schedule-free": {
        "refresh": FixedRefresh(4),
        "averaging": ScheduleFree(),
        "betas": (0.0, 0.99),
    },
    "primal averaging": {"refresh": Divided(4), "averaging": PrimalAveraging()},
    "weight average": {"refresh": FixedRefresh(4), "averaging": WeightEMA(0.9, interval=2)},
    "latest weights": {
        "refresh": FixedRefresh(4),
        "averaging": LatestWeightAverage(length=2, interval=2),
    },
}

SQUARE_BLOCKS = ((20, 20), (7,), (16, 16), (20, 10), (), (10, 10), (32, 16))
"""For methods that make their first bases of the first gradient: it gives square blocks full rank."""

CASES: dict[str, Case] = {
    name: Case(options, shapes=SQUARE_BLOCKS if name.endswith(", lagged") else SHAPES)
    for name, options in METHODS.items()
}
CASES |= {
    "missing gradients": Case(
        METHODS["staggered"], missing={2: (0,), 3: (0, 1, 2, 3), 5: tuple(range(7)), 6: (6,)}
    ),
    "frozen": Case(METHODS["staggered"], frozen_until=3),
    "blocks of several sizes": Case(
        {**METHODS["eigenvalue-corrected"], "max_block_size": (16, 4, 8, 9, 16, None, 12)}
    ),
    "two groups": Case(METHODS["eigenvalue-corrected"], split_at=3),
    "two groups, missing": Case(METHODS["schedule-free"], split_at=2, missing={3: (2, 3, 4, 5, 6)}),
    "not finite": Case(METHODS["staggered"], poisoned={2: 0, 5: 6}),
    "no decay": Case({**METHODS["shampoo"], "weight_decay": 0.0}),
    "waves": Case({**METHODS["staggered"], "max_wave_numel": 300}, missing={3: (0, 1)}, split_at=4),
    "waves, weight average": Case({**METHODS["weight average"], "max_wave_numel": 200}),
    "waves, packed": Case({**METHODS["packed one-sided"], "max_wave_numel": 500}, frozen_until=3),
    "overlap": Case({**METHODS["shampoo"], "distributed": Distribution(overlap=True)}, split_at=3),
}
SINGLE_PRECISION = {
    f"{name}, float32": Case(METHODS[name], dtype=torch.float32)
    for name in (
        "shampoo",
        "staggered",
        "eigenvalue-corrected",
        "spectral",
        "adam",
        "primal averaging",
    )
}
CASES |= SINGLE_PRECISION
HALF_PRECISION = {
    "bfloat16 parameters": Case(METHODS["staggered"], dtype=torch.bfloat16),
}
CASES |= HALF_PRECISION

AfterStep = Callable[[int, list[torch.nn.Parameter]], None]


MAIN = (
    "staggered",
    "eigenvalue-corrected",
    "kl-shampoo, lagged",
    "weight average",
    "missing gradients",
    "two groups",
    "not finite",
    "staggered, float32",
    "waves",
)
"""A method, policy, averaging and event of every kind, for many ranks on few cores."""

Parameters = list[torch.nn.Parameter]


def build(
    case: Case, distribute: Callable[[Parameters], Parameters] = lambda params: params
) -> tuple[Parameters, DistributedShampoo]:
    """Parameters, as DTensors where these are asked for, and optimizer of a case."""
    params = parameters(case.shapes, dtype=case.dtype)
    for index in (1, 3):
        params[index].requires_grad_(case.frozen_until == 0)
    params = distribute(params)
    options = {"lr": 0.01, "max_block_size": 16, "weight_decay": 0.01, **case.options}
    if case.split_at is None:
        return params, DistributedShampoo(params, **options)
    second = {"params": params[case.split_at :], "lr": 0.02, "preconditioner": AdamConfig()}
    return params, DistributedShampoo([{"params": params[: case.split_at]}, second], **options)


def run(
    case: Case,
    params: list[torch.nn.Parameter],
    optimizer: DistributedShampoo,
    steps: range,
    after_step: AfterStep,
) -> None:
    """Step; evaluate now and then."""
    for step in steps:
        if step == case.frozen_until:
            for index in (1, 3):
                params[index].requires_grad_(True)
        for index, parameter in enumerate(params):
            absent = index in case.missing.get(step, ()) or not parameter.requires_grad
            parameter.grad = None if absent else gradient_of(case, parameter, step, index)
        optimizer.step()
        after_step(step, params)
        if step in EVALUATE_AT:
            optimizer.eval()
            after_step(step, params)
            optimizer.train()
            after_step(step, params)


def gradient_of(case: Case, parameter: Tensor, step: int, index: int) -> Tensor:
    """The gradient, with a bad number where the case wants one; placed as the parameter is."""
    sharded = isinstance(parameter, DTensor)
    result = gradient(parameter.detach().full_tensor() if sharded else parameter, step, index)
    if case.poisoned.get(step) == index:
        result.view(-1)[0] = float("nan")
    if isinstance(parameter, DTensor):
        return distribute_tensor(result, parameter.device_mesh, parameter.placements)
    return result


def trajectory(case: Case) -> list[list[Tensor]]:
    """Parameters after every step and evaluation."""
    params, optimizer = build(case)
    seen: list[list[Tensor]] = []
    run(
        case,
        params,
        optimizer,
        range(1, STEPS + 1),
        lambda step, params: seen.append([p.detach().clone() for p in params]),
    )
    return seen


def assert_close(
    name: str, actual: list[list[Tensor]], expected: list[list[Tensor]], tolerance: float
) -> None:
    """Largest difference relative to the largest number, parameter by parameter."""
    assert len(actual) == len(expected)
    for moment, (left, right) in enumerate(zip(actual, expected, strict=True)):
        for a, b in zip(left, right, strict=True):
            error = (a - b).abs().max() / b.abs().max()
            assert error <= tolerance, (name, moment, tuple(b.shape), float(error))


def tolerance_of(case: Case) -> float:
    """1e-12 in double precision, 1e-6 in single; one rounding of the parameter in bfloat16."""
    return {torch.float64: 1e-12, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[case.dtype]
