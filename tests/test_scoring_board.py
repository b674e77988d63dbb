"""Scoreboards: who and what counts, in which order, against whom, and up to which ratio."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hand_made_logs import write_missing, write_reaching

from workloads_smoke.scoring import Scoreboard, Target, read_results


def trial_of(root: Path, submission: str, workload: str = "mnist") -> Path:
    return root / submission / "study_0" / f"{workload}_pytorch" / "trial_1"


def board_of(root: Path, seconds: dict[str, float | None]) -> Scoreboard:
    """Submissions with their times to the target of mnist; None misses it."""
    for name, time in seconds.items():
        folder = trial_of(root, name)
        write_missing(folder) if time is None else write_reaching(folder, 100, time)
    return Scoreboard.of(read_results([root]))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        # The word that says most comes first, however it is written and whoever is ahead.
        ({"ours": 1.0, "adamw": 2.0, "NAdamW": 3.0, "my_Baseline": 3.5}, "my_Baseline"),
        ({"ours": 1.0, "adamw": 2.0, "NAdamW": 3.0}, "NAdamW"),
        ({"ours": 3.0, "adamw_tuned": 1.0}, "adamw_tuned"),
        # Of two baselines the better one.
        ({"baseline_a": 3.0, "baseline_b": 2.0, "ours": 1.0}, "baseline_b"),
        ({"ours": 1.0, "theirs": 3.0, "sgd": 2.0}, "theirs"),
    ],
)
def test_speedups_are_over_a_baseline_or_else_the_last(
    tmp_path: Path, times: dict[str, float | None], expected: str
) -> None:
    board = board_of(tmp_path, times)
    assert board.reference == expected
    assert board.speedups().loc["ours", "mnist"] == pytest.approx(times[expected] / times["ours"])  # type: ignore[operator]


def test_nobody_is_fastest_where_nobody_arrives(tmp_path: Path) -> None:
    board = board_of(tmp_path, {"ours": None, "theirs": None})
    assert list(board.summary()["num_fastest"]) == list(board.summary()["num_reached"]) == [0, 0]
    assert list(board.summary()["num_compared"]) == [0, 0]


def test_ties_are_in_the_order_of_names_and_misses_in_that_of_metrics(tmp_path: Path) -> None:
    write_missing(trial_of(tmp_path, "a"), best=0.3)
    write_missing(trial_of(tmp_path, "b"), best=0.7)
    write_reaching(trial_of(tmp_path, "d"), 100, 2.0)
    write_reaching(trial_of(tmp_path, "c"), 100, 2.0)
    write_missing(trial_of(tmp_path, "e", workload="wmt"))
    board = Scoreboard.of(read_results([tmp_path]), workloads=["mnist"])
    assert board.ranking("mnist") == ["c", "d", "b", "a", "e"]
    assert board.submissions == ("c", "d", "a", "b", "e")


def test_who_ran_none_of_the_workloads_that_count_has_missed_them(tmp_path: Path) -> None:
    for workload in ("mnist", "wmt", "ogbg"):
        write_reaching(trial_of(tmp_path, "ours", workload), 100, 2.0)
    write_reaching(trial_of(tmp_path, "theirs", "ogbg"), 100, 2.0)
    board = Scoreboard.of(read_results([tmp_path]), workloads=["wmt", "mnist"])
    assert board.workloads == tuple(board.seconds.columns) == ("wmt", "mnist")  # as they were asked
    assert list(board.seconds.loc["theirs"]) == [math.inf, math.inf]
    assert board.summary().loc["theirs", "score"] == 0.0
    assert "theirs did not run wmt, mnist: counted as missed" in board.notes()


@pytest.mark.parametrize(("r_max", "score"), [(1.25, 0.0), (1.5, 1 / 198), (2.0, 0.5)])
def test_what_takes_longer_than_r_max_is_missed_everywhere(
    tmp_path: Path, r_max: float, score: float
) -> None:
    board_of(tmp_path, {"ours": 2.0, "theirs": 3.0})
    board = Scoreboard.of(read_results([tmp_path]), r_max=r_max)
    assert board.profiles().columns[-1] == r_max
    assert board.summary().loc["theirs", "score"] == pytest.approx(score, abs=0.006)
    assert board.workload_scores().loc["theirs", "mnist"] == pytest.approx(score, abs=0.006)
    ratio = board.ratios().loc["theirs", "mnist"]
    assert ratio == (math.inf if r_max < 1.5 else 1.5)


def test_submissions_are_ranked_by_scores_at_the_ratio_asked_for(tmp_path: Path) -> None:
    """Far behind on one workload, or somewhat on both: which is worse depends on where a miss begins."""
    for name, times in (("far", (2.0, 8.0)), ("near", (3.0, 3.0)), ("first", (9.0, 2.0))):
        for workload, seconds in zip(("mnist", "wmt"), times, strict=True):
            write_reaching(trial_of(tmp_path, name, workload), 100, seconds)
    trials = read_results([tmp_path])
    ranks = {r: Scoreboard.of(trials, r_max=r).submissions.index("near") for r in (1.25, 4.0)}
    assert ranks == {1.25: 2, 4.0: 0}


def test_without_a_budget_nothing_is_compared_with_it(tmp_path: Path) -> None:
    board_of(tmp_path, {"ours": 2.0, "nadamw": None})
    targets = {"mnist": Target("accuracy", 0.9)}
    board = Scoreboard.of(read_results([tmp_path]), targets)
    assert np.isnan(board.summary()["speedup_with_budget"]).all()
