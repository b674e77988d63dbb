"""Spectral descent against one plain float64 matrix at a time, and what a polar factor must be."""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from quadratic import assert_same, gradient, optimizer_for, parameters, run
from reference.algebra import Array
from reference.spectral import SCALES
from trajectories import assert_follows

from shampoo_core import AdamGrafting, FixedRefresh, ShampooConfig, SpectralConfig
from shampoo_core.preconditioners.parts import Parts
from shampoo_core.preconditioners.spectral import Spectral, polar_factor
from shampoo_core.solvers.polar import COEFFICIENTS, SAFETY

OPTIONS: dict[str, Any] = {"lr": 0.02, "weight_decay": 0.1}


def plain(block: Array, **options: Any) -> Any:
    """Muon for matrices, AdamW for vectors."""
    if block.ndim == 1:
        return reference.AdamW(block, betas=(0.8, 0.9), eps=1e-7, **OPTIONS)
    return reference.Muon(block, **OPTIONS, **options)


@pytest.mark.parametrize("max_block_size", [None, 16])
@pytest.mark.parametrize("cut", ["balanced", "greedy"])
@pytest.mark.parametrize("shape", [(20, 30), (33, 9), (5, 4, 3, 3), (18, 6, 17), (9,), ()])
def test_exact_polar_factors_agree_with_the_reference(
    shape: tuple[int, ...], cut: str, max_block_size: int | None
) -> None:
    assert_follows(
        plain,
        shape,
        absent=(4, 5, 11),
        cut=cut,
        max_block_size=max_block_size,
        preconditioner=SpectralConfig(method="svd"),
        betas=(0.8, 0.9),
        eps=1e-7,
        **OPTIONS,
    )


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (6, 5, 9)])
def test_scales(scale: Any, shape: tuple[int, ...]) -> None:
    assert_follows(
        lambda block: plain(block, scale=scale, spectral_momentum=0.6, spectral_nesterov=False),
        shape,
        preconditioner=SpectralConfig(method="svd", scale=scale, momentum=0.6, nesterov=False),
        **OPTIONS,
    )


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("method", COEFFICIENTS)
def test_iterations_agree_with_the_reference(method: str, momentum: float) -> None:
    table = COEFFICIENTS[method]
    triples = [table[min(step, len(table) - 1)] for step in range(6)]
    if method == "polar_express":  # damped but for the last
        damped = [(a / SAFETY, b / SAFETY**3, c / SAFETY**5) for a, b, c in triples[:-1]]
        triples = [*damped, triples[-1]]
    assert_follows(
        lambda block: plain(block, coefficients=triples, safety=SAFETY, spectral_momentum=momentum),
        (20, 11),
        preconditioner=SpectralConfig(method=method, num_iterations=6, momentum=momentum),
        **OPTIONS,
    )


def test_it_is_shampoo_without_accumulation() -> None:
    ours, theirs = parameters([(8, 12), (12, 8), (9, 9)]), parameters([(8, 12), (12, 8), (9, 9)])
    spectral = SpectralConfig(method="svd", scale="none", momentum=0.0)
    first = optimizer_for(ours, preconditioner=spectral, betas=(0.0, 0.0))
    second = optimizer_for(
        theirs, preconditioner=ShampooConfig(rank_tolerance=1e-9), grafting=None,
        refresh=FixedRefresh(1), betas=(0.0, 0.0),
    )  # fmt: skip
    run(first, ours, range(1, 10))
    run(second, theirs, range(1, 10))
    assert_same(ours, theirs, 1e-6)


def test_vectors_are_stepped_by_adam() -> None:
    shapes = [(6, 7), (20,), (), (30,)]
    ours, theirs = parameters(shapes), parameters(shapes)[1:]
    betas, eps = (0.8, 0.95), 1e-7
    optimizer = optimizer_for(ours, preconditioner=SpectralConfig(), betas=betas, eps=eps)
    adamw = torch.optim.AdamW(theirs, 0.01, betas, eps, weight_decay=0.01)
    for step in range(1, 21):
        ours[0].grad = gradient(ours[0], step, 0)
        for index, (left, right) in enumerate(zip(ours[1:], theirs, strict=True)):
            left.grad = gradient(left, step, index)
            right.grad = left.grad.clone()
        optimizer.step()
        adamw.step()
    assert_same(ours[1:], theirs, 1e-12)


