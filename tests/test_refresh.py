"""When factors are refreshed, how evenly the work is spread, and what adaptivity leaves alone."""

from __future__ import annotations

import collections
import itertools
import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from distributed_cases import Divided
from hypothesis import given
from hypothesis import strategies as st
from quadratic import assert_same, gradient, optimizer_for, parameters, run

from shampoo_core import (
    AdaptiveRefresh,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    ShampooConfig,
    StaggeredAdaptiveRefresh,
    StaggeredRefresh,
)
from shampoo_core.blocking import merge_dimensions, tiles_of
from shampoo_core.costs import plain_step_flops, refresh_flops
from shampoo_core.exchange.choice import Exchanges
from shampoo_core.exchange.local import LocalExchange
from shampoo_core.preconditioners.axes import preconditioned_axes
from shampoo_core.preconditioners.eigenvalue_corrected import SecondMoments
from shampoo_core.refresh import (
    SMALLEST_SHARE,
    FactorSlice,
    FactorStackSize,
    RefreshPolicy,
    joined,
    portions,
    whole_stacks,
)
from shampoo_core.stacks import StackSet

sizes_strategy = st.lists(
    st.builds(FactorStackSize, st.integers(1, 12), st.integers(1, 64)), min_size=1, max_size=6
).map(tuple)


def covered(
    policy: RefreshPolicy, sizes: tuple[FactorStackSize, ...], steps: range
) -> collections.Counter[tuple[int, int]]:
    """How often each factor is due in some steps."""
    return collections.Counter(
        (item.stack, factor)
        for step in steps
        for item in policy.due(step, sizes)
        for factor in range(item.start, item.stop)
    )


@given(sizes_strategy, st.integers(1, 20000))
def test_portions_hold_what_is_due_and_no_more_than_allowed(
    sizes: tuple[FactorStackSize, ...], limit: int
) -> None:
    due = [item for item in whole_stacks(sizes) if item.stack % 3 != 1]
    found = portions(due, sizes, limit)
    numels = [[sizes[item.stack].dimension ** 2 for item in _singly(part)] for part in found]
    assert _singly(due) == [item for part in found for item in _singly(part)]
    assert all(part and (sum(part) <= limit or len(part) == 1) for part in numels)
    assert all(sum(a) + b[0] > limit for a, b in itertools.pairwise(numels))


def test_slices_that_fill_a_portion_share_it() -> None:
    sizes = (FactorStackSize(3, 2), FactorStackSize(1, 4))
    alone = [FactorSlice(0, i, i + 1) for i in range(3)]
    found = portions([*alone, FactorSlice(1, 0, 1)], sizes, 8)
    assert found == [alone[:2], alone[2:], [FactorSlice(1, 0, 1)]]


def test_only_neighbours_are_joined() -> None:
    """What lies between was not due; nor are factors of two stacks one slice."""
    due = [(0, 0, 1), (0, 2, 3), (0, 3, 5), (1, 5, 6), (1, 6, 7), (1, 0, 2)]
    found = joined([FactorSlice(*item) for item in due])
    assert found == [(0, 0, 1), (0, 2, 5), (1, 5, 7), (1, 0, 2)]


def _singly(due: list[FactorSlice]) -> list[FactorSlice]:
    return [FactorSlice(item.stack, i, i + 1) for item in due for i in range(item.start, item.stop)]


@given(sizes_strategy, st.integers(1, 20), st.integers(1, 30), st.integers(1, 9))
def test_staggered_refreshes_every_factor_once_per_interval(
    sizes: tuple[FactorStackSize, ...], interval: int, start: int, ranks: int
) -> None:
    policy = StaggeredRefresh(interval, start, ranks=ranks)
    everything = {(i, j) for i, size in enumerate(sizes) for j in range(size.num_factors)}
    assert not covered(policy, sizes, range(1, policy.first_step))
    for first in (policy.first_step, policy.first_step + 3):
        counts = covered(policy, sizes, range(first, first + interval))
        assert set(counts) == everything
        assert set(counts.values()) == {1}
    assert policy.settled_step == start + interval - 1


