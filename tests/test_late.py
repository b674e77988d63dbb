"""Blocks that start late: as in an optimizer of their own that starts with their first gradient."""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from distributed_cases import Divided
from quadratic import assert_same, gradient, optimizer_for, parameters
from torch import Tensor

from shampoo_core import (
    AdamConfig,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLShampooConfig,
    KLSOAPConfig,
    OrthogonalIterationSolver,
    PerFactorCorrectedConfig,
    SGDConfig,
    ShampooConfig,
)
from shampoo_core.counting import OperationCounter
from shampoo_core.refresh import FactorSlice, FactorStackSize, whole_stacks
from shampoo_core.solvers import off_diagonal_ratio

SHAPE = (12, 20)
WARM = OrthogonalIterationSolver()
METHODS: dict[str, Any] = {
    "shampoo": ShampooConfig(),
    "shampoo, warm": ShampooConfig(solver=WARM),
    "shampoo, packed": ShampooConfig(storage="packed"),
    "eigenvalue-corrected": EigenvalueCorrectedConfig(),
    "eigenvalue-corrected, warm": EigenvalueCorrectedConfig(solver=WARM),
    "per factor": PerFactorCorrectedConfig(),
    "per factor, warm": PerFactorCorrectedConfig(solver=WARM),
    "kl-shampoo": KLShampooConfig(),
    "kl-soap": KLSOAPConfig(),
}
GRAFTED = ("shampoo", "shampoo, warm", "per factor")
WARM_STARTED = [name for name, config in METHODS.items() if config.solver.warm_starts]


@dataclass(frozen=True)
class Shifted:
    """Everything at every step whose number and ``shift`` sum to a multiple of ``interval``."""

    interval: int
    shift: int
    tolerance: float = 0.0

    @property
    def first_step(self) -> int:
        return self.interval - self.shift % self.interval

    @property
    def settled_step(self) -> int:
        return self.first_step

    def due(self, step: int, sizes: tuple[FactorStackSize, ...]) -> list[FactorSlice]:
        return whole_stacks(sizes) if (step + self.shift) % self.interval == 0 else []


def scaled(parameter: Tensor, step: int) -> Tensor:
    """A gradient whose rows lie on four decades, where Adam and the gradient go different ways."""
    decades = torch.logspace(0, -4, SHAPE[0], dtype=parameter.dtype)
    return gradient(parameter, step, 0) * decades[:, None]


def two(late: int, **options: Any) -> tuple[DistributedShampoo, list[torch.nn.Parameter]]:
    """An optimizer of a late parameter and its neighbour, before the late one's first step."""
    params = parameters([SHAPE, SHAPE])
    optimizer = optimizer_for(params, **options)
    for step in range(1, late):
        step_both(optimizer, params, step, None)
    return optimizer, params


def step_both(
    optimizer: DistributedShampoo,
    params: list[torch.nn.Parameter],
    step: int,
    grad: Tensor | None,
) -> None:
    """A step with a gradient for the late parameter, which is the first."""
    params[0].grad = grad
    params[1].grad = gradient(params[1], step, 1)
    optimizer.step()


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize("late", [4, 6, 8])
@pytest.mark.parametrize("name", METHODS)
def test_a_late_parameter_is_stepped_as_alone(name: str, late: int, is_frozen: bool) -> None:
    """Refreshes at steps 1, 6, 11; the late one's at the same ones, counted from its own first step."""
    options: dict[str, Any] = {"preconditioner": METHODS[name], "betas": (0.9, 0.95)}
    params = parameters([SHAPE, SHAPE])
    params[0].requires_grad_(not is_frozen)
    together = optimizer_for(params, refresh=Shifted(5, 4), **options)
    (own,) = parameters([SHAPE])
    alone = optimizer_for([own], refresh=Shifted(5, late - 2), **options)
    for step in range(1, 20):
        if step == late:
            params[0].requires_grad_(True)
        if step >= late:
            own.grad = scaled(own, step)
            alone.step()
        step_both(together, params, step, scaled(params[0], step) if step >= late else None)
        assert_same([params[0]], [own], 1e-12)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", GRAFTED)
