"""KL-Shampoo and KL-SOAP against one plain float64 block at a time, and what whitening must do."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import reference
import torch
from quadratic import assert_same, gradient, optimizer_for, parameters, run
from reference.algebra import Array, gram, multiply, outer, rotate_back, transport
from reference.kl import other_sizes
from section11_configurations import UnsortedIterationSolver
from trajectories import assert_follows

from shampoo_core import (
    AdamGrafting,
    AdaptiveRefresh,
    DistributedShampoo,
    EighSolver,
    FixedRefresh,
    KLShampooConfig,
    KLSOAPConfig,
    ShampooConfig,
)
from shampoo_core.preconditioners.kl import KLShampoo
from shampoo_core.preconditioners.parts import Parts

PUBLISHED: dict[str, Any] = {
    "lr": 0.01, "betas": (0.9, 0.95), "eps": 1e-6, "weight_decay": 0.1,
}  # fmt: skip
"""Blocks as the published code steps them: everything else is the method's own."""

METHODS = {"kl": (KLShampooConfig, reference.KLShampoo), "soap": (KLSOAPConfig, reference.KLSOAP)}

SHAPES = [(13, 4), (4, 13), (14, 9), (4, 5, 3), (9, 4, 8)]
"""Cut at 5 into blocks whose first factors have at most one null direction, so that the published
method, which starts from their eigenbases, is determined up to signs."""


class Current:
    """KL-Shampoo and KL-SOAP by their defaults, written down once more without stacks.

    Statistics come before the step. The first basis is an eigendecomposition, later ones one
    orthogonal iteration from columns sorted by measured eigenvalue; second moments are transported.
    """

    def __init__(
        self, parameter: Array, *, soap: bool, interval: int, start: int, statistics_every: int = 1
    ) -> None:
        self.parameter, self.soap = parameter.copy(), soap
        self.statistics_every, self.decay = statistics_every, 0.95**statistics_every
        self.interval, self.start, self.t = interval, start, 0
        sides = parameter.shape
        self.factors = [np.zeros((d, d)) for d in sides]
        self.bases = [np.eye(d) for d in sides]
        self.eigenvalues = [np.ones(d) for d in sides]
        self.first, self.second = np.zeros(sides), np.zeros(sides)

    def step(self, gradient: Array, lr: float | None = None) -> Array:
        self.t += 1
        if (self.t - 1) % self.statistics_every == 0:
            self.absorb(gradient)
        if self.t == self.start or (self.t > self.start and self.t % self.interval == 0):
            self.refresh()
        self.first = 0.9 * self.first + 0.1 * gradient
        momentum = multiply(self.first, self.bases) / (1 - 0.9**self.t)
        if self.soap:
            self.second = 0.95 * self.second + 0.05 * multiply(gradient, self.bases) ** 2
            roots = np.sqrt(self.second / (1 - 0.95**self.t))
        else:
            roots = outer([values**0.5 for values in self.eigenvalues])
        direction = rotate_back(momentum / (roots + 1e-6), self.bases)
        self.parameter = self.parameter - 0.01 * (direction + 0.1 * self.parameter)
        return self.parameter

    def absorb(self, gradient: Array) -> None:
        sides, old, decay = gradient.shape, list(self.eigenvalues), self.decay
        rotated = multiply(gradient, self.bases)
        for axis, d in enumerate(sides):
            others = [np.ones(n) if i == axis else old[i] ** -0.5 for i, n in enumerate(sides)]
            seen = gram(rotated * outer(others), axis) / other_sizes(sides, axis)
            basis = self.bases[axis]
            self.factors[axis] = decay * self.factors[axis] + (1 - decay) * basis @ seen @ basis.T
            measured = decay * old[axis] + (1 - decay) * np.diag(seen)
            measured = measured if self.t > 1 else np.full(d, 0.1)
            self.eigenvalues[axis] = np.maximum(measured, max(10.0, min(d, 4000.0)) ** -2.0)

    def refresh(self) -> None:
        new = []
        for factor, basis in zip(self.factors, self.bases, strict=True):
            if self.t == self.start:
                new.append(np.linalg.eigh(factor)[1][:, ::-1])
                continue
            order = np.argsort(-np.diag(basis.T @ factor @ basis), kind="stable")
            new.append(np.linalg.qr(factor @ basis[:, order])[0])
        self.second = transport(self.second, self.bases, new)
        self.eigenvalues = [
            transport(values, [before], [after])
            for values, before, after in zip(self.eigenvalues, self.bases, new, strict=True)
        ]
        self.bases = new


