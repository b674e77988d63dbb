"""The learning-rate schedules: exact numbers, and properties for every shape and length."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from submission.schedule import TRAPEZOID_DECAY_SHARE, Schedule

SHAPES = ("cosine", "linear", "trapezoid", "constant")


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    total = draw(st.integers(1, 5000))
    return Schedule(
        shape=draw(st.sampled_from(SHAPES)),
        peak=draw(st.floats(1e-6, 10.0)),
        total_steps=total,
        warmup_steps=draw(st.integers(0, total - 1)),
        floor=draw(st.floats(0.0, 1.0)),
    )


def test_cosine_with_warm_up_by_hand() -> None:
    schedule = Schedule(shape="cosine", peak=2.0, total_steps=12, warmup_steps=4, floor=0.0)
    assert [schedule(step) for step in range(1, 5)] == [0.5, 1.0, 1.5, 2.0]
    assert schedule(6) == pytest.approx(1.0 + math.cos(math.pi / 4))
    assert schedule(8) == pytest.approx(1.0)
    assert schedule(12) == pytest.approx(0.0, abs=1e-15)


def test_linear_by_hand() -> None:
    schedule = Schedule(shape="linear", peak=1.0, total_steps=10, floor=0.2)
    assert schedule(5) == pytest.approx(0.2 + 0.8 * 0.5)
    assert schedule(10) == pytest.approx(0.2)


def test_trapezoid_stays_up_then_goes_down() -> None:
    schedule = Schedule(shape="trapezoid", peak=1.0, total_steps=1000, floor=0.0)
    flat_until = round(1000 * (1 - TRAPEZOID_DECAY_SHARE))
    assert {schedule(step) for step in range(1, flat_until + 1)} == {1.0}
    assert schedule(flat_until + 1) < 1.0
    assert schedule(1000) == pytest.approx(0.0)


def test_constant_stays_at_the_peak() -> None:
    schedule = Schedule(shape="constant", peak=0.3, total_steps=7, warmup_steps=2)
    assert [schedule(step) for step in (2, 3, 7, 700)] == [0.3] * 4


@given(schedules())
def test_rises_to_the_peak_then_never_rises_again(schedule: Schedule) -> None:
    rates = [schedule(step) for step in range(1, schedule.total_steps + 20)]
    warm, rest = rates[: schedule.warmup_steps], rates[schedule.warmup_steps :]
    assert all(earlier < later for earlier, later in itertools.pairwise(warm))
    assert all(earlier >= later for earlier, later in itertools.pairwise(rest))
    assert all(0.0 <= rate <= schedule.peak * (1 + 1e-12) for rate in rates)
    if warm:
        assert warm[-1] == schedule.peak


@given(schedules())
def test_stands_at_its_floor_after_the_end(schedule: Schedule) -> None:
    """Torch's CosineAnnealingLR climbs again there, which undid runs longer than their hint."""
    last = schedule(schedule.total_steps)
    assert schedule(10 * schedule.total_steps + 7) == last
    if schedule.shape != "constant":
        assert last == pytest.approx(schedule.floor * schedule.peak)


@given(schedules(), st.integers(1, 6000))
def test_is_a_pure_function(schedule: Schedule, step: int) -> None:
    assert schedule(step) == schedule(step)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"shape": "step"}, "shape must be one of cosine, linear, trapezoid, constant, got 'step'"),
        ({"peak": 0.0}, "peak must be a positive number, got 0.0"),
        ({"peak": math.nan}, "peak must be a positive number, got nan"),
        ({"total_steps": 0}, "total_steps must be at least 1, got 0"),
        ({"warmup_steps": 10}, "warmup_steps must be in [0, total_steps = 10), got 10"),
        ({"warmup_steps": -1}, "warmup_steps must be in [0, total_steps = 10), got -1"),
        ({"floor": 1.5}, "floor must be in [0, 1], got 1.5"),
    ],
)
def test_refuses(change: dict[str, object], message: str) -> None:
    arguments: dict[str, object] = {"shape": "cosine", "peak": 1.0, "total_steps": 10}
    with pytest.raises(ValueError) as caught:
        Schedule(**(arguments | change))  # type: ignore[arg-type]
    assert str(caught.value) == message


def test_refuses_step_zero() -> None:
    with pytest.raises(ValueError, match="step counts from 1, got 0"):
        Schedule(shape="cosine", peak=1.0, total_steps=10)(0)


def test_a_run_that_outlives_its_schedule_has_a_second_course() -> None:
    first = Schedule(shape="cosine", peak=2.0, total_steps=100, warmup_steps=10)
    both = Schedule(shape="cosine", peak=2.0, total_steps=100, warmup_steps=10, second_end=300)
    assert [both(step) for step in range(1, 101)] == [first(step) for step in range(1, 101)]
    stretched = Schedule(shape="cosine", peak=2.0, total_steps=200, warmup_steps=20)
    assert [both(100 + step) for step in range(1, 300)] == [
        stretched(step) for step in range(1, 300)
    ]


def test_a_second_course_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ValueError, match="second_end must be above total_steps = 100, got 100"):
        Schedule(shape="linear", peak=1.0, total_steps=100, second_end=100)


@given(st.sampled_from(SHAPES), st.integers(1, 300), st.integers(1, 300), st.floats(0, 0.99))
def test_every_step_of_both_courses_has_a_rate(
    shape: str, total: int, further: int, warmup: float
) -> None:
    steps = total + further
    schedule = Schedule(
        shape=shape,
        peak=1.0,
        total_steps=total,
        warmup_steps=min(round(total * warmup), total - 1),
        second_end=steps,
    )
    assert all(0.0 < schedule(step) <= 1.0 + 1e-12 for step in range(1, steps + 10))
