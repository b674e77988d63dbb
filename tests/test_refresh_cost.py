"""The refresh interval follows the measured cost: coarsely, once, and the same after a resume."""

import logging
import math
import random

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from toy_workload import Run, assert_equal, namespace

from shampoo_core.refresh import FactorStackSize
from submission import refresh_cost
from submission.pace import REFRESHES_PER_RUN
from submission.refresh_cost import (
    CYCLES,
    IDLE_STEPS,
    SHARE,
    WARM_UP_STEPS,
    MeasuredRefresh,
    RefreshCost,
    chosen_interval,
    interval_bounds,
)

CPU = torch.device("cpu")
# Large enough that a staggered refresh takes them one by one.
SIZES = (FactorStackSize(5, 600), FactorStackSize(2, 800))
seconds = st.floats(0.0, 1e3)
intervals = st.integers(1, 400)
lengths = st.integers(1, 200_000)


class Clock:
    """Time that passes only where a simulated step says so."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(refresh_cost.time, "perf_counter", lambda: self.now)

    def run(self, cost: RefreshCost, steps: range, forward: float, share: float) -> list[int]:
        """Take steps; `share` is the time of a step's part of the refresh. Returns idle steps."""
        idle = []
        for step in steps:
            cost.begin(step)
            self.now += forward
            cost.begin_update(step)
            has_work = bool(cost.policy.due(step, SIZES))
            self.now += 0.1 + (share if has_work else 0.0)
            cost.end(step)
            if cost.policy.is_idle:
                idle.append(step)
        return idle


@given(intervals, lengths, seconds, st.floats(1e-3, 1e3))
def test_the_choice_is_a_power_of_two_away_and_within_bounds(
    interval: int, length: int, refresh: float, step: float
) -> None:
    low, high = bounds = interval_bounds(interval, length)
    assert 1 <= low <= interval <= high
    chosen = chosen_interval(interval, bounds, refresh, step)
    assert low <= chosen <= high
    if chosen not in bounds:
        doublings = math.log2(chosen / interval)
        assert abs(chosen - interval * 2 ** round(doublings)) <= 0.5
    if 0.5 * interval < refresh / (SHARE * step) < 2.0 * interval:
        assert chosen == interval, "no change within a factor of two"


@given(intervals, lengths, seconds, seconds, st.floats(1e-3, 1e3))
def test_a_dearer_refresh_is_never_made_more_often(
    interval: int, length: int, cheap: float, more: float, step: float
) -> None:
    bounds = interval_bounds(interval, length)
    first, second = (chosen_interval(interval, bounds, c, step) for c in (cheap, cheap + more))
    assert first <= second


@given(intervals, lengths)
def test_a_run_keeps_its_number_of_refreshes(interval: int, length: int) -> None:
    _, high = interval_bounds(interval, length)
    assert high == interval or length / high >= REFRESHES_PER_RUN


@pytest.mark.parametrize(("before", "after"), [(4, 8), (4, 2), (1, 4), (7, 7)])
def test_every_factor_is_due_once_an_interval_after_a_change(before: int, after: int) -> None:
    policy = MeasuredRefresh(before)
    start = policy.settled_step + 3
    policy.change(after, start)
    for begin in range(start, start + 2 * after):
        due = [s for step in range(begin, begin + after) for s in policy.due(step, SIZES)]
        counts = [sum(s.stop - s.start for s in due if s.stack == stack) for stack in range(2)]
        assert counts == [5, 2]


def test_a_change_must_leave_the_first_round_whole() -> None:
    policy = MeasuredRefresh(10)
    with pytest.raises(ValueError, match="start must be above 10, got 10"):
        policy.change(5, 10)