@pytest.mark.parametrize("cut", ["balanced", "greedy"])
@pytest.mark.parametrize("interval", [1, 4])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", METHODS)
def test_blocks_agree_with_the_published_method(
    name: str, shape: tuple[int, ...], interval: int, cut: str
) -> None:
    config, plain = METHODS[name]

    def count(method: Any) -> None:
        method.t += 1

    assert_follows(
        lambda block: plain(block, interval=interval, **PUBLISHED),
        shape,
        # Not where the reference would have to refresh without a step: at 5, 9, 13, ...
        absent=(4, 7, 8) if interval == 4 else (),
        on_absent=count,
        cut=cut,
        max_block_size=5,
        refresh=FixedRefresh(interval),
        preconditioner=config(solver=UnsortedIterationSolver(), second_moments="keep", lagged=True),
        weight_decay_kind="decoupled_after",
        bias_correction=False,
        **PUBLISHED,
    )


@pytest.mark.parametrize("name", METHODS)
def test_factors_have_a_decay_and_a_first_eigenvalue_of_their_own(name: str) -> None:
    config, plain = METHODS[name]
    assert_follows(
        lambda block: plain(
            block, interval=4, factor_beta=0.8, initial_eigenvalue=0.3, **PUBLISHED
        ),
        (14, 9),
        max_block_size=5,
        refresh=FixedRefresh(4),
        preconditioner=config(
            solver=UnsortedIterationSolver(),
            second_moments="keep",
            lagged=True,
            factor_decay=0.8,
            initial_eigenvalue=0.3,
        ),
        weight_decay_kind="decoupled_after",
        bias_correction=False,
        **PUBLISHED,
    )


@pytest.mark.parametrize("cut", ["balanced", "greedy"])
@pytest.mark.parametrize(("interval", "start"), [(1, 5), (4, 6)])
@pytest.mark.parametrize("shape", [(20, 30), (35, 9), (18, 6, 5)])
@pytest.mark.parametrize("name", METHODS)
def test_blocks_agree_with_the_defaults_written_down_again(
    name: str, shape: tuple[int, ...], interval: int, start: int, cut: str
) -> None:
    config, _ = METHODS[name]
    assert_follows(
        lambda block: Current(block, soap=name == "soap", interval=interval, start=start),
        shape,
        cut=cut,
        refresh=FixedRefresh(interval, start),
        preconditioner=config(),
        **PUBLISHED,
    )


def test_statistics_every_third_step() -> None:
    assert_follows(
        lambda block: Current(block, soap=False, interval=4, start=7, statistics_every=3),
        (20, 30),
        refresh=FixedRefresh(4, 7),
        preconditioner=KLShampooConfig(statistics_interval=3),
        **PUBLISHED,
    )


@pytest.mark.parametrize("divide", [False, True])
@pytest.mark.parametrize("exponent", [None, 0.5])
@pytest.mark.parametrize("shape", [(13, 9), (7, 6, 5)])
def test_whitened_statistics_agree_with_the_reference(
    shape: tuple[int, ...], exponent: float | None, divide: bool
) -> None:
    assert_follows(
        lambda block: reference.MetaKLShampoo(
            block, interval=3, start=2, divide=divide, exponent=exponent, ridge="absolute",
            **{**PUBLISHED, "eps": 1e-3},
        ),
        shape,
        cut="greedy",
        max_block_size=7,
        refresh=FixedRefresh(3, 2),
        preconditioner=ShampooConfig(
            statistics="whitened_mean" if divide else "whitened", exponent=exponent, ridge=1e-3
        ),
        grafting=None,
        **PUBLISHED,
    )  # fmt: skip


