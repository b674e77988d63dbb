"""The submission's five functions on a toy workload, as the harness would call them."""

import copy
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from toy_workload import ToyWorkload
from torch import nn

from submission import submission
from submission.hyperparameters import SELF_TUNING, Hyperparameters
from submission.pace import pace

POINTS = json.loads((Path(__file__).parents[1] / "tuning_search_space.json").read_text())


class Run:
    """One run on the toy workload, driven like the harness drives it."""

    def __init__(self, hyperparameters: Any = None, step_hint: int = 20) -> None:
        self.workload = ToyWorkload(step_hint)
        self.hyperparameters = hyperparameters
        self.model: nn.Module
        self.model, self.model_state = self.workload.init_model_fn()
        self.queue = self.workload.batches()
        self.state = submission.init_optimizer_state(
            self.workload, self.model, self.model_state, hyperparameters, rng=None
        )
        self.step = 0

    def train(self, steps: int) -> None:
        for _ in range(steps):
            batch = submission.data_selection(
                self.workload,
                self.queue,
                self.state,
                self.model,
                self.model_state,
                self.hyperparameters,
                self.step,
                None,
            )
            torch.manual_seed(self.step)  # dropout
            self.state, self.model, self.model_state = submission.update_params(
                workload=self.workload,
                current_param_container=self.model,
                current_params_types=self.workload.model_params_types,
                model_state=self.model_state,
                hyperparameters=self.hyperparameters,
                batch=batch,
                loss_type=self.workload.loss_type,
                optimizer_state=self.state,
                eval_results=[],
                global_step=self.step,
                rng=None,
                train_state={"is_time_remaining": True},
            )
            self.step += 1

    def prepare_for_eval(self) -> None:
        self.state, self.model, self.model_state = submission.prepare_for_eval(
            workload=self.workload,
            current_param_container=self.model,
            current_params_types=self.workload.model_params_types,
            model_state=self.model_state,
            hyperparameters=self.hyperparameters,
            loss_type=self.workload.loss_type,
            optimizer_state=self.state,
            eval_results=[],
            global_step=self.step,
            rng=None,
        )

    def checkpoint(self) -> dict[str, Any]:
        """Save as the harness does: every value through state_dict."""
        return copy.deepcopy(
            {
                "model": self.model.state_dict(),
                "state": {key: value.state_dict() for key, value in self.state.items()},
                "step": self.step,
            }
        )

    def resume(self, saved: dict[str, Any]) -> None:
        """Restore as the harness does: the model, then every key of a fresh optimizer state."""
        self.model.load_state_dict(saved["model"])
        for key, value in self.state.items():
            value.load_state_dict(saved["state"][key])
        self.step = saved["step"]
        for _ in range(self.step):
            next(self.queue)

    def weights(self) -> list[torch.Tensor]:
        return [weight.detach().clone() for weight in self.model.parameters()]


def namespace(**changes: Any) -> SimpleNamespace:
    return SimpleNamespace(**{**vars(SELF_TUNING), **changes})


