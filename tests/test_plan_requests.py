"""Requests for plans: every flag and option is planned for, costs and bytes by hand."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from shampoo_core import (
    AdamConfig,
    EigenvalueCorrectedConfig,
    EighSolver,
    KLShampooConfig,
    KLSOAPConfig,
    PerFactorCorrectedConfig,
    ShampooConfig,
    SpectralConfig,
)
from shampoo_core.averaging import HeavyBall
from shampoo_core.counting import Operation
from shampoo_core.groups import LARGEST_WAVE_NUMEL
from shampoo_core.model_shapes import NamedShape, named_model
from shampoo_core.plan import DEVICES, Placement, Request, make_plan
from shampoo_core.plan.__main__ import _config, _parser, _request, _title, main
from shampoo_core.plan.advice import _others
from shampoo_core.plan.devices import LAUNCH_SECONDS
from shampoo_core.plan.layout import MOST_RANKS, blocks_by_method
from shampoo_core.plan.planning import GIB

SMALL = [NamedShape("w", (24, 40)), NamedShape("b", (24,)), NamedShape("k", (6, 5, 3, 3))]


def test_every_kernel_of_an_operation_is_launched() -> None:
    many = Operation("aten::_foreach_add_", 0.0, 4, num_kernels=7)
    assert DEVICES["a100"].step_seconds([many]) == pytest.approx(7 * LAUNCH_SECONDS)


@pytest.mark.parametrize(
    ("config", "products", "more"),
    [
        (AdamConfig(), 0.0, 0.0),
        (ShampooConfig(), 2.0, 0.0),
        (EigenvalueCorrectedConfig(), 3.0, 0.0),
        (KLShampooConfig(), 3.0, 0.0),
        (PerFactorCorrectedConfig(), 3.0, 2.0 * (8**3 + 6**3)),
        (SpectralConfig(num_iterations=3), 0.0, 3 * (4.0 * 6**2 * 8 + 2.0 * 6**3)),
    ],
)
def test_costs_by_hand(config: Any, products: float, more: float) -> None:
    """Of a block of 8 x 6, refreshed once in ten steps."""
    refreshes = 24.0 * (8**3 + 6**3) / 10 if products else 0.0
    along_axes = 2.0 * 48 * (8 + 6)
    expected = 900.0 * 48 + products * along_axes + refreshes + more
    assert config.block_flops((8, 6), 10) == pytest.approx(expected)


def test_the_dearest_step_of_an_interval_refreshes() -> None:
    plan = make_plan(Request(SMALL, max_block_size=16, refresh_interval=4))
    # All factors of a small model at one step of the interval.
    assert plan.plain_ms < plan.staggered_ms == pytest.approx(plan.refresh_ms)


def test_what_is_reserved_is_not_there() -> None:
    plan = make_plan(Request(SMALL, memory_gib=2.0, reserved_gib=2.0 - 1e-5))
    assert plan.memory_gib == pytest.approx(1e-5)
    assert not plan.fits
    assert make_plan(Request(SMALL, memory_gib=2.0, reserved_gib=1.0)).fits


def test_indices_are_there_at_staggered_refreshes_too() -> None:
    request = Request(SMALL, config=ShampooConfig(storage="packed"), max_block_size=16)
    plan = make_plan(request)
    memory = plan.staggered_memory
    assert plan.peak_gib * GIB == pytest.approx(
        2 * plan.parameter_bytes
        + memory.state
        + memory.tables
        + max(memory.plain, memory.staggered)
    )
    assert memory.tables > 0


@pytest.mark.parametrize("sharding", ["ddp", "hsdp"])
def test_flags_are_those_of_a_request(sharding: Any, tmp_path: Path) -> None:
    file = tmp_path / "shapes.json"
    file.write_text(json.dumps(dict(SMALL)))
    is_ddp = sharding == "ddp"
    expected = Request(
        SMALL, Placement(8, sharding, 8 if is_ddp else 2, 4), DEVICES["h100"], 3.0,
        KLSOAPConfig(storage="8bit", solver=EighSolver()), HeavyBall(), weight_decay=0.5, max_block_size=16,
        max_wave_numel=300, refresh_interval=7, table_rows=40, gradient_as_bucket_view=is_ddp,
        reserved_gib=1.0, step_ms=20.0, overhead_percent=3.0,
    )  # fmt: skip
    of_sharding = "--gradient_as_bucket_view" if is_ddp else "--group_size 2"
    flags = (
        f"--shapes {shlex.quote(str(file))} --world_size 8 --sharding {sharding} --ranks_per_group 4 "
        "--device h100 --memory_gib 3 --preconditioner kl_soap --storage 8bit --solver eigh "
        "--averaging heavy_ball --weight_decay 0.5 --max_block_size 16 --max_wave_numel 300 "
        "--refresh_interval 7 --table_rows 40 --reserved_gib 1 --step_ms 20 --overhead_percent 3 "
        f"{of_sharding}"
    )
    assert _request(_parser().parse_args(shlex.split(flags))) == expected


@pytest.mark.slow
def test_refreshes_come_in_portions_by_default_where_factors_are_many() -> None:
    """Tall blocks are few numbers, all stepped at once; their factors are sixteen times as many."""
    tall = [NamedShape(str(index), (1024, 64)) for index in range(500)]
    portions, whole = (
        make_plan(Request(tall, max_wave_numel=limit)).at_once_memory for limit in ("auto", None)
    )
    assert portions.plain == whole.plain
    assert portions.refresh < 1.8 * GIB < 3.9 * GIB < whole.refresh


def test_waves_are_as_long_as_those_of_the_optimizer() -> None:
    """The messages of all ranks together are no longer than two of the largest."""
    for ranks, expected in ((1, None), (8, 2 * LARGEST_WAVE_NUMEL // 8)):
        method, *_ = blocks_by_method(
            named_model("transformer_1b") if ranks > 1 else SMALL,
            ShampooConfig(), Placement(ranks),
            max_block_size=1024, refresh_interval=100, max_wave_numel="auto",
        )  # fmt: skip
        assert method.max_wave_numel == expected


def test_other_ranks_that_are_tried_where_memory_is_short() -> None:
    """All of them sharing, twice as many, and sharded parameters."""
    request = Request(SMALL, Placement(4, ranks_per_group=2))
    tried = {name: edit(request).placement for name, edit in _others(request)}
    assert tried["ranks_per_group=4"] == Placement(4, ranks_per_group=4)
    assert tried["8 ranks, all of which share"] == Placement(8)
    assert tried["parameters sharded (FSDP2), all of which share"] == Placement(4, "fsdp2")
    alone = Request(SMALL, Placement(1), max_block_size=255)
    assert [name for name, _ in _others(alone)] == ["2 ranks"]


def test_more_ranks_than_any_machine_has_are_refused() -> None:
    with pytest.raises(ValueError, match="world_size must be at most 65536, for a plan goes"):
        Placement(10**6)


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--preconditioner spectral --solver eigh", "--solver eigh is for methods with factors"),
        ("--preconditioner spectral --storage 4bit", "--storage 4bit is for methods with factors"),
        (
            "--preconditioner kl_soap --solver coupled_newton",
            "solver must be a solver that computes",
        ),
    ],
)
def test_a_solver_that_does_not_fit_is_refused(
    flags: str, why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--workload", "mnist", "--world_size", "1", "--memory_gib", "1", *flags.split()])
    assert why in capsys.readouterr().err


def test_warm_started_bases_are_planned() -> None:
    """As on a GPU, by matrix products: a fraction of an eigendecomposition's time."""
    matrices = [NamedShape(str(index), (512, 512)) for index in range(4)]
    flags = "--workload ogbg --world_size 1 --memory_gib 16 --preconditioner eigenvalue_corrected"
    means = {}
    for solver in ("eigh", "orthogonal_iteration"):
        options = _parser().parse_args([*flags.split(), "--solver", solver])
        means[solver] = make_plan(Request(matrices, config=_config(options))).refresh_ms
        assert f"(dense, {solver})" in _title(options)
    assert means["orthogonal_iteration"] < 0.2 * means["eigh"]


def test_no_more_ranks_are_advised_than_can_be_planned() -> None:
    most = Request(SMALL, Placement(MOST_RANKS), memory_gib=1e-6)
    assert [what for what, _ in _others(most)] == [
        "max_block_size=512",
        "parameters sharded (FSDP2)",
    ]