def test_staggered_solves_small_factors_together_at_evenly_spaced_steps() -> None:
    sizes = (FactorStackSize(num_factors=96, dimension=128), FactorStackSize(96, 64))
    shares = math.ceil(96 * (128**3 + 64**3) / SMALLEST_SHARE)
    policy = StaggeredRefresh(interval=7 * shares)
    busy = [step for step in range(1, 7 * shares + 1) if policy.due(step, sizes)]
    assert busy == list(range(1, 7 * shares + 1, 7))
    work = [
        sum((item.stop - item.start) * sizes[item.stack].dimension ** 3 for item in due)
        for due in (policy.due(step, sizes) for step in busy)
    ]
    assert max(work) < 1.2 * min(work)


@pytest.mark.parametrize(("ranks", "steps"), [(1, range(1, 9)), (2, (1, 3, 5, 7)), (8, (1,))])
def test_every_rank_has_a_share_worth_a_step(ranks: int, steps: Sequence[int]) -> None:
    """Of eight factors that are just one each; steps with work are evenly spaced."""
    policy, sizes = StaggeredRefresh(8, 1, ranks=ranks), (FactorStackSize(8, 512),)
    for first in (1, 9):
        due = [step for step in range(1, 9) if policy.due(first - 1 + step, sizes)]
        assert due == list(steps)


def test_several_ranks_are_given_as_many_factors_at_fewer_steps() -> None:
    sizes = (FactorStackSize(20, 1024), FactorStackSize(20, 1024))
    policy = StaggeredRefresh(10, ranks=8)
    due = [policy.due(step, sizes) for step in range(1, 11)]
    counts = [sum(item.stop - item.start for item in some) for some in due]
    assert [count for count in counts if count] == [8] * 5
    assert all(len({item.stack for item in some}) == len(some) for some in due)
    with pytest.raises(ValueError, match="StaggeredRefresh: ranks must be at least 1, got 0"):
        StaggeredRefresh(ranks=0)


@given(sizes_strategy, st.integers(1, 20), st.integers(1, 30))
def test_fixed_refreshes_at_its_start_and_at_multiples(
    sizes: tuple[FactorStackSize, ...], interval: int, start: int
) -> None:
    policy = FixedRefresh(interval, start)
    due = [step for step in range(1, 80) if policy.due(step, sizes)]
    assert due == [s for s in range(1, 80) if s == start or (s > start and s % interval == 0)]
    total = sum(size.num_factors for size in sizes)
    assert sum(covered(policy, sizes, range(start, start + 1)).values()) == total


def stacks_of(workload: str) -> StackSet:
    """The stacks of an official model under the default blocking."""
    path = Path(__file__).parent / "data" / "algoperf_param_shapes.json"
    tiles = []
    for index, (_, shape, _) in enumerate(json.loads(path.read_text())[workload]["params"]):
        tiles += tiles_of(index, merge_dimensions(tuple(shape), 1024), 1024)
    return StackSet(tiles, dtype=torch.float32, device=torch.device("meta"))


def step_flops(policy: RefreshPolicy, stack_set: StackSet, steps: range) -> list[float]:
    """Modelled work of each step: statistics, preconditioning and refreshes."""
    sizes = tuple(
        FactorStackSize(stack_set.layouts[axis.stack].num_blocks, axis.dimension)
        for axis in preconditioned_axes(stack_set, precondition_vectors=False)
    )
    plain = sum(
        layout.num_blocks * plain_step_flops(layout.block_shape) for layout in stack_set.layouts
    )
    return [
        plain
        + sum(
            (item.stop - item.start) * refresh_flops(sizes[item.stack].dimension)
            for item in policy.due(step, sizes)
        )
        for step in steps
    ]


@pytest.mark.parametrize("workload", ["imagenet_resnet", "imagenet_vit"])
def test_no_step_is_a_spike(workload: str) -> None:
    """At interval 100 the dearest step costs at most 1.5 times the median; all at once, far more."""
    stack_set = stacks_of(workload)
    staggered = step_flops(StaggeredRefresh(100), stack_set, range(1, 101))
    at_once = step_flops(FixedRefresh(100), stack_set, range(1, 101))
    assert sum(staggered) == pytest.approx(sum(at_once))
    assert max(staggered) <= 1.5 * statistics.median(staggered)
    assert max(at_once) > 5 * statistics.median(at_once)


