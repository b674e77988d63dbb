"""Diagonal methods against torch.optim and one plain float64 block at a time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import reference
import torch
from quadratic import assert_same, gradient, optimizer_for, parameters, run
from trajectories import assert_follows

from shampoo_core import (
    AdaGradConfig,
    AdamConfig,
    AdamGrafting,
    DistributedShampoo,
    RMSpropConfig,
    RowWiseAdaGradConfig,
    SGDConfig,
)

EPS = 1e-6
CASES: dict[str, tuple[Any, Callable[..., Any], dict[str, Any]]] = {
    "sgd": (SGDConfig(), reference.SGD, {"betas": (0.0, 0.9)}),
    "averaged sgd": (SGDConfig(), reference.SGD, {"betas": (0.9, 0.9)}),
    "adagrad": (AdaGradConfig(), reference.AdaGrad, {"betas": (0.9, 0.9), "eps": EPS}),
    "rmsprop": (RMSpropConfig(), reference.RMSprop, {"betas": (0.0, 0.9), "eps": EPS}),
    "adam": (AdamConfig(), reference.AdamW, {"betas": (0.9, 0.95), "eps": EPS}),
    "nadam": (AdamConfig(), reference.AdamW, {"betas": (0.9, 0.95), "beta3": 0.81, "eps": EPS}),
    "rows, sum": (RowWiseAdaGradConfig(), reference.RowWiseAdaGrad, {"betas": (0.0, 1.0)}),
    "rows, average": (
        RowWiseAdaGradConfig(decay=None),
        reference.RowWiseAdaGrad,
        {"betas": (0.9, 0.8), "eps": EPS},
    ),
}


@pytest.mark.parametrize("cut", ["balanced", "greedy"])
@pytest.mark.parametrize("shape", [(20, 33), (40, 3, 5), (19, 18, 17), (70,), ()])
@pytest.mark.parametrize("name", CASES)
def test_blocks_agree_with_the_reference(name: str, shape: tuple[int, ...], cut: str) -> None:
    config, plain, options = CASES[name]
    options = {"lr": 0.05, "weight_decay": 0.1, **options}
    assert_follows(
        lambda block: plain(block, **options),
        shape,
        absent=(4, 5, 11),
        preconditioner=config,
        cut=cut,
        **options,
    )


@pytest.mark.parametrize(
    ("config", "options", "theirs"),
    [
        (SGDConfig(), {"betas": (0.0, 0.9)}, lambda p: torch.optim.SGD(p, 0.01)),
        (
            RMSpropConfig(beta2=0.97, eps=1e-7),
            {"betas": (0.0, 0.9)},
            lambda p: torch.optim.RMSprop(p, 0.01, alpha=0.97, eps=1e-7),
        ),
        (
            AdaGradConfig(eps=1e-7),
            {"betas": (0.0, 0.9)},
            lambda p: torch.optim.Adagrad(p, 0.01, eps=1e-7),
        ),
        (
            AdamConfig(beta2=0.97, eps=1e-7),
            {"betas": (0.8, 0.5)},
            lambda p: torch.optim.Adam(p, 0.01, betas=(0.8, 0.97), eps=1e-7),
        ),
    ],
    ids=["sgd", "rmsprop", "adagrad", "adam"],
)
def test_they_are_the_classical_optimizers(
    config: Any, options: dict[str, Any], theirs: Callable[[Any], torch.optim.Optimizer]
) -> None:
    ours, expected = parameters(), parameters()
    optimizer = optimizer_for(ours, preconditioner=config, weight_decay=0.0, **options)
    classical = theirs(expected)
    for step in range(1, 31):
        for index, (left, right) in enumerate(zip(ours, expected, strict=True)):
            left.grad = gradient(left, step, index)
            right.grad = left.grad.clone()
        optimizer.step()
        classical.step()
    assert_same(ours, expected, 1e-12)


def test_one_group_of_adam_beside_one_of_shampoo() -> None:
    params, expected = parameters(), parameters()
    groups = [
        {"params": params[:3]},
        {"params": params[3:], "preconditioner": AdamConfig(), "max_block_size": None},
    ]
    optimizer = optimizer_for(groups)
    adam = torch.optim.AdamW(expected[3:], 0.01, weight_decay=0.01)
    for step in range(1, 11):
        for index, (left, right) in enumerate(zip(params, expected, strict=True)):
            left.grad = gradient(left, step, index)
            right.grad = left.grad.clone()
        optimizer.step()
        adam.step()
    assert_same(params[3:], expected[3:], 1e-12)


def test_rows_have_one_number_each_and_accept_sparse_gradients() -> None:
    table = torch.nn.Embedding(50, 8, sparse=True)
    optimizer = DistributedShampoo(
        table.parameters(),
        lr=0.1,
        betas=(0.0, 0.9),
        weight_decay=0.0,
        preconditioner=RowWiseAdaGradConfig(),
    )
    before = table.weight.detach().clone()
    table(torch.tensor([3, 7, 7])).pow(2).sum().backward()
    optimizer.step()
    moved = (table.weight.detach() != before).any(1).nonzero().flatten().tolist()
    assert moved == [3, 7]
    floats = [v for v in optimizer.state[table.weight].values() if v.is_floating_point()]
    assert sum(value.numel() for value in floats) == 50 + 1


def test_a_row_moves_by_its_own_root_mean_square() -> None:
    weight = torch.nn.Parameter(torch.zeros(3, 4, dtype=torch.float64))
    optimizer = optimizer_for(
        [weight], lr=1.0, betas=(0.0, 0.9), weight_decay=0.0, preconditioner=RowWiseAdaGradConfig()
    )
    weight.grad = torch.tensor([[1.0], [10.0], [1e-3]], dtype=torch.float64) * torch.tensor(
        [3.0, -1.0, 1.0, 1.0], dtype=torch.float64
    )
    optimizer.step()
    expected = -torch.tensor([3.0, -1.0, 1.0, 1.0], dtype=torch.float64) / 3.0**0.5
    torch.testing.assert_close(weight.detach(), expected.expand(3, 4), rtol=1e-4, atol=0.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: AdamConfig(beta2=0.0), r"AdamConfig: beta2 must lie in \(0.0, 1.0\], got 0.0"),
        (lambda: AdaGradConfig(eps=0.0), r"AdaGradConfig: eps must lie in \(0.0, inf\), got 0.0"),
        (
            lambda: RowWiseAdaGradConfig(decay=1.5),
            r"RowWiseAdaGradConfig: decay must lie in \(0.0, 1.0\], got 1.5",
        ),
        (
            lambda: optimizer_for(
                parameters(), preconditioner=SGDConfig(), grafting=AdamGrafting()
            ),
            "SGDConfig: grafting must be None or 'auto', got AdamGrafting",
        ),
    ],
)
def test_bad_options_are_named(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("bias_correction", [True, False])
def test_a_look_ahead_without_momentum_knows_the_last_gradient(bias_correction: bool) -> None:
    weight = torch.nn.Parameter(torch.zeros(3))
    optimizer = DistributedShampoo(
        [weight],
        lr=1.0,
        weight_decay=0.0,
        betas=(0.0, 0.9),
        beta3=0.25,
        bias_correction=bias_correction,
        preconditioner=SGDConfig(),
    )
    first, second = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([8.0, 16.0, -4.0])
    share = 1.0 if bias_correction else 0.75  # of the first gradient, which has none before it
    expected = torch.zeros(3)
    for grad, step in ((first, share * first), (second, 0.25 * first + 0.75 * second)):
        weight.grad = grad.clone()
        optimizer.step()
        expected -= step
        torch.testing.assert_close(weight.detach(), expected, rtol=1e-6, atol=0.0)


def test_rows_have_a_decay_and_eps_of_their_own() -> None:
    """Of the configuration where it names them, of the group where it does not."""
    ours, theirs = parameters(), parameters()
    own = RowWiseAdaGradConfig(decay=0.8, eps=1e-2)
    first = optimizer_for(ours, preconditioner=own, betas=(0.9, 0.5), eps=1e-8)
    of_group = RowWiseAdaGradConfig(decay=None)
    second = optimizer_for(theirs, preconditioner=of_group, betas=(0.9, 0.8), eps=1e-2)
    run(first, ours, range(1, 11))
    run(second, theirs, range(1, 11))
    assert_same(ours, theirs)


def test_averages_of_rows_are_corrected_where_asked_for() -> None:
    for bias_correction, size in ((True, 1.0), (False, 0.2**-0.5)):
        (weight,) = parameters([(3, 4)])
        optimizer = optimizer_for(
            [weight], lr=1.0, betas=(0.0, 0.9), weight_decay=0.0, bias_correction=bias_correction,
            preconditioner=RowWiseAdaGradConfig(decay=0.8, eps=1e-12),
        )  # fmt: skip
        before, weight.grad = weight.detach().clone(), gradient(weight, 1, 0)
        optimizer.step()
        rows = weight.grad.square().mean(1, keepdim=True).sqrt()
        torch.testing.assert_close(before - weight.detach(), size * weight.grad / rows)
