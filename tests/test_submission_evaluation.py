"""Evaluation weights go in, training weights come back bit for bit, also across a checkpoint."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from submission.evaluation import EvaluationWeights


class Averaged(torch.optim.AdamW):
    """AdamW that evaluates a running mean; its way back from evaluation rounds on purpose."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.1)
        self.mean = [p.detach().clone() for g in self.param_groups for p in g["params"]]
        self.swapped = False

    def weights(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert not self.swapped, "a step from the evaluation weights"
        super().step()
        for mean, weight in zip(self.mean, self.weights(), strict=True):
            mean.lerp_(weight, 0.1)

    @torch.no_grad()
    def eval(self) -> None:
        self.swapped = True
        self.difference = []
        for mean, weight in zip(self.mean, self.weights(), strict=True):
            self.difference.append(weight - mean)
            weight.copy_(mean)

    @torch.no_grad()
    def train(self) -> None:
        self.swapped = False
        for weight, difference in zip(self.weights(), self.difference, strict=True):
            weight.add_(difference * 1.001)

    def state_dict(self) -> dict[str, Any]:
        extra = {"mean": self.mean, "swapped": self.swapped}
        if self.swapped:
            extra["difference"] = self.difference
        return super().state_dict() | extra

    def load_state_dict(self, state: dict[str, Any]) -> None:
        state = dict(state)
        self.mean, self.swapped = state.pop("mean"), state.pop("swapped")
        self.difference = state.pop("difference", [])
        super().load_state_dict(state)


def model_and_swap(averaging: bool = True) -> tuple[nn.Module, Averaged, EvaluationWeights]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4), nn.Linear(4, 3))
    optimizer = Averaged(model.parameters())
    return model, optimizer, EvaluationWeights(optimizer, averaging)


def step(model: nn.Module, optimizer: Averaged, swap: EvaluationWeights) -> None:
    swap.restore()
    optimizer.zero_grad()
    model(torch.linspace(-1, 1, 10).reshape(2, 5)).square().sum().backward()
    optimizer.step()


def values(model: nn.Module) -> list[Tensor]:
    return [weight.detach().clone() for weight in model.parameters()]


def assert_equal(left: list[Tensor], right: list[Tensor]) -> None:
    for ours, theirs in zip(left, right, strict=True):
        assert torch.equal(ours, theirs)


def test_swap_is_exact() -> None:
    model, optimizer, swap = model_and_swap()
    for _ in range(3):
        step(model, optimizer, swap)
    training = values(model)
    swap.swap_in()
    assert_equal(values(model), optimizer.mean)
    assert not torch.equal(values(model)[0], training[0])
    swap.restore()
    assert_equal(values(model), training)
    assert not optimizer.swapped


def test_swapping_twice_and_restoring_twice_changes_nothing() -> None:
    model, optimizer, swap = model_and_swap()
    step(model, optimizer, swap)
    training = values(model)
    swap.swap_in()
    swap.swap_in()
    swap.restore()
    swap.restore()
    assert_equal(values(model), training)


def test_evaluations_do_not_change_the_run() -> None:
    plain, evaluated = model_and_swap(), model_and_swap()
    for _ in range(4):
        step(*plain)
        step(*evaluated)
        evaluated[2].swap_in()
    evaluated[2].restore()
    assert_equal(values(plain[0]), values(evaluated[0]))


def test_resume_from_a_checkpoint_taken_during_evaluation() -> None:
    plain, saved, resumed = model_and_swap(), model_and_swap(), model_and_swap()
    for _ in range(3):
        step(*plain)
        step(*saved)
    saved[2].swap_in()
    checkpoint = copy.deepcopy([part.state_dict() for part in saved])
    for part, state in zip(resumed, checkpoint, strict=True):
        part.load_state_dict(state)
    assert_equal(values(resumed[0]), values(saved[0]))  # the evaluation weights are in the model
    for _ in range(3):
        step(*plain)
        step(*resumed)
    assert_equal(values(resumed[0]), values(plain[0]))


def test_without_averaging_nothing_moves_and_nothing_is_kept() -> None:
    model, optimizer, swap = model_and_swap(averaging=False)
    step(model, optimizer, swap)
    training = values(model)
    swap.swap_in()
    assert_equal(values(model), training)
    assert swap.state_dict() == {"training_weights": []}


def test_refuses_a_checkpoint_of_an_averaged_run() -> None:
    model, optimizer, swap = model_and_swap()
    step(model, optimizer, swap)
    swap.swap_in()
    with pytest.raises(ValueError, match="the checkpoint holds averaged weights, but this setting"):
        model_and_swap(averaging=False)[2].load_state_dict(swap.state_dict())


def test_refuses_weights_of_another_model() -> None:
    _, _, swap = model_and_swap()
    with pytest.raises(ValueError, match="training weights do not fit this model"):
        swap.load_state_dict({"training_weights": [torch.zeros(2)]})
