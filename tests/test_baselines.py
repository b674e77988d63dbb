"""The baselines against plain formulas, one tensor and one step at a time."""

import copy
import importlib
import json
import math
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from workloads_smoke import spec
from workloads_smoke.baselines import schedule_free_adamw
from workloads_smoke.baselines.muon.optimizer import Muon, orthogonalised
from workloads_smoke.baselines.muon.submission import is_for_muon
from workloads_smoke.baselines.nadamw.optimizer import NAdamW
from workloads_smoke.baselines.schedule_free_adamw.optimizer import ScheduleFreeAdamW
from workloads_smoke.baselines.training import short_run_factor, warmup_then_cosine

PUBLISHED = json.loads(
    Path(schedule_free_adamw.__file__).with_name("tuning_search_space.json").read_text()
)
BASELINES = ("nadamw", "schedule_free_adamw", "muon")
FUNCTIONS = (
    "get_batch_size",
    "init_optimizer_state",
    "update_params",
    "prepare_for_eval",
    "data_selection",
)


def submission_of(name: str) -> ModuleType:
    return importlib.import_module(f"workloads_smoke.baselines.{name}.submission")


def gradients(shape: tuple[int, ...], steps: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(steps)]


def test_nadamw_follows_its_formula() -> None:
    beta1, beta2, lr, wd, eps = 0.9, 0.99, 0.1, 0.2, 1e-3
    start = torch.linspace(-1, 1, 6, dtype=torch.float64).reshape(2, 3)
    weight = nn.Parameter(start.clone())
    optimizer = NAdamW([weight], lr, betas=(beta1, beta2), eps=eps, weight_decay=wd)
    w, m, v = start.clone(), torch.zeros_like(start), torch.zeros_like(start)
    for t, gradient in enumerate(gradients((2, 3), 5), start=1):
        weight.grad = gradient
        optimizer.step()
        w = w * (1 - lr * wd)
        m = beta1 * m + (1 - beta1) * gradient
        v = beta2 * v + (1 - beta2) * gradient**2
        ahead = (beta1 * m + (1 - beta1) * gradient) / (1 - beta1**t)
        w = w - lr * ahead / ((v / (1 - beta2**t)).sqrt() + eps)
        torch.testing.assert_close(weight.data, w, rtol=0, atol=1e-14)


def test_schedule_free_follows_its_formula() -> None:
    beta1, beta2, lr, wd, eps, warmup = 0.9, 0.99, 0.1, 0.2, 1e-3, 3
    start = torch.linspace(-1, 1, 6, dtype=torch.float64)
    weight = nn.Parameter(start.clone())
    optimizer = ScheduleFreeAdamW(
        [weight], lr, betas=(beta1, beta2), eps=eps, weight_decay=wd, warmup_steps=warmup
    )
    x, z, v, weight_sum = start.clone(), start.clone(), torch.zeros_like(start), 0.0
    for t, gradient in enumerate(gradients((6,), 6), start=1):
        y = (1 - beta1) * z + beta1 * x
        optimizer.extrapolate()
        torch.testing.assert_close(weight.data, y, rtol=0, atol=1e-14)
        weight.grad = gradient
        optimizer.step()
        lr_t = lr * min(t / warmup, 1.0)
        v = beta2 * v + (1 - beta2) * gradient**2
        z = z - lr_t * (1 - beta2**t) ** 0.5 * (gradient / (v.sqrt() + eps) + wd * y)
        weight_sum += lr_t**2
        share = lr_t**2 / weight_sum
        x = (1 - share) * x + share * z
        torch.testing.assert_close(weight.data, x, rtol=0, atol=1e-13)


def test_schedule_free_agrees_with_the_published_numbers() -> None:
    """The y of a 2 x 3 example after five steps, computed from the published code by others."""
    weight = nn.Parameter(torch.tensor([[1, 2, -1], [3, -4, 0.5]], dtype=torch.float64))
    g1 = torch.tensor([[0.1, -0.2, 0.3], [0.4, 0.05, -0.1]], dtype=torch.float64)
    g2 = torch.tensor([[-0.2, 0.1, 0.15], [0.05, 0.3, 0.25]], dtype=torch.float64)
    g3 = torch.tensor([[0.3, 0.2, -0.1], [-0.15, 0.1, 0.05]], dtype=torch.float64)
    optimizer = ScheduleFreeAdamW([weight], 0.1, betas=(0.9, 0.99))
    for gradient in (g1, g2, g3, 0.5 * g1 + g2, g3 - g2):
        optimizer.extrapolate()
        weight.grad = gradient
        optimizer.step()
    optimizer.extrapolate()
    expected = [[0.9006615, 1.9542909, -1.1502034], [2.9014522, -4.2889955, 0.4498191]]
    torch.testing.assert_close(
        weight.data, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=3e-6
    )


