"""The benchmarks' own arithmetic, and that their tables say what the optimizer does."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import bases, counts, measured, memory, methods, pairs, parts, share, timing
from benchmarks.courses import Course
from benchmarks.phases import PARTS
from benchmarks.tables import publish, text_table
from shampoo_core.config import Storage


def test_tables_line_up_and_show_what_is_missing() -> None:
    rows = [{"name": "a", "value": 1.23456}, {"name": "longer", "value": None}]
    lines = text_table(rows, {"name": "name", "value": "ms"}).splitlines()
    assert lines == ["name      ms", "------  ----", "a       1.23", "longer     -"]


def test_a_table_is_printed_and_written_with_its_origin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for value in (1, 2):  # a rerun replaces the file
        publish("Things: of a kind", [{"x": value}], {"x": "x"}, tmp_path / "new", "a note")
    document = json.loads((tmp_path / "new" / "things.json").read_text())
    assert document["rows"] == [{"x": 2}]
    assert {"torch", "python", "commit", "processor", "threads"} <= set(document["environment"])
    assert "a note" in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["things.json"]


def test_counts_of_a_workload_have_the_peers_beside_them() -> None:
    rows = counts.operation_rows(["mnist"])
    assert [row["preconditioned"] for row in rows] == ["vectors diagonal", "everything"]
    for row in rows:
        assert row["plain"] < row["plain_theirs"] == 92
        assert row["refresh"] < row["refresh_theirs"] == 264
        assert (row["plain_waits"], row["refresh_waits"]) == (0, 1)
    (state,) = counts.state_rows(["mnist"])
    assert state["4bit"] < state["8bit"] < state["packed"] < state["dense"]


@pytest.mark.slow
def test_every_row_of_methods_counts_something() -> None:
    rows = {row["method"]: row for row in methods.method_rows("mnist")}
    assert len(rows) == len(methods.methods())
    has_statistics = {name for name, row in rows.items() if row["statistics_ms"] > 0.0}
    assert has_statistics == set(rows) - {"Adam", "spectral"}
    assert rows["Adam"]["plain_gflop"] == 0.0
    assert rows["eigenvalue-corrected"]["plain_gflop"] > rows["Shampoo"]["plain_gflop"] > 0.0
    assert rows["Shampoo, one-sided"]["state_mib"] < rows["Shampoo"]["state_mib"]
    two = {"Shampoo, OrthogonalIterationSolver"}  # bases, then roots
    assert {name for name, row in rows.items() if row["waits"] > 1} == two


@pytest.mark.slow  # the bound itself is in test_waves.py
def test_rows_of_memory_have_the_limit_beside_them() -> None:
    """Issue 7's bound on the real shapes: twice the largest stack, in waves."""
    rows = list(memory.memory_rows(["ogbg"]))
    assert [row["limit"] for row in rows] == [None, memory.LIMIT] * len(memory.METHODS)
    for whole, waves in zip(rows[::2], rows[1::2], strict=True):
        assert whole["waves"] == 1 < waves["waves"]
        for kind in ("plain", "staggered", "refresh"):
            assert waves[f"{kind}_stacks"] <= memory.LIMIT < whole[f"{kind}_stacks"]
        assert waves["operations"] > whole["operations"]
        assert waves["state_mib"] == whole["state_mib"]


def test_the_floor_does_as_much_arithmetic_as_is_asked_for() -> None:
    from shampoo_core.counting import OperationCounter

    for flops in (1e7, 3e9):
        step = timing.products(flops)
        with OperationCounter() as counter:
            step()
        assert counter.flops == pytest.approx(flops, rel=0.1)


def test_steps_between_refreshes_are_timed_as_they_are_behind_the_second() -> None:
    """Before it the grafting method stands in for roots that nobody has asked for, in one pass more."""
    from shampoo_core.counting import OperationCounter

    floor = timing.products(1e6)
    skips = timing.candidates("mnist", floor, refresh=False)["ours"]
    refreshes = timing.candidates("mnist", floor, refresh=True, peers="none")["ours"]
    for _ in range(timing.CYCLE):
        refreshes()
    counts = []
    for step in (skips, refreshes):
        with OperationCounter() as counter:
            step()
        counts.append((counter.num_operations, counter.flops))
    assert counts[0] == counts[1]


def test_steps_to_target_are_interpolated() -> None:
    course = Course(steps=[10, 20, 30], losses=[1.0, 0.6, 0.2])
    assert course.steps_to(1.5) == 10
    assert course.steps_to(0.7) == pytest.approx(17.5)
    assert course.steps_to(0.1) is None


def test_a_mean_ratio_has_the_interval_of_students_t() -> None:
    """Logarithms 0, 0.1 and 0.2: mean 0.1, deviation 0.1, and t = 4.303 at two degrees of freedom."""
    found = pairs.mean_ratio([1.0, math.exp(0.1), math.exp(0.2)])
    half = 4.303 * 0.1 / math.sqrt(3)
    assert found.mean == pytest.approx(math.exp(0.1))
    assert found.low == pytest.approx(math.exp(0.1 - half))
    assert found.high == pytest.approx(math.exp(0.1 + half))
    assert pairs.mean_ratio([2.0]) == pairs.MeanRatio(pytest.approx(2.0), None, None)
    assert pairs.mean_ratio([0.5, 2.0]).mean == pytest.approx(1.0)  # no side counts more
    many = pairs.mean_ratio([1.0, math.exp(0.2)] * 50)
    deviation = 0.1 * math.sqrt(100 / 99)
    assert many.high == pytest.approx(math.exp(0.1 + 2.042 * deviation / 10))


