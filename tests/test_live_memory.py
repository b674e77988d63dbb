"""The meters of `shampoo_core.counting` and `shampoo_core.live_memory`, on code with known answers."""

from __future__ import annotations

import pytest
import torch

from shampoo_core import (
    AdamConfig,
    DistributedShampoo,
    FactorSlice,
    FixedRefresh,
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


@pytest.mark.parametrize(("config", "most"), [(AdamConfig(), 2.0), (SpectralConfig(), 5.0)])
def test_stacks_of_gradients_are_freed_after_their_last_use(
    config: PreconditionerConfig, most: float
) -> None:
    """In units of the parameter: without it, one more."""
    parameter = torch.nn.Parameter(torch.zeros(256, 256))
    optimizer = DistributedShampoo([parameter], preconditioner=config, max_block_size=256)
    peaks = []
    for _ in range(2):
        parameter.grad = torch.ones_like(parameter)
        with LiveMemory() as memory:
            optimizer.step()
        peaks.append(memory.peak / parameter.nbytes)
    assert peaks[-1] <= most + 0.01


@DEVICES
@pytest.mark.parametrize(
    ("config", "early", "late"),
    [(ShampooConfig(), 3.0, 2.0), (PerFactorCorrectedConfig(), 6.0, 5.0)],
    ids=["shampoo", "per-factor"],
)
def test_the_grafting_direction_is_freed_once_every_block_has_a_root(
    config: PreconditionerConfig, early: float, late: float, device: str
) -> None:
    """In plain steps before and behind the second refresh, at which the host asks; in parameters."""
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
    assert peaks[1] == pytest.approx(early, abs=0.05)
    assert peaks[4] == pytest.approx(late, abs=0.05)


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