@pytest.mark.parametrize("bad", [0, 1, 2, 3])
def test_a_bad_gradient_closes_its_own_blocks_in_either_part(bad: int) -> None:
    params = parameters([(6, 7), (20,), (9, 5), (5,)])
    optimizer = optimizer_for(params, preconditioner=SpectralConfig(), betas=(0.9, 0.9))
    run(optimizer, params, range(1, 4))

    def second_moments() -> list[torch.Tensor]:
        states = [optimizer.state[vector] for vector in params[1::2]]
        pairs = [
            [s[key] for key in s if key.endswith(f"second_moment.{name}")]
            for s in states
            for name in ("average", "weight")
        ]
        return [
            average / weight
            for averages, weights in zip(pairs[::2], pairs[1::2], strict=True)
            for average, weight in zip(averages, weights, strict=True)
        ]

    before, old = [p.detach().clone() for p in params], second_moments()
    for index, parameter in enumerate(params):
        parameter.grad = gradient(parameter, 4, index)
    params[bad].grad.view(-1)[0] = torch.inf
    optimizer.step()
    changed = [not torch.equal(a, b) for a, b in zip(params, before, strict=True)]
    # (20,) is two blocks, of which one goes on.
    assert changed == [index != bad or index == 1 for index in range(4)]
    same = [torch.allclose(a, b, rtol=1e-12) for a, b in zip(second_moments(), old, strict=True)]
    assert same == [bad == 1, False, bad == 3]


def test_state_is_one_momentum_and_parts_exist_only_where_needed() -> None:
    params = parameters([(12, 8), (5, 4, 3)])
    optimizer = optimizer_for(params, preconditioner=SpectralConfig())
    assert isinstance(optimizer._engines[0][0].preconditioner, Spectral)
    for parameter in params:
        moments = [v for k, v in optimizer.state[parameter].items() if v.dim() > 0]
        assert sum(moment.numel() for moment in moments) == parameter.numel()
    mixed = optimizer_for(parameters([(12, 8), (5,)]), preconditioner=SpectralConfig())
    assert isinstance(mixed._engines[0][0].preconditioner, Parts)


def test_half_precision_products_come_close() -> None:
    ours, exact = parameters([(16, 16)], torch.float32), parameters([(16, 16)], torch.float32)
    half = SpectralConfig(product_dtype=torch.bfloat16)
    run(optimizer_for(ours, preconditioner=half, lr=0.1), ours, range(1, 6))
    run(optimizer_for(exact, preconditioner=SpectralConfig(), lr=0.1), exact, range(1, 6))
    difference = (ours[0] - exact[0]).norm() / (exact[0] - parameters([(16, 16)])[0]).norm()
    assert 0 < difference < 0.05


def test_polar_factors_of_hard_matrices() -> None:
    generator = torch.Generator().manual_seed(0)
    matrices = torch.randn(4, 6, 9, generator=generator, dtype=torch.float64)
    matrices[0] = 0.0
    matrices[1, 3:] = 0.0
    matrices[2] *= 1e-30
    polar = polar_factor(matrices)
    assert torch.equal(polar[0], torch.zeros(6, 9, dtype=torch.float64))
    for index, rank in ((1, 3), (2, 6), (3, 6)):
        values = torch.linalg.svdvals(polar[index])
        torch.testing.assert_close(values[:rank], torch.ones(rank, dtype=torch.float64))
        assert values[rank:].sum() < 1e-12
        symmetric = polar[index].mT @ matrices[index]
        torch.testing.assert_close(symmetric, symmetric.mT)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.0}, r"SpectralConfig: momentum must lie in \[0.0, 1.0\), got 1.0"),
        ({"scale": "adam"}, "SpectralConfig: scale must be one of"),
        ({"method": "newton"}, "SpectralConfig: method must be one of"),
        ({"num_iterations": 0}, "num_iterations must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SpectralConfig(**options)


def test_grafting_is_refused() -> None:
    with pytest.raises(ValueError, match="SpectralConfig: grafting must be None or 'auto'"):
        optimizer_for(parameters(), preconditioner=SpectralConfig(), grafting=AdamGrafting())