def test_before_its_first_root_a_late_block_is_stepped_by_adam(name: str, zero: bool) -> None:
    options: dict[str, Any] = {"refresh": FixedRefresh(100, 1), "weight_decay": 0.0}
    optimizer, params = two(1, preconditioner=METHODS[name], **options)
    (own,) = parameters([SHAPE])
    adam = optimizer_for([own], preconditioner=AdamConfig(), **options)
    for step in range(1, 15):
        is_late = step < 4
        own.grad = scaled(own, step) * (not is_late)
        if not is_late or zero:
            adam.step()
        step_both(optimizer, params, step, None if is_late and not zero else own.grad.clone())
        assert_same([params[0]], [own], 1e-12)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("name", WARM_STARTED)
def test_the_first_basis_of_a_late_block_is_an_eigendecomposition(name: str, zero: bool) -> None:
    optimizer, params = two(1, preconditioner=METHODS[name], refresh=FixedRefresh(20, 1))
    for step in range(1, 21):
        nothing = torch.zeros_like(params[0]) if zero else None
        grad = scaled(params[0], step) if step > 5 else nothing
        step_both(optimizer, params, step, grad)
    state = {k.removeprefix("block.0.0."): v for k, v in optimizer.state_dict()["state"][0].items()}
    prefix = "basis.matrix" if "basis.matrix.axis0" in state else "bases"
    for axis in ("axis0", "axis1"):
        basis, factor = state[f"{prefix}.{axis}"], state[f"factors.{axis}"]
        assert state[f"refreshes.{axis}"] == 1
        if name.startswith("kl"):  # kept in the basis already
            basis = torch.eye(len(factor), dtype=factor.dtype)
        assert off_diagonal_ratio(factor[None], basis[None]).item() < 1e-10


@pytest.mark.parametrize("is_used", [False, True])
@pytest.mark.parametrize("saved", [3, 4, 5, 8])
@pytest.mark.parametrize("name", METHODS)
def test_a_resumed_run_treats_late_blocks_alike(name: str, saved: int, is_used: bool) -> None:
    """In a new optimizer, and in one that has come as far with nothing late: what it knew is void.

    The first gradient, of step 4, is not finite, and between steps whose gradients count.
    """
    config = replace(METHODS[name], statistics_interval=5)
    options: dict[str, Any] = {"preconditioner": config, "refresh": FixedRefresh(5, 1)}

    def go_on(optimizer: Any, params: list[torch.nn.Parameter], steps: range, late: int) -> None:
        for step in steps:
            grad = scaled(params[0], step) if step >= late else None
            if grad is not None and step == 4:
                grad[0, 0] = float("nan")
            step_both(optimizer, params, step, grad)

    undisturbed, expected = two(1, **options)
    go_on(undisturbed, expected, range(1, 17), late=4)
    first, params = two(1, **options)
    go_on(first, params, range(1, saved + 1), late=4)
    second, others = two(1, **options)
    if is_used:
        go_on(second, others, range(1, saved + 1), late=1)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    for other, parameter in zip(others, params, strict=True):
        other.detach().copy_(parameter.detach())
    go_on(first, params, range(saved + 1, 17), late=4)
    go_on(second, others, range(saved + 1, 17), late=4)
    assert_same(params, expected)
    assert_same(others, expected)