@pytest.mark.parametrize(
    ("setting", "with_statistics"),
    [(None, [0, 3, 6]), (SimpleNamespace(**PUBLISHED[0]), [1, 2, 4, 5])],
    ids=["self", "external"],
)
def test_schedule_free_warms_up_and_takes_statistics_as_published(
    setting: SimpleNamespace | None, with_statistics: list[int]
) -> None:
    """Over 2 % of three quarters of the hint; in every third step at the average, or in the others."""
    module = submission_of("schedule_free_adamw")
    passes: list[tuple[bool, bool]] = []
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))

    def model_fn(**arguments: Any) -> tuple[Tensor, None]:
        # A setting's dropout rate is not read.
        assert "dropout_rate" not in arguments
        passes.append((arguments["update_batch_norm"], torch.is_grad_enabled()))
        return model(arguments["augmented_and_preprocessed_input_batch"]["inputs"]), None

    def loss_fn(logits_batch: Tensor, **_: Any) -> dict[str, Any]:
        return {"summed": logits_batch.square().sum(), "n_valid_examples": 4}

    workload = SimpleNamespace(
        step_hint=1000,
        loss_type=spec.LossType.SOFTMAX_CROSS_ENTROPY,
        model_fn=model_fn,
        loss_fn=loss_fn,
    )
    state = module.init_optimizer_state(workload, model, None, setting, None)
    assert state["optimizer"].param_groups[0]["warmup_steps"] == 15
    batch = {"inputs": torch.randn(4, 2), "targets": torch.zeros(4)}
    found = []
    for step in range(7):
        passes.clear()
        module.update_params(
            workload, model, None, None, setting, batch, None, state, [], step, None
        )
        assert passes[-1] == (False, True)
        found += [step] * (passes[:-1] == [(True, False)])
    assert found == with_statistics


def test_orthogonalised_turns_every_singular_value_to_about_one() -> None:
    stack = torch.stack(gradients((5, 8), 3) + gradients((5, 8), 1))
    values = torch.linalg.svdvals(orthogonalised(stack, iterations=8, eps=1e-7))
    assert values.min() > 0.6
    assert values.max() < 1.35
    tall = orthogonalised(stack.mT.contiguous(), iterations=8, eps=1e-7)
    torch.testing.assert_close(tall.mT, orthogonalised(stack, iterations=8, eps=1e-7))


def test_muon_treats_a_stack_like_one_matrix_at_a_time() -> None:
    shapes = [(4, 3), (6, 2, 3), (4, 3)]
    start = [torch.ones(shape, dtype=torch.float64) for shape in shapes]
    together = [nn.Parameter(w.clone()) for w in start]
    alone = [nn.Parameter(w.clone()) for w in start]
    optimizers = [Muon(together, 0.1, beta=0.9), *(Muon([w], 0.1, beta=0.9) for w in alone)]
    for step in range(3):
        for index, shape in enumerate(shapes):
            gradient = gradients(shape, 3)[step] * (index + 1)
            together[index].grad = gradient.clone()
            alone[index].grad = gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_muon_scales_by_the_sides() -> None:
    weight = nn.Parameter(torch.zeros(9, 4, dtype=torch.float64))
    weight.grad = gradients((9, 4), 1)[0]
    Muon([weight], 0.1, beta=0.0, nesterov=False, iterations=12).step()
    singular = torch.linalg.svdvals(weight.data)
    assert singular.max() < 0.1 * math.sqrt(9 / 4) * 1.3
    assert singular.min() > 0.1 * math.sqrt(9 / 4) * 0.6


def test_muon_leaves_embeddings_and_vectors_to_adamw() -> None:
    matrix, vector = torch.zeros(3, 3), torch.zeros(3)
    assert is_for_muon("encoder.linear.weight", matrix)
    assert not is_for_muon("shared_embedding.weight", matrix)
    assert not is_for_muon("encoder.linear.bias", vector)


def test_published_schedule() -> None:
    factors = [warmup_then_cosine(step, 100, 0.1) for step in (0, 5, 10, 55, 100, 300)]
    assert factors == pytest.approx([0.0, 0.5, 1.0, 0.5, 0.0, 0.0])


@pytest.mark.parametrize("name", BASELINES)
def test_has_the_official_functions_and_a_list_of_points(name: str) -> None:
    module = submission_of(name)
    assert all(callable(getattr(module, function)) for function in FUNCTIONS)
    path = Path(module.__file__ or "").with_name("tuning_search_space.json")
    points = json.loads(path.read_text())
    assert 1 <= len(points) <= 5
    assert len({tuple(point) for point in points}) == 1


@pytest.mark.parametrize("name", BASELINES)
def test_optimizers_resume_exactly(name: str) -> None:
    """Two steps, saved and loaded in between, equal two steps in one go."""
    module = submission_of(name)
    workload = SimpleNamespace(step_hint=10)

    def fresh() -> tuple[nn.Module, dict[str, torch.optim.Optimizer]]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        return model, module.init_optimizer_state(workload, model, None, None, None)

    def step(model: nn.Module, optimizers: dict[str, torch.optim.Optimizer]) -> None:
        for optimizer in optimizers.values():
            if isinstance(optimizer, ScheduleFreeAdamW):
                optimizer.extrapolate()
            optimizer.zero_grad()
        model(torch.ones(2, 4)).square().sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()

    model, optimizers = fresh()
    step(model, optimizers)
    saved = {key: copy.deepcopy(o.state_dict()) for key, o in optimizers.items()}
    resumed_model, resumed = fresh()
    resumed_model.load_state_dict(model.state_dict())
    for key, optimizer in resumed.items():
        optimizer.load_state_dict(saved[key])
    step(resumed_model, resumed)
    step(model, optimizers)
    for ours, theirs in zip(resumed_model.parameters(), model.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_short_runs_take_larger_steps_and_official_ones_the_published() -> None:
    assert short_run_factor(400) == pytest.approx(5.0)
    assert short_run_factor(10_666) == short_run_factor(195_999) == 1.0