@pytest.mark.parametrize("name", METHODS)
def test_gradients_of_a_kronecker_covariance_come_out_white(name: str) -> None:
    """What it is for: G = A Z B with white Z; the direction has to be white again."""
    generator = torch.Generator().manual_seed(5)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, right = normal(4, 4), 0.1 * normal(5, 5)
    weight = torch.nn.Parameter(torch.zeros(4, 5, dtype=torch.float64))
    config, _ = METHODS[name]
    optimizer = optimizer_for(
        [weight], lr=1.0, betas=(0.0, 0.995), eps=1e-12, weight_decay=0.0,
        preconditioner=config(largest_scale=1e4), refresh=FixedRefresh(5, 1),
    )  # fmt: skip
    covariance = torch.zeros(20, 20, dtype=torch.float64)
    for step in range(1, 1201):
        before = weight.detach().clone()
        weight.grad = left @ normal(4, 5) @ right
        optimizer.step()
        if step > 400:
            direction = (before - weight.detach()).flatten()
            covariance += torch.outer(direction, direction) / 800
    eigenvalues = torch.linalg.eigvalsh(covariance)
    # 800 samples in 20 dimensions spread the eigenvalues of a white covariance from 0.7 to 1.3.
    assert 0.5 < eigenvalues[0] < eigenvalues[-1] < 1.6
    raw = torch.linalg.eigvalsh(torch.kron(left @ left.T, right.T @ right))
    assert raw[-1] > 1e3 * raw[0], raw[-1] / raw[0]


def test_vectors_are_stepped_by_adam_and_cost_nothing_where_there_are_none() -> None:
    shapes = [(9, 7), (20,), (), (1, 1), (3, 4, 5)]
    ours = parameters(shapes)
    theirs = parameters(shapes)[1:4]
    optimizer = optimizer_for(
        ours, betas=(0.8, 0.95), eps=1e-7, preconditioner=KLShampooConfig(), target_order=None
    )
    adamw = torch.optim.AdamW(theirs, 0.01, (0.8, 0.95), 1e-7, weight_decay=0.01)
    for step in range(1, 21):
        for index, parameter in enumerate(ours):
            parameter.grad = gradient(parameter, step, index)
        for left, right in zip(ours[1:4], theirs, strict=True):
            right.grad = left.grad.clone()
        optimizer.step()
        adamw.step()
    assert_same(ours[1:4], theirs, 1e-12)
    assert isinstance(optimizer._engines[0][0].preconditioner, Parts)
    matrices = optimizer_for(parameters([(9, 7), (3, 4, 5)]), preconditioner=KLShampooConfig())
    assert isinstance(matrices._engines[0][0].preconditioner, KLShampoo)


def test_lagged_the_first_gradient_moves_nothing() -> None:
    params = parameters()
    optimizer = optimizer_for(params, preconditioner=KLShampooConfig(lagged=True))
    run(optimizer, params, range(1, 2))
    assert_same(params, parameters())
    run(optimizer, params, range(2, 3))
    assert not any(torch.equal(moved, old) for moved, old in zip(params, parameters(), strict=True))


def test_a_closed_block_keeps_its_eigenvalues() -> None:
    params = parameters([(8, 6), (8, 6)])
    optimizer = optimizer_for(params, preconditioner=KLShampooConfig(), refresh=FixedRefresh(100))
    run(optimizer, params, range(1, 4))
    before = [
        {key: value.clone() for key, value in optimizer.state[p].items() if "eigenvalues" in key}
        for p in params
    ]
    for index, parameter in enumerate(params):
        parameter.grad = gradient(parameter, 4, index)
    params[0].grad[2, 3] = torch.nan
    optimizer.step()
    for key, value in before[0].items():
        assert torch.equal(optimizer.state[params[0]][key], value), key
    for key, value in before[1].items():
        assert not torch.equal(optimizer.state[params[1]][key], value), key


def test_a_parameter_that_comes_late_starts_like_the_others() -> None:
    early, late = parameters([(8, 6), (8, 6)]), parameters([(8, 6), (8, 6)])
    options: dict[str, Any] = {"preconditioner": KLShampooConfig(), "refresh": FixedRefresh(10**6)}
    first, second = optimizer_for(early, **options), optimizer_for(late, **options)
    for step in range(1, 11):
        early[0].grad = gradient(early[0], step, 0)
        first.step()
        late[1].grad = gradient(late[1], step, 1)
        second.step()
    for step in range(1, 11):
        late[0].grad = gradient(late[0], step, 0)
        late[1].grad = gradient(late[1], step + 10, 1)
        second.step()
    assert_same(early[:1], late[:1], 1e-13)


def test_the_clamp_limits_how_far_small_gradients_are_blown_up() -> None:
    weight = torch.nn.Parameter(torch.zeros(12, 16, dtype=torch.float64))
    optimizer = optimizer_for(
        [weight], lr=1.0, betas=(0.0, 0.5), weight_decay=0.0, eps=1e-12,
        preconditioner=KLShampooConfig(), refresh=FixedRefresh(10**6),
    )  # fmt: skip
    for step in range(1, 60):
        before = weight.detach().clone()
        weight.grad = 1e-8 * gradient(torch.zeros_like(weight), step, 0)
        optimizer.step()
    # lambda^(-1/2) is at most d on an axis of 12, and of 16.
    torch.testing.assert_close(before - weight.detach(), weight.grad * 12 * 16)