@pytest.mark.parametrize("name", METHODS)
def test_the_first_gradient_counts_between_steps_that_do(name: str) -> None:
    """Every tenth step counts; the late gradient of step 4 does too, before the refresh of step 5."""
    config = replace(METHODS[name], statistics_interval=10)
    optimizer, params = two(1, preconditioner=config, refresh=FixedRefresh(5), max_block_size=10)
    (own,) = parameters([SHAPE])
    alone = optimizer_for([own], preconditioner=config, max_block_size=10)
    for step in range(1, 8):
        grad = scaled(params[0], step) if step >= 4 else None
        if grad is not None:
            own.grad = grad.clone()
            alone.step()
        step_both(optimizer, params, step, grad)
    together, expected = (some.state_dict()["state"][0] for some in (optimizer, alone))
    for key, number in together.items():
        if ".refreshes." in key:
            assert number == 1
        elif ".failures." in key:
            assert number == 0
        elif ".factors." in key and not name.startswith("kl"):  # those are kept in their bases
            torch.testing.assert_close(number, expected[key])


@pytest.mark.usefixtures("as_on_an_accelerator")
def test_what_is_known_to_be_ready_costs_nothing() -> None:
    """One operation more in the first interval, one question at its end; then no more of either."""
    params = parameters([SHAPE, SHAPE], dtype=torch.float32)
    optimizer = optimizer_for(params, refresh=FixedRefresh(4, 1))
    counts = []
    for step in range(1, 13):
        for index, parameter in enumerate(params):
            parameter.grad = gradient(parameter, step, index)
        with OperationCounter() as ops:
            optimizer.step()
        counts.append((ops.num_operations, ops.num_synchronisations))
    operations, waits = zip(*counts, strict=True)
    assert waits == (1, 0, 0, 2, 0, 0, 0, 1, 0, 0, 0, 1)
    assert operations[1] == operations[4] + 1
    assert set(operations[4:7]) == set(operations[8:11]) == {operations[4]}


@pytest.mark.parametrize("config", [ShampooConfig(), PerFactorCorrectedConfig()])
@pytest.mark.parametrize(("grafting", "alone"), [(None, SGDConfig()), ("auto", AdamConfig())])
def test_blocks_follow_the_graft_until_all_their_factors_have_been_refreshed(
    config: Any, grafting: Any, alone: Any
) -> None:
    """A staggered refresh comes to the sides of a block one after the other."""
    shapes, options = [(12, 9)] * 4, {"betas": (0.0, 0.9), "weight_decay": 0.0}
    params, expected = parameters(shapes), parameters(shapes)
    optimizer = optimizer_for(
        params, preconditioner=config, grafting=grafting, refresh=Divided(9), **options
    )
    plain = optimizer_for(expected, preconditioner=alone, **options)
    half = 0
    for step in range(1, 9):
        for index, (left, right) in enumerate(zip(params, expected, strict=True)):
            left.grad, right.grad = (gradient(parameters(shapes)[index], step, index),) * 2
        optimizer.step()
        plain.step()
        for left, right in zip(params, expected, strict=True):
            state = optimizer.state[left]
            counts = [int(state[f"block.0.0.refreshes.axis{axis}"]) for axis in (0, 1)]
            if min(counts) == 0:
                assert_same([left], [right], 1e-12)
                half += max(counts)
    assert half > 0


@pytest.mark.parametrize("config", [KLShampooConfig, KLSOAPConfig])
def test_a_late_matrix_beside_vectors_counts_between_steps_that_do(config: Any) -> None:
    """Vectors are stepped by Adam, apart from it."""
    late, vector = params = parameters([(8, 6), (7,)])
    optimizer = optimizer_for(
        params, preconditioner=config(statistics_interval=10), refresh=FixedRefresh(5)
    )
    for step in range(1, 6):
        late.grad = gradient(late, step, 0) if step >= 4 else None
        vector.grad = gradient(vector, step, 1)
        optimizer.step()
    state = optimizer.state_dict()["state"][0]
    for axis in ("axis0", "axis1"):
        assert state[f"block.0.0.refreshes.{axis}"] == 1
        assert torch.count_nonzero(state[f"block.0.0.factors.{axis}"]) > 0
