"""The submission's five functions on a toy workload, as the harness would call them."""

import inspect
import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from toy_workload import Run, ToyWorkload, assert_equal, namespace

from shampoo_core import AdamConfig, DistributedShampoo, FixedRefresh, SpectralConfig
from submission import submission
from submission.construction import build_optimizer, route_options
from submission.hyperparameters import Hyperparameters
from submission.objective import mean_loss, training_mode
from submission.pace import pace
from submission.routing import Kind, routed

POINTS = json.loads((Path(__file__).parents[1] / "tuning_search_space.json").read_text())


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


@pytest.mark.parametrize(("asked", "got"), [(None, 0.25), (0.0, 0.0)])
def test_no_dropout_rate_keeps_the_models_own(asked: float | None, got: float) -> None:
    run = Run(namespace(dropout_rate=asked))
    run.train(1)
    assert run.workload.calls[0]["dropout_rate"] == got


def test_padding_does_not_count() -> None:
    """The reported loss is the mean over valid examples only."""
    run = Run(namespace(dropout_rate=0.0, label_smoothing=0.0))
    batch = next(run.workload.batches())
    valid = {key: value[:-2] for key, value in batch.items()}
    mode = training_mode(run.workload)
    run.model.train()
    run.model.bn.eval()  # type: ignore[union-attr]
    whole, _ = run.workload.model_fn(run.model, batch, None, mode, None, True, 0.0)
    alone, _ = run.workload.model_fn(run.model, valid, None, mode, None, True, 0.0)
    expected = nn.functional.cross_entropy(alone, valid["targets"])
    torch.testing.assert_close(mean_loss(run.workload, batch, whole, 0.0), expected)


def test_gradient_is_clipped_and_its_norm_reported_unclipped() -> None:
    run = Run(namespace(grad_clip=1e-3))
    optimizer, norms = run.state["optimizer"], []
    plain_step = optimizer.step

    def recording_step() -> None:
        squares = [weight.grad.square().sum() for weight in run.model.parameters()]
        norms.append(math.sqrt(float(torch.stack(squares).sum())))
        plain_step()

    optimizer.step = recording_step
    run.train(1)
    assert norms == [pytest.approx(1e-3, rel=1e-2)]
    assert run.workload.metrics_logger is not None
    assert run.workload.metrics_logger.entries[0][1]["grad_norm"] > 1e-2


@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_report_changes_no_step_whatever_the_gradients(
    monkeypatch: pytest.MonkeyPatch, bad: float
) -> None:
    """A gradient that is not finite costs its own block the step, and no other."""
    weights, norms = [], []
    for reported in (False, True):
        monkeypatch.setattr(submission, "is_due", lambda step, hint, due=reported: due)
        run = Run(namespace(grad_clip=None))
        run.train(1)
        run.model.head.bias.register_hook(lambda gradient: torch.full_like(gradient, bad))
        before = run.weights()
        run.train(1)
        weights.append(run.weights())
        changed = [not torch.equal(*pair) for pair in zip(before, weights[-1], strict=True)]
        assert changed.count(False) == 1
        norms += [entry["grad_norm"] for _, entry in run.workload.metrics_logger.entries]
    assert_equal(*weights)
    assert len(norms) == 2
    assert math.isfinite(norms[0]) and not math.isfinite(norms[1])


def test_learning_rate_follows_the_schedule() -> None:
    run = Run(namespace(warmup_factor=0.2), step_hint=20)
    schedule = pace(
        Hyperparameters.from_namespace(run.hyperparameters), run.workload.step_hint
    ).schedule
    for step in range(1, 8):
        run.train(1)
        rates = {group["lr"] for group in run.state["optimizer"].param_groups}
        assert rates == {schedule(step)}


def test_embeddings_have_a_learning_rate_of_their_own() -> None:
    run = Run(namespace(embedding_rate_factor=4.0, warmup_factor=0.2), step_hint=20)
    table = run.model.position_embedding.weight
    schedule = pace(Hyperparameters.from_namespace(run.hyperparameters), 20).schedule
    for step in range(1, 4):
        run.train(1)
        for group in run.state["optimizer"].param_groups:
            has_table = any(weight is table for weight in group["params"])
            assert group["lr"] == (4.0 if has_table else 1.0) * schedule(step)
            assert not has_table or len(group["params"]) == 1


