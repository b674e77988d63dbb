"""The training loop: order and arguments of its calls, its clock, and when it stops."""

import csv
import itertools
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
from tiny_runner import TinyWorkload

from workloads_smoke import randomness, spec, trial, trial_setup
from workloads_smoke.errors import UserError
from workloads_smoke.outcome import TrialOutcome, outcome_of
from workloads_smoke.progress import TrialProgress
from workloads_smoke.settings import RunSettings, TrialRequest
from workloads_smoke.submissions import Submission
from workloads_smoke.trial_setup import TrialContext

SETTING = namedtuple("Hyperparameters", ["learning_rate"])(0.1)
UPDATE_ARGUMENTS = [
    "workload",
    "current_param_container",
    "current_params_types",
    "model_state",
    "hyperparameters",
    "batch",
    "loss_type",
    "optimizer_state",
    "eval_results",
    "global_step",
    "rng",
]


class Clock:
    """Time passes only when someone says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(trial, "current_time", clock)
    monkeypatch.setattr(trial_setup, "current_time", clock)
    return clock


class Recorder:
    """A submission that does nothing but remember: 0.25 s to select, 1 s a step, 0.5 s to prepare."""

    def __init__(self, clock: Clock, during_update: Callable[[int], None] = lambda step: None):
        self.calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = []
        self.clock = clock
        self.during_update = during_update

    def init_optimizer_state(self, *arguments: Any) -> dict[str, Any]:
        self.calls.append(("init_optimizer_state", arguments, {}))
        return {}

    def data_selection(self, *arguments: Any) -> dict[str, Any]:
        self.calls.append(("data_selection", arguments, {}))
        self.clock.now += 0.25
        return next(arguments[1])

    def update_params(self, **arguments: Any) -> Any:
        self.calls.append(("update_params", (), arguments))
        self.clock.now += 1.0
        self.during_update(arguments["global_step"])
        return _states(arguments)

    def prepare_for_eval(self, **arguments: Any) -> Any:
        self.calls.append(("prepare_for_eval", (), arguments))
        self.clock.now += 0.5
        return _states(arguments)

    def names(self) -> str:
        return "".join(name[0] for name, _, _ in self.calls)


def _states(arguments: dict[str, Any]) -> Any:
    names = ("optimizer_state", "current_param_container", "model_state")
    return tuple(arguments[name] for name in names)


class TimedWorkload(TinyWorkload):
    """Evaluations take 10 s and reach the accuracies they are told to."""

    eval_period_time_sec = 3
    max_allowed_runtime_sec = 1000

    def __init__(self, clock: Clock, validation: list[float], test: list[float]) -> None:
        super().__init__()
        self.clock = clock
        self.accuracies = zip(
            itertools.chain(validation, itertools.repeat(validation[-1])),
            itertools.chain(test, itertools.repeat(test[-1])),
            strict=False,
        )
        self.evaluations: list[tuple[Any, ...]] = []

    def eval_model(self, *arguments: Any) -> dict[str, float]:
        self.evaluations.append(arguments)
        self.clock.now += 10.0
        validation, test = next(self.accuracies)
        return {"validation/accuracy": validation, "test/accuracy": test}


class Case:
    """A trial of a recording submission on a timed workload."""

    def __init__(
        self,
        folder: Path,
        clock: Clock,
        *,
        validation: tuple[float, ...] = (0.0,),
        test: tuple[float, ...] = (0.0,),
        during_update: Callable[[int], None] = lambda step: None,
        wants_train_state: bool = False,
        prepares: bool = True,
        hyperparameters: Any = SETTING,
        **settings: Any,
    ) -> None:
        self.folder = folder
        self.recorder = Recorder(clock, during_update)
        self.workload = TimedWorkload(clock, list(validation), list(test))
        submission = Submission(
            path=Path("entry/submission.py"),
            init_optimizer_state=self.recorder.init_optimizer_state,
            update_params=self.recorder.update_params,
            data_selection=self.recorder.data_selection,
            get_batch_size=lambda name: 16,
            prepare_for_eval=self.recorder.prepare_for_eval if prepares else None,
            get_eval_batch_size=None,
            wants_train_state=wants_train_state,
        )
        self.context = TrialContext(
            TrialRequest("tiny", 1, 1, None, 7, folder, 8, 64),
            RunSettings(Path("entry/submission.py"), **{"save_checkpoints": False, **settings}),
            submission,
            self.workload,
            hyperparameters,
        )

    def run(self) -> TrialOutcome:
        progress = TrialProgress("tiny", 1, "accuracy", 0.99, quiet=True)
        return trial.run_loop(self.context, progress)

    def evals(self) -> list[dict[str, float]]:
        with (self.folder / "eval_measurements.csv").open(newline="") as file:
            return [{k: float(v) for k, v in row.items()} for row in csv.DictReader(file)]


def test_calls_come_in_the_official_order_with_the_official_arguments(
    tmp_path: Path, clock: Clock
) -> None:
    case = Case(tmp_path, clock, max_global_steps=2, eval_every_steps=2, data_dir="data")
    case.run()
    calls, workload = case.recorder.calls, case.workload
    assert [name for name, _, _ in calls] == [
        "init_optimizer_state",
        *("data_selection", "update_params", "prepare_for_eval"),
        *("data_selection", "update_params", "prepare_for_eval"),
    ]
    key = randomness.split(randomness.PRNGKey(7), 2)[0]
    _, optimizer_rng, _, rng = randomness.split(key, 4)
    model = calls[2][2]["current_param_container"]
    assert calls[0][1][:4] == (workload, model, None, SETTING)
    assert calls[0][1][4].tolist() == optimizer_rng.tolist()
    for step in (0, 1):
        select, update, prepare = calls[1 + 3 * step : 4 + 3 * step]
        keys = randomness.split(randomness.fold_in(rng, step), 4)
        queue = select[1][1]
        assert select[1][:-1] == (workload, queue, {}, model, None, SETTING, step)
        assert select[1][-1].tolist() == keys[0].tolist()
        assert list(update[2]) and set(update[2]) == set(UPDATE_ARGUMENTS)
        assert update[2]["global_step"] == step
        assert update[2]["rng"].tolist() == keys[1].tolist()
        assert update[2]["batch"]["inputs"].shape == (8, 6)
        assert set(prepare[2]) == set(UPDATE_ARGUMENTS) - {"batch"}
        assert prepare[2]["global_step"] == step + 1, "steps taken, not the index of the step"
        assert prepare[2]["rng"].tolist() == keys[2].tolist()
        arguments = workload.evaluations[step]
        assert arguments[:3] == (64, model, None)
        assert arguments[3].tolist() == keys[3].tolist()
        assert arguments[4:] == ("data", None, step + 1)


def test_self_tuning_has_no_hyperparameters_another_key_and_half_the_budget_more(
    tmp_path: Path, clock: Clock
) -> None:
    case = Case(tmp_path, clock, hyperparameters=None, tuning_ruleset="self", eval_every_steps=1)
    case.workload.max_allowed_runtime_sec = 10  # type: ignore[misc]
    outcome = case.run()
    assert case.recorder.calls[0][1][3] is None
    optimizer_rng = randomness.split(randomness.PRNGKey(7), 4)[1]
    assert case.recorder.calls[0][1][4].tolist() == optimizer_rng.tolist()
    assert outcome.stopped_by == "time budget used up"
    # A step with its preparation takes 1.75 s: 8 end at 14 s, 9 at 15.75 s, beyond 1.5 * 10 s.
    assert (outcome.global_step, outcome.submission_time) == (9, 15.75)
    assert len(case.evals()) == 8, "no evaluation after the budget is used up"


def test_the_clock_stands_still_during_evaluation(tmp_path: Path, clock: Clock) -> None:
    case = Case(tmp_path, clock, max_global_steps=4, eval_every_steps=2)
    outcome = case.run()
    evals = case.evals()
    assert [row["global_step"] for row in evals] == [1, 2, 4]
    assert [row["score"] for row in evals] == [1.75, 3.5, 6.5]
    assert [row["accumulated_submission_time"] for row in evals] == [1.75, 3.5, 6.5]
    assert [row["accumulated_eval_time"] for row in evals] == [10, 20, 30]
    assert [row["total_duration"] for row in evals] == [11.75, 23.5, 36.5]
    assert outcome.submission_time == 6.5
    with (tmp_path / "step_times.csv").open() as file:
        assert file.read().split() == [
            "global_step,seconds",
            *(f"{step},1.25" for step in range(1, 5)),
        ]


def test_evaluations_come_after_the_first_step_and_then_every_period(
    tmp_path: Path, clock: Clock
) -> None:
    """A period of 3 s, steps of 1.25 s: evaluations after step 1 and then after every third step."""
    case = Case(tmp_path, clock, max_global_steps=9, prepares=False)
    case.run()
    assert [row["global_step"] for row in case.evals()] == [1, 4, 7, 9]


def test_an_evaluation_is_due_when_the_period_is_over(tmp_path: Path, clock: Clock) -> None:
    """To the moment: 2.5 s are two steps, not three."""
    case = Case(tmp_path, clock, max_global_steps=8, prepares=False)
    case.workload.eval_period_time_sec = 2.5  # type: ignore[misc]
    case.run()
    assert [row["global_step"] for row in case.evals()] == [1, 3, 5, 7, 8]


def test_a_resumed_trial_does_not_evaluate_at_once(tmp_path: Path, clock: Clock) -> None:
    """The time in which it was not run is no part of the period."""
    options = {"prepares": False, "save_checkpoints": True}
    Case(tmp_path, clock, max_global_steps=2, **options).run()
    clock.now += 500.0
    resumed = Case(tmp_path, clock, max_global_steps=9, **options)
    resumed.run()
    assert [row["global_step"] for row in resumed.evals()] == [1, 2, 5, 8, 9]


def test_time_to_log_is_counted_apart(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    def slow(self: TrialProgress, *arguments: Any) -> None:
        clock.now += 2.0

    monkeypatch.setattr(TrialProgress, "evaluation", slow)
    case = Case(tmp_path, clock, max_global_steps=3, eval_every_steps=1, prepares=False)
    outcome = case.run()
    assert [row["accumulated_logging_time"] for row in case.evals()] == [0.0, 2.0, 4.0]
    assert outcome.submission_time == 3 * 1.25


def test_both_targets_must_be_reached_though_not_at_once(tmp_path: Path, clock: Clock) -> None:
    accuracies = {"validation": (0.5, 1.0, 0.5), "test": (0.5, 0.5, 1.0)}
    case = Case(tmp_path, clock, eval_every_steps=1, **accuracies)
    outcome = case.run()
    assert outcome == TrialOutcome("targets reached", 3, 5.25, 1.0, 2, 3.5)
    line = outcome.summary(case.workload)
    assert line == "validation/accuracy passed 0.99 at step 2 after 3.5 s"


def test_a_submission_may_end_training_and_gets_a_last_evaluation(
    tmp_path: Path, clock: Clock
) -> None:
    def give_up(step: int) -> None:
        if step == 4:
            raise spec.TrainingCompleteError

    case = Case(tmp_path, clock, during_update=give_up, eval_every_steps=100)
    outcome = case.run()
    assert (outcome.stopped_by, outcome.global_step) == ("submission ended training", 5)
    assert [row["global_step"] for row in case.evals()] == [1, 5]
    assert "target not reached: best validation/accuracy 0," in outcome.summary(case.workload)


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_global_steps": 6}, 6),
        ({"step_budget": 0.1}, 4),
        ({"step_budget": 0.14}, 6),  # the nearest whole number of 5.6
        ({"step_budget": 0.1, "max_global_steps": 3}, 3),
        ({"step_budget": 1e-9}, 1),
    ],
)
def test_step_limits(tmp_path: Path, clock: Clock, limits: Any, steps: int) -> None:
    outcome = Case(tmp_path, clock, eval_every_steps=100, **limits).run()
    assert (outcome.global_step, outcome.stopped_by) == (steps, "step limit")


def test_without_evaluations_the_time_budget_still_holds(tmp_path: Path, clock: Clock) -> None:
    case = Case(tmp_path, clock, skip_evals=True)
    case.workload.max_allowed_runtime_sec = 10  # type: ignore[misc]
    outcome = case.run()
    assert (outcome.global_step, outcome.best_metric) == (8, None)
    assert "p" not in case.recorder.names()
    assert not (tmp_path / "eval_measurements.csv").exists()
    with (tmp_path / "measurements.csv").open() as file:
        assert list(csv.DictReader(file)) == [
            {"global_step": "8", "preemption_count": "0", "score": "10.0"}
        ]


def test_train_state_is_for_those_who_ask_and_only_to_read(tmp_path: Path, clock: Clock) -> None:
    case = Case(tmp_path, clock, max_global_steps=2, eval_every_steps=1, wants_train_state=True)
    case.run()
    train_state = case.recorder.calls[-2][2]["train_state"]
    assert isinstance(train_state, MappingProxyType)
    assert set(train_state) == {
        "validation_goal_reached",
        "test_goal_reached",
        "is_time_remaining",
        "last_eval_time",
        "training_complete",
        "accumulated_submission_time",
        "accumulated_eval_time",
        "accumulated_logging_time",
        "last_step_end_time",
    }


def test_a_lacking_hyperparameter_is_named_with_its_file(tmp_path: Path, clock: Clock) -> None:
    def read(step: int) -> None:
        SETTING.momentum  # noqa: B018

    space = Path("entry/tuning_search_space.json")
    case = Case(tmp_path, clock, during_update=read, tuning_search_space=space)
    with pytest.raises(UserError) as caught:
        case.run()
    assert str(caught.value) == (
        "search space entry/tuning_search_space.json lacks hyperparameter 'momentum', which "
        "submission entry/submission.py reads"
    )


def test_an_error_inside_the_submission_is_its_own(tmp_path: Path, clock: Clock) -> None:
    def fail(step: int) -> None:
        [].no_such_method()  # type: ignore[attr-defined]

    with pytest.raises(AttributeError, match="no_such_method"):
        Case(tmp_path, clock, during_update=fail).run()


def test_what_a_submission_logged_before_it_failed_is_kept(tmp_path: Path, clock: Clock) -> None:
    """Between evaluations rows are in memory; officially every one is written at once."""

    def log_and_fail(step: int) -> None:
        logger = case.workload.metrics_logger
        assert logger is not None
        logger.append_scalar_metrics({"train_loss": float(step)}, step)
        if step == 5:
            raise ValueError("diverged")

    case = Case(tmp_path, clock, during_update=log_and_fail, eval_every_steps=100)
    with pytest.raises(ValueError, match="diverged"):
        case.run()
    with (tmp_path / "measurements.csv").open(newline="") as file:
        losses = [row["train_loss"] for row in csv.DictReader(file)]
    assert [float(loss) for loss in losses if loss] == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
    assert len((tmp_path / "step_times.csv").read_text().splitlines()) == 1 + 5


class LossWorkload(TinyWorkload):
    target_metric_name = "loss"

    def has_reached_validation_target(self, eval_result: dict[str, float]) -> bool:
        return eval_result["validation/loss"] < 0.1


def test_the_best_metric_is_the_least_loss_that_is_a_number() -> None:
    losses = (float("nan"), 0.5, 0.3, 0.4)
    results = [(step, {"validation/loss": loss}) for step, loss in enumerate(losses, start=1)]
    found = outcome_of(LossWorkload(), results, 9, 2.0, "step limit")
    assert found == TrialOutcome("step limit", 9, 2.0, 0.3, None, None)
