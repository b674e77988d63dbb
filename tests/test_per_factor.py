"""Eigenvalues measured factor by factor in an old basis, against one plain float64 block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from quadratic import assert_same, optimizer_for, parameters, run
from reference.algebra import Array
from trajectories import assert_follows

from shampoo_core import (
    AdamConfig,
    AdaptiveRefresh,
    EighSolver,
    FixedRefresh,
    PerFactorCorrectedConfig,
    RMSpropGrafting,
    ShampooConfig,
    StaggeredRefresh,
)
from shampoo_core.solvers import OrthogonalIterationSolver

OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "weight_decay": 0.1}
START = 6
"""Late enough for full rank: the basis of a null space is anybody's choice."""


def plain(ndim: int, **options: Any) -> Callable[[Array], Any]:
    """The reference for blocks of ``ndim`` axes or more, AdamW for the others."""

    def make(block: Array) -> Any:
        if block.ndim < ndim:
            return reference.AdamW(block, eps=1e-8, **OPTIONS)
        return reference.PerFactorCorrected(block, start=START, **{**OPTIONS, **options})

    return make


@pytest.mark.parametrize("cut", ["balanced", "greedy"])
@pytest.mark.parametrize("shape", [(20, 30), (35, 9), (18, 6, 5), (40,)])
@pytest.mark.parametrize("interval", [1, 5])
def test_blocks_agree_with_the_reference(shape: tuple[int, ...], interval: int, cut: str) -> None:
    assert_follows(
        plain(
            2, interval=interval, eps=1e-3, grafting="adam", grafting_beta2=0.95, grafting_eps=1e-8
        ),
        shape,
        cut=cut,
        # A reference that skips a step also skips a refresh, unless every step has one.
        absent=(8, 12, 13) if interval == 1 else (),
        refresh=FixedRefresh(interval, START),
        preconditioner=PerFactorCorrectedConfig(ridge=1e-3),
        **OPTIONS,
    )


def test_gradients_that_are_missing_between_refreshes() -> None:
    def count(method: Any) -> None:
        method.t += 1

    assert_follows(
        plain(
            2, interval=4, eps=1e-3, bias_correction=False,
            grafting="rmsprop", grafting_beta2=0.95, grafting_eps=1e-8,
        ),
        (20, 30),
        absent=(3, 9, 10, 15),
        on_absent=count,
        refresh=FixedRefresh(4, START),
        preconditioner=PerFactorCorrectedConfig(ridge=1e-3),
        grafting=RMSpropGrafting(),
        bias_correction=False,
        **OPTIONS,
    )  # fmt: skip


@pytest.mark.parametrize("exponent", [None, 0.5, {2: 0.3, 3: 0.2}])
@pytest.mark.parametrize("shape", [(12, 10), (6, 5, 7), (5,)])
def test_without_graft_and_truncated(shape: tuple[int, ...], exponent: Any) -> None:
    assert_follows(
        plain(1, interval=4, eps=0.0, ridge="truncate", rtol=1e-9, exponent=exponent),
        shape,
        grafting=None,
        refresh=FixedRefresh(4, START),
        preconditioner=PerFactorCorrectedConfig(
            exponent=exponent, rank_tolerance=1e-9, precondition_vectors=True
        ),
        **OPTIONS,
    )


def test_refreshed_at_every_step_it_is_shampoo() -> None:
    ours, theirs = parameters(), parameters()
    first = optimizer_for(
        ours, preconditioner=PerFactorCorrectedConfig(), refresh=FixedRefresh(1, START), **OPTIONS
    )
    second = optimizer_for(
        theirs, preconditioner=ShampooConfig(), refresh=FixedRefresh(1, START), **OPTIONS
    )
    run(first, ours, range(1, 25))
    run(second, theirs, range(1, 25))
    assert_same(ours, theirs, 1e-9)


