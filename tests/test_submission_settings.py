"""From a setting to an optimizer: every field arrives where it belongs; README says what the points are."""

from __future__ import annotations

import dataclasses
import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
from toy_workload import Run, namespace

from shampoo_core import (
    AdamConfig,
    EigenvalueCorrectedConfig,
    HeavyBall,
    OrthogonalIterationSolver,
    PrimalAveraging,
    ScheduleFree,
    ShampooConfig,
    SpectralConfig,
    WeightEMA,
)
from submission.construction import route_options
from submission.hyperparameters import SELF_TUNING, Hyperparameters
from submission.pace import SELF_TUNING_BUDGET, pace
from submission.routing import Kind, Route
from submission.schedule import Schedule

WARM = OrthogonalIterationSolver()

ROOT = Path(__file__).parent.parent
POINTS = json.loads((ROOT / "tuning_search_space.json").read_text())
LONG = 50_000


def setting(**changes: Any) -> Hyperparameters:
    return dataclasses.replace(SELF_TUNING, **changes)


def groups(step_hint: int = LONG, **changes: Any) -> list[dict[str, Any]]:
    run = Run(namespace(**changes), step_hint=step_hint)
    found: list[dict[str, Any]] = run.state["optimizer"].param_groups
    return found


def test_the_self_tuning_setting_is_the_first_point() -> None:
    assert dataclasses.asdict(SELF_TUNING) == POINTS[0]


def test_readme_describes_the_points() -> None:
    rows = re.findall(r"^\| (\d) \| (.+?) \| (.+?) \| (.+?) \| (.+?) \|$", _readme(), re.MULTILINE)
    assert [int(row[0]) for row in rows] == [1, 2, 3, 4, 5]
    methods = {
        "eigenvalue_corrected": "eigenvalue-corrected",
        "shampoo": "Shampoo with roots",
        "spectral": "spectral (Muon)",
    }
    for point, (_, method, rate, schedule, rest) in zip(POINTS, rows, strict=True):
        averaged = ", averaged weights" if point["averaging"] == "weight_ema" else ""
        assert method == methods[point["preconditioner"]] + averaged
        assert float(rate.split(",")[0]) == point["learning_rate"]
        assert float(schedule) == point["step_hint_factor"]
        smoothing = re.search(r"label smoothing (\.\d+)", rest)
        assert point["label_smoothing"] == (0.0 if smoothing is None else float(smoothing[1]))
        assert ("no label smoothing" in rest) == (point["label_smoothing"] == 0.0)
        decay = SELF_TUNING.weight_decay
        assert point["weight_decay"] == (2 * decay if "twice the weight decay" in rest else decay)
        embeddings = re.search(r"embeddings\* (\.\d+)", rate)
        factor = 1.0 if embeddings is None else float(embeddings[1]) / point["learning_rate"]
        assert point["embedding_rate_factor"] == pytest.approx(factor)
    assert "embeddings by Adam" in rows[4][4]


def _readme() -> str:
    return (ROOT / "README.md").read_text()


def test_numbers_of_a_setting_are_options_of_the_optimizer() -> None:
    for group in groups(
        one_minus_beta1=0.2, one_minus_beta2=0.03, epsilon=1e-6, weight_decay=0.3, nesterov=True
    ):
        assert group["betas"] == (0.8, 0.97)
        assert group["beta3"] == pytest.approx(0.64)
        assert (group["eps"], group["weight_decay"]) == (1e-6, 0.3)
    assert {group["beta3"] for group in groups(nesterov=False)} == {None}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"preconditioner": "shampoo"}, ShampooConfig()),
        ({"preconditioner": "shampoo", "inverse_exponent": 0.3}, ShampooConfig(exponent=0.3)),
        ({"inverse_exponent": 0.4}, EigenvalueCorrectedConfig(exponent=0.4, solver=WARM)),
        ({}, EigenvalueCorrectedConfig(exponent=0.5, solver=WARM)),
        (
            {"preconditioner": "spectral", "one_minus_beta1": 0.2, "nesterov": False},
            SpectralConfig(momentum=0.8, nesterov=False),
        ),
    ],
)
def test_matrices_are_stepped_by_the_method(changes: dict[str, Any], expected: Any) -> None:
    methods = [group["preconditioner"] for group in groups(**changes)]
    assert methods[0] == expected
    assert all(method in (expected, AdamConfig()) for method in methods)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"averaging": "none"}, None),
        ({"averaging": "schedule_free"}, ScheduleFree()),
        ({"averaging": "primal"}, PrimalAveraging()),
        # A window of one per cent of 30,000 steps.
        ({"averaging": "weight_ema"}, WeightEMA(decay=0.9, interval=30)),
        (
            {"averaging": "none", "momentum": 0.7},
            HeavyBall(momentum=0.7, dampening=0.7, nesterov=True),
        ),
    ],
)
def test_weights_are_averaged_as_the_setting_says(changes: dict[str, Any], expected: Any) -> None:
    averaging = groups(**changes)[0]["averaging"]
    if isinstance(expected, WeightEMA):
        assert averaging.interval == expected.interval
        assert averaging.decay == pytest.approx(expected.decay)
    else:
        assert averaging == expected


