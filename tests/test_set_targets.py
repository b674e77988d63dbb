"""Target setting: the recipe on curves made up by hand, and one real short search."""

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from workloads_smoke import set_targets
from workloads_smoke.registry import load_workload
from workloads_smoke.spec import LossType
from workloads_smoke.target_setting import recipe
from workloads_smoke.target_setting.algorithms import ALGORITHMS, Point, search_points
from workloads_smoke.target_setting.training import Curve, Run, schedule, train

POINT = Point(0.1, 0.1, 0.01, 0.0, 0.0)


def made_up(value: Any, monkeypatch: pytest.MonkeyPatch, folder: Path, name: str = "mnist") -> Any:
    """A target setter whose runs reach `value(run)` at their end, and half of it half-way."""

    def pretend(workload: Any, run: Run) -> Curve:
        end = value(run)
        if end is None:
            return Curve([], [], [], 0.0)
        return Curve([run.num_steps // 2, run.num_steps], [end / 2, end], [end / 4, end / 2], 0.0)

    monkeypatch.setattr(recipe, "train", pretend)
    return recipe.TargetSetter(name, folder, lambda line: None)


def test_target_is_the_median_over_seeds_of_the_best_finalist(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A point that is best on seed 0 only must not win, and a diverged seed must not count."""
    lucky, steady = (
        search_points("nesterov", 3, LossType.SOFTMAX_CROSS_ENTROPY)[i] for i in (0, 2)
    )

    def value(run: Run) -> float | None:
        if run.algorithm != "nesterov":
            return 0.1
        if run.point == lucky:
            return 0.9 if run.seed == 0 else 0.2
        if run.point == steady:
            return [0.8, 0.7, None, 0.6, 0.75][run.seed]
        return 0.3

    setter = made_up(value, monkeypatch, tmp_path)
    entry = setter.find(recipe.Effort(points=3, finalists=2, seeds=5))
    assert entry["validation_target_value"] == pytest.approx(0.7 - 5e-7, abs=1e-12)
    assert entry["test_target_value"] == pytest.approx(0.35 - 5e-7, abs=1e-12)
    assert entry["point"] == steady.as_dict()
    assert len(entry["runs"]) == 4 * 3 + 2 * 5
    assert entry["num_steps"] == int(0.75 * load_workload("mnist").step_hint)
    assert entry["check"]["nadamw_poor_learning_rate_reaches_at"] is None


def test_lower_is_better_for_a_loss(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def value(run: Run) -> float:
        return {"adamw": 0.4, "nadamw": 0.5}.get(run.algorithm, 0.6)

    entry = made_up(value, monkeypatch, tmp_path, "criteo1tb").find(recipe.Effort(1, 1, 1))
    assert entry["algorithm"] == "adamw"
    # The best along the run is its middle, where the made-up curve is lower.
    assert entry["validation_target_value"] == pytest.approx(0.2 + 5e-7, abs=1e-12)


def test_the_run_that_sets_a_target_reaches_it() -> None:
    """Targets are to be exceeded, and values may have been rounded to six decimals."""
    for value in (0.95541666, 67.63557466715162, 3.0e-4, 0.0):
        assert recipe.eased(round(value, 6), larger_is_better=True) < value
        assert recipe.eased(round(value, 6), larger_is_better=False) > value
        assert recipe.eased(value, larger_is_better=True) == pytest.approx(value, abs=6e-7)


def test_a_search_where_everything_diverges_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setter = made_up(lambda run: None, monkeypatch, tmp_path)
    with pytest.raises(RuntimeError, match="most repeats diverged"):
        setter.find(recipe.Effort(1, 1, 3))


def test_finished_runs_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    trained = []
    effort = recipe.Effort(points=2, finalists=1, seeds=2)
    entries = [
        made_up(lambda run: trained.append(run) or 0.5, monkeypatch, tmp_path).find(effort)
        for _ in range(2)
    ]
    assert entries[0] == entries[1]
    assert len(trained) == len(set(trained))


def test_a_check_says_when_a_whole_run_exceeds_the_target_and_that_a_poor_one_does_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    setter = made_up(lambda run: 0.5, monkeypatch, tmp_path)
    hint = setter.workload.step_hint
    rates: list[float] = []

    def train(run: Run) -> recipe.Result:
        rates.append(run.point.learning_rate)
        middle = {0: 0.7, 1: 0.6, 2: 0.3}[run.seed]  # 0.6 is the target, which has to be exceeded
        values = [0.1, middle, 0.65] if len(rates) <= 3 + 3 else [0.1, 0.2, 0.3]
        steps = [hint // 4, hint // 2, hint]
        return recipe.Result(run, Curve(steps, values, values, 0.0))

    monkeypatch.setattr(setter, "_train", train)
    (point,) = search_points("nadamw", 1, LossType.SOFTMAX_CROSS_ENTROPY)
    best = recipe.Result(Run("nadamw", point, 0, hint, 10), Curve([1], [0.5], [0.5], 0.0))
    found = setter._check([best], 0.6)
    assert found["nadamw_tuned_reaches_at"] == [hint // 2 / hint, 1.0, 1.0]
    assert found["nadamw_poor_learning_rate_reaches_at"] is None
    tuned = found["nadamw_tuned_learning_rate"]
    assert rates[:3] == pytest.approx([point.learning_rate * f for f in (0.5, 1.0, 2.0)])
    assert rates[-1] == pytest.approx(tuned / 30)


def test_runs_on_another_text_are_not_taken_up(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    trained: list[Run] = []
    counts = []
    for text in ("one", "one", "other"):
        setter = made_up(lambda run: trained.append(run) or 0.5, monkeypatch, tmp_path, "wmt")
        monkeypatch.setattr(type(setter.workload), "text_fingerprint", text)
        setter.find(recipe.Effort(1, 1, 1))
        counts.append(len(trained))
    assert counts[0] == counts[1] == counts[2] / 2 > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--output=words.json"], "--output: words.json is no file of targets: Expecting value"),
        (["--output=list.json"], "list.json is no file of targets, it has no object 'workloads'"),
        (["--output=folder"], "--output: folder is no file of targets: "),
        (["--output=list.json/targets.json"], "--output: list.json is no folder; "),
        (["--runs_dir=list.json"], "--runs_dir: list.json is no folder; "),
        (["--points=0"], "--points: expected a whole number >= 1, got '0'"),
        (["--finalists=0"], "--finalists: expected a whole number >= 1, got '0'"),
        (["--seeds=-1"], "--seeds: expected a whole number >= 1, got '-1'"),
    ],
)
def test_mistakes_are_named_before_anything_is_trained(
    arguments: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delattr(set_targets, "TargetSetter")
    Path("words.json").write_text("words")
    Path("list.json").write_text("[]")
    Path("folder").mkdir()
    try:
        status = set_targets.main(["--workload=mnist", *arguments])
    except SystemExit as end:
        status = end.code
    assert status in (1, 2)
    assert message in capsys.readouterr().err


def test_the_file_of_targets_keeps_other_entries(tmp_path: Path) -> None:
    file = tmp_path / "targets.json"
    set_targets.write_entry(file, "wmt", {"validation_target_value": 1.0})
    set_targets.write_entry(file, "mnist", {"validation_target_value": 2.0})
    set_targets.write_entry(file, "wmt", {"validation_target_value": 3.0})
    content = json.loads(file.read_text())["workloads"]
    assert {name: entry["validation_target_value"] for name, entry in content.items()} == {
        "mnist": 2.0,
        "wmt": 3.0,
    }
    assert list(content) == ["mnist", "wmt"]


def test_schedule_warms_up_and_ends_at_zero() -> None:
    factors = [schedule(step, 100) for step in range(101)]
    assert factors[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert factors[5] == 1.0
    assert all(a >= b for a, b in pairwise(factors[5:]))
    assert factors[100] == pytest.approx(0.0)


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_points_lie_in_their_ranges(algorithm: str) -> None:
    points = search_points(algorithm, 16, LossType.SOFTMAX_CROSS_ENTROPY)
    ranges = ALGORITHMS[algorithm]
    for point in points:
        for name in ("learning_rate", "one_minus_beta1", "one_minus_beta2", "weight_decay"):
            low, high = getattr(ranges, name)
            assert low * 0.999 <= getattr(point, name) <= high * 1.001
    assert {point.label_smoothing for point in points} == {0.0, 0.1}
    assert points[:4] == search_points(algorithm, 4, LossType.SOFTMAX_CROSS_ENTROPY)
    other = search_points(algorithm, 16, LossType.CTC_LOSS)
    assert {point.label_smoothing for point in other} == {0.0}


@pytest.mark.parametrize("algorithm", list(ALGORITHMS))
def test_algorithms_take_their_settings(algorithm: str) -> None:
    """The first step of plain momentum is lr times gradient; of the Adam family, about lr."""
    parameter = torch.nn.Parameter(torch.tensor([1.0]))
    optimizer = ALGORITHMS[algorithm].build([parameter], POINT)
    parameter.grad = torch.tensor([4.0])
    optimizer.step()
    step = 1.0 - parameter.item()
    expected = {"adamw": 0.1, "nesterov": 0.1 * (4.0 + 0.9 * 4.0), "heavy_ball": 0.4}
    if algorithm in expected:
        assert step == pytest.approx(expected[algorithm], rel=1e-5)
    else:
        assert 0.05 < step < 0.2


def test_training_improves_and_is_repeatable() -> None:
    run = Run("nadamw", Point(0.01, 0.1, 0.01, 0.0, 0.0), seed=1, num_steps=20, num_evaluations=2)
    first, second = (train(load_workload("mnist"), run) for _ in range(2))
    assert first.steps == [10, 20]
    assert (first.validation, first.test) == (second.validation, second.test)
    assert 0.2 < first.validation[0] < first.validation[1]


def test_a_diverging_run_ends_early() -> None:
    run = Run("nesterov", Point(1e30, 0.1, 0.01, 0.0, 0.0), seed=0, num_steps=8, num_evaluations=4)
    curve = train(load_workload("criteo1tb"), run)
    assert len(curve.steps) < 4
