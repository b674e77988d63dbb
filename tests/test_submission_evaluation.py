"""Evaluation weights go in, training weights come back bit for bit, also across a checkpoint."""

import copy

import pytest
import torch
from toy_workload import Run, assert_equal, namespace

AVERAGES = ("weight_ema", "schedule_free", "primal")
PRECONDITIONERS = ("shampoo", "eigenvalue_corrected", "spectral")


@pytest.fixture(params=AVERAGES)
def averaging(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def averaged_run(averaging: str, preconditioner: str = "shampoo") -> Run:
    return Run(namespace(averaging=averaging, preconditioner=preconditioner), step_hint=200)


def test_swap_is_exact(averaging: str) -> None:
    run = averaged_run(averaging)
    run.train(6)
    training = run.weights()
    run.prepare_for_eval()
    evaluated = run.weights()
    assert not any(torch.equal(a, b) for a, b in zip(training, evaluated, strict=True))
    run.prepare_for_eval()
    assert_equal(run.weights(), evaluated)
    run.state["optimizer"].train()
    assert_equal(run.weights(), training)


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_evaluations_do_not_change_the_run(averaging: str, preconditioner: str) -> None:
    plain, evaluated = (averaged_run(averaging, preconditioner) for _ in range(2))
    for _ in range(3):
        plain.train(2)
        evaluated.train(2)
        evaluated.prepare_for_eval()
    plain.train(1)
    evaluated.train(1)
    assert_equal(plain.weights(), evaluated.weights())


@pytest.mark.parametrize("preconditioner", PRECONDITIONERS)
def test_resume_from_a_checkpoint_taken_during_evaluation(
    averaging: str, preconditioner: str
) -> None:
    whole, first, second = (averaged_run(averaging, preconditioner) for _ in range(3))
    whole.train(12)
    first.train(6)
    first.prepare_for_eval()
    second.resume(first.checkpoint())
    assert_equal(second.weights(), first.weights())  # the evaluation weights are in the model
    second.train(6)
    assert_equal(second.weights(), whole.weights())
    whole.prepare_for_eval()
    second.prepare_for_eval()
    assert_equal(second.weights(), whole.weights())


def test_without_averaging_the_training_weights_are_evaluated() -> None:
    run = Run(namespace(averaging="none"))
    run.train(2)
    training = run.weights()
    run.prepare_for_eval()
    assert_equal(run.weights(), training)


def test_checkpoint_of_another_setting_is_refused() -> None:
    run = Run(namespace(averaging="weight_ema"))
    run.train(2)
    saved = copy.deepcopy(run.checkpoint())
    with pytest.raises(ValueError, match="of another configuration"):
        Run(namespace(averaging="none")).resume(saved)