def assert_equal(left: list[torch.Tensor], right: list[torch.Tensor]) -> None:
    for ours, theirs in zip(left, right, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("point", [None, *POINTS], ids=lambda point: "self" if not point else None)
def test_every_point_trains(point: dict[str, Any] | None) -> None:
    """No point may raise or diverge on a small model it has not seen."""
    run = Run(None if point is None else SimpleNamespace(**point), step_hint=60)
    before = run.weights()
    run.train(60)
    after = run.weights()
    assert all(bool(torch.isfinite(weight).all()) for weight in after)
    assert all(not torch.equal(old, new) for old, new in zip(before, after, strict=True))
    assert run.workload.metrics_logger is not None
    losses = [entry["loss"] for _, entry in run.workload.metrics_logger.entries]
    assert sum(losses[-5:]) < sum(losses[:5])


def test_dropout_and_label_smoothing_reach_the_workload() -> None:
    run = Run(namespace(dropout_rate=0.125, label_smoothing=0.3))
    run.train(1)
    assert run.workload.calls[0]["dropout_rate"] == 0.125
    assert run.workload.calls[0]["mode"].name == "TRAIN"
    assert run.workload.calls[1] == {"label_smoothing": 0.3}


def test_no_dropout_rate_keeps_the_models_own() -> None:
    run = Run(namespace(dropout_rate=None))
    run.train(1)
    assert run.workload.calls[0]["dropout_rate"] == 0.25


def test_padding_does_not_count() -> None:
    """The reported loss is the mean over valid examples only."""
    run = Run(namespace(dropout_rate=0.0, label_smoothing=0.0))
    batch = next(run.workload.batches())
    valid = {key: value[:-2] for key, value in batch.items()}
    run.model.train()
    run.model.bn.eval()  # type: ignore[union-attr]
    whole, _ = run.workload.model_fn(run.model, batch, None, _train_mode(run), None, True, 0.0)
    alone, _ = run.workload.model_fn(run.model, valid, None, _train_mode(run), None, True, 0.0)
    from submission.objective import mean_loss

    expected = nn.functional.cross_entropy(alone, valid["targets"])
    torch.testing.assert_close(mean_loss(run.workload, batch, whole, 0.0), expected)


def _train_mode(run: Run) -> Any:
    from submission.objective import training_mode

    return training_mode(run.workload)


def test_gradient_is_clipped_and_its_norm_reported_unclipped() -> None:
    class Recorder(torch.optim.SGD):
        """Sees the gradient as the optimizer does."""

        def step(self, closure: Any = None) -> None:
            self.norm = math.sqrt(
                sum(float(p.grad.square().sum()) for g in self.param_groups for p in g["params"])
            )

    run = Run(namespace(grad_clip=1e-3))
    optimizer = Recorder(run.model.parameters(), lr=1.0)
    run.state["optimizer"] = optimizer
    run.train(1)
    assert optimizer.norm == pytest.approx(1e-3, rel=1e-2)
    assert run.workload.metrics_logger is not None
    assert run.workload.metrics_logger.entries[0][1]["grad_norm"] > 1e-2


def test_learning_rate_follows_the_schedule() -> None:
    run = Run(namespace(warmup_factor=0.2), step_hint=20)
    schedule = pace(
        Hyperparameters.from_namespace(run.hyperparameters), run.workload.step_hint
    ).schedule
    for step in range(1, 8):
        run.train(1)
        rates = {group["lr"] for group in run.state["optimizer"].param_groups}
        assert rates == {schedule(step)}


def test_reports_now_and_then_only() -> None:
    run = Run(step_hint=2000)
    run.train(25)
    assert run.workload.metrics_logger is not None
    steps = [step for step, _ in run.workload.metrics_logger.entries]
    assert steps == [0, 1, 2, 3, 4, 10, 20]
    assert set(run.workload.metrics_logger.entries[0][1]) == {"loss", "grad_norm", "learning_rate"}


def test_trains_without_a_metrics_logger() -> None:
    run = Run()
    run.workload.metrics_logger = None
    run.train(2)


def test_bad_hyperparameters_are_refused_before_training() -> None:
    with pytest.raises(ValueError, match="hyperparameter learning_rate = -1"):
        Run(namespace(learning_rate=-1))


def test_every_state_value_can_be_saved_safely(tmp_path: Path) -> None:
    """The harness restores every key, and torch.load's safe mode must take it."""
    run = Run()
    run.train(3)
    run.prepare_for_eval()
    for value in run.state.values():
        assert callable(value.state_dict)
        assert callable(value.load_state_dict)
    torch.save(run.checkpoint(), tmp_path / "checkpoint")
    torch.load(tmp_path / "checkpoint", weights_only=True)


@pytest.mark.parametrize("point", [None, *POINTS], ids=lambda point: "self" if not point else None)
def test_resumed_run_equals_uninterrupted_one(point: dict[str, Any] | None) -> None:
    """The checkpoint is written while the evaluation weights are in the model."""
    hyperparameters = None if point is None else SimpleNamespace(**point)
    whole, first, second = (Run(hyperparameters) for _ in range(3))
    whole.train(14)
    first.train(7)
    first.prepare_for_eval()
    second.resume(first.checkpoint())
    second.train(7)
    assert_equal(second.weights(), whole.weights())


def test_get_batch_size() -> None:
    assert submission.get_batch_size("wmt") == 128
    with pytest.raises(ValueError, match="no batch size for workload 'wmt_post_ln'; known: "):
        submission.get_batch_size("wmt_post_ln")
