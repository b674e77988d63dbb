"""Every bad hyperparameter is refused by name, and the setting is fitted to the run."""

import collections
import dataclasses
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from submission.hyperparameters import SELF_TUNING, Hyperparameters
from submission.pace import (
    AVERAGE_WINDOW,
    LONG_RUN,
    REFRESHES_PER_RUN,
    SELF_TUNING_BUDGET,
    SHORTEST_AVERAGE_WINDOW,
    pace,
)

TUNING_SEARCH_SPACE = Path(__file__).parents[1] / "tuning_search_space.json"
GOOD: dict[str, Any] = dataclasses.asdict(SELF_TUNING)


def error_of(values: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as caught:
        Hyperparameters.from_namespace(SimpleNamespace(**values))
    return str(caught.value)


def test_none_is_the_built_in_setting() -> None:
    assert Hyperparameters.from_namespace(None) is SELF_TUNING


def test_reads_what_a_harness_may_hand_over() -> None:
    named = collections.namedtuple("Hyperparameters", list(GOOD))(**GOOD)
    for namespace in (named, SimpleNamespace(**GOOD), dict(GOOD), SELF_TUNING):
        assert Hyperparameters.from_namespace(namespace) == SELF_TUNING


def test_refuses_what_is_no_namespace() -> None:
    with pytest.raises(TypeError, match="a mapping or None, got int"):
        Hyperparameters.from_namespace(3)


def test_names_what_is_missing_and_what_is_unknown() -> None:
    values = {name: value for name, value in GOOD.items() if name != "weight_decay"}
    message = error_of(values | {"weight_dekay": 0.1})
    assert "missing: weight_decay; unknown: weight_dekay." in message
    assert ", ".join(GOOD) in message


def test_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        SELF_TUNING.learning_rate = 1.0  # type: ignore[misc]


@pytest.mark.parametrize(
    ("name", "value", "allowed"),
    [
        ("learning_rate", -0.1, "must be a number in (0, inf)"),
        ("learning_rate", 0.0, "must be a number in (0, inf)"),
        ("learning_rate", math.nan, "must be a number in (0, inf)"),
        ("learning_rate", math.inf, "must be a number in (0, inf)"),
        ("learning_rate", "0.1", "must be a number in (0, inf)"),
        ("learning_rate", True, "must be a number in (0, inf)"),
        ("one_minus_beta1", 0.0, "must be a number in (0, 1]"),
        ("one_minus_beta2", 1.1, "must be a number in (0, 1]"),
        ("max_block_size", 0, "must be a whole number in [1, 1.04858e+06]"),
        ("max_block_size", 10.5, "must be a whole number in [1, 1.04858e+06]"),
        ("warmup_factor", 1.0, "must be a number in [0, 1)"),
        ("dropout_rate", 1.0, "must be a number in [0, 1) or null"),
        ("grad_clip", 0.0, "must be a number in (0, inf) or null"),
        ("label_smoothing", None, "must be a number in [0, 1)"),
        ("nesterov", 1, "must be true or false"),
        ("preconditioner", "adam", "must be one of shampoo, eigenvalue_corrected, spectral"),
        ("schedule", "step", "must be one of cosine, linear, trapezoid, constant"),
    ],
)
def test_refuses_values_by_name(name: str, value: Any, allowed: str) -> None:
    assert error_of(GOOD | {name: value}) == f"hyperparameter {name} = {value!r}: {allowed}"


def test_momentum_and_averaging_exclude_each_other() -> None:
    message = error_of(GOOD | {"momentum": 0.5, "averaging": "primal"})
    assert message == (
        "hyperparameter momentum = 0.5: must be 0 where averaging is not 'none', "
        "got averaging = 'primal'"
    )


@pytest.mark.parametrize("name", ["dropout_rate", "grad_clip", "inverse_exponent"])
def test_null_is_allowed_where_it_means_something(name: str) -> None:
    assert getattr(Hyperparameters.from_namespace(GOOD | {name: None}), name) is None


def test_the_tuning_space_has_five_different_good_points() -> None:
    points = json.loads(TUNING_SEARCH_SPACE.read_text())
    settings = [Hyperparameters.from_namespace(point) for point in points]
    assert len(settings) == len(set(settings)) == 5
    methods = {setting.preconditioner for setting in settings}
    assert methods == {"shampoo", "eigenvalue_corrected", "spectral"}
    # The harness takes the names of the first point for all.
    assert len({tuple(point) for point in points}) == 1


def test_a_long_run_keeps_the_published_time_scales() -> None:
    setting = dataclasses.replace(SELF_TUNING, step_hint_factor=0.5, warmup_factor=0.1)
    fitted = pace(setting, step_hint=196_000)
    assert fitted.refresh_interval == setting.refresh_interval
    assert fitted.beta2 == 1.0 - setting.one_minus_beta2
    assert fitted.schedule.total_steps == 98_000
    assert fitted.schedule.warmup_steps == 9_800
    assert fitted.schedule.peak == setting.learning_rate


def test_a_short_run_refreshes_as_often_as_a_long_one() -> None:
    """A fixed interval of 100 means six refreshes in a run of 600 steps."""
    setting = dataclasses.replace(SELF_TUNING, step_hint_factor=1.0)
    assert 600 // pace(setting, step_hint=600).refresh_interval == REFRESHES_PER_RUN
    assert pace(setting, step_hint=30).refresh_interval == 1


def test_a_short_run_takes_larger_steps() -> None:
    setting = dataclasses.replace(SELF_TUNING, step_hint_factor=1.0, learning_rate=0.01)
    assert pace(setting, LONG_RUN // 4).schedule.peak == pytest.approx(0.02)
    assert pace(setting, LONG_RUN // 100).schedule.peak == pytest.approx(0.1)


@pytest.mark.parametrize(
    ("step_hint", "factors", "blocks"),
    [
        (10_666, [1.25, 1.53, 1.02, 1.25, 1.25], [1024, 512, 1024, 1024, 16_384]),
        (18_094, [1.0, 1.18, 1.0, 1.0, 1.0], [1024, 1024, 1024, 1024, 16_384]),
        (25_000, [1.0] * 5, [1024, 1024, 1024, 1024, 16_384]),
        (11_112, [1.22, 1.5, 1.0, 1.22, 1.22], [1024, 512, 1024, 1024, 16_384]),
    ],
)
def test_the_length_of_a_run_is_that_of_its_schedule(
    step_hint: int, factors: list[float], blocks: list[int]
) -> None:
    """The figures in the README and in the module's own text."""
    points = json.loads(TUNING_SEARCH_SPACE.read_text())
    settings = [Hyperparameters.from_namespace(point) for point in points]
    fitted = [pace(setting, step_hint) for setting in settings]
    peaks = [
        one.schedule.peak / setting.learning_rate
        for one, setting in zip(fitted, settings, strict=True)
    ]
    assert peaks == pytest.approx(factors, abs=0.006)
    assert [one.max_block_size for one in fitted] == blocks


def test_averages_forget_within_a_hundredth_of_the_run() -> None:
    for step_hint in (600, 2_600, 10_000, 200_000):
        fitted = pace(dataclasses.replace(SELF_TUNING, step_hint_factor=1.0), step_hint)
        window = fitted.average_interval / (1.0 - fitted.average_decay)
        assert window == pytest.approx(max(SHORTEST_AVERAGE_WINDOW, AVERAGE_WINDOW * step_hint))


@pytest.mark.parametrize("step_hint", [1, 2, 10, 600, 10_666, 200_000])
def test_any_length_gives_a_usable_pace(step_hint: int) -> None:
    fitted = pace(SELF_TUNING, step_hint)
    assert 0.0 <= fitted.beta2 < 1.0
    assert 1 <= fitted.refresh_interval <= SELF_TUNING.refresh_interval
    assert fitted.schedule(1) > 0.0


def test_no_run_at_all_is_refused() -> None:
    with pytest.raises(ValueError, match="step_hint must be at least 1, got 0"):
        pace(SELF_TUNING, 0)


def test_short_runs_cut_smaller_blocks_and_long_runs_the_largest_asked_for() -> None:
    setting = dataclasses.replace(SELF_TUNING, max_block_size=1024, step_hint_factor=1.0)
    assert pace(setting, 20).max_block_size == 128
    assert pace(setting, 600).max_block_size == 128
    assert pace(setting, LONG_RUN // 5).max_block_size == 256
    assert pace(setting, LONG_RUN // 2).max_block_size == 512
    assert pace(setting, LONG_RUN).max_block_size == 1024
    assert pace(dataclasses.replace(setting, max_block_size=100), 600).max_block_size == 100


def test_a_short_schedule_leaves_time_for_a_second_course() -> None:
    setting = dataclasses.replace(SELF_TUNING, step_hint_factor=0.6)
    assert pace(setting, 1000).schedule.second_end == 1000
    assert pace(setting, 1000, SELF_TUNING_BUDGET).schedule.second_end == 1500
    setting = dataclasses.replace(SELF_TUNING, step_hint_factor=0.9)
    assert pace(setting, 1000).schedule.second_end is None
    assert pace(setting, 1000, SELF_TUNING_BUDGET).schedule.second_end == 1500
    assert pace(setting, 1).schedule.second_end is None
