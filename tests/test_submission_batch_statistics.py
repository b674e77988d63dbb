"""Batch statistics fit the averaged weights that are evaluated."""

import pytest
import torch
from torch import nn
from toy_workload import Run, namespace

from submission.batch_statistics import KEPT_BATCHES, RecentBatches, momenta, passes_needed


def statistics(run: Run) -> tuple[torch.Tensor, torch.Tensor]:
    norm = run.model.bn
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean.clone(), norm.running_var.clone()


def test_statistics_are_those_of_the_evaluated_weights() -> None:
    """A schedule-free average far behind the training weights, on one batch again and again."""
    run = Run(namespace(averaging="schedule_free", learning_rate=0.1, schedule="constant"))
    batch = next(run.queue)
    run.queue = iter([batch] * 20)
    run.train(20)
    before = statistics(run)[0]
    run.prepare_for_eval()
    conv = run.model.conv
    assert isinstance(conv, nn.Conv2d)
    with torch.no_grad():
        channels = conv(batch["inputs"])
    expected_mean, expected_var = channels.mean((0, 2, 3)), channels.var((0, 2, 3))
    # The passes leave at most 5 % of the old statistics.
    mean, var = statistics(run)
    assert (mean - expected_mean).abs().max() <= 0.06 * (before - expected_mean).abs().max() + 1e-6
    torch.testing.assert_close(var, expected_var, rtol=0.1, atol=0.01)


def test_without_averaging_statistics_are_left_alone() -> None:
    run = Run(namespace(averaging="none"))
    run.train(3)
    before = statistics(run)
    run.prepare_for_eval()
    for old, new in zip(before, statistics(run), strict=True):
        assert torch.equal(old, new)


def test_batches_are_kept_only_where_they_are_needed() -> None:
    with_norm, without = nn.BatchNorm1d(3), nn.LayerNorm(3)
    batch = {"inputs": torch.ones(1)}
    for model, averaging, kept in (
        (with_norm, True, 29),
        (with_norm, False, 0),
        (without, True, 0),
    ):
        recent = RecentBatches(model, averaging)
        recent.keep(batch)
        assert len(recent.in_turn()) == kept


def test_the_last_batches_are_used_in_turn() -> None:
    recent = RecentBatches(nn.BatchNorm1d(3), averaging=True)
    for index in range(KEPT_BATCHES + 3):
        recent.keep({"index": index})
    turns = [batch["index"] for batch in recent.in_turn()]
    assert turns[:KEPT_BATCHES] == list(range(3, KEPT_BATCHES + 3))
    assert turns[KEPT_BATCHES] == 3


def test_a_resumed_run_starts_without_batches() -> None:
    recent = RecentBatches(nn.BatchNorm1d(3), averaging=True)
    recent.keep({})
    assert recent.state_dict() == {}
    recent.load_state_dict({})
    assert recent.in_turn() == []


@pytest.mark.parametrize(("rates", "passes"), [([0.1], 29), ([1.0, 0.5], 5), ([0.0], 32)])
def test_passes(rates: list[float], passes: int) -> None:
    assert passes_needed(rates) == passes


def test_momenta_of_a_model() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2, momentum=0.3), nn.BatchNorm1d(2, momentum=None))
    assert momenta(model) == [0.3, 0.0]
    assert momenta(nn.BatchNorm1d(2, track_running_stats=False)) == []