def refreshes(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        int(value)
        for state in optimizer.state.values()
        for name, value in state.items()
        if ".refreshes." in name
    )


def still(parameter: torch.Tensor, step: int) -> torch.Tensor:
    """Gradients whose covariance has fixed axes."""
    generator = torch.Generator().manual_seed(step)
    noise = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype)
    scales = torch.logspace(0, -2, parameter.shape[0], dtype=parameter.dtype)
    return noise * scales[:, None]


@pytest.mark.parametrize("policy", [AdaptiveRefresh, StaggeredAdaptiveRefresh])
def test_adaptive_leaves_bases_that_stand_still_alone(
    policy: type[AdaptiveRefresh | StaggeredAdaptiveRefresh],
) -> None:
    """A covariance that stands still is refreshed a few times, a turning one at every test."""
    counts = {}
    for name, turn in (("still", 0.0), ("turning", 0.02)):
        params = parameters([(8, 64)])
        optimizer = optimizer_for(
            params,
            max_block_size=64,
            betas=(0.9, 0.99),
            refresh=policy(interval=5, start=5, threshold=0.1),
            preconditioner=EigenvalueCorrectedConfig(),
        )
        generator = torch.Generator().manual_seed(1)
        skew = torch.randn(8, 8, generator=generator, dtype=torch.float64)
        rotation = torch.linalg.matrix_exp(turn * (skew - skew.T))
        frame = torch.eye(8, dtype=torch.float64)
        for step in range(1, 101):
            params[0].grad = frame @ still(params[0], step)
            optimizer.step()
            frame = rotation @ frame
        counts[name] = int(optimizer.state[params[0]]["block.0.0.refreshes.axis0"])
    assert counts["still"] <= 4
    assert counts["turning"] >= 12


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_the_ends_of_the_threshold_are_always_and_never(threshold: float) -> None:
    params = parameters([(12, 12)])
    optimizer = optimizer_for(
        params,
        refresh=AdaptiveRefresh(interval=2, start=2, threshold=threshold),
        preconditioner=EigenvalueCorrectedConfig(),
    )
    run(optimizer, params, range(1, 11))
    assert refreshes(optimizer) == (10 if threshold == 0.0 else 0)


def test_staggered_and_adaptive_tests_what_staggered_refreshes() -> None:
    sizes = (FactorStackSize(12, 512), FactorStackSize(40, 256))
    staggered, both = StaggeredRefresh(10, 3), StaggeredAdaptiveRefresh(10, 3, 0.2)
    for step in range(1, 30):
        assert both.due(step, sizes) == staggered.due(step, sizes)
    assert (both.tolerance, staggered.tolerance) == (0.2, 0.0)
    with pytest.raises(ValueError, match=r"StaggeredAdaptiveRefresh: threshold .* got 1.5"):
        StaggeredAdaptiveRefresh(threshold=1.5)


@pytest.mark.parametrize(
    "policy", [FixedRefresh, AdaptiveRefresh, StaggeredRefresh, StaggeredAdaptiveRefresh]
)
def test_a_policy_is_refused_by_its_own_name(policy: type[FixedRefresh | StaggeredRefresh]) -> None:
    with pytest.raises(ValueError, match=f"^{policy.__name__}: interval .* got 0"):
        policy(interval=0)


@pytest.mark.parametrize("policy", [AdaptiveRefresh, StaggeredAdaptiveRefresh])
def test_a_first_root_is_made_whatever_the_test_says(
    policy: type[AdaptiveRefresh | StaggeredAdaptiveRefresh],
) -> None:
    """The identity diagonalises a diagonal factor from the start, but is not its root."""
    ways = []
    for refresh in (FixedRefresh(4, 2), policy(4, 2, threshold=0.5)):
        params = parameters([(12, 12)])
        optimizer = optimizer_for(
            params, max_block_size=12, refresh=refresh, preconditioner=ShampooConfig()
        )
        for step in range(1, 4):
            numbers = torch.logspace(0, -2, 12, dtype=params[0].dtype) * (1 + 0.1 * step)
            params[0].grad = torch.diag(numbers)
            optimizer.step()
        assert int(optimizer.state[params[0]]["block.0.0.refreshes.axis0"]) == 1
        ways.append(params[0].detach())
    torch.testing.assert_close(ways[1], ways[0], rtol=1e-12, atol=1e-12)