@pytest.mark.parametrize("averaging", ["weight_ema", "schedule_free"])
def test_a_lookup_table_is_not_averaged(averaging: str) -> None:
    options = route_options(Route(Kind.TABLE), setting(averaging=averaging))
    assert options["preconditioner"] == AdamConfig()
    assert options["target_order"] == 1  # of an elementwise method, which has no use for matrices
    # Schedule-Free is where its steps lead, not a copy beside it.
    assert ("averaging" in options) == (averaging == "weight_ema")
    assert options.get("averaging") is None
    assert "averaging" not in route_options(Route(Kind.MATRIX), setting(averaging=averaging))


def test_a_step_is_timed_from_its_forward_pass_and_an_update_from_its_own_beginning() -> None:
    run = Run(namespace())
    calls: list[str] = []

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            return lambda step: calls.append(f"{name} {step}")

    run.state["refresh_cost"] = Recorder()
    run.model.register_forward_pre_hook(lambda *_: calls.append("forward"))
    run.state["optimizer"].register_step_pre_hook(lambda *_: calls.append("update"))
    run.train(2)
    expected = ["begin {}", "forward", "begin_update {}", "update", "end {}"]
    assert calls == [call.format(step) for step in (1, 2) for call in expected]


def test_time_scales_of_short_and_long_runs() -> None:
    long, short = pace(SELF_TUNING, LONG), pace(SELF_TUNING, 500)
    assert (long.beta2, long.average_interval) == (pytest.approx(0.995), 30)
    # A run of 300 steps forgets within 15 of them, and averages over twenty.
    assert (short.beta2, short.average_interval) == (pytest.approx(1 - 20 / 300), 2)
    assert (short.beta1, short.average_decay) == (0.9, pytest.approx(0.9))
    assert short.schedule.total_steps == 300
    assert short.schedule.warmup_steps == 15
    assert (short.schedule.second_end, pace(SELF_TUNING, 500, 1.5).schedule.second_end) == (
        500,
        750,
    )


@pytest.mark.parametrize(("factor", "second_end"), [(0.78, 1000), (0.8, 1000), (0.81, None)])
def test_a_second_course_takes_a_quarter_of_the_first(
    factor: float, second_end: int | None
) -> None:
    assert pace(setting(step_hint_factor=factor), 1000).schedule.second_end == second_end


@pytest.mark.parametrize("step_hint", [1, 2, 10])
def test_a_warm_up_leaves_a_step(step_hint: int) -> None:
    """Where nearly all of so short a run rounds to all of it."""
    long = setting(warmup_factor=0.99, step_hint_factor=1.0)
    assert pace(long, step_hint).schedule.warmup_steps == step_hint - 1


def test_shapes_of_schedules() -> None:
    cosine = Schedule(shape="cosine", peak=1.0, total_steps=100)
    assert cosine(100) == pytest.approx(0.01)
    trapezoid = Schedule(shape="trapezoid", peak=1.0, total_steps=100, floor=0.0)
    assert [trapezoid(step) for step in (69, 85, 100)] == pytest.approx([1.0, 0.5, 0.0])


@pytest.mark.parametrize("self_tuning", [True, False])
def test_the_rate_is_that_of_the_ruleset_budget(self_tuning: bool) -> None:
    """Of step 14 of 12, in the second course, which ends later under self-tuning."""
    run = Run(None if self_tuning else namespace(), step_hint=20)
    run.train(14)
    budget = SELF_TUNING_BUDGET if self_tuning else 1.0
    expected = pace(SELF_TUNING, 20, budget)
    for group in run.state["optimizer"].param_groups:
        factor = group["initial_lr"] / SELF_TUNING.learning_rate
        assert math.isclose(group["lr"], expected.schedule(14) * factor)
    assert expected.schedule(14) != pace(SELF_TUNING, 20, 2.5 - budget).schedule(14)


def test_refreshes_begin_at_the_interval_of_the_run() -> None:
    run = Run(namespace(), step_hint=1000)
    assert (
        run.state["refresh_cost"].policy.interval == pace(SELF_TUNING, 1000).refresh_interval == 24
    )
