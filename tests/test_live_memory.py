"""The meters of `shampoo_core.counting` and `shampoo_core.live_memory`, on code with known answers."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shampoo_core import (
    AdamConfig,
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FactorSlice,
    FixedRefresh,
    KLSOAPConfig,
    PerFactorCorrectedConfig,
    ShampooConfig,
    SpectralConfig,
)
from shampoo_core.blocking import tiles_of
from shampoo_core.counting import QR_FLOPS_PER_CUBE, OperationCounter
from shampoo_core.live_memory import LiveMemory
from shampoo_core.preconditioners.base import PreconditionerConfig
from shampoo_core.stacks import StackSet
from shampoo_core.statistics import FactorAxis, KroneckerFactors

DEVICES = pytest.mark.parametrize("device", ["cpu", "meta"])


@DEVICES
def test_a_storage_lives_as_long_as_any_view_of_it(device: str) -> None:
    with LiveMemory() as memory:
        whole = torch.zeros(1000, device=device)
        part = whole.view(10, 100)[3:]
        assert memory.live == 4000
        del whole
        assert memory.live == 4000
        more = part + 1.0
        assert memory.live == 4000 + 2800
        del part
        assert memory.live == 2800
        more.mul_(2.0)
        del more
    assert memory.live == 0
    assert memory.peak == 6800


@DEVICES
def test_what_lived_before_and_in_place_work_count_nothing(device: str) -> None:
    before = torch.zeros(100, device=device)
    with LiveMemory() as memory:
        before.add_(1.0)
        before.view(10, 10).mul_(2.0)
        torch._foreach_add_([before], 1.0)
    assert memory.peak == 0


@DEVICES
def test_flops_bytes_and_waits_of_known_operations(device: str) -> None:
    left, right = torch.zeros(3, 4, 5, device=device), torch.zeros(3, 5, 6, device=device)
    square = torch.eye(7, device=device)[None]
    with OperationCounter() as counted:
        product = torch.bmm(left, right)
        product.view(-1)
        torch.baddbmm(product, left, right)
    assert counted.num_operations == 2
    assert counted.flops == 2 * (2 * 3 * 4 * 5 * 6)
    assert counted.bytes_moved == 4 * (60 + 90 + 72 + 72 + 60 + 90 + 72)
    assert counted.num_synchronisations == 0
    with OperationCounter() as counted:
        torch.linalg.qr(square)
        assert not (square.sum() > 100).item()
    assert counted.flops == QR_FLOPS_PER_CUBE * 7**3
    assert counted.num_synchronisations == 1
    with OperationCounter() as counted:  # of what is given to be written to, once
        torch.bmm(left, right, out=product)
    assert counted.bytes_moved == 4 * (60 + 90 + 72)
    if device == "cpu":  # torch has no meta kernel for the first of these
        with OperationCounter() as counted:
            torch.linalg.householder_product(*torch.geqrf(square))
        assert counted.flops == pytest.approx(QR_FLOPS_PER_CUBE * 7**3)


PLAIN_STEPS: list[tuple[PreconditionerConfig, dict[str, float]]] = [
    (AdamConfig(), {"cpu": 1.0, "meta": 2.0}),
    (ShampooConfig(), {"cpu": 2.0, "meta": 2.0}),
    (PerFactorCorrectedConfig(), {"cpu": 4.0, "meta": 4.0}),
    (EigenvalueCorrectedConfig(), {"cpu": 2.0, "meta": 2.0}),
    (EigenvalueCorrectedConfig(lagged=True), {"cpu": 2.0, "meta": 2.0}),
    (KLSOAPConfig(), {"cpu": 4.0, "meta": 4.0}),
    (SpectralConfig(), {"cpu": 5.0, "meta": 5.0}),
]
"""What they take beside the state, in parameters: the gradient as a stack, and on a GPU Adam's
denominators; then one product, in the per-factor method two more, of bases and powers of today."""


def plain_step_peaks(config: PreconditionerConfig, device: str) -> list[float]:
    """Of five steps in units of the parameter, of which the first and third refresh."""
    parameter = torch.nn.Parameter(torch.zeros(512, 256, device=device))
    optimizer = DistributedShampoo(
        [parameter], preconditioner=config, max_block_size=64, refresh=FixedRefresh(3, 1)
    )
    peaks = []
    for _ in range(5):
        parameter.grad = torch.ones_like(parameter)
        with LiveMemory() as memory, OperationCounter():  # answers what a refresh asks
            optimizer.step()
        peaks.append(memory.peak / parameter.nbytes)
    return peaks


@DEVICES
@pytest.mark.parametrize(("config", "expected"), PLAIN_STEPS, ids=str)
def test_memory_that_has_served_is_used_again(
    config: PreconditionerConfig, expected: dict[str, float], device: str
) -> None:
    assert plain_step_peaks(config, device)[4] == pytest.approx(expected[device], abs=0.1)


@pytest.mark.parametrize(
    ("config", "early"),
    [(ShampooConfig(), 3.0), (PerFactorCorrectedConfig(), 5.0)],
    ids=["shampoo", "per-factor"],
)
def test_the_graft_is_kept_until_every_block_is_known_to_have_a_root(
    config: PreconditionerConfig, early: float
) -> None:
    """A GPU is asked at the second refresh, a CPU after the first."""
    on_gpu, on_cpu = (plain_step_peaks(config, device)[1] for device in ("meta", "cpu"))
    assert on_gpu == pytest.approx(early, abs=0.1)
    assert on_cpu == pytest.approx(early - 1.0, abs=0.1)


def test_few_factors_are_an_eighth_as_many_numbers_as_the_stacks() -> None:
    stack_set = StackSet(tiles_of(0, (128, 8), 8), dtype=torch.float32, device=torch.device("cpu"))
    factors = KroneckerFactors(stack_set, [FactorAxis(0, 0, 8, 2), FactorAxis(0, 1, 8, 2)], 0.9)
    assert stack_set.sizes == [16]
    for due, expected in (
        ([], True),
        ([FactorSlice(0, 1, 3)], True),
        ([FactorSlice(1, 0, 3)], False),
        ([FactorSlice(0, 3, 4), FactorSlice(1, 0, 1)], True),
        ([FactorSlice(0, 2, 4), FactorSlice(1, 0, 1)], False),
    ):
        assert factors.are_few(due) is expected, due


@DEVICES
def test_a_product_takes_the_place_of_the_graft_and_that_of_the_gradient(device: str) -> None:
    """Of four shapes: on a CPU one wave and a product, on a GPU Adam's denominators beside the wave."""
    shapes = [(32, 32 * width) for width in (1, 2, 3, 4)]
    params = [torch.nn.Parameter(torch.zeros(shape, device=device)) for shape in shapes]
    optimizer = DistributedShampoo(params, max_block_size=128, refresh=FixedRefresh(3, 1))
    peaks = []
    for _ in range(5):
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        with LiveMemory() as memory, OperationCounter():
            optimizer.step()
        peaks.append(memory.peak / sum(p.nbytes for p in params))
    assert peaks[4] == pytest.approx(1.4 if device == "cpu" else 2.0, abs=0.1)


@pytest.mark.parametrize(
    ("options", "most"),
    [
        ({}, 2.0),
        ({"preconditioner": PerFactorCorrectedConfig()}, 3.0),
        ({"preconditioner": EigenvalueCorrectedConfig()}, 3.0),
        ({"preconditioner": EigenvalueCorrectedConfig(), "betas": (0.0, 0.9)}, 3.0),
        ({"preconditioner": ShampooConfig(sides="first")}, 2.0),
    ],
    ids=str,
)
def test_blocks_with_three_axes_use_memory_again_too(options: dict[str, Any], most: float) -> None:
    """Beside a vector, which is not multiplied: its view of the gradients keeps all of their memory."""
    params = [torch.nn.Parameter(torch.zeros(shape)) for shape in ((64, 32, 32), (32,))]
    optimizer = DistributedShampoo(
        params, max_block_size=32, target_order=3, refresh=FixedRefresh(9, 1), **options
    )
    for _ in range(3):
        for parameter in params:
            parameter.grad = torch.ones_like(parameter)
        with LiveMemory() as memory:
            optimizer.step()
    assert memory.peak / params[0].nbytes <= most + 0.1