def test_transported_second_moments_survive_crossing_eigenvalues() -> None:
    """A drifting problem: directions stand still, their scales rise and fall and cross.

    Bases are ordered by eigenvalue, so that columns change places at a crossing. Numbers that are left
    where they were then belong to another direction; carried over they follow theirs. The error is the
    mean absolute log of measured over true second moment, right after a refresh. It buys a quarter
    here. It is not always better: where factors forget faster than D, leaving the numbers in
    descending order happens to put them nearer to the new eigenvalues (measured with factor_decay .9
    and betas[1] .97: 0.51 transported, 0.31 kept).
    """
    errors = {kind: _drift_error(kind) for kind in ("transport", "keep")}
    assert errors["transport"] < 0.85 * errors["keep"], errors


def _drift_error(kind: SecondMoments) -> float:
    (parameter,) = params = parameters([(6, 32)])
    optimizer = optimizer_for(
        params,
        max_block_size=32,
        betas=(0.0, 0.9),
        refresh=FixedRefresh(10, 10),
        preconditioner=EigenvalueCorrectedConfig(second_moments=kind),
    )
    generator = torch.Generator().manual_seed(3)
    frame = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64)).Q
    errors = []
    for step in range(1, 401):
        phase = step / 40 + torch.arange(6, dtype=torch.float64)
        scales = torch.exp(2 * torch.sin(phase))
        noise = torch.randn(6, 32, generator=generator, dtype=torch.float64)
        parameter.grad = frame @ (scales[:, None] * noise)
        optimizer.step()
        if step % 10 == 0 and step > 100:
            state = optimizer.state[parameter]
            basis = state["block.0.0.bases.axis0"]
            second = state["block.0.0.second_moment.average"]
            measured = (second / state["block.0.0.second_moment.weight"]).mean(1)
            truth = torch.diagonal(basis.T @ frame @ torch.diag(scales**2) @ frame.T @ basis)
            errors.append((measured / truth).log().abs().mean().item())
    return statistics.mean(errors)


def test_first_direction_after_an_early_basis_is_finite() -> None:
    params = parameters([(12, 5)])
    optimizer = optimizer_for(
        params, refresh=FixedRefresh(10, 1), preconditioner=EigenvalueCorrectedConfig()
    )
    params[0].grad = gradient(params[0], 1, 0)
    before = params[0].detach().clone()
    optimizer.step()
    moved = (params[0].detach() - before).norm().item()
    assert 0 < moved <= 0.011 * math.sqrt(60)


def test_an_interval_that_never_ends_costs_nothing() -> None:
    sizes = (FactorStackSize(3, 1024), FactorStackSize(5, 512))
    policy = StaggeredRefresh(10**9)
    due = policy.due(1, sizes)
    assert due and policy.due(2, sizes) == []


def test_staggered_weighs_a_large_factor_against_many_small_ones() -> None:
    """One of twice the side is as much work as eight."""
    small, large = FactorStackSize(8, 512), FactorStackSize(1, 1024)
    for sizes in ((small, large), (large, small)):
        policy = StaggeredRefresh(2)
        shares = [policy.due(step, sizes) for step in (1, 2)]
        assert sorted([(sizes[i.stack].dimension, i.stop - i.start) for i in due] for due in shares) == [
            [(512, 8)], [(1024, 1)],
        ]  # fmt: skip


def test_a_schedule_does_not_depend_on_how_parameters_travel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Factors take turns in the order of parameters, some of which other ranks may share in other ways."""

    def stepped() -> list[torch.nn.Parameter]:
        params = parameters([(8, 8)] * 4)
        run(optimizer_for(params, refresh=Divided(4)), params, range(1, 10))
        return params

    expected = stepped()
    ways = itertools.cycle((LocalExchange(), LocalExchange()))
    monkeypatch.setattr(Exchanges, "of", lambda self, parameter: next(ways))
    assert_same(stepped(), expected, 1e-12)