def test_in_a_basis_that_stands_still_old_is_as_good_as_new() -> None:
    """What it is for: the spectrum moves, the basis does not, and one refresh is enough."""
    left, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(8, 8, dtype=torch.float64))
    once, always = FixedRefresh(10**6, 1), FixedRefresh(1, 1)
    runs = {
        "corrected, refreshed once": (PerFactorCorrectedConfig(), once),
        "shampoo, refreshed once": (ShampooConfig(), once),
        "shampoo, refreshed always": (ShampooConfig(), always),
    }
    results = {}
    for name, (config, refresh) in runs.items():
        weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
        optimizer = optimizer_for([weight], preconditioner=config, refresh=refresh, **OPTIONS)
        generator = torch.Generator().manual_seed(3)
        for step in range(1, 31):
            spectrum = torch.rand(8, generator=generator, dtype=torch.float64) + 0.1
            # Half of the directions grow, half shrink.
            spectrum *= 1.2 ** (step * torch.tensor([1, -1] * 4))
            weight.grad = left @ torch.diag(spectrum) @ right.T
            optimizer.step()
        results[name] = weight.detach()
    exact = results["shampoo, refreshed always"]
    assert_same([results["corrected, refreshed once"]], [exact], 1e-9)
    stale = torch.linalg.vector_norm(results["shampoo, refreshed once"] - exact)
    assert stale > 0.1 * torch.linalg.vector_norm(exact)


def test_gradients_whose_squares_vanish_are_followed_as_they_are() -> None:
    weight = torch.nn.Parameter(torch.zeros(4, 6))
    optimizer = optimizer_for(
        [weight], lr=1.0, betas=(0.0, 0.9), weight_decay=0.0, grafting=None,
        preconditioner=PerFactorCorrectedConfig(), refresh=FixedRefresh(1),
    )  # fmt: skip
    weight.grad = 1e-25 * torch.randn(4, 6)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -weight.grad, rtol=1e-5, atol=0.0)


@pytest.mark.parametrize("refresh", [FixedRefresh(3), StaggeredRefresh(3)])
def test_the_first_basis_is_exact_whatever_the_solver(refresh: Any) -> None:
    """One orthogonal iteration from the identity would be a poor start."""
    bases = []
    for solver in (EighSolver(), OrthogonalIterationSolver()):
        params = parameters([(24, 24)])
        optimizer = optimizer_for(
            params, preconditioner=PerFactorCorrectedConfig(solver=solver), refresh=refresh
        )
        run(optimizer, params, range(1, 4))
        state = optimizer.state[params[0]]
        bases.append([value for name, value in state.items() if ".bases." in name])
    assert len(bases[0]) == 8
    assert_same(bases[0], bases[1], 1e-12)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"exponent": 0.0}, r"PerFactorCorrectedConfig: exponent must lie in \(0.0, inf\)"),
        ({"rank_tolerance": 2.0}, "rank_tolerance must lie in"),
        ({"rank_tolerance": 0.1, "ridge": 0.1}, "ridge takes the place of truncation"),
        ({"statistics_interval": 0}, "statistics_interval must be at least 1, got 0"),
        ({"factor_decay": 1.5}, "factor_decay must lie in"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PerFactorCorrectedConfig(**options)


def test_a_factor_that_is_diagonal_already_does_not_hold_the_block_back() -> None:
    """An adaptive refresh would never solve that of white rows; the block is to leave Adam nevertheless."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(96, 96, generator=generator) * torch.logspace(0, -1, 96)
    steps = []
    for config in (PerFactorCorrectedConfig(), AdamConfig()):
        parameter = torch.nn.Parameter(torch.zeros(3, 96))
        optimizer = optimizer_for(
            [parameter],
            preconditioner=config,
            refresh=AdaptiveRefresh(20, 20),
            max_block_size=96,
            weight_decay=0.0,
            betas=(0.9, 0.99),
        )
        rows = torch.Generator().manual_seed(1)
        for _ in range(42):
            before = parameter.detach().clone()
            parameter.grad = torch.randn(3, 96, generator=rows) @ mix.mT
            optimizer.step()
        steps.append((parameter.detach() - before).flatten())
    assert torch.nn.functional.cosine_similarity(*steps, dim=0) < 0.99