def test_losses_are_smoothed_over_their_neighbours() -> None:
    course = Course(steps=[1, 2, 3, 4], losses=[4.0, 1.0, 1.0, 0.0])
    assert pairs.smoothed(course, 3).losses == pytest.approx([2.5, 2.0, 2 / 3, 0.5])
    assert course.losses == [4.0, 1.0, 1.0, 0.0]


def test_a_pair_shares_the_target_that_lies_between_its_losses() -> None:
    """After 3 of 5 evaluations the losses are 2 and 4; 3 is reached after 20 and after 40 steps."""
    steps = [10, 20, 30, 40, 50]
    first = Course(steps=steps, losses=[4.0, 3.0, 2.0, 1.0, 1.0], state_bytes=100)
    slower = Course(steps=steps, losses=[6.0, 5.0, 4.0, 3.0, 2.0], state_bytes=25)
    never = Course(steps=steps, losses=[6.0, 6.0, 6.0, 5.0, 5.0], state_bytes=25)
    assert pairs.steps_of_pair(first, slower) == pytest.approx((20.0, 40.0))
    assert pairs.steps_of_pair(first, never) is None
    row = pairs.pair_row([first, first], [slower, never])
    assert (row["reached"], row["state_ratio"]) == (1, 0.25)
    assert (row["steps"], row["steps_low"]) == (pytest.approx(100.0), None)
    assert row["loss"] == pytest.approx(100.0 * (math.sqrt(2.0 * 5.0) - 1.0))
    diverged = Course(steps=steps, losses=[6.0, math.nan, math.nan, math.inf, math.nan])
    row = pairs.pair_row([first, first], [slower, diverged])
    assert (row["reached"], row["diverged"]) == (1, 1)
    assert (row["loss"], row["loss_low"]) == (pytest.approx(100.0), None)
    row = pairs.pair_row([first], [diverged])
    assert (row["reached"], row["diverged"], "loss" in row) == (0, 1, False)
    itself = pairs.pair_row([first, first], [first, first])
    assert itself["steps"] == itself["steps_low"] == itself["steps_high"] == pytest.approx(0.0)


def test_one_part_of_the_state_is_coded_alone() -> None:
    """Codes are bytes; the sum over parts of what they save is what four bits save."""
    from shampoo_core import DistributedShampoo, ShampooConfig

    def kept(part: parts.Part | None, storage: Storage = "4bit") -> dict[str, int]:
        with parts.coded_alone(part):
            optimizer = DistributedShampoo(
                [torch.nn.Parameter(torch.zeros(64, 64))],
                preconditioner=ShampooConfig(storage=storage),
            )
        (entries,) = optimizer.state.values()
        return {name: tensor.numel() * tensor.element_size() for name, tensor in entries.items()}

    dense = sum(kept(None, "dense").values())
    choices: list[parts.Part] = ["factors", "roots", "first", "second"]
    saved = {part: dense - sum(kept(part).values()) for part in choices}
    assert min(saved.values()) > 0
    assert sum(saved.values()) == dense - sum(kept(None).values())


@pytest.mark.slow
def test_the_optimizers_share_is_a_part_of_the_step(tmp_path: Path) -> None:
    share.run(["mnist", "not a smoke workload"], tmp_path)
    (row,) = json.loads((tmp_path / "share.json").read_text())["rows"]
    assert 0.0 < row["update_ms"] < row["step_ms"]
    assert row["share"] == pytest.approx(row["update_ms"] / row["step_ms"])
    assert 0.0 < row["share_with_refreshes"] < 1.0


def test_parts_of_a_step_add_up() -> None:
    """Of every method, nested parts counted once."""
    rows = list(measured.method_rows("mnist", methods.methods()[:2]))
    assert [row["method"] for row in rows] == ["Adam", "Shampoo"]
    for row in rows:
        parts = [row[f"{part}_ms"] for part in PARTS if part != "refresh"]
        assert sum(parts) == pytest.approx(row["plain_ms"], rel=0.1)
    assert rows[0]["statistics_ms"] == 0.0 < rows[1]["statistics_ms"]
    assert rows[1]["spike"] > 1.5


def test_a_peer_that_refreshes_late_is_measured_when_it_does() -> None:
    """SOAP's first step only begins."""
    seconds = [9.0, 1.0, 1.0, 2.0, 9.0, 1.0, 1.0, 2.0, 8.0, 1.0, 1.0, 2.0]
    assert timing._shortest("SOAP (reference)", seconds, plain=False) == 8.0
    assert timing._shortest("SOAP (reference)", seconds, plain=True) == 1.0
    assert timing._shortest("ours", seconds, plain=False) == 2.0


@pytest.mark.slow  # loads a text
def test_bases_are_judged_by_what_they_leave_of_their_factors(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A narrow model for two looks: bases that were just refreshed are diagonal, older ones are not."""
    for name, value in {"WIDTH": 12, "NUM_TOKENS": 3000, "HELD_OUT": 500, "EVERY": 10}.items():
        monkeypatch.setattr(bases, name, value)
    monkeypatch.setattr(bases, "INTERVALS", (1, 15))
    rows = bases.rows(20, range(1))
    assert [(row["basis"], row["interval"]) for row in rows] == [
        (name, interval) for interval in (1, 15) for name in bases.SOLVERS
    ]
    fresh, _, old, _ = rows
    assert fresh["last_ratio"] < 1e-4 < 0.01 < old["last_ratio"]
    for row in rows:
        assert row["training"] < math.log(512)
        assert row["validation"] > 0.0
