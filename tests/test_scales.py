"""Gradients of every size that the guard lets pass leave the weights finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shampoo_core import (
    AdamGrafting,
    DistributedShampoo,
    FixedRefresh,
    PerFactorCorrectedConfig,
    SGDGrafting,
    ShampooConfig,
    health_report,
)
from shampoo_core.grafting import GraftingConfig

EXPONENTS = st.sampled_from([0.1, 0.25, 0.5, 0.75, 1.0])
GRAFTS = st.sampled_from([None, AdamGrafting(), SGDGrafting()])
SIZES = st.floats(-15.0, 15.0)


def trained(config: Any, scales: list[float], grafting: GraftingConfig | None) -> Any:
    """A weight after one step with each scale, and its optimizer."""
    weight = torch.nn.Parameter(torch.ones(8, 6))
    optimizer = DistributedShampoo(
        [weight], lr=0.1, preconditioner=config, grafting=grafting, refresh=FixedRefresh(1, 1)
    )
    for scale in scales:
        weight.grad = scale * torch.randn(8, 6)
        optimizer.step()
    return weight.detach(), optimizer


@given(st.sampled_from([ShampooConfig, PerFactorCorrectedConfig]), EXPONENTS, GRAFTS, SIZES, SIZES)
def test_weights_stay_finite(
    config: Any, exponent: float, grafting: GraftingConfig | None, early: float, late: float
) -> None:
    """At one scale for a while, and then at another, which the first roots were not made for."""
    scales = [10.0**early] * 2 + [10.0**late] * 2
    weight, _ = trained(config(exponent=exponent), scales, grafting)
    assert torch.isfinite(weight).all()


@pytest.mark.parametrize("config", [ShampooConfig, PerFactorCorrectedConfig])
@pytest.mark.parametrize("grafting", [None, AdamGrafting()])
@pytest.mark.parametrize("decades", [*range(-18, -3), *range(4, 16)])
def test_weights_stay_finite_with_the_largest_exponent(
    config: Any, grafting: GraftingConfig | None, decades: int
) -> None:
    weight, _ = trained(config(exponent=1.0), [10.0**decades] * 3, grafting)
    assert torch.isfinite(weight).all()


def test_roots_that_are_too_large_are_counted_where_no_length_is_borrowed() -> None:
    _, optimizer = trained(ShampooConfig(exponent=1.0), [1e-15] * 3, None)
    assert health_report(optimizer).failed_refreshes == 6


@pytest.mark.parametrize("decades", range(-15, 16))
@pytest.mark.parametrize("config", [ShampooConfig, PerFactorCorrectedConfig])
def test_the_default_exponent_has_roots_for_gradients_of_all_sizes(
    config: Any, decades: int
) -> None:
    """And takes the same steps, whatever the unit of the loss."""
    ends = []
    for scale in (1.0, 2.0 ** round(decades / 0.30103)):
        torch.manual_seed(0)
        graft = AdamGrafting(eps=1e-30)
        weight, optimizer = trained(config(rank_tolerance=1e-3), [scale] * 3, graft)
        assert health_report(optimizer).failed_refreshes == 0
        ends.append(weight)
    torch.testing.assert_close(*ends, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("config", [ShampooConfig, PerFactorCorrectedConfig])
@pytest.mark.parametrize("exponent", [0.5, 1.0])
def test_a_borrowed_length_does_without_the_size_of_roots(config: Any, exponent: float) -> None:
    """Roots of 1e9 and more are too large to be multiplied, and their directions as good as any."""
    ends = []
    for scale in (1.0, 2.0**-20):
        torch.manual_seed(0)
        options = config(exponent=exponent, rank_tolerance=1e-3)
        weight, optimizer = trained(options, [scale] * 3, AdamGrafting(eps=1e-30))
        assert health_report(optimizer).failed_refreshes == 0
        ends.append(weight)
    torch.testing.assert_close(*ends, rtol=0.0, atol=1e-5)


@pytest.mark.parametrize("config", [ShampooConfig, PerFactorCorrectedConfig])
def test_where_roots_are_too_large_the_gradient_is_followed_as_it_is(config: Any) -> None:
    """Of a block whose length is its own; it does not stand still."""
    weight = torch.nn.Parameter(torch.zeros(8, 6))
    optimizer = DistributedShampoo(
        [weight], lr=1.0, betas=(0.0, 0.9), weight_decay=0.0, grafting=None,
        preconditioner=config(exponent=1.0), refresh=FixedRefresh(1, 1),
    )  # fmt: skip
    weight.grad = 1e-15 * torch.randn(8, 6)
    optimizer.step()
    torch.testing.assert_close(weight.detach(), -weight.grad, rtol=1e-4, atol=0.0)


def test_roots_of_blocks_with_more_axes_have_the_lower_limit() -> None:
    """Also in one batch with those of matrices: three of 1e8 are too many for a late gradient."""
    weights = [torch.nn.Parameter(torch.ones(8, 8)), torch.nn.Parameter(torch.ones(8, 8, 8))]
    optimizer = DistributedShampoo(
        weights, lr=0.1, betas=(0.0, 0.9), target_order=None, grafting=None,
        preconditioner=ShampooConfig(exponent=1.0), refresh=FixedRefresh(100, 1),
    )  # fmt: skip
    for scale in (1e-4, 5e15):
        for weight in weights:
            weight.grad = torch.zeros_like(weight)
            weight.grad[(torch.arange(8),) * weight.dim()] = scale
        optimizer.step()
    assert all(torch.isfinite(weight).all() for weight in weights)
