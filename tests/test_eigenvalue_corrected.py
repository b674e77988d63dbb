"""Adam in Shampoo's eigenbasis against one plain float64 block at a time."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from quadratic import assert_same, optimizer_for, parameters, run
from reference.algebra import Array
from trajectories import assert_follows

from shampoo_core import AdamConfig, AdaptiveRefresh, EigenvalueCorrectedConfig, FixedRefresh
from shampoo_core.preconditioners.basis_change import turned_squares
from shampoo_core.preconditioners.factor_matrices import Replacement
from shampoo_core.refresh import FactorSlice
from shampoo_core.solvers import OrthogonalIterationSolver

OPTIONS: dict[str, Any] = {"lr": 0.02, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1}
START = 6
"""Late enough for full rank: the basis of a null space is anybody's choice."""


def eshampoo(**options: Any) -> Any:
    """The reference for blocks of two axes or more, AdamW for the others."""

    def make(block: Array) -> Any:
        if block.ndim == 1:
            return reference.AdamW(block, **OPTIONS)
        return reference.EShampoo(block, start=START, descending=True, **{**OPTIONS, **options})

    return make


@pytest.mark.parametrize("cut", ["balanced", "greedy"])
@pytest.mark.parametrize("shape", [(20, 30), (35, 9), (18, 6, 5), (40,)])
@pytest.mark.parametrize("second_moments", ["transport", "keep"])
@pytest.mark.parametrize("interval", [1, 5])
def test_blocks_agree_with_the_reference(
    interval: int, second_moments: Any, shape: tuple[int, ...], cut: str
) -> None:
    assert_follows(
        eshampoo(interval=interval, second_moments=second_moments),
        shape,
        cut=cut,
        # A reference that skips a step also skips a refresh, unless every step has one.
        absent=(8, 12, 13) if interval == 1 else (),
        refresh=FixedRefresh(interval, START),
        preconditioner=EigenvalueCorrectedConfig(second_moments=second_moments),
        **OPTIONS,
    )


@pytest.mark.parametrize("exponent", [0.25, 0.5, 1.0])
def test_exponents_and_look_ahead(exponent: float) -> None:
    options = {"exponent": exponent, "beta3": 0.81}
    assert_follows(
        eshampoo(interval=3, **options),
        (20, 30),
        refresh=FixedRefresh(3, START),
        preconditioner=EigenvalueCorrectedConfig(exponent=exponent, second_moments="keep"),
        beta3=0.81,
        **OPTIONS,
    )


@pytest.mark.parametrize("threshold", [0.05, 0.3, 0.6])
def test_adaptive_refreshes_agree_with_the_reference(threshold: float) -> None:
    assert_follows(
        eshampoo(interval=2, second_moments="transport", tolerance=threshold),
        (20, 30),
        refresh=AdaptiveRefresh(2, START, threshold),
        preconditioner=EigenvalueCorrectedConfig(),
        **OPTIONS,
    )


@pytest.mark.parametrize("cut", ["balanced", "greedy"])
@pytest.mark.parametrize("second_moments", ["permute", "transport"])
@pytest.mark.parametrize("shape", [(13, 4), (14, 9), (9, 4, 8)])
@pytest.mark.parametrize("interval", [1, 4])
def test_lagged_with_one_iteration_it_is_soap(
    interval: int, shape: tuple[int, ...], second_moments: Any, cut: str
) -> None:
    def count(method: Any) -> None:
        method.t += 1

    assert_follows(
        lambda block: reference.SOAP(
            block, interval=interval, factor_beta=0.9, second_moments=second_moments,
            bias_correction=False, **OPTIONS,
        ),
        shape,
        absent=(4, 7, 8) if interval == 4 else (),
        on_absent=count,
        cut=cut,
        max_block_size=5,
        refresh=FixedRefresh(interval),
        preconditioner=EigenvalueCorrectedConfig(
            solver=OrthogonalIterationSolver(), second_moments=second_moments, lagged=True,
            factor_decay=0.9,
        ),
        weight_decay_kind="decoupled_after",
        bias_correction=False,
        **OPTIONS,
    )  # fmt: skip


def test_before_the_first_basis_it_is_adam() -> None:
    ours, theirs = parameters(), parameters()
    never = FixedRefresh(10**6)
    first = optimizer_for(ours, preconditioner=EigenvalueCorrectedConfig(), refresh=never)
    second = optimizer_for(theirs, preconditioner=AdamConfig())
    run(first, ours, range(1, 21))
    run(second, theirs, range(1, 21))
    assert_same(ours, theirs, 1e-12)


def test_second_moments_follow_their_columns_by_one_rule_alone() -> None:
    """A solver says which column continues which, whether or not anybody asks."""
    order = torch.tensor([[2, 0, 1]])
    change = Replacement(FactorSlice(0, 0, 1), -torch.eye(3)[None, :, order[0]], order)
    blocks = torch.arange(6.0).view(1, 2, 3)
    assert turned_squares(blocks, 1, change, "keep") is None
    assert turned_squares(blocks, 1, change._replace(order=None), "permute") is None
    for rule in ("permute", "transport"):
        assert torch.equal(turned_squares(blocks, 1, change, rule), blocks[:, :, order[0]])
    assert torch.equal(change.turn, -torch.eye(3)[None, :, order[0]])  # others need it
