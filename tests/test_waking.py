"""Directions and parameters whose gradients begin late: nothing stands still, nothing leaps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from shampoo_core import (
    AdaptiveRefresh,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLShampooConfig,
    KLSOAPConfig,
    OrthogonalIterationSolver,
    PerFactorCorrectedConfig,
    ShampooConfig,
    StaggeredAdaptiveRefresh,
)

BEGIN = 21
"""Step of the late gradients."""


def noise(shape: tuple[int, ...], step: int, index: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * step + index)
    return torch.randn(shape, generator=generator)


def moves_of_late_part(late: tuple[slice, slice], num_steps: int, **options: Any) -> Tensor:
    """How far the entries of an (8, 24) matrix have moved whose gradients are zero before `BEGIN`."""
    weight = torch.nn.Parameter(noise((8, 24), 0, 9))
    optimizer = DistributedShampoo(
        [weight], lr=0.01, betas=(0.9, 0.99), weight_decay=0.0, **options
    )
    before = weight.detach().clone()
    early = (slice(0, 4), slice(0, 12) if late[1].start else slice(None))
    for step in range(1, num_steps + 1):
        weight.grad = torch.zeros_like(weight)
        weight.grad[early] = noise((8, 24), step)[early]
        if step >= BEGIN:
            weight.grad[late] = noise((8, 24), step, 1)[late]
        optimizer.step()
    return (weight.detach() - before)[late].abs()


@pytest.mark.parametrize(
    "refresh",
    [FixedRefresh(10, 1), AdaptiveRefresh(10, 1), StaggeredAdaptiveRefresh(10)],
    ids=lambda refresh: type(refresh).__name__,
)
@pytest.mark.parametrize("solver", [None, OrthogonalIterationSolver(max_iterations=5)])
def test_rows_that_wake_up_move(refresh: Any, solver: Any) -> None:
    """The old basis still diagonalises their factor, but the root that was made in it has no such rows."""
    config = ShampooConfig() if solver is None else ShampooConfig(solver=solver)
    moved = moves_of_late_part(
        (slice(4, 8), slice(0, None)), 200, refresh=refresh, preconditioner=config
    )
    assert bool((moved > 0.0).all())
    assert moved.mean() > 0.02


def test_a_root_that_keeps_its_directions_is_left_alone() -> None:
    """Of rows that are there from the start: eigenvalues alone are no reason."""
    weight = torch.nn.Parameter(torch.zeros(4, 64))
    optimizer = DistributedShampoo(
        [weight], betas=(0.9, 0.99), refresh=AdaptiveRefresh(5, 1, threshold=0.9)
    )
    for step in range(1, 41):
        scales = torch.tensor([1.0, 1.0, 0.1, 0.1]) if step < 20 else torch.tensor([1.0, 1, 3, 3])
        weight.grad = noise((4, 64), step) * scales[:, None]
        optimizer.step()
    optimizer.state_dict()
    assert optimizer.state[weight]["block.0.0.refreshes.axis0"] == 1


def test_directions_that_stay_asleep_wake_no_root() -> None:
    """The root is zero along them as it should be: only a gradient there makes it old."""
    weight = torch.nn.Parameter(torch.ones(8, 24))
    optimizer = DistributedShampoo(
        [weight], betas=(0.9, 0.99), refresh=AdaptiveRefresh(5, 1, threshold=0.9)
    )
    for step in range(1, 41):
        weight.grad = noise((8, 24), step)
        weight.grad[4:] = 0.0
        optimizer.step()
    optimizer.state_dict()
    assert optimizer.state[weight]["block.0.0.refreshes.axis0"] == 1


@pytest.mark.parametrize("statistics", ["whitened", "whitened_mean"])
def test_directions_that_no_root_has_seen_are_learnt_by_whitened_statistics(
    statistics: Any,
) -> None:
    """Truncated roots on both sides would hide such gradients from both factors for good."""
    config = ShampooConfig(statistics=statistics, exponent=0.5)
    moved = moves_of_late_part(
        (slice(4, 8), slice(12, 24)), 200, refresh=FixedRefresh(10, 1), preconditioner=config
    )
    assert bool((moved > 0.0).all())
    assert moved.mean() > 0.01
    with pytest.raises(ValueError, match="rank_tolerance=1e-06: what whitens must not be trunc"):
        ShampooConfig(statistics=statistics, rank_tolerance=1e-6)


@pytest.mark.parametrize("make", [ShampooConfig, PerFactorCorrectedConfig])
@pytest.mark.parametrize("ridge", [0.0, 1e-12])
@pytest.mark.parametrize("grafting", ["auto", None])
@pytest.mark.parametrize("bad_start", [False, True], ids=["late", "not_finite"])
def test_a_late_parameter_steps_as_one_alone_before_its_first_root(
    make: Any, ridge: float, grafting: Any, bad_start: bool
) -> None:
    """A ridge is no root: of a factor without gradients it would be enormous."""
    options = {"grafting": grafting, "preconditioner": make(ridge=ridge), "weight_decay": 0.0}
    late, other, alone = (torch.nn.Parameter(torch.ones(6, 5)) for _ in range(3))
    together = DistributedShampoo([late, other], refresh=FixedRefresh(100, 1), **options)
    first = DistributedShampoo([alone], refresh=FixedRefresh(100), **options)
    for step in range(1, 9):
        other.grad = noise((6, 5), step, 1)
        if step >= 4:
            late.grad = alone.grad = 1e-3 * noise((6, 5), step)
        elif bad_start:
            late.grad = torch.full((6, 5), float("nan"))
        together.step()
        if step >= 4:
            first.step()
    torch.testing.assert_close(late, alone, rtol=0.0, atol=1e-6)
    assert not torch.equal(alone, torch.ones(6, 5))


@pytest.mark.parametrize("lagged", [False, True])
@pytest.mark.parametrize("make", [EigenvalueCorrectedConfig, KLShampooConfig, KLSOAPConfig])
def test_factors_learn_every_so_many_steps(make: Any, lagged: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(3, 3))
    optimizer = DistributedShampoo(
        [weight],
        refresh=FixedRefresh(1000),
        preconditioner=make(lagged=lagged, statistics_interval=4),
    )
    counted, before = [], None
    for step in range(1, 14):
        weight.grad = noise((3, 3), step)
        optimizer.step()
        factor = optimizer.state_dict()["state"][0]["block.0.0.factors.axis0"].clone()
        if before is None or not torch.equal(before, factor):
            counted.append(step)
        before = factor
    assert counted == [1, 5, 9, 13]


@pytest.mark.parametrize("make", [EigenvalueCorrectedConfig, KLShampooConfig, KLSOAPConfig])
def test_the_first_gradients_make_the_first_bases_of_lagged_methods(make: Any) -> None:
    """Whatever an adaptive refresh would leave alone later."""
    weight = torch.nn.Parameter(torch.ones(4, 4))
    optimizer = DistributedShampoo(
        [weight],
        refresh=AdaptiveRefresh(50, 1, threshold=1.0),
        preconditioner=make(lagged=True),
    )
    weight.grad = noise((4, 4), 1)
    optimizer.step()
    state = optimizer.state_dict()["state"][0]
    assert [int(state[f"block.0.0.refreshes.axis{axis}"]) for axis in (0, 1)] == [1, 1]


@pytest.mark.parametrize("make", [ShampooConfig, EigenvalueCorrectedConfig, KLShampooConfig])
def test_vectors_are_kept_in_few_bits_too(make: Any) -> None:
    sizes = []
    for storage in ("dense", "4bit"):
        vector, matrix = (torch.nn.Parameter(torch.ones(shape)) for shape in ((4096,), (8, 8)))
        optimizer = DistributedShampoo([vector, matrix], preconditioner=make(storage=storage))
        vector.grad, matrix.grad = noise((4096,), 1), noise((8, 8), 1)
        optimizer.step()
        optimizer.state_dict()
        sizes.append(sum(entry.nbytes for entry in optimizer.state[vector].values()))
    assert sizes[1] < 0.5 * sizes[0]