@pytest.mark.parametrize(
    # Seven factors, so that seven of the eight steps of a round have a share of the work.
    ("share", "expected"),
    [(0.0, 2), (0.03, 4), (0.1, 8), (0.12, 8), (0.3, 16), (5.0, 32)],
)
def test_the_interval_fits_the_clock(
    monkeypatch: pytest.MonkeyPatch, share: float, expected: int
) -> None:
    cost = RefreshCost(8, 10_000, CPU)
    idle = Clock(monkeypatch).run(cost, range(1, 60), forward=0.9, share=share)
    assert cost.policy.interval == expected
    # Whole rounds behind the first steps, some steps without, and the next begins another interval.
    first = WARM_UP_STEPS + 1 + CYCLES * 8
    assert idle == list(range(first, first + IDLE_STEPS))
    assert not cost.policy.is_idle
    changed = cost.policy.plan.first_step
    assert changed == (first + IDLE_STEPS if expected != 8 else 1)


def test_a_slow_step_now_and_then_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """The quickest of the measured times counts."""
    clock, cost = Clock(monkeypatch), RefreshCost(8, 10_000, CPU)
    for step in range(1, 60):
        forward = 30.0 if step in (12, 20, 28) else 0.9
        clock.run(cost, range(step, step + 1), forward, share=5.0 if step == 14 else 0.1)
    assert cost.policy.interval == 8


def test_what_the_first_steps_take_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    """They allocate and compile; both rounds of so short an interval would lie among them."""
    clock, cost = Clock(monkeypatch), RefreshCost(2, 10_000, CPU)
    for step in range(1, 60):
        clock.run(cost, range(step, step + 1), 0.9, share=50.0 if step <= WARM_UP_STEPS else 0.1)
    assert WARM_UP_STEPS >= 10
    assert cost.policy.interval == 2


