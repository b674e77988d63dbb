"""Time to target: per trial, minimum over trials, median over studies."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pytest
from hand_made_logs import write_missing, write_reaching, write_trial

from workloads_smoke.scoring import Scoreboard, Target, read_results
from workloads_smoke.scoring.time_to_target import resolve_targets, trial_table
from workloads_smoke.scoring.verdict import workload_verdict

INF = float("inf")


def trial_row(tmp_path: Path, values: list[float], metric: str, target: float) -> dict[str, float]:
    steps = [1, *range(10, 10 * len(values), 10)]
    seconds = [2.0 + 0.5 * step for step in steps]
    write_trial(tmp_path / "s" / "study_0" / "w_pytorch" / "trial_1", steps, seconds, values,
                metric, target)  # fmt: skip
    trials = read_results([tmp_path])
    (row,) = trial_table(trials, resolve_targets(trials)).to_dict("records")
    return row


def test_the_first_evaluation_that_meets_the_target_counts(tmp_path: Path) -> None:
    row = trial_row(tmp_path, [0.1, 0.5, 0.9, 0.3, 0.95], "accuracy", 0.9)
    assert (row["steps"], row["seconds"]) == (20, 12.0)
    assert (row["best_metric"], row["best_step"]) == (0.95, 40)
    assert row["seconds_per_step"] == 12.0 / 20
    assert row["num_evaluations"] == 5


def test_a_loss_has_to_fall_and_nan_never_counts(tmp_path: Path) -> None:
    row = trial_row(tmp_path, [math.nan, 0.7, math.nan, 0.45], "loss", 0.5)
    assert (row["steps"], row["best_metric"]) == (30, 0.45)


def test_a_miss_is_infinite_with_its_best_metric(tmp_path: Path) -> None:
    row = trial_row(tmp_path, [0.1, 0.8, 0.7, math.nan], "accuracy", 0.9)
    assert (row["steps"], row["seconds"]) == (INF, INF)
    assert (row["best_metric"], row["best_step"], row["last_step"]) == (0.8, 10, 30)


@pytest.mark.parametrize("metric", ["loss", "accuracy"])
def test_what_is_not_finite_is_no_best_metric(tmp_path: Path, metric: str) -> None:
    row = trial_row(tmp_path, [INF, -INF, math.nan], metric, 0.5)
    assert math.isnan(row["best_metric"]) and math.isnan(row["best_step"])


def test_what_is_no_number_is_named_with_its_place(tmp_path: Path) -> None:
    folder = tmp_path / "s" / "study_0" / "mnist_pytorch" / "trial_1"
    write_reaching(folder, 200, 6.0)
    table = folder / "eval_measurements.csv"
    table.write_text(table.read_text().replace("0.95", "abc"))
    message = "trial_1: evaluations, column 'validation/accuracy': could not convert .* 'abc'"
    with pytest.raises(ValueError, match=message):
        Scoreboard.of(read_results([tmp_path]))


def test_a_trial_of_one_step_tells_no_step_time(tmp_path: Path) -> None:
    assert math.isnan(trial_row(tmp_path, [0.1], "accuracy", 0.9)["seconds_per_step"])


def test_minimum_over_trials_then_median_over_studies(tmp_path: Path) -> None:
    # Fastest in steps and fastest in seconds are different trials of study_0.
    times = {
        "study_0": [(100, 9.0), (120, 8.0)],
        "study_1": [(300, 30.0), (90, 5.0)],
        "study_2": [(200, 20.0), None],
    }
    for study, trials in times.items():
        for number, time in enumerate(trials, start=1):
            folder = tmp_path / "ours" / study / "mnist_pytorch" / f"trial_{number}"
            write_missing(folder) if time is None else write_reaching(folder, *time)
    board = Scoreboard.of(read_results([tmp_path]))
    studies = board.per_study.set_index("study")
    # Steps and seconds of a study are of one trial, whose quotient is a time that a step took.
    assert list(studies["steps"]) == [120, 90, 200]
    assert list(studies["fewest_steps"]) == [100, 90, 200]
    assert list(studies["seconds"]) == [8.0, 5.0, 20.0]
    assert list(studies["best_trial"]) == ["trial_2", "trial_2", "trial_1"]
    (row,) = board.per_workload.to_dict("records")
    assert (row["steps"], row["seconds"], row["fewest_steps"]) == (120, 8.0, 100)
    assert board.steps.loc["ours", "mnist"] == 100
    assert (row["studies_reached"], row["num_studies"], row["num_trials"]) == (3, 3, 6)
    assert row["seconds_per_step"] == 8.0 / 120


def test_the_fastest_trial_counts_whatever_others_reach(tmp_path: Path) -> None:
    """Neither fewer steps nor a better metric later make up for seconds."""
    study = tmp_path / "ours" / "study_0" / "mnist_pytorch"
    write_trial(study / "trial_1", [1, 10, 20], [0.1, 9.0, 18.0], [0.1, 0.92, 0.99])
    write_trial(study / "trial_2", [1, 40, 50], [0.1, 8.0, 10.0], [0.1, 0.91, 0.93])
    write_trial(study / "trial_3", [1, 50, 90], [0.1, 11.0, 19.0], [0.1, 0.8, 0.95])
    (row,) = Scoreboard.of(read_results([tmp_path])).per_study.to_dict("records")
    assert (row["best_trial"], row["seconds"], row["steps"]) == ("trial_2", 8.0, 40)
    assert (row["fewest_steps"], row["best_metric"], row["num_trials"]) == (10, 0.99, 3)
    assert row["seconds_per_step"] == 8.0 / 40


def test_a_target_met_at_the_first_step_tells_no_step_time(tmp_path: Path) -> None:
    """That step is start-up, also in words."""
    for submission, seconds in (("ours", 5.0), ("theirs", 8.0)):
        folder = tmp_path / submission / "study_0" / "mnist_pytorch" / "trial_1"
        write_trial(folder, [1, 10], [seconds, 9.0], [0.95, 0.96])
    board = Scoreboard.of(read_results([tmp_path]))
    assert board.per_workload["seconds_per_step"].isna().all()
    assert workload_verdict(board, "mnist").endswith(
        "theirs took 1.60x as long (8.00 s): 1.00x the steps (1 against 1)."
    )


@pytest.mark.parametrize(("num_missing", "expected"), [(1, 5.0), (2, INF), (3, INF)])
def test_a_study_that_misses_is_infinite_in_the_median(
    tmp_path: Path, num_missing: int, expected: float
) -> None:
    for index in range(3):
        folder = tmp_path / "ours" / f"study_{index}" / "mnist_pytorch" / "trial_1"
        write_missing(folder) if index < num_missing else write_reaching(folder, 100, 5.0)
    board = Scoreboard.of(read_results([tmp_path]))
    assert board.seconds.loc["ours", "mnist"] == expected
    (row,) = board.per_workload.to_dict("records")
    assert row["studies_reached"] == 3 - num_missing


def test_the_best_trial_of_a_study_that_misses_has_the_best_metric(tmp_path: Path) -> None:
    study = tmp_path / "ours" / "study_0" / "mnist_pytorch"
    write_missing(study / "trial_1", best=0.3)
    write_missing(study / "trial_2", best=0.85)
    (study / "trial_3").mkdir()
    board = Scoreboard.of(read_results([tmp_path]))
    (row,) = board.per_study.to_dict("records")
    assert (row["best_trial"], row["best_metric"], row["num_trials"]) == ("trial_2", 0.85, 3)


def test_targets_given_win_over_recorded_win_over_official(tmp_path: Path) -> None:
    write_reaching(tmp_path / "a" / "study_0" / "mnist_pytorch" / "trial_1", 100, 5.0, target=0.7)
    write_reaching(tmp_path / "a" / "study_0" / "cifar_pytorch" / "trial_1", 100, 5.0, target=None)
    trials = read_results([tmp_path])
    resolved = resolve_targets(trials)
    assert resolved["mnist"].value == 0.7
    assert resolved["cifar"] == Target("accuracy", 0.85, 4883, 3600.0)
    given = {"mnist": Target("accuracy", 0.99), "cifar": Target("accuracy", 0.2)}
    assert resolve_targets(trials, given) == given
    with pytest.raises(ValueError, match="no target for workload 'cifar'"):
        resolve_targets(trials, {"mnist": Target("accuracy", 0.99)})


def test_runs_against_different_targets_do_not_compare(tmp_path: Path) -> None:
    for study, target in (("study_0", 0.9), ("study_1", 0.8)):
        folder = tmp_path / "a" / study / "mnist_pytorch" / "trial_1"
        write_reaching(folder, 100, 5.0, target=target)
    with pytest.raises(ValueError, match=r"different targets.*--targets FILE"):
        resolve_targets(read_results([tmp_path]))


def test_runs_with_other_budgets_have_the_same_target(tmp_path: Path) -> None:
    for study, budget in (("study_0", 100.0), ("study_1", 50.0)):
        folder = tmp_path / "a" / study / "mnist_pytorch" / "trial_1"
        write_reaching(folder, 100, 5.0, max_seconds=budget)
    assert resolve_targets(read_results([tmp_path]))["mnist"].value == 0.9


def test_an_unknown_workload_without_a_recorded_target_is_refused(tmp_path: Path) -> None:
    write_reaching(tmp_path / "a" / "study_0" / "novel_pytorch" / "trial_1", 100, 5.0, target=None)
    with pytest.raises(ValueError, match="'novel' record no target"):
        resolve_targets(read_results([tmp_path]))


def test_step_times_are_means_between_evaluations_or_each_step(tmp_path: Path) -> None:
    from workloads_smoke.scoring.step_times import step_times, times_every_step

    folder = tmp_path / "s" / "study_0" / "mnist_pytorch" / "trial_1"
    write_trial(folder, [1, 11, 31], [5.0, 6.0, 10.0], [0.1, 0.2, 0.3])
    (trial,) = read_results([tmp_path])
    seconds, steps = step_times(trial)
    np.testing.assert_allclose(seconds, [0.1, 0.2])
    np.testing.assert_array_equal(steps, [10, 20])
    assert not times_every_step(trial)
    # A resumed run of the official harness may evaluate at the same step again.
    again = write_trial(tmp_path / "s/study_1/mnist_pytorch/trial_1", [1, 11, 11], [5.0, 6.0, 6.5],
                        [0.1, 0.2, 0.2])  # fmt: skip
    (resumed,) = (trial for trial in read_results([tmp_path]) if trial.folder == again)
    np.testing.assert_array_equal(step_times(resumed), [[0.1], [10]])
    (folder / "step_times.csv").write_text("global_step,seconds\n1,9.0\n2,0.5\n3,0.25\n")
    seconds, steps = step_times(trial)
    np.testing.assert_array_equal(seconds, [0.5, 0.25])
    np.testing.assert_array_equal(steps, [1, 1])
    assert times_every_step(trial)
