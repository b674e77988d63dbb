"""Few bits: rounding within its bound, errors fed back, and methods that hardly notice."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from quadratic import optimizer_for, parameters, run
from torch import Tensor

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
CONFIGS = [
    ShampooConfig,
    EigenvalueCorrectedConfig,
    KLShampooConfig,
    KLSOAPConfig,
    PerFactorCorrectedConfig,
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
