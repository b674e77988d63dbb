"""No point of ours raises, diverges or stalls on models it has not seen."""

import json
import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from official_harness import REPOSITORY
from toy_workload import Run
from unseen_models import MODELS, UnseenWorkload

POINTS = json.loads((REPOSITORY / "tuning_search_space.json").read_text())
SETTINGS: dict[str, Any] = {"self": None} | {
    f"point {number}": SimpleNamespace(**point) for number, point in enumerate(POINTS, start=1)
}


def run_of(model: str, setting: str, step_hint: int) -> Run:
    return Run(SETTINGS[setting], workload=UnseenWorkload(model, step_hint))


def losses_of(run: Run, steps: int) -> list[float]:
    """Train, with an evaluation now and then; return how far each step's loss is above the least.

    With smoothed labels the least is their entropy, and a model that gives the true word more than its
    share does worse.
    """
    losses: list[float] = []
    whole_loss = run.workload.loss_fn

    def recording(**arguments: Any) -> dict[str, torch.Tensor]:
        result = whole_loss(**arguments)
        mean = result["summed"].detach() / result["n_valid_examples"]
        num_classes = arguments["logits_batch"].shape[-1]
        losses.append(mean.item() - entropy(arguments["label_smoothing"], num_classes))
        return result

    run.workload.loss_fn = recording  # type: ignore[method-assign]
    for _ in range(steps // 4):
        run.train(4)
        if run.step % 16 == 0:
            run.prepare_for_eval()
    assert all(bool(torch.isfinite(weight).all()) for weight in run.weights())
    return losses


def entropy(label_smoothing: float, num_classes: int) -> float:
    """Of a smoothed label, in nats."""
    other = label_smoothing / num_classes
    shares = [1.0 - label_smoothing + other, *[other] * (num_classes - 1)]
    return -sum(share * math.log(share) for share in shares if share > 0.0)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_takes_steps(model: str, setting: str) -> None:
    """The first of a run of twenty steps, and of one of a hundred thousand."""
    for step_hint in (20, 100_000):
        run = run_of(model, setting, step_hint)
        before = run.weights()
        losses = losses_of(run, 20 if step_hint == 20 else 4)
        assert losses[-1] < 3.0 * losses[0]
        for (name, weight), old in zip(run.model.named_parameters(), before, strict=True):
            has_gradients = weight.requires_grad and weight.numel() > 0 and "unused" not in name
            is_asked = "experts.2" not in name or step_hint == 20
            if weight.numel() > 0:
                assert torch.equal(weight, old) != (has_gradients and is_asked), name


@pytest.mark.slow
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("model", MODELS)
def test_learns(model: str, setting: str) -> None:
    """In a run of 300 steps: no stall, and no loss at the end that was lost on the way."""
    losses = losses_of(run_of(model, setting, step_hint=300), 300)
    windows = [sum(losses[i : i + 20]) / 20 for i in range(0, 300, 20)]
    first = sum(losses[:5]) / 5
    assert windows[-1] < MODELS[model].share_left * first, windows
    assert windows[-1] < 1.3 * min(windows) + 0.02 * first, windows
    assert max(losses) < 3.0 * first, max(losses)