def test_factors_are_kept_in_bases_that_stay_orthogonal_and_diagonalise_them() -> None:
    weight = torch.nn.Parameter(torch.zeros(16, 12))
    optimizer = optimizer_for(
        [weight], max_block_size=None, betas=(0.9, 0.99), preconditioner=KLShampooConfig(),
        refresh=FixedRefresh(1),
    )  # fmt: skip
    generator = torch.Generator().manual_seed(2)
    spectrum = torch.linspace(1.0, 3.0, 16)[:, None] * torch.linspace(0.2, 1.0, 12)
    frame = torch.linalg.qr(torch.randn(16, 16, generator=generator))[0]
    for _ in range(300):
        weight.grad = frame @ (spectrum * torch.randn(16, 12, generator=generator))
        optimizer.step()
    state = {key: value for key, value in optimizer.state[weight].items() if value.dim() > 0}
    for axis in ("axis0", "axis1"):
        basis = state[f"block.0.0.bases.{axis}"]
        factor = state[f"block.0.0.factors.{axis}"]
        assert (basis.T @ basis - torch.eye(len(basis))).abs().max() < 1e-5
        off_diagonal = factor - torch.diag(factor.diagonal())
        assert off_diagonal.norm() < 0.2 * factor.norm()


def test_adaptive_refresh_leaves_bases_that_stand_still_alone() -> None:
    refreshes = {}
    for kind in ("still", "turning"):
        weight = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
        optimizer = optimizer_for(
            [weight], betas=(0.9, 0.95), refresh=AdaptiveRefresh(5, threshold=0.3),
            preconditioner=KLShampooConfig(solver=EighSolver()),
        )  # fmt: skip
        generator = torch.Generator().manual_seed(2)
        turn = torch.linalg.matrix_exp(torch.tensor([[0.0, 0.02], [-0.02, 0.0]]).double())
        rotation = torch.block_diag(turn, torch.eye(6, dtype=torch.float64))
        frame = torch.eye(8, dtype=torch.float64)
        scales = torch.tensor([4.0, 1, 1, 1, 1, 1, 1, 1], dtype=torch.float64)
        for _ in range(200):
            noise = torch.randn(8, 8, generator=generator, dtype=torch.float64)
            weight.grad = frame @ torch.diag(scales) @ noise
            optimizer.step()
            frame = frame if kind == "still" else rotation @ frame
        refreshes[kind] = int(optimizer.state[weight]["block.0.0.refreshes.axis0"])
    assert refreshes["still"] <= 2
    assert refreshes["turning"] >= 8


@pytest.mark.parametrize("config", [KLShampooConfig, KLSOAPConfig])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"second_moments": "forget"}, "second_moments must be one of"),
        ({"initial_eigenvalue": 0.0}, r"initial_eigenvalue must lie in \(0.0, inf\), got 0.0"),
        ({"largest_scale": 0.0}, r"largest_scale must lie in \(0.0, "),
        ({"factor_decay": -0.1}, "factor_decay must lie in"),
        ({"statistics_interval": 0}, "statistics_interval must be at least 1, got 0"),
    ],
)
def test_bad_options_are_named(config: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"{config.__name__}: {message}"):
        config(**options)


def test_grafting_is_refused() -> None:
    with pytest.raises(ValueError, match="KLSOAPConfig: grafting must be None or 'auto'"):
        DistributedShampoo(
            parameters(), preconditioner=KLSOAPConfig(), grafting=AdamGrafting(eps=1e-3)
        )


@pytest.mark.parametrize("largest", [3.0, 50.0])
def test_the_clamp_can_be_set(largest: float) -> None:
    weight = torch.nn.Parameter(torch.zeros(12, 16, dtype=torch.float64))
    config = KLShampooConfig(largest_scale=largest)
    optimizer = optimizer_for(
        [weight], lr=1.0, betas=(0.0, 0.5), weight_decay=0.0, eps=1e-12,
        preconditioner=config, refresh=FixedRefresh(10**6),
    )  # fmt: skip
    for step in range(1, 60):
        before = weight.detach().clone()
        weight.grad = 1e-8 * gradient(torch.zeros_like(weight), step, 0)
        optimizer.step()
    torch.testing.assert_close(before - weight.detach(), weight.grad * largest**2)
