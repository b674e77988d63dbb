"""Batch statistics fit the averaged weights that are evaluated."""

import pytest
import torch
from torch import nn
from toy_workload import Run, namespace

from submission.batch_statistics import (
    KEPT_BATCHES,
    Kept,
    RecentBatches,
    kept_share,
    modules_with_statistics,
)


def statistics(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    norm = run.model.bn
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.clone(), norm.running_var.clone()


@pytest.mark.parametrize("rate", [0.1, 0.001, 1.0, None])
def test_statistics_are_those_of_the_evaluated_weights(rate: float | None) -> None:
    """A schedule-free average far behind the training weights; whatever the rate of the statistics."""
    run = Run(namespace(averaging="schedule_free", learning_rate=0.1, schedule="constant"))
    run.model.bn.momentum = rate  # type: ignore[union-attr]
    batches = [next(run.queue) for _ in range(2 * KEPT_BATCHES)]
    run.queue = iter(batches)
    run.train(len(batches))
    run.prepare_for_eval()
    conv = run.model.conv
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        channels = [conv(batch["inputs"]) for batch in batches[-KEPT_BATCHES:]]
    means = torch.stack([one.mean((0, 2, 3)) for one in channels])
    variances = torch.stack([one.var((0, 2, 3)) for one in channels])
    # The weights of the passes in a running average, the last one's the largest.
    weights = torch.ones(KEPT_BATCHES, 1)
    if rate is not None:
        weights = (1.0 - rate) ** torch.arange(KEPT_BATCHES - 1, -1, -1.0)[:, None]
    weights /= weights.sum()
    mean, var = statistics(run)
    torch.testing.assert_close(mean, (weights * means).sum(0), rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(var, (weights * variances).sum(0), rtol=1e-3, atol=1e-4)


def test_statistics_are_taken_under_the_dropout_of_training() -> None:
    run = Run(namespace(averaging="schedule_free", dropout_rate=0.4))
    run.train(2)
    run.workload.calls.clear()
    run.prepare_for_eval()
    assert [call["dropout_rate"] for call in run.workload.calls] == [0.4, 0.4]


def test_without_averaging_statistics_are_left_alone() -> None:
    run = Run(namespace(averaging="none"))
    run.train(3)
    before = statistics(run)
    run.prepare_for_eval()
    for old, new in zip(before, statistics(run), strict=True):
        assert torch.equal(old, new)


def test_batches_are_kept_only_where_they_are_needed() -> None:
    with_norm, without = nn.BatchNorm1d(3), nn.LayerNorm(3)
    for model, averaging, kept in ((with_norm, True, 1), (with_norm, False, 0), (without, True, 0)):
        recent = RecentBatches(model, averaging)
        recent.keep({"inputs": torch.ones(1)})
        assert len(recent.kept().batches) == kept


def test_the_last_batches_are_kept() -> None:
    recent = RecentBatches(nn.BatchNorm1d(3), averaging=True)
    for index in range(KEPT_BATCHES + 3):
        recent.keep({"index": index})
    assert [batch["index"] for batch in recent.kept().batches] == list(range(3, KEPT_BATCHES + 3))
    assert recent.kept().num_carried == 0


def test_a_resumed_run_starts_without_batches_but_knows_how_many_there_were() -> None:
    recent = RecentBatches(nn.BatchNorm1d(3), averaging=True)
    for _ in range(3):
        recent.keep({})
    saved = recent.state_dict()
    recent.load_state_dict(saved)
    assert recent.kept() == Kept([], 3)
    for k in range(1, KEPT_BATCHES + 1):
        recent.keep({})
        assert recent.kept() == Kept([{}] * k, min(3, KEPT_BATCHES - k))
        assert recent.state_dict() == {"num_batches": min(3 + k, KEPT_BATCHES)}
    # A checkpoint of before they were counted.
    recent.load_state_dict({})
    assert recent.kept() == Kept([], KEPT_BATCHES)


@pytest.mark.parametrize("rate", [0.1, 0.001, None])
def test_no_single_batch_decides_an_evaluation_right_after_a_resumption(rate: float | None) -> None:
    setting = namespace(averaging="schedule_free", learning_rate=0.01, schedule="constant")
    run, resumed = Run(setting), Run(setting)
    for one in (run, resumed):
        one.model.bn.momentum = rate  # type: ignore[union-attr]
    run.train(2 * KEPT_BATCHES)
    run.prepare_for_eval()
    resumed.resume(run.checkpoint())
    before = statistics(resumed)
    for one in (run, resumed):
        one.train(1)
    kept = resumed.state["recent_batches"].kept()
    assert (len(kept.batches), kept.num_carried) == (1, KEPT_BATCHES - 1)
    at_training = statistics(resumed)
    for one in (run, resumed):
        one.prepare_for_eval()
    conv = resumed.model.conv
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        channels = conv(kept.batches[0]["inputs"])
    news = channels.mean((0, 2, 3)), channels.var((0, 2, 3))
    for old, new, found in zip(at_training, news, statistics(resumed), strict=True):
        expected = ((KEPT_BATCHES - 1) * old + new) / KEPT_BATCHES
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    # Nearer to those of a run that goes on than one batch alone would be.
    for old, whole, new, found in zip(
        before, statistics(run), news, statistics(resumed), strict=True
    ):
        assert (found - whole).norm() < 0.5 * (new - whole).norm()
        assert (found - old).norm() < (new - old).norm()


def test_shares_follow_what_a_module_counts() -> None:
    """A norm that is used twice in a pass is updated twice; one that is not used, not at all."""
    norm = nn.BatchNorm1d(2, momentum=0.3)
    for _ in range(4):
        norm(torch.randn(5, 2))
    assert kept_share(norm, 0, 2) == pytest.approx(0.7**4)
    assert kept_share(norm, 4, 2) == 1.0
    assert kept_share(norm, None, 2) == pytest.approx(0.7**2)
    norm.momentum = None
    assert kept_share(norm, 3, 1) == pytest.approx(3 / 4)


def test_modules_that_keep_statistics() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.BatchNorm1d(2, track_running_stats=False))
    assert modules_with_statistics(model) == [model[0]]
