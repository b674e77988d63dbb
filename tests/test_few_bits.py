"""Methods in few bits: they hardly notice, take a third of the state, and stay finite."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from quadratic import optimizer_for, parameters, run

from shampoo_core import (
    AdaGradGrafting,
    AdamGrafting,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLShampooConfig,
    KLSOAPConfig,
    PerFactorCorrectedConfig,
    RMSpropGrafting,
    ShampooConfig,
)
from shampoo_core.blocking import tiles_of
from shampoo_core.gradients import StackedGradients
from shampoo_core.model_shapes import workload_shapes
from shampoo_core.moments import MovingAverage
from shampoo_core.preconditioners.turns import turn_of, turn_of_rounded
from shampoo_core.stacks import StackSet

CONFIGS = [
    ShampooConfig,
    EigenvalueCorrectedConfig,
    KLShampooConfig,
    KLSOAPConfig,
    PerFactorCorrectedConfig,
]


@pytest.mark.parametrize(
    ("storage", "tolerance"), [("packed", 1e-10), ("8bit", 0.015), ("4bit", 0.02)]
)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_every_method_goes_where_it_goes_in_full_precision(
    config: Any, storage: Any, tolerance: float
) -> None:
    """Distance of the ends of two runs, in units of the way.

    Factors have full rank when they are first used: rounding fills directions that no gradient has
    shown yet with noise, where an exact factor is truncated.
    """
    ends = []
    for kind in ("dense", storage):
        params = parameters()
        start = [p.detach().clone() for p in params]
        optimizer = optimizer_for(
            params,
            preconditioner=config(storage=kind),
            refresh=FixedRefresh(4, start=8),
            betas=(0.9, 0.99),
        )
        run(optimizer, params, range(1, 25))
        ends.append(torch.cat([(p - s).flatten() for p, s in zip(params, start, strict=True)]))
    assert (ends[1] - ends[0]).norm() <= tolerance * ends[0].norm()


WORKLOADS = ["imagenet_resnet", "imagenet_vit", "ogbg", "mnist", "fastmri"]


@pytest.mark.parametrize("workload", WORKLOADS)
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__name__)
def test_state_at_four_bits_is_a_third(workload: str, config: Any) -> None:
    sizes = {}
    for storage in ("dense", "8bit", "4bit"):
        params = [
            torch.nn.Parameter(torch.zeros(parameter.shape, device="meta"))
            for parameter in workload_shapes(workload)
        ]
        optimizer = DistributedShampoo(params, preconditioner=config(storage=storage))
        sizes[storage] = sum(
            tensor.numel() * tensor.element_size()
            for entries in optimizer.state.values()
            for tensor in entries.values()
        )
    assert sizes["4bit"] <= 0.35 * sizes["dense"]
    assert sizes["4bit"] < sizes["8bit"] <= 0.42 * sizes["dense"]


def test_a_rounded_basis_turns_moments_without_stretching_them() -> None:
    torch.manual_seed(0)
    old, new = (
        torch.linalg.qr(torch.randn(3, 12, 12))[0] + 0.03 * torch.randn(3, 12, 12) for _ in range(2)
    )
    new[1] = old[1]
    turn = turn_of_rounded(old, new)
    assert torch.equal(turn[1], torch.eye(12))
    values = torch.linalg.svdvals(turn)
    assert (torch.linalg.svdvals(turn_of(old, new)) - 1).abs().max() > 0.2
    assert (values - 1).abs().max() < 0.05
    # The nearest orthogonal matrix.
    u, _, v = torch.linalg.svd(turn_of(old, new)[::2])
    torch.testing.assert_close(turn[::2], u @ v, atol=0.05, rtol=0.0)


def test_moments_of_a_block_without_gradients_do_not_grow_at_refreshes() -> None:
    """Rounded bases are not orthogonal, and what is turned by one again and again would grow for ever."""
    sizes = {}
    for storage in ("dense", "8bit", "4bit"):
        params = parameters([(32, 32), (4, 4)], dtype=torch.float32)
        method = EigenvalueCorrectedConfig(storage=storage)
        optimizer = optimizer_for(
            params, preconditioner=method, refresh=FixedRefresh(1), max_block_size=32
        )
        run(optimizer, params, range(1, 31))
        params[0].grad = None
        run(optimizer, params[1:], range(31, 91))
        before = params[0].detach().clone()
        run(optimizer, params, range(91, 92))
        sizes[storage] = (params[0] - before).norm().item()
    assert sizes["8bit"] == pytest.approx(sizes["dense"], rel=0.1)
    assert sizes["4bit"] == pytest.approx(sizes["dense"], rel=0.3)


@pytest.mark.parametrize("storage", ["8bit", "4bit"])
def test_turned_factors_without_full_rank_stay_finite(storage: Any) -> None:
    """Large gradients of unequal sides: rounding leaves directions with nothing, or less, behind."""
    (parameter,) = parameters([(128, 32)], dtype=torch.float32)
    optimizer = optimizer_for(
        [parameter],
        preconditioner=KLShampooConfig(storage=storage),
        refresh=FixedRefresh(3, 1),
        betas=(0.9, 0.95),
        max_block_size=128,
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(30):
        rows, columns = (torch.randn(side, 4, generator=generator) for side in (128, 32))
        parameter.grad = 3e4 * rows @ columns.mT
        optimizer.step()
    state = optimizer.state[parameter]
    assert all(torch.isfinite(entry).all() for entry in state.values())
    assert sum(int(entry) for key, entry in state.items() if ".failures." in key) == 0


@pytest.mark.parametrize("beta1", [0.9, 0.95])
@pytest.mark.parametrize("storage", ["8bit", "4bit"])
def test_codes_and_errors_have_the_bits_of_the_table(storage: Any, beta1: float) -> None:
    """That of `shampoo_core.storage`: an average without its error would stand still."""
    runs: list[tuple[Any, Any, str]] = [
        (ShampooConfig, AdamGrafting(), "grafting.average"),
        (ShampooConfig, AdaGradGrafting(), "grafting.average"),
        (ShampooConfig, RMSpropGrafting(), "grafting.average"),
        (EigenvalueCorrectedConfig, None, "second_moment.average"),
        (KLSOAPConfig, None, "second_moment.average"),
    ]
    first = "8 + 8" if storage == "8bit" else "8" if beta1 == 0.9 else "4 + 8"
    factors = "8 + 8" if storage == "8bit" else "4 + 8"
    for config, grafting, second in runs:
        (parameter,) = params = parameters([(16, 16)])
        optimizer = optimizer_for(
            params, preconditioner=config(storage=storage), grafting=grafting, betas=(beta1, 0.99)
        )
        state = optimizer.state[parameter]
        matrices = "roots" if config is ShampooConfig else "bases"
        expected = {"factors.axis0": factors, f"{matrices}.axis0": "8"}
        for name, wanted in {**expected, "filter.average": first, second: "8 + 8"}.items():
            codes = state[f"block.0.0.{name}.codes"]
            # A triangle, or all of 16 x 16, in groups of 64.
            numbers = 128 if name.startswith(("factors", "roots")) else 256
            found = [str(8 * codes.numel() // numbers)]
            found += ["8"] * (f"block.0.0.{name}.errors" in state)
            assert " + ".join(found) == wanted, (config.__name__, name)


def test_turns_of_rounded_bases_neither_lengthen_nor_shorten() -> None:
    generator = torch.Generator().manual_seed(0)
    old, new = torch.linalg.qr(torch.randn(2, 3, 24, 24, generator=generator)).Q
    sizes = torch.tensor([0.9, 1.0, 1.05]).view(3, 1, 1)  # farther than eight bits are off
    lengths = torch.linalg.svdvals(turn_of_rounded(old, sizes * new))
    assert (lengths - 1.0).abs().max() < 1e-3
    still = turn_of_rounded(sizes * old, sizes * old)
    assert torch.equal(still, torch.eye(24).expand(3, -1, -1))


@pytest.mark.parametrize("storage", ["8bit", "4bit"])
@pytest.mark.parametrize("options", [{}, {"bias_correction": False}, {"decay": 1.0}])
@pytest.mark.parametrize("is_missing", [False, True])
def test_every_way_of_averaging_keeps_what_it_made(
    is_missing: bool, options: dict[str, Any], storage: Any
) -> None:
    tiles = [tile for index in range(2) for tile in tiles_of(index, (8, 24), None)]
    stack_set = StackSet(tiles, dtype=torch.float32, device=torch.device("cpu"))
    is_open = torch.tensor([1.0, 0.0]) if is_missing else torch.ones(2)
    presence = is_open if is_missing else None
    for kind in ("first", "second"):
        kept, exact = (
            MovingAverage(stack_set, **{"decay": 0.8, **options}, storage=how, kind=kind)
            for how in (storage, "dense")
        )
        for _ in range(4):
            stacks = [torch.randn(2, 8, 24) * is_open[:, None, None]]
            for average in (kept, exact):
                absorb = average.absorb if kind == "first" else average.absorb_squares
                absorb(StackedGradients(stacks, is_open, presence))
        assert torch.equal(kept.weight, exact.weight)
        (found,), (expected,) = kept.average, exact.average
        assert expected[0].count_nonzero() == expected[0].numel()
        torch.testing.assert_close(found, expected, rtol=0.1, atol=0.01)
