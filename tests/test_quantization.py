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
    DistributedShampoo,
    EigenvalueCorrectedConfig,
    FixedRefresh,
    KLShampooConfig,
    KLSOAPConfig,
    PerFactorCorrectedConfig,
    ShampooConfig,
)
from shampoo_core.counting import OperationCounter
from shampoo_core.model_shapes import workload_shapes
from shampoo_core.quantization import (
    GROUP,
    CodedRows,
    CodedSymmetric,
    CodedTensors,
    Format,
)

FORMATS = [
    Format(bits, keeps_error, curve)
    for bits in (4, 8)
    for keeps_error in (False, True)
    for curve in ("linear", "root", "fourth_root")
]
CONFIGS = [
    ShampooConfig,
    EigenvalueCorrectedConfig,
    KLShampooConfig,
    KLSOAPConfig,
    PerFactorCorrectedConfig,
]


def coded(rows: Tensor, form: Format) -> CodedRows:
    kept = CodedRows(rows.shape[0], rows.shape[1], form, rows.dtype, rows.device)
    kept.write(0, len(rows), rows)
    return kept


def numbers(form: Format, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return drawn.square() if form.curve == "fourth_root" else drawn


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_numbers_come_back_within_half_a_level(form: Format, scale: float) -> None:
    """Of the curved number: y -> y^p has slope at most p, so that p / (2 q) bounds the error."""
    rows = numbers(form, (3, 200)) * scale
    kept = coded(rows, form).read(0, 3)
    power = {"linear": 1, "root": 2, "fourth_root": 4}[form.curve]
    # Rows of 200 are four groups of 50.
    largest = rows.view(3, 4, 50).abs().amax(-1, keepdim=True).expand(3, 4, 50).reshape(3, 200)
    bound = power * 0.5 / form.largest_level * (1 + 1e-3) + 1e-6
    if form.curve == "fourth_root" and not form.keeps_error:
        bound += (1.0 / form.largest_level) ** 4  # zero is kept from being zero
    assert ((kept - rows).abs() <= bound * largest).all()


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_what_was_read_is_written_back_unchanged(form: Format) -> None:
    kept = coded(numbers(form, (4, 77)), form)
    before = {name: tensor.clone() for name, tensor in kept.tensors.items()}
    kept.write(0, 4, kept.read(0, 4))
    assert all(
        torch.equal(tensor, before[name])
        for name, tensor in kept.tensors.items()
        if name != "scales"
    )
    torch.testing.assert_close(kept.tensors["scales"], before["scales"], rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_only_the_rows_asked_for_change(form: Format) -> None:
    kept = coded(numbers(form, (5, 70)), form)
    before = kept.read(0, 5)
    new = numbers(form, (3, 70), seed=1)
    kept.write(1, 4, new, torch.tensor([True, False, True]))
    after = kept.read(0, 5)
    assert torch.equal(after[[0, 2, 4]], before[[0, 2, 4]])
    assert torch.equal(after[[1, 3]], coded(new, form).read(0, 3)[[0, 2]])


@given(st.integers(0, 3 * GROUP), st.sampled_from(FORMATS))
def test_rows_of_any_length(length: int, form: Format) -> None:
    rows = numbers(form, (2, length))
    kept = coded(rows, form)
    assert kept.read(0, 2).shape == rows.shape
    assert kept.read(1, 2).shape == (1, length)
    padded = 0 if length == 0 else kept.tensors["codes"][0].numel() * 8 // form.code_bits
    assert length <= padded < length + 2 * max(1, math.ceil(length / GROUP))
    assert torch.equal(coded(torch.zeros(2, length), form).read(0, 2), torch.zeros(2, length))


def test_a_positive_second_moment_never_becomes_zero() -> None:
    """It is divided by."""
    rows = torch.tensor([[1.0, 1e-30, 0.0, 1e-12]])
    for bits in (4, 8):
        kept = coded(rows, Format(bits, keeps_error=False, curve="fourth_root")).read(0, 1)
        assert (kept[0, [0, 1, 3]] > 0).all()
        assert kept[0, 2] == 0


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
    kept = CodedSymmetric(matrices, form)
    read = kept.read(0, 3)
    assert torch.equal(read, read.mT)
    assert torch.equal(read.diagonal(dim1=-2, dim2=-1), matrices.diagonal(dim1=-2, dim2=-1))
    assert torch.equal(kept.read(1, 2)[0], read[1])
    sizes = matrices.diagonal(dim1=-2, dim2=-1).sqrt()
    errors = (read - matrices).abs() / (sizes[:, :, None] * sizes[:, None, :])
    assert errors.max() <= 0.51 / form.largest_level
    kept.scale(torch.tensor([0.5, 1.0, 4.0]))
    torch.testing.assert_close(
        kept.read(0, 3), read * torch.tensor([0.5, 1.0, 4.0]).view(3, 1, 1), rtol=1e-6, atol=0.0
    )


def test_rows_of_different_scale_would_be_lost_without_the_diagonal() -> None:
    """Rounding the entries as they are leaves nothing of rows that are a millionth of others."""
    matrices = covariance(32)
    small = matrices[:, -8:, -8:]
    ours = CodedSymmetric(matrices, Format(4, True)).read(0, 3)[:, -8:, -8:]
    plain = CodedTensors(matrices, Format(8, True)).read(0, 3)[:, -8:, -8:]
    assert (ours - small).norm() < 1e-2 * small.norm()
    assert (plain - small).norm() > 1e-1 * small.norm()


@pytest.mark.parametrize("decay", [0.99, 0.999])
def test_errors_fed_back_let_an_average_move(decay: float) -> None:
    """Without them a code's step is larger than what one gradient adds, and the average stands still."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(24, 24, generator=generator) / 24**0.5
    started = torch.eye(24)[None]
    averages = {
        "exact": started.clone(),
        "fed back": CodedSymmetric(started, Format(4, keeps_error=True)),
        "forgotten": CodedSymmetric(started, Format(4, keeps_error=False)),
    }
    for _ in range(int(2 / (1 - decay))):
        rows = mixing @ torch.randn(24, 40, generator=generator) / 40**0.5
        for name, average in averages.items():
            old = average if isinstance(average, Tensor) else average.read(0, 1)
            new = decay * old + (1 - decay) * rows @ rows.mT
            if isinstance(average, Tensor):
                averages[name] = new
            else:
                average.write(0, 1, new)
    exact = averages["exact"]
    assert isinstance(exact, Tensor)
    moved = (exact - started).norm()
    errors = {
        name: float((average.read(0, 1) - exact).norm() / moved)
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


@pytest.mark.parametrize("workload", ["imagenet_resnet", "imagenet_vit", "ogbg", "mnist"])
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
    assert sizes["4bit"] < sizes["8bit"] <= 0.4 * sizes["dense"]


@pytest.mark.parametrize("storage", ["8bit", "4bit"])
def test_a_stack_is_decoded_whatever_its_length_in_the_same_operations(storage: Any) -> None:
    counts = []
    for copies in (1, 5):
        params = [torch.nn.Parameter(torch.zeros(24, 40, device="meta")) for _ in range(copies)]
        for parameter in params:
            parameter.grad = torch.zeros(24, 40, device="meta")
        config = ShampooConfig(storage=storage)
        optimizer = DistributedShampoo(params, preconditioner=config, refresh=FixedRefresh(3, 2))
        steps = []
        for _ in range(3):
            with OperationCounter() as counter:
                optimizer.step()
            steps.append((counter.num_operations, counter.num_synchronisations))
        counts.append(steps)
    assert counts[0] == counts[1]
    assert [waits for _, waits in counts[0]] == [0, 1, 1]
