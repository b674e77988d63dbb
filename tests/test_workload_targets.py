"""The targets of smoke workloads: where they come from, and when a run has reached them."""

import json
import statistics

import pytest

from workloads_smoke.registry import WORKLOADS, load_workload
from workloads_smoke.target_setting.recipe import eased
from workloads_smoke.targets import TARGETS_FILE, load_targets
from workloads_smoke.workloads.base import SmokeWorkload

LOWER_IS_BETTER = ("ppl", "loss", "wer")


@pytest.fixture(params=list(WORKLOADS))
def workload(request: pytest.FixtureRequest) -> SmokeWorkload:
    return load_workload(request.param)


def test_reaching_a_target_is_strict(
    workload: SmokeWorkload, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = workload.target_metric_name
    monkeypatch.setattr(SmokeWorkload, "validation_target_value", property(lambda self: 0.5))
    monkeypatch.setattr(SmokeWorkload, "test_target_value", property(lambda self: 0.5))
    better = 0.4 if metric in LOWER_IS_BETTER else 0.6
    worse = 1.0 - better
    for value, reached in ((better, True), (0.5, False), (worse, False), (float("nan"), False)):
        result = {f"validation/{metric}": value, f"test/{metric}": value}
        assert workload.has_reached_validation_target(result) == reached
        assert workload.has_reached_test_target(result) == reached


def test_each_split_is_judged_by_its_own_metric_and_target(
    workload: SmokeWorkload, monkeypatch: pytest.MonkeyPatch
) -> None:
    metric = workload.target_metric_name
    better, worse = (0.4, 0.6) if metric in LOWER_IS_BETTER else (0.6, 0.4)
    for name, target in (("validation", 0.5), ("test", better)):
        value = property(lambda self, target=target: target)
        monkeypatch.setattr(SmokeWorkload, f"{name}_target_value", value)
    for validation, test in ((better, worse), (worse, 2 * better - 0.5), (better, better)):
        result = {f"validation/{metric}": validation, f"test/{metric}": test}
        assert workload.has_reached_validation_target(result) == (validation == better)
        assert workload.has_reached_test_target(result) == (test == 2 * better - 0.5)


def test_targets_are_those_of_the_workload_as_it_is(workload: SmokeWorkload) -> None:
    """Set for this metric, batch size and step hint, and the median of the recorded runs."""
    entry = json.loads(TARGETS_FILE.read_text())["workloads"][workload.name]
    assert entry["metric"] == workload.target_metric_name
    assert entry["batch_size"] == workload.smoke_batch_size
    assert entry["step_hint"] == workload.step_hint
    winner = entry["point"] | {"algorithm": entry["algorithm"]}
    runs = {run["seed"]: run for run in entry["runs"] if winner.items() <= run.items()}
    assert len(runs) == entry["effort"]["seeds"] >= 3
    targets = load_targets(workload.name)
    for split in ("validation", "test"):
        median = statistics.median(run[split] for run in runs.values())
        target = eased(median, workload.facts.larger_is_better)
        assert getattr(targets, f"{split}_target_value") == pytest.approx(target, abs=1e-9)


def test_targets_separate_a_poor_learning_rate_from_a_tuned_one(workload: SmokeWorkload) -> None:
    check = json.loads(TARGETS_FILE.read_text())["workloads"][workload.name]["check"]
    assert check["nadamw_poor_learning_rate_reaches_at"] is None
    reached = [share for share in check["nadamw_tuned_reaches_at"] if share is not None]
    assert len(reached) >= 2
    assert 0.5 <= statistics.median(reached) <= 1.0


def test_missing_targets_name_the_script() -> None:
    with pytest.raises(KeyError, match="set_targets --workload cifar"):
        load_targets("cifar")
