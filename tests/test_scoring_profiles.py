"""Performance profiles, scores and speed-ups, against plain definitions and exact integrals."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from workloads_smoke.scoring.profiles import (
    algoperf_scores,
    geometric_means,
    performance_profiles,
    performance_ratios,
    speedups,
    within_budget,
)

INF = float("inf")


def table(**rows: list[float]) -> pd.DataFrame:
    width = len(next(iter(rows.values())))
    return pd.DataFrame(rows, index=[f"w{i}" for i in range(width)]).T


@st.composite
def tables(draw: st.DrawFn) -> pd.DataFrame:
    time = st.one_of(st.floats(0.5, 100.0), st.just(INF))
    num_workloads = draw(st.integers(1, 5))
    row = st.lists(time, min_size=num_workloads, max_size=num_workloads)
    return table(**{f"s{i}": draw(row) for i in range(draw(st.integers(1, 4)))})


def exact_score(ratios: np.ndarray, r_max: float) -> float:
    """Mean over workloads of the profile's exact area."""
    return float(np.mean([max(0.0, r_max - r) / (r_max - 1) for r in ratios]))


def test_ratios_cut_off_at_r_max_and_survive_a_workload_that_nobody_reached() -> None:
    times = table(a=[1.0, 8.0, INF, 4.0], b=[2.0, 2.0, INF, math.nan])
    expected = table(a=[1.0, 4.0, INF, 1.0], b=[2.0, 1.0, INF, INF])
    pd.testing.assert_frame_equal(performance_ratios(times), expected)
    assert performance_ratios(times, r_max=3.9).loc["a", "w1"] == INF


def test_profile_counts_workloads_within_tau() -> None:
    times = table(a=[1.0, 3.0], b=[2.0, 1.0])
    profiles = performance_profiles(times, r_max=4.0, num_points=4)  # tau = 1, 2, 3, 4
    assert list(profiles.columns) == [1.0, 2.0, 3.0, 4.0]
    assert list(profiles.loc["a"]) == [0.5, 0.5, 1.0, 1.0]
    assert list(profiles.loc["b"]) == [0.5, 1.0, 1.0, 1.0]


def test_scores_of_extremes() -> None:
    scores = algoperf_scores(performance_profiles(table(best=[1.0, 1.0], never=[INF, 4.1])))
    assert scores["best"] == pytest.approx(1.0)
    assert scores["never"] == 0.0


def test_score_follows_the_official_sampling_rather_than_the_exact_integral() -> None:
    # One workload at ratio 2: the first of the 100 points at or above 2 is 1 + 33 * 3 / 99 = 2.
    score = algoperf_scores(performance_profiles(table(a=[1.0], b=[2.0])))["b"]
    assert score == pytest.approx((66 + 0.5) / 99, abs=1e-12)
    assert exact_score(np.array([2.0]), 4.0) == pytest.approx(66 / 99)


@given(tables(), st.floats(1.5, 10.0))
def test_sampled_score_is_close_to_the_exact_integral(times: pd.DataFrame, r_max: float) -> None:
    ratios = performance_ratios(times, r_max)
    scores = algoperf_scores(performance_profiles(times, r_max))
    for name in times.index:
        exact = exact_score(ratios.loc[name].to_numpy(), r_max)
        assert abs(scores[name] - exact) <= 0.5 / 99 + 1e-9


@given(tables(), st.floats(0.01, 100.0))
def test_scores_ignore_the_unit_of_time_and_the_order_of_submissions(
    times: pd.DataFrame, scale: float
) -> None:
    # Powers of two scale without rounding, so that no ratio crosses a sampling point.
    power = 2.0 ** round(math.log2(scale))
    expected = algoperf_scores(performance_profiles(times))
    scaled = algoperf_scores(performance_profiles(times * power))
    pd.testing.assert_series_equal(scaled, expected)
    reversed_scores = algoperf_scores(performance_profiles(times.iloc[::-1]))
    pd.testing.assert_series_equal(reversed_scores.loc[expected.index], expected)


@given(tables())
def test_profiles_rise_and_the_fastest_start_them(times: pd.DataFrame) -> None:
    profiles = performance_profiles(times).to_numpy()
    assert ((profiles >= 0) & (profiles <= 1)).all()
    assert (np.diff(profiles, axis=1) >= 0).all()
    reachable = np.isfinite(times.to_numpy()).any(axis=0).mean()
    assert profiles[:, 0].sum() >= reachable - 1e-12


@given(tables())
def test_a_faster_submission_never_scores_less(times: pd.DataFrame) -> None:
    before = algoperf_scores(performance_profiles(times))
    faster = times.copy()
    faster.iloc[0] = faster.iloc[0] * 0.5
    after = algoperf_scores(performance_profiles(faster))
    assert after.iloc[0] >= before.iloc[0] - 1e-12
    assert (after.iloc[1:] <= before.iloc[1:] + 1e-12).all()


def test_speedups_and_geometric_means_leave_misses_out() -> None:
    times = table(ours=[2.0, 5.0, INF, 1.0], base=[4.0, 40.0, 3.0, INF])
    ratios = speedups(times, "base")
    np.testing.assert_array_equal(ratios.loc["ours"], [2.0, 8.0, math.nan, math.nan])
    means = geometric_means(ratios)
    assert means["ours"] == pytest.approx(4.0)
    assert means["base"] == pytest.approx(1.0)
    with pytest.raises(ValueError, match=r"reference 'other' is not a submission.*ours, base"):
        speedups(times, "other")


def test_misses_count_as_the_budget_and_a_second() -> None:
    times = table(ours=[2.0, INF], base=[4.0, 3.0])
    filled = within_budget(times, {"w0": 100.0, "w1": 200.0})
    np.testing.assert_array_equal(filled.to_numpy(), [[2.0, 201.0], [4.0, 3.0]])


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="r_max > 1 is needed, got r_max=1"):
        performance_ratios(table(a=[1.0]), r_max=1)
    with pytest.raises(ValueError, match="at least one workload"):
        performance_profiles(pd.DataFrame(index=["a"]))