def test_noise_of_steps_without_work_does_not_add_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven of fifty steps refresh a factor; that of the others would otherwise count fifty times."""
    clock, cost = Clock(monkeypatch), RefreshCost(50, 50_000, CPU)
    generator = random.Random(1)
    for step in range(1, 200):
        cost.begin(step)
        clock.now += 0.9
        cost.begin_update(step)
        has_work = bool(cost.policy.due(step, SIZES))
        clock.now += 0.1 + (0.7 if has_work else 0.0) + generator.uniform(0.0, 0.4)
        cost.end(step)
    assert cost.policy.interval == 50


def test_it_is_decided_once_and_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    clock, cost = Clock(monkeypatch), RefreshCost(8, 10_000, CPU)
    with caplog.at_level(logging.INFO, logger="absl"):
        clock.run(cost, range(1, 60), forward=0.9, share=0.3)
        clock.run(cost, range(60, 300), forward=0.9, share=50.0)
    assert cost.policy.interval == 16
    assert [record.getMessage() for record in caplog.records] == [
        "A refresh takes 2.1 s, a step without 1 s: every 16 steps (setting: 8)."
    ]


@pytest.mark.parametrize("cut", [5, 15, 25, 31, 33, 50])
def test_a_resumed_run_decides_alike(monkeypatch: pytest.MonkeyPatch, cut: int) -> None:
    """Wherever it is cut: before, while and after it measures."""
    clock, whole = Clock(monkeypatch), RefreshCost(8, 10_000, CPU)
    clock.run(whole, range(1, 80), forward=0.9, share=0.3)
    first, second = RefreshCost(8, 10_000, CPU), RefreshCost(8, 10_000, CPU)
    idle = clock.run(first, range(1, cut), forward=0.9, share=0.3)
    second.load_state_dict(first.state_dict())
    assert second.state_dict() == first.state_dict()
    idle += clock.run(second, range(cut, 80), forward=0.9, share=0.3)
    assert len(idle) == IDLE_STEPS
    for step in range(cut, 140):
        assert second.policy.due(step, SIZES) == whole.policy.due(step, SIZES) or step < 80
    assert second.state_dict()["start"] == whole.state_dict()["start"]
    assert second.policy.interval == whole.policy.interval == 16


@pytest.mark.parametrize(("cut", "expected"), [(5, 4), (15, 4), (19, 4), (20, 8), (50, 16)])
def test_times_of_other_ranks_are_not_taken_over(
    monkeypatch: pytest.MonkeyPatch, cut: int, expected: int
) -> None:
    """A round that is measured whole decides, no round keeps the interval; a decision stays."""
    clock, first = Clock(monkeypatch), RefreshCost(8, 10_000, CPU)
    clock.run(first, range(1, cut), forward=0.9, share=0.3)
    monkeypatch.setattr(refresh_cost, "world_size", lambda: 8)
    monkeypatch.setattr(refresh_cost, "_slowest", lambda seconds, device: list(seconds))
    second, third = RefreshCost(8, 10_000, CPU), RefreshCost(8, 10_000, CPU)
    second.load_state_dict(first.state_dict())
    third.load_state_dict(second.state_dict())  # cut once more, on as many ranks
    for cost in (second, third):
        clock.run(cost, range(cut, 80), forward=0.9, share=0.3)
        assert cost.policy.interval == expected


def test_going_back_to_before_a_decision_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, cost = Clock(monkeypatch), RefreshCost(8, 10_000, CPU)
    clock.run(cost, range(1, 20), forward=0.9, share=0.3)
    before = cost.state_dict()
    clock.run(cost, range(20, 60), forward=0.9, share=0.3)
    assert cost.policy.interval == 16
    cost.load_state_dict(before)
    assert cost.policy.interval == 8
    assert any(cost.policy.due(step, SIZES) for step in range(20, 28))
    clock.run(cost, range(20, 60), forward=0.9, share=0.3)
    assert cost.policy.interval == 16


def test_parameters_that_begin_late_are_due_in_their_own_time() -> None:
    """Their steps are counted from their first gradient: a change of the interval lies ahead of them."""
    policy = MeasuredRefresh(10)
    policy.change(20, start=41)
    sizes = (FactorStackSize(1, 600),)
    due = [step for step in range(1, 100) if policy.due(step, sizes)]
    assert due == [1, 11, 21, 31, 41, 61, 81]


def test_a_checkpoint_of_another_interval_is_refused() -> None:
    state = RefreshCost(8, 10_000, CPU).state_dict()
    with pytest.raises(ValueError, match="made with a refresh interval of 8, this run has 9"):
        RefreshCost(9, 10_000, CPU).load_state_dict(state)


@pytest.mark.parametrize(("interval", "total_steps"), [(1, 18), (50, 200), (1, 1)])
def test_runs_too_short_to_gain_do_not_measure(
    monkeypatch: pytest.MonkeyPatch, interval: int, total_steps: int
) -> None:
    cost = RefreshCost(interval, total_steps, CPU)
    idle = Clock(monkeypatch).run(cost, range(1, total_steps + 1), forward=0.9, share=9.0)
    assert cost.policy.interval == interval
    assert not idle


def test_a_run_measures_decides_and_resumes_bit_for_bit(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the whole submission, with a clock that makes every refresh dear."""
    point = namespace(refresh_interval=2, step_hint_factor=1.0, max_block_size=16)
    ticks = iter(range(10**9))
    monkeypatch.setattr(refresh_cost.time, "perf_counter", lambda: float(next(ticks)))
    # Each phase then takes as long as an idle step: a refresh is free, so it is made more often.
    whole, first, second = (Run(point, step_hint=400) for _ in range(3))
    whole.train(34)
    assert whole.state["refresh_cost"].policy.interval == 1
    first.train(27)
    first.prepare_for_eval()
    second.resume(first.checkpoint())
    assert second.state["refresh_cost"].policy.interval == 1
    second.train(7)
    assert_equal(second.weights(), whole.weights())


def test_what_the_run_chose_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, logger="absl"):
        Run(namespace(step_hint_factor=1.0, refresh_interval=4), step_hint=400)
    (message,) = (record.getMessage() for record in caplog.records)
    assert "over 400 steps, 20 of them warm-up" in message
    assert "Refreshes: every 4 steps" in message
