"""What benchmarks are asked for: they take it, say why they do not, or refuse it before they measure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from benchmarks import counts, memory, methods, on_device, scaling, timing, training
from benchmarks.__main__ import SECTIONS, main
from benchmarks.flags import out_folder, parser_of
from benchmarks.tables import publish
from shampoo_core import ShampooConfig
from shampoo_core.counting import OperationCounter
from shampoo_core.model_shapes import named_model
from shampoo_core.plan import Request, make_plan


@pytest.mark.parametrize(
    ("section", "workload", "file"),
    [
        ("time", "criteo1tb", "time.json"),
        ("measured", "criteo1tb", "measured.json"),
        ("share", "cifar", "share.json"),
    ],
)
def test_what_is_skipped_is_named_and_replaces_nothing(
    section: str, workload: str, file: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="1"):
        main([section, "--workload", workload, "--out", str(tmp_path / "new")])
    lines = capsys.readouterr().out.split("\n\n")
    assert len(lines) == 2  # no table
    assert lines[0].strip().startswith(f"skipped: {workload} (")
    assert lines[1] == "nothing was written\n"
    assert not (tmp_path / "new").exists()
    (tmp_path / file).write_text("good")
    with pytest.raises(SystemExit, match="1"):
        main([section, "--workload", workload, "--out", str(tmp_path)])
    assert (tmp_path / file).read_text() == "good"


def test_a_table_without_rows_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert publish("Things: none", [], {"x": "x"}, tmp_path) == []
    assert not capsys.readouterr().out
    assert not list(tmp_path.iterdir())


def test_what_is_no_number_is_null(tmp_path: Path) -> None:
    """Strict readers refuse JSON with NaN."""
    (path,) = publish("Things: few", [{"x": math.nan, "y": 1.5}], {"x": "x", "y": "y"}, tmp_path)
    assert "NaN" not in path.read_text()
    assert json.loads(path.read_text())["rows"] == [{"x": None, "y": 1.5}]


def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let sections that compare methods and sizes have few of them."""
    chosen = methods.methods()[:2]
    monkeypatch.setattr(methods, "methods", lambda: chosen)
    monkeypatch.setattr(scaling, "WIDTHS", (64,))
    monkeypatch.setattr(scaling, "RANKS", (1, 2))
    monkeypatch.setattr(scaling, "METHODS", {"shampoo": ShampooConfig()})
    monkeypatch.setattr(memory, "INTERVAL", 8)
    monkeypatch.delitem(memory.METHODS, "eigenvalue-corrected")


@pytest.mark.parametrize(
    ("section", "files"),
    [
        ("counts", ["operations.json", "state.json"]),
        ("methods", ["methods.json"]),
        ("memory", ["memory.json"]),
        ("scaling", ["width.json", "ranks.json", "scaling.png"]),
        ("time", ["time.json"]),
    ],
)
def test_a_section_takes_the_models_it_is_asked_for(
    section: str,
    files: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few(monkeypatch)
    asked = ["mnist", "fastmri"] if section in ("methods", "scaling") else ["mnist"]
    flags = [flag for name in asked for flag in ("--workload", name)]
    main([section, *flags, *flags, "--out", str(tmp_path)])
    written = ", ".join(str(tmp_path / file) for file in files)
    assert capsys.readouterr().out.endswith(f"\n\nwritten: {written}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(files)
    for file in files:
        if file.endswith(".json") and file != "width.json":
            rows = json.loads((tmp_path / file).read_text())["rows"]
            assert list(dict.fromkeys(row["workload"] for row in rows)) == asked
            if section in ("time", "memory"):  # the aim is that of other models
                assert not any(row["limit"] for row in rows)


def test_some_workloads_do_not_replace_what_was_measured_of_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    few(monkeypatch)
    monkeypatch.chdir(tmp_path)
    main(["memory", "--workload", "mnist"])
    assert "\nwritten: results/bench/mnist/memory.json\n" in capsys.readouterr().out
    parsed = parser_of("", "").parse_args
    assert out_folder(parsed([])) == Path("results/bench")
    assert out_folder(parsed(["--workload=wmt", "--workload=ogbg"])).name == "wmt+ogbg"
    assert out_folder(parsed(["--workload=wmt", "--out=here"])) == Path("here")


def test_help_says_which_workloads_a_section_takes(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and section.takes in text for name, section in SECTIONS.items())


def test_a_lookup_table_is_stepped_as_the_planner_says(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = make_plan(Request(named_model("criteo1tb")))
    assert counts.allocated_bytes("criteo1tb", ShampooConfig()) == plan.state_bytes
    none = OperationCounter()
    monkeypatch.setattr(counts, "count_steps", lambda workload, config: (none, none))
    routings = [row["preconditioned"] for row in counts.operation_rows(["criteo1tb"])]
    assert routings == ["vectors, table diagonal", "all but the table"]
    assert "criteo1tb" in counts.chosen(None, counts.official_workloads())


@pytest.mark.slow
def test_operations_beside_a_lookup_table_are_those_of_the_planner() -> None:
    plain, _ = counts.count_steps("criteo1tb", ShampooConfig())
    assert plain.num_operations == make_plan(Request(named_model("criteo1tb"))).plain_operations


WHOLE = "must be a whole number, at least 1, got"


@pytest.mark.parametrize(
    ("command", "flags", "message"),
    [
        (timing.main, ["--cycles", "0"], f"argument --cycles: {WHOLE} '0'"),
        (timing.main, ["--cycles", "2.5"], f"argument --cycles: {WHOLE} '2.5'"),
        (timing.main, ["--out", __file__], "argument --out: --out: "),
        (training.main, ["storage", "--out", "/proc/none"], "nothing can be written in /proc ("),
        (timing.main, ["--refresh", "--peers", "nonesuch"], "argument --peers: must be part of"),
        (timing.main, ["--refresh", "--peers", "nonesuch"], "'heavyball SOAP'"),
        (memory.main, ["--waves_of_largest_stack", "0"], f"{WHOLE} '0'"),
        (training.main, ["storage", "--steps", "0"], f"argument --steps: {WHOLE} '0'"),
        (training.main, ["storage", "--seeds", "-1"], f"argument --seeds: {WHOLE} '-1'"),
        (training.main, ["storage", "--lr", "nan"], "--lr: must be a number above 0, got 'nan'"),
        (training.main, ["storage", "--lr", "fast"], "--lr: must be a number above 0"),
        (training.main, ["storage", "--only", "("], "--only: must be a regular expression"),
        (training.main, ["storage", "--only", "Muon"], "'KLSOAP 4bit'], got 'Muon'"),
    ],
)
def test_a_flag_that_nothing_can_be_measured_with_is_refused(
    command: Callable[[list[str]], None],
    flags: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as refused:
        command(flags)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_more_waves_than_numbers_are_waves_of_one_block(monkeypatch: pytest.MonkeyPatch) -> None:
    few(monkeypatch)
    rows = list(memory.memory_rows(["mnist"], memory.METHODS, 10**9))
    assert [row["max_wave_numel"] for row in rows] == [None, 1]


@pytest.mark.parametrize(
    ("name", "known"),
    [
        ("Tesla V100-SXM2-16GB", "v100"),
        ("NVIDIA A100-SXM4-40GB", "a100"),
        ("NVIDIA H200", "h100"),
        ("NVIDIA GH200 480GB", "h100"),
        ("NVIDIA RTX A1000", None),
    ],
)
def test_a_device_is_known_by_its_whole_name(
    name: str, known: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    device = on_device.this_device()
    assert (None if device is None else device.name) == known
