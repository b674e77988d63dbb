"""Few bits: rounding within its bound, symmetry and diagonals kept, errors fed back."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from shampoo_core.refresh import FactorSlice, FactorStackSize
from shampoo_core.stacks import StackSet
from shampoo_core.storage.coded import CodedBases, CodedBlocks, CodedSymmetric
from shampoo_core.storage.quantization import GROUP, Format

FORMATS = [
    Format(bits, keeps_error, curve)
    for bits in (4, 8)
    for keeps_error in (False, True)
    for curve in ("linear", "root", "cube_root", "fourth_root")
]


def coded(rows: Tensor, form: Format) -> CodedBlocks:
    """Rows of numbers as blocks of one stack."""
    kept = CodedBlocks([rows.shape[0]], [rows.shape[1]], form, rows.dtype, rows.device)
    kept.write(some(0, len(rows)), [rows])
    return kept


def some(start: int, stop: int) -> list[list[FactorSlice]]:
    return [[FactorSlice(0, start, stop)]]


def read(kept: CodedBlocks, rows: Tensor) -> Tensor:
    """What is kept of rows."""
    return kept.read(some(0, len(rows)))[0][:, : rows.shape[1]]


def numbers(form: Format, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.square() if form.curve == "fourth_root" else drawn


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_numbers_come_back_within_half_a_level(form: Format, scale: float) -> None:
    """Of the curved number: y -> y^p has slope at most p, so that p / (2 q) bounds the error."""
    rows = numbers(form, (3, 200)) * scale
    kept = read(coded(rows, form), rows)
    power = {"linear": 1, "root": 2, "cube_root": 3, "fourth_root": 4}[form.curve]
    groups = rows.split(GROUP, dim=1)
    largest = torch.cat([g.abs().amax(-1, keepdim=True).expand_as(g) for g in groups], dim=1)
    bound = power * 0.5 / form.largest_level * (1 + 1e-3) + 1e-6
    if form.curve == "fourth_root" and not form.keeps_error:
        bound += (1.0 / form.largest_level) ** 4  # zero is kept from being zero
    assert ((kept - rows).abs() <= bound * largest).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_what_was_read_is_written_back_unchanged(form: Format) -> None:
    rows = numbers(form, (4, 77))
    kept = coded(rows, form)
    (tensors,) = kept.tensors
    before = {name: tensor.clone() for name, tensor in tensors.items()}
    kept.write(some(0, 4), [read(kept, rows)])
    assert all(
        torch.equal(tensor, before[name]) for name, tensor in tensors.items() if name != "scales"
    )
    torch.testing.assert_close(tensors["scales"], before["scales"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_only_the_rows_asked_for_change(form: Format) -> None:
    rows = numbers(form, (5, 70))
    kept = coded(rows, form)
    before = read(kept, rows)
    new = numbers(form, (3, 70), seed=1)
    kept.write(some(1, 4), [new], [torch.tensor([True, False, True])])
    after = read(kept, rows)
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])
    assert torch.equal(after[[1, 3]], read(coded(new, form), new)[[0, 2]])


@given(st.integers(0, 3 * GROUP), st.sampled_from(FORMATS))
def test_rows_of_any_length(length: int, form: Format) -> None:
    rows = numbers(form, (2, length))
    kept = coded(rows, form)
    assert read(kept, rows).shape == rows.shape
    assert torch.equal(kept.read(some(1, 2))[0][:, :length], read(kept, rows)[1:])
    padded = kept.tensors[0]["codes"][0].numel() * 8 // form.code_bits
    assert length <= padded < max(1, length) + GROUP
    zeros = torch.zeros(2, length)
    assert torch.equal(read(coded(zeros, form), zeros), zeros)


def test_a_positive_second_moment_never_becomes_zero() -> None:
    """It is divided by."""
    rows = torch.tensor([[1.0, 1e-30, 0.0, 1e-12]])
    for bits in (4, 8):
        kept = read(coded(rows, Format(bits, keeps_error=False, curve="fourth_root")), rows)
        assert (kept[0, [0, 1, 3]] > 0).all()
        assert kept[0, 2] == 0


def symmetric(matrices: Tensor, form: Format) -> CodedSymmetric:
    return filled(CodedSymmetric, matrices, form)


def filled(kind: Any, matrices: Tensor, form: Format) -> Any:
    """A store of one stack of matrices."""
    stack_set = StackSet([], dtype=matrices.dtype, device=matrices.device)
    store = kind(stack_set, [FactorStackSize(*matrices.shape[:2])], form)
    put(store, matrices)
    return store


def put(store: Any, matrices: Tensor) -> None:
    ones = torch.ones_like(matrices[:, 0, 0])
    store.blend([FactorSlice(0, 0, len(matrices))], [matrices], [ones])


def covariance(side: int, condition: float = 1e4, seed: int = 0) -> Tensor:
    """(3, side, side), rows of very different scales."""
    generator = torch.Generator().manual_seed(seed)
    basis, _ = torch.linalg.qr(torch.randn(3, side, side, generator=generator))
    values = torch.logspace(0, -math.log10(condition), side)
    scales = torch.logspace(0, -6, side)
    return (basis * values) @ basis.mT * scales[:, None] * scales


@pytest.mark.parametrize("side", [1, 2, 33, 64])
@pytest.mark.parametrize("form", [Format(4, True), Format(8, False), Format(8, True)], ids=str)
def test_symmetric_matrices_keep_diagonal_and_symmetry(form: Format, side: int) -> None:
    matrices = covariance(side)
    kept = symmetric(matrices, form)
    (read,) = kept.read_all()
    assert torch.equal(read, read.mT)
    assert torch.equal(read.diagonal(dim1=-2, dim2=-1), matrices.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(kept.read([FactorSlice(0, 1, 2)])[0], read[1:2])
    sizes = matrices.diagonal(dim1=-2, dim2=-1).sqrt()
    errors = (read - matrices).abs() / (sizes[:, :, None] * sizes[:, None, :])
    assert errors.max() <= 0.51 / form.largest_level
    factors = torch.tensor([0.5, 1.0, 4.0])
    kept.scale([factors])
    (scaled,) = kept.read_all()
    torch.testing.assert_close(scaled, read * factors.view(3, 1, 1), rtol=1e-6, atol=0.0)


def test_rows_of_different_scale_would_be_lost_without_the_diagonal() -> None:
    """Rounding the entries as they are leaves nothing of rows that are a millionth of others."""
    matrices = covariance(32)
    small = matrices[:, -8:, -8:]
    (ours,) = symmetric(matrices, Format(4, True)).read_all()
    (plain,) = filled(CodedBases, matrices, Format(8, True)).read_all()
    assert (ours[:, -8:, -8:] - small).norm() < 1e-2 * small.norm()
    assert (plain[:, -8:, -8:] - small).norm() > 1e-1 * small.norm()


@pytest.mark.parametrize("decay", [0.99, 0.999])
def test_errors_fed_back_let_an_average_move(decay: float) -> None:
    """Without them a code's step is larger than what one gradient adds, and the average stands still."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator) / 24**0.5
    started = torch.eye(24)[None]
    averages = {
        "exact": started.clone(),
        "fed back": symmetric(started, Format(4, keeps_error=True)),
        "forgotten": symmetric(started, Format(4, keeps_error=False)),
    }
    for _ in range(int(2 / (1 - decay))):
        rows = mixing @ torch.randn(24, 40, generator=generator) / 40**0.5
        for name, average in averages.items():
            old = average if isinstance(average, Tensor) else next(average.read_all())
            new = decay * old + (1 - decay) * rows @ rows.mT
            if isinstance(average, Tensor):
                averages[name] = new
            else:
                put(average, new)
    exact = averages["exact"]
    assert isinstance(exact, Tensor)
    moved = (exact - started).norm()
    errors = {
        name: float((next(average.read_all()) - exact).norm() / moved)
        for name, average in averages.items()
        if isinstance(average, CodedSymmetric)
    }
    assert errors["fed back"] < 0.02
    assert errors["forgotten"] > 0.2


def test_a_direction_in_which_nothing_was_seen_does_not_spoil_the_others() -> None:
    """Rounding leaves a row of small numbers beside a diagonal of zero, or of next to nothing."""
    matrix = torch.eye(16) + 0.5
    matrix[3, :], matrix[:, 3] = 1e-4, 1e-4
    for diagonal in (0.0, 1e-12):
        matrix[3, 3] = diagonal
        (read,) = symmetric(matrix[None].clone(), Format(4, True)).read_all()
        keep = torch.arange(16) != 3
        error = (read[0] - matrix)[keep][:, keep].abs().max()
        assert error < 0.1
        assert torch.isfinite(read).all()
