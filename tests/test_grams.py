"""Gram matrices by their upper triangle: the same factors for less arithmetic, whoever reads them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from distributed_cases import CASES, assert_close, tolerance_of, trajectory
from hypothesis import given
from hypothesis import strategies as st
from quadratic import assert_same, optimizer_for, parameters, run
from torch import Tensor

from benchmarks.counts import count_steps
from benchmarks.timing import method_flops
from shampoo_core import DistributedShampoo, FixedRefresh, ShampooConfig, grams
from shampoo_core.blocking import tiles_of
from shampoo_core.counting import OperationCounter
from shampoo_core.grams import ON_CPU, Price, add_gram, num_pieces, strip_bounds, upper_gram
from shampoo_core.refresh import FactorSlice, FactorStackSize
from shampoo_core.stacks import StackSet
from shampoo_core.storage import factor_store


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strips however little they save."""
    monkeypatch.setattr(grams, "ON_CPU", Price(4, 0.0, has_columns=True))
    monkeypatch.setattr(grams, "LEAST_ROWS", 1)
    monkeypatch.setattr(grams, "LEAST_COLUMNS", 1)


@given(
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 5),
    st.integers(1, ON_CPU.most_strips),
    st.booleans(),
)
def test_upper_triangles_are_those_of_the_whole_product(
    count: int, side: int, length: int, strips: int, across: bool
) -> None:
    """In strips of columns, or of rows where these run across memory."""
    rows = torch.randn(count, length, side, dtype=torch.float64).mT
    rows = rows if across else rows.contiguous()
    old = torch.randn(count, side, side, dtype=torch.float64)
    old = old + old.mT
    bounds = [index * side // strips for index in range(strips + 1)]
    new = old.clone()
    add_gram(new, rows, bounds, decay=0.75, gain=0.5)
    expected = 0.75 * old + 0.5 * rows @ rows.mT
    torch.testing.assert_close(new.triu(), expected.triu(), rtol=1e-13, atol=1e-13)


def test_what_the_memory_held_before_is_not_read(eager: None) -> None:
    rows = torch.randn(2, 8, 3)
    bounds = strip_bounds(rows)
    result = torch.full((2, 8, 8), torch.nan)
    add_gram(result, rows, bounds, decay=0.0, gain=1.0)
    torch.testing.assert_close(result.triu(), (rows @ rows.mT).triu())
    torch.testing.assert_close(upper_gram(rows).triu(), (rows @ rows.mT).triu())


@given(
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(1, 40),
    st.booleans(),
    st.sampled_from([0.0, 0.75]),
)
def test_products_of_pieces_are_those_of_whole_rows(
    count: int, side: int, length: int, across: bool, decay: float
) -> None:
    rows = torch.randn(count, length, side, dtype=torch.float64).mT
    rows = rows if across else rows.contiguous()
    old = torch.randn(count, side, side, dtype=torch.float64)
    expected = decay * old + 0.5 * rows @ rows.mT
    if decay == 0.0:
        old.fill_(torch.nan)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(grams, "ON_CPU", Price(1, 0.0, 30))
        patch.setattr(grams, "LEAST_LENGTH", 2)
        patch.setattr(grams, "LEAST_PIECES", 2)
        pieces = num_pieces(rows)
        with OperationCounter() as counter:
            add_gram(old, rows, (0, side), decay=decay, gain=0.5)
    assert length % pieces == 0 and length // pieces >= min(2, length) and count * pieces <= 30
    assert (pieces > 1) == any(
        length % divisor == 0 for divisor in range(2, min(length // 2, 30 // count) + 1)
    )
    assert (counter.counts["aten::bmm"] > 0) == (pieces > 1)
    torch.testing.assert_close(old, expected, rtol=1e-13, atol=1e-13)


def test_a_gpu_cuts_only_long_rows_of_few_small_matrices() -> None:
    """Those of the kernel axes of convolutions; each of these would be one processor's work."""
    lengths = {
        (3, 9, 2**18): 128,
        (4, 9, 2**14): 16,
        (1, 64, 147): 1,
        (6, 256, 2304): 1,
        (600, 9, 2**18): 1,
    }
    for shape, pieces in lengths.items():
        assert num_pieces(torch.empty(shape, device="meta")) == pieces, shape
        assert num_pieces(torch.empty(1).expand(shape)) == 1, "a CPU has no processors to keep busy"
    matrices, rows = torch.empty(3, 9, 9, device="meta"), torch.empty(3, 2**18, 9, device="meta").mT
    with OperationCounter() as counter:
        add_gram(matrices, rows, (0, 9), decay=0.5, gain=0.5)
    assert counter.num_operations == 4, "no copy: the pieces are views"


@pytest.mark.parametrize(("device", "strips"), [("meta", 4), ("cpu", 8)])
def test_strips_pay_for_themselves(device: str, strips: int) -> None:
    """Small products stay one operation, large ones take 5/8 of the arithmetic, or 9/16."""
    for shape in [(1, 16, 16), (8, 64, 64), (1, 10, 2048)]:
        assert strip_bounds(torch.empty(shape, device=device)) == (0, shape[1])
    # A CPU cuts columns narrower than it does rows.
    wide = torch.empty(8, 256, 1024, device=device)
    across = wide.mT.contiguous().mT
    found = tuple(len(strip_bounds(rows)) - 1 for rows in (wide, across))
    assert found == ((8, 2) if device == "cpu" else (1, 1))
    large = torch.empty(8, 1024, 1024, device=device)
    assert strip_bounds(large) == tuple(range(0, 1025, 1024 // strips))
    matrices, rows = torch.empty(2, 8, 1024, 1024, device="meta")
    with OperationCounter() as counter:
        add_gram(matrices, rows, strip_bounds(large), decay=0.5, gain=0.5)
    assert counter.num_operations == strips
    assert counter.flops == (strips + 1) / (2 * strips) * 2 * 8 * 1024**3


@pytest.mark.parametrize("storage", ["dense", "packed"])
def test_stores_give_whole_matrices_to_every_reader(eager: None, storage: Any) -> None:
    sizes = (FactorStackSize(3, 7), FactorStackSize(2, 4), FactorStackSize(1, 1))
    stack_set = StackSet(tiles_of(0, (10,), 10), dtype=torch.float64, device=torch.device("cpu"))
    store = factor_store(stack_set, sizes, storage)
    expected = [torch.zeros(n, d, d, dtype=torch.float64) for n, d in sizes]

    def rows() -> list[Tensor]:
        return [torch.randn(n, d, 5, dtype=torch.float64) for n, d in sizes]

    def add() -> None:
        added = rows()
        store.add_grams(added, decay=0.9, gain=0.1)
        for matrices, own in zip(expected, added, strict=True):
            matrices.mul_(0.9).add_(own @ own.mT, alpha=0.1)

    add()
    where = [FactorSlice(0, 1, 3), FactorSlice(1, 0, 1)]
    assert_same(store.read(where), [expected[0][1:3], expected[1][:1]], 1e-14)
    add()
    store.scale([torch.full((n,), 0.5, dtype=torch.float64) for n, _ in sizes])
    for matrices in expected:
        matrices.mul_(0.5)
    assert_same(list(store.read_all()), expected, 1e-14)


@pytest.mark.parametrize(
    "name", [name for name in CASES if CASES[name].dtype == torch.float64 and "waves" not in name]
)
def test_strips_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    case = replace(CASES[name])
    whole = trajectory(case)
    monkeypatch.setattr(grams, "ON_CPU", Price(4, 0.0, has_columns=True))
    monkeypatch.setattr(grams, "LEAST_ROWS", 1)
    monkeypatch.setattr(grams, "LEAST_COLUMNS", 1)
    assert_close(name, trajectory(case), whole, tolerance_of(case))


def test_checkpoints_hold_whole_factors_and_continue(eager: None) -> None:
    def make() -> tuple[list[torch.nn.Parameter], DistributedShampoo]:
        params = parameters()
        return params, optimizer_for(params, refresh=FixedRefresh(4), betas=(0.9, 0.99))

    params, optimizer = make()
    run(optimizer, params, range(1, 7))
    state = optimizer.state_dict()
    factors = [
        tensor
        for entries in state["state"].values()
        for name, tensor in entries.items()
        if ".factors.axis" in name
    ]
    assert len(factors) > 10
    for factor in factors:
        # The parts on the diagonal are products, which not every processor rounds symmetrically.
        torch.testing.assert_close(factor, factor.mT, rtol=0.0, atol=1e-14)
    others, resumed = make()
    resumed.load_state_dict(state)
    with torch.no_grad():
        for other, parameter in zip(others, params, strict=True):
            other.copy_(parameter)
    run(optimizer, params, range(7, 12))
    run(resumed, others, range(7, 12))
    assert_same(others, params)


def test_real_models_save_a_third_of_the_statistics() -> None:
    """Of the plain products of the method, statistics are half: 4 strips leave 13 of 16 parts."""
    plain, _ = count_steps("wmt", ShampooConfig())
    assert 13 / 16 <= plain.flops / method_flops("wmt") < 0.83