def test_the_spectral_method_takes_whole_matrices_and_leaves_embeddings_to_adam() -> None:
    run = Run(namespace(preconditioner="spectral", max_block_size=4096), step_hint=20)
    groups = run.state["optimizer"].param_groups
    taken = {
        name: (group["preconditioner"], size)
        for name, weight in run.model.named_parameters()
        for group in groups
        for one, size in zip(group["params"], group["max_block_size"], strict=True)
        if weight is one
    }
    spectral = SpectralConfig(momentum=0.9)
    for name in ("conv.weight", "head.weight"):
        assert taken[name] == (spectral, 4096)  # also in a run of twenty steps
    for name in ("position_embedding.weight", "norm.weight", "conv.bias"):
        assert taken[name][0] == AdamConfig()


@pytest.mark.parametrize(
    ("changes", "num_groups"),
    [
        ({}, 1),
        ({"preconditioner": "shampoo"}, 1),
        ({"preconditioner": "shampoo", "inverse_exponent": 0.5, "averaging": "schedule_free"}, 1),
        ({"inverse_exponent": 0.25}, 2),
        ({"embedding_rate_factor": 4.0}, 2),
        ({"preconditioner": "spectral"}, 2),
        ({"preconditioner": "spectral", "embedding_rate_factor": 4.0}, 3),
    ],
    ids=str,
)
def test_routes_that_share_a_group_are_stepped_as_if_they_did_not(
    changes: dict[str, Any], num_groups: int
) -> None:
    """Vectors by Adam, blocks of each size by the setting's method."""
    point = Hyperparameters.from_namespace(namespace(**{"averaging": "weight_ema", **changes}))
    workload = ToyWorkload()
    models = [workload.init_model_fn()[0].double() for _ in range(2)]
    types = workload.model_params_types
    refresh = FixedRefresh(3, start=12)  # by when the factors have full rank
    together = build_optimizer(models[0], types, point, pace(point, 20), refresh)
    assert len(together.param_groups) == num_groups
    routes = routed(
        models[1],
        types,
        128,
        embeddings_apart=point.embedding_rate_factor != 1 or point.preconditioner == "spectral",
    )
    groups = [
        {
            "params": parameters,
            **route_options(route, point),
            **({"preconditioner": AdamConfig()} if route.kind is Kind.DIAGONAL else {}),
        }
        for route, parameters in routes.items()
    ]
    apart = DistributedShampoo(groups, **{**together.defaults, "max_block_size": 128})
    generator = torch.Generator().manual_seed(3)
    for _ in range(18):
        for left, right in zip(*(model.parameters() for model in models), strict=True):
            left.grad = torch.randn(left.shape, generator=generator, dtype=left.dtype)
            right.grad = left.grad.clone()
        together.step()
        apart.step()
    together.eval()
    apart.eval()
    for left, right in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(left, right, rtol=0.0, atol=1e-9)


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


def test_sparse_gradients_train_like_dense_ones() -> None:
    """One of the published entries dies on them."""
    sparse, dense = Run(), Run()
    sparse.model.position_embedding.sparse = True  # type: ignore[union-attr]
    sparse.train(3)
    dense.train(3)
    assert_equal(sparse.weights(), dense.weights())


def test_a_compiled_model_trains_like_the_plain_one() -> None:
    """The harness compiles after it has made the optimizer's parameters; names get a prefix."""
    plain, compiled = Run(namespace(max_block_size=8)), Run(namespace(max_block_size=8))
    compiled.model = torch.compile(compiled.model, backend="eager")
    compiled.state = submission.init_optimizer_state(
        compiled.workload, compiled.model, None, compiled.hyperparameters, rng=None
    )
    for run in (plain, compiled):
        run.train(3)
        run.prepare_for_eval()
        run.train(2)
    assert_equal(plain.weights(), compiled.weights())
    options = ("max_block_size", "preconditioner", "target_order")
    for mine, theirs in zip(
        plain.state["optimizer"].param_groups, compiled.state["optimizer"].param_groups, strict=True
    ):
        assert [mine[name] for name in options] == [theirs[name] for name in options]


def test_the_harness_may_or_may_not_pass_the_train_state() -> None:
    """It does where the signature names it, and older ones never did."""
    assert inspect.signature(submission.update_params).parameters["train_state"].default is None
