"""What a reader is told of runs that are no like for like: cut off, run otherwise, on other data."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hand_made_logs import write_missing, write_reaching

from workloads_smoke.logs import OUT_OF_TIME
from workloads_smoke.registry import load_workload
from workloads_smoke.scoring import Scoreboard, read_results
from workloads_smoke.targets import load_targets

OWN = {"step_budget": 1.0, "eval_every_steps": 45, "tuning_ruleset": "external"}


def trial(root: Path, submission: str, *, ended: bool = True, flags: Any, metadata: Any) -> Path:
    folder = write_missing(root / submission / "study_0" / "mnist_pytorch" / "trial_1")
    (folder / "flags_0.json").write_text(json.dumps(flags))
    known = json.loads((folder / "meta_data_0.json").read_text())
    (folder / "meta_data_0.json").write_text(json.dumps(known | metadata))
    if ended:
        (folder / "outcome.json").write_text("{}")
    return folder


def notes(root: Path) -> list[str]:
    """Without the one on how many trials there are."""
    return Scoreboard.of(read_results([root])).notes()[1:]


def test_trials_that_ran_out_of_time_before_their_steps_are_named(tmp_path: Path) -> None:
    """On a busy machine a miss may be the machine's."""
    late = {"stopped_by": OUT_OF_TIME, "global_step": 810, "steps_to_target": None}
    for name, flags, outcome in (
        ("late", OWN, late),
        # The benchmark ends trials by time alone; and a target that was reached is no miss.
        ("unlimited", OWN | {"step_budget": None}, late),
        ("reached", OWN, late | {"steps_to_target": 5}),
        ("out_of_steps", OWN, late | {"stopped_by": "step limit"}),
    ):
        folder = trial(tmp_path, name, flags=flags, metadata={})
        (folder / "outcome.json").write_text(json.dumps(outcome))
    assert [note for note in notes(tmp_path) if "time" in note] == [
        "out of time with steps left, so that a miss may be the machine's: "
        "late study_0 mnist trial_1 (step 810)"
    ]


def test_trials_that_did_not_end_are_named(tmp_path: Path) -> None:
    trial(tmp_path, "ours", flags=OWN, metadata={})
    assert notes(tmp_path) == []
    trial(tmp_path, "theirs", ended=False, flags=OWN, metadata={})
    # The official harness leaves no mark of an end.
    trial(tmp_path, "official", ended=False, flags={"framework": "pytorch"}, metadata={})
    (note,) = [note for note in notes(tmp_path) if "did not end" in note]
    assert note.endswith(": theirs study_0 mnist trial_1 (step 1000)")


def test_trials_that_logged_no_evaluation_are_named(tmp_path: Path) -> None:
    """A copy that lost its tables scores as misses do."""
    for submission in ("ours", "theirs"):
        for study in range(2):
            write_reaching(tmp_path / f"{submission}/study_{study}/mnist_pytorch/trial_1", 200, 6.0)
    assert notes(tmp_path) == []
    for path in (tmp_path / "theirs").glob("*/*/*/eval_measurements.csv"):
        path.unlink()
    assert notes(tmp_path) == ["without any evaluation, so that a miss may be none: theirs 2"]
    cut = trial(tmp_path, "cut", ended=False, flags=OWN, metadata={})
    (cut / "eval_measurements.csv").unlink()
    found = Scoreboard.of(read_results([tmp_path])).notes()
    assert "did not end, so that a miss may be none: cut study_0 mnist trial_1 (step 0)" in found
    assert "without any evaluation, so that a miss may be none: theirs 2" in found


def test_flags_that_differ_are_named(tmp_path: Path) -> None:
    trial(tmp_path, "ours", flags=OWN, metadata={})
    trial(tmp_path, "theirs", flags=OWN | {"step_budget": 0.2, "rng_seed": 3}, metadata={})
    assert notes(tmp_path) == [
        "mnist was run with different --step_budget: 1.0 (ours), 0.2 (theirs)"
    ]


def test_flags_that_a_log_does_not_have_differ_from_none(tmp_path: Path) -> None:
    trial(tmp_path, "ours", flags=OWN, metadata={})
    trial(tmp_path, "official", ended=False, flags={"framework": "pytorch"}, metadata={})
    assert notes(tmp_path) == []


def test_data_of_several_pythons_are_named(tmp_path: Path) -> None:
    first = {"workload.text_fingerprint": "a", "python_version": "3.11.7"}
    trial(tmp_path, "ours", flags=OWN, metadata=first | {"workload.caveat": "rough"})
    assert notes(tmp_path) == ["mnist: rough"]
    other = {"workload.text_fingerprint": "b", "python_version": "3.12.1"}
    trial(tmp_path, "theirs", flags=OWN, metadata=other)
    (note,) = notes(tmp_path)
    assert note.startswith("mnist was run on 2 different texts, of Python 3.11.7, 3.12.1:")


def test_a_workload_knows_whether_its_data_are_those_of_the_target(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fingerprints = "workloads_smoke.workloads.base.fingerprint"
    monkeypatch.setattr(fingerprints, lambda: load_targets("wmt").text_fingerprint)
    assert load_workload("wmt").caveat is None
    monkeypatch.setattr(fingerprints, lambda: "another text")
    assert "is not that of 3.11" in (load_workload("wmt").caveat or "")
    assert load_workload("mnist").caveat is load_workload("mnist").text_fingerprint is None


@pytest.mark.parametrize(("ruleset", "budget"), [("external", 101.0), ("self", 151.0)])
def test_a_miss_counts_as_the_budget_of_its_ruleset(
    tmp_path: Path, ruleset: str, budget: float
) -> None:
    for submission, seconds in (("ours", 80.0), ("nadamw", 1e9)):
        folder = tmp_path / submission / "study_0" / "mnist_pytorch" / "trial_1"
        write_reaching(folder, 100, seconds) if seconds < 1e9 else write_missing(folder)
        (folder / "flags_0.json").write_text(json.dumps({"tuning_ruleset": ruleset}))
    board = Scoreboard.of(read_results([tmp_path]))
    assert board.summary().loc["ours", "speedup_with_budget"] == pytest.approx(budget / 80.0)
    other = tmp_path / "nadamw" / "study_0" / "mnist_pytorch" / "trial_1" / "flags_0.json"
    mixed = {"external": "self", "self": "external"}[ruleset]
    other.write_text(json.dumps({"tuning_ruleset": mixed}))
    assert np.isnan(Scoreboard.of(read_results([tmp_path])).summary()["speedup_with_budget"]).all()
