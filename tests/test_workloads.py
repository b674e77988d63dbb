"""Every smoke workload against the benchmark's contract."""

import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from workloads_smoke import spec
from workloads_smoke.data.queue import map_tensors
from workloads_smoke.registry import WORKLOADS, load_workload
from workloads_smoke.workloads.base import SmokeWorkload
from workloads_smoke.workloads.parameter_types import parameter_type

OFFICIAL = json.loads((Path(__file__).parent / "data" / "algoperf_param_shapes.json").read_text())
NAMES = list(WORKLOADS)
TRAIN, EVAL = spec.ForwardPassMode.TRAIN, spec.ForwardPassMode.EVAL
WITH_BATCH_NORM = ("imagenet_resnet", "librispeech_conformer", "librispeech_deepspeech")
# Officially these ignore the dropout rate.
WITHOUT_DROPOUT = ("mnist", "imagenet_resnet", "finewebedu_lm")
METRICS = {
    "mnist": ("accuracy", "SOFTMAX_CROSS_ENTROPY"),
    "wmt": ("bleu", "SOFTMAX_CROSS_ENTROPY"),
    "finewebedu_lm": ("ppl", "SOFTMAX_CROSS_ENTROPY"),
    "fastmri": ("ssim", "MEAN_ABSOLUTE_ERROR"),
    "imagenet_resnet": ("accuracy", "SOFTMAX_CROSS_ENTROPY"),
    "imagenet_vit": ("accuracy", "SOFTMAX_CROSS_ENTROPY"),
    "criteo1tb": ("loss", "SIGMOID_CROSS_ENTROPY"),
    "librispeech_conformer": ("wer", "CTC_LOSS"),
    "librispeech_deepspeech": ("wer", "CTC_LOSS"),
    "ogbg": ("mean_average_precision", "SOFTMAX_CROSS_ENTROPY"),
}


@pytest.fixture(params=NAMES)
def workload(request: pytest.FixtureRequest) -> SmokeWorkload:
    return load_workload(request.param)


def batches(workload: SmokeWorkload, split: str, size: int, seed: int = 1) -> Iterator[Any]:
    return workload._build_input_queue([seed, 2], split, "", size)


def build(workload: SmokeWorkload, seed: int = 3) -> nn.Module:
    model, state = workload.init_model_fn([seed, 4])
    assert isinstance(model, nn.Module)
    assert state is None
    return model


def tensors(value: Any) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    map_tensors(lambda tensor: found.append(tensor) or tensor, value)
    return found


def assert_same(first: Any, second: Any) -> None:
    for one, other in zip(tensors(first), tensors(second), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def training_loss(
    workload: SmokeWorkload, model: nn.Module, batch: Any, **options: Any
) -> dict[str, torch.Tensor]:
    logits, _ = workload.model_fn(model, batch, None, TRAIN, None, True, **options)
    return workload.loss_fn(batch["targets"], logits, batch.get("weights"))


def test_there_is_a_shadow_of_every_official_workload() -> None:
    assert set(NAMES) == set(OFFICIAL) - {"_source", "cifar"} | {"finewebedu_lm"}


def test_unknown_workload_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ValueError, match="unknown workload 'mnits'") as refusal:
        load_workload("mnits")
    assert all(name in str(refusal.value) for name in NAMES)


def test_facts(workload: SmokeWorkload) -> None:
    metric, loss = METRICS[workload.name]
    assert (workload.target_metric_name, workload.loss_type.name) == (metric, loss)
    assert workload.loss_type.name == OFFICIAL.get(workload.name, {"loss_type": loss})["loss_type"]
    assert 300 <= workload.step_hint <= 1500
    model = build(workload)
    assert 20_000 <= sum(p.numel() for p in model.parameters()) <= 600_000


@pytest.mark.parametrize("name", [name for name in NAMES if name in OFFICIAL])
def test_parameters_are_those_of_the_official_model(name: str) -> None:
    """Same names but for numbers, same types, same number of dimensions."""

    def without_numbers(parameter: str) -> str:
        return re.sub(r"\d+", "#", parameter)

    official = {without_numbers(p): (kind, len(s)) for p, s, kind in OFFICIAL[name]["params"]}
    workload = load_workload(name)
    build(workload)
    ours = {
        without_numbers(p): (workload.model_params_types[p].name, len(shape.shape_tuple))
        for p, shape in workload.param_shapes.items()
    }
    assert ours.items() <= official.items()
    assert {kind for kind, _ in ours.values()} == {kind for kind, _ in official.values()}


@pytest.mark.parametrize("name", [name for name in OFFICIAL if name != "_source"])
def test_parameter_types_are_the_official_ones(name: str) -> None:
    for parameter, _, kind in OFFICIAL[name]["params"]:
        assert parameter_type(parameter).name == kind, parameter


def test_unfitting_norm_and_attention_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match=r"norm\.gain"):
        parameter_type("layer.norm.gain")
    with pytest.raises(ValueError, match=r"attn\.gate"):
        parameter_type("layer.attn.gate")


def test_output_parameters_exist(workload: SmokeWorkload) -> None:
    model = build(workload)
    names = [name for name, _ in model.named_parameters() if workload.is_output_params(name)]
    assert sorted(names) == sorted(workload.output_parameters)


def test_batches_are_a_function_of_the_seed(workload: SmokeWorkload) -> None:
    first, same, other = (batches(workload, "train", 8, seed) for seed in (1, 1, 2))
    for _ in range(2):
        batch, again, different = next(first), next(same), next(other)
        assert_same(batch.values(), again.values())
    shapes = [[tensor.shape for tensor in tensors(b["inputs"])] for b in (batch, different)]
    assert shapes[0] != shapes[1] or any(
        not torch.equal(a, b)
        for a, b in zip(tensors(batch["inputs"]), tensors(different["inputs"]), strict=True)
    )


def test_models_are_a_function_of_the_seed(workload: SmokeWorkload) -> None:
    first, same, other = (dict(build(workload, seed).named_parameters()) for seed in (1, 1, 2))
    assert all(torch.equal(first[name], same[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


def test_processes_share_a_global_batch(workload: SmokeWorkload) -> None:
    """Two processes' slices of a batch, one after the other, are the batch of one process."""
    if workload.name == "ogbg":
        pytest.skip("graphs of a batch are joined: see the test of their slices")

    def queue(rank: int, world_size: int) -> Any:
        placed = load_workload(workload.name)
        object.__setattr__(placed.placement, "rank", rank)
        object.__setattr__(placed.placement, "world_size", world_size)
        return batches(placed, "train", 8)

    whole, first, second = queue(0, 1), queue(0, 2), queue(1, 2)
    for _ in range(2):
        parts = next(first), next(second)
        for name, value in next(whole).items():
            halves = zip(tensors(parts[0][name]), tensors(parts[1][name]), strict=True)
            assert_same(value, tuple(torch.cat(pair) for pair in halves))


def test_evaluation_covers_each_example_once(workload: SmokeWorkload) -> None:
    """A batch size that does not divide the split fills up with examples of weight zero."""
    count = workload.num_validation_examples
    size = count // 2 - 3
    queue = batches(workload, "validation", size)
    passed = [next(queue)["weights"] for _ in range(3)]
    valid = torch.cat([w.reshape(size, -1).float().amax(dim=1) for w in passed])
    assert len(valid) == 3 * size
    # A molecule may by chance have no label at all.
    assert valid.sum() == count if workload.name != "ogbg" else valid.sum() > 0.95 * count
    assert not valid[count:].any()


@pytest.mark.parametrize(("split", "same"), [("validation", True), ("eval_train", True)])
def test_evaluation_data_does_not_depend_on_the_seed(
    workload: SmokeWorkload, split: str, same: bool
) -> None:
    """A resumed run must evaluate on the same examples as one that ran through."""
    first, second = (next(batches(workload, split, 8, seed)) for seed in (1, 2))
    assert_same(first.values(), second.values())


def test_padding_examples_have_no_effect(workload: SmokeWorkload) -> None:
    """Neither on the loss nor on any gradient, whatever is in them."""
    model = build(workload)
    size = workload.num_validation_examples - 3
    queue = batches(workload, "validation", size)
    next(queue)
    padded = next(queue)
    keep = padded["weights"].reshape(size, -1).float().amax(dim=1) > 0
    keep[3:] = False
    if workload.name == "ogbg":
        pytest.skip("rows of a graph batch cannot be cut out; its mask is tested below")

    def gradients(batch: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.eval()
        model.zero_grad(set_to_none=True)
        # In evaluation mode, where examples do not meet in batch statistics, but with gradients.
        logits = workload._forward(model, batch, 0.0)
        loss = workload.loss_fn(batch["targets"], logits, batch["weights"])
        mean = loss["summed"] / loss["n_valid_examples"]
        mean.backward()
        return mean.detach(), [p.grad for p in model.parameters() if p.grad is not None]

    smaller = {k: map_tensors(lambda t: t[: int(keep.sum())], v) for k, v in padded.items()}
    small = {k: map_tensors(lambda t: t[:9], v) for k, v in padded.items()}
    with_padding, padded_gradients = gradients(small)
    without, plain_gradients = gradients(smaller)
    torch.testing.assert_close(with_padding, without, rtol=1e-5, atol=1e-5)
    for padded_gradient, plain in zip(padded_gradients, plain_gradients, strict=True):
        torch.testing.assert_close(padded_gradient, plain, rtol=1e-4, atol=1e-5)


def test_loss_parts_agree(workload: SmokeWorkload) -> None:
    loss = training_loss(workload, build(workload), next(batches(workload, "train", 8)))
    assert loss["summed"].ndim == 0
    assert loss["n_valid_examples"].ndim == 0
    torch.testing.assert_close(loss["per_example"].sum(), loss["summed"])
    assert loss["per_example"].shape[0] == 8
    assert loss["n_valid_examples"] > 0


def test_weights_scale_the_loss(workload: SmokeWorkload) -> None:
    model = build(workload)
    batch = next(batches(workload, "validation", 8))
    with torch.no_grad():
        logits = workload._forward(model.eval(), batch, 0.0)
    every = workload.loss_fn(batch["targets"], logits, batch["weights"])
    halved = workload.loss_fn(batch["targets"], logits, batch["weights"] * 0.5)
    torch.testing.assert_close(halved["summed"], 0.5 * every["summed"], check_dtype=False)
    absent = workload.loss_fn(batch["targets"], logits, torch.zeros_like(batch["weights"]))
    assert absent["summed"] == 0.0


def test_a_step_changes_every_parameter(workload: SmokeWorkload) -> None:
    """Two steps, since zero-initialised layers keep what is below them still at first."""
    model = build(workload)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in itertools.islice(batches(workload, "train", 8), 3):
        optimizer.zero_grad()
        loss = training_loss(workload, model, batch)
        (loss["summed"] / loss["n_valid_examples"]).backward()
        optimizer.step()
    still = [name for name, p in model.named_parameters() if torch.equal(p, before[name])]
    if workload.name == "criteo1tb":
        still = [name for name in still if not name.startswith("embedding_chunk")]
    assert still == []


def test_evaluation_mode_is_deterministic_and_keeps_statistics(workload: SmokeWorkload) -> None:
    model = build(workload)
    batch = next(batches(workload, "validation", 8))
    before = {name: b.clone() for name, b in model.named_buffers()}
    first, second = (
        workload.model_fn(model, batch, None, EVAL, None, False, dropout_rate=0.5)[0]
        for _ in range(2)
    )
    assert_same(first, second)
    assert not any(tensor.requires_grad for tensor in tensors(first))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    if workload.name == "imagenet_resnet":  # as officially, of this workload alone
        with pytest.raises(ValueError, match="update_batch_norm"):
            workload.model_fn(model, batch, None, EVAL, None, True)
    else:
        assert_same(workload.model_fn(model, batch, None, EVAL, None, True)[0], first)
        assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())


def test_training_passes_set_the_mode_where_they_do_officially(workload: SmokeWorkload) -> None:
    """On two workloads a submission that forgets ``model.train()`` trains without dropout."""
    model = build(workload)
    batch = next(batches(workload, "train", 8))
    workload.model_fn(model, batch, None, EVAL, None, False)
    assert not model.training
    workload.model_fn(model, batch, None, TRAIN, None, False)
    assert model.training == (workload.name not in ("mnist", "wmt"))


def test_dropout_rate_is_passed_through(workload: SmokeWorkload) -> None:
    model = build(workload)
    batch = next(batches(workload, "train", 8))

    def logits(rate: float | None, seed: int) -> torch.Tensor:
        # Masking of spectra draws random numbers too: the same ones for the same seed.
        torch.manual_seed(seed)
        output, _ = workload.model_fn(model, batch, None, TRAIN, None, False, dropout_rate=rate)
        return tensors(output)[0].detach()

    with torch.no_grad():
        for parameter in model.parameters():
            # Zero-initialised heads would hide the dropout before them.
            parameter.add_(0.05)
    torch.testing.assert_close(logits(0.0, 1), logits(0.0, 1))
    changed = not torch.equal(logits(0.5, 1), logits(0.0, 1))
    assert changed == (workload.name not in WITHOUT_DROPOUT)
    default = workload.facts.default_dropout_rate
    torch.testing.assert_close(logits(None, 1), logits(default, 1))


@pytest.mark.parametrize("name", WITH_BATCH_NORM)
def test_batch_statistics_follow_the_flag(name: str) -> None:
    workload = load_workload(name)
    model = build(workload)
    batch = next(batches(workload, "train", 8))

    def statistics(update: bool) -> dict[str, torch.Tensor]:
        workload.model_fn(model, batch, None, TRAIN, None, update)
        return {n: b.clone() for n, b in model.named_buffers() if "running" in n}

    initial = {n: b.clone() for n, b in model.named_buffers() if "running" in n}
    assert len(initial) >= 4
    frozen = statistics(update=False)
    assert all(torch.equal(frozen[n], initial[n]) for n in initial)
    moved = statistics(update=True)
    assert all(not torch.equal(moved[n], initial[n]) for n in initial)
    kept = statistics(update=False)
    assert all(torch.equal(kept[n], moved[n]) for n in initial)
    again = statistics(update=True)
    assert all(not torch.equal(again[n], moved[n]) for n in initial)


def test_eval_model_reports_the_target_metric(workload: SmokeWorkload) -> None:
    """On a few examples: the whole evaluation is the same code."""
    model = build(workload)
    for split in ("eval_train", "validation", "test"):
        results = workload._eval_model_on_split(split, 12, 8, model, None, [5, 6], "", 0)
        assert all(isinstance(value, float) for value in results.values())
        assert workload.target_metric_name in results
    again = workload._eval_model_on_split("validation", 12, 8, model, None, [7, 8], "")
    assert again.keys() == results.keys()


def test_the_last_batch_of_an_evaluation_counts_though_it_is_not_full(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    workload = load_workload("mnist")
    counts: list[int] = []
    monkeypatch.setattr(workload, "_measure", lambda _, rows: counts.append(len(list(rows))) or {})
    model = build(workload)
    for num_examples in (12, 16, 17):
        workload._eval_model_on_split("test", num_examples, 8, model, None, [5, 6], "", 0)
    assert counts == [2, 2, 3]


def test_perplexity_of_a_run_that_diverged_is_a_number() -> None:
    metrics = load_workload("finewebedu_lm")._final_metrics({"loss": 1e6, "tokens": 10.0})
    assert metrics == {"loss": 1e5, "ppl": float("inf")}


def test_unknown_splits_are_refused(workload: SmokeWorkload) -> None:
    with pytest.raises(ValueError, match="got 'valid'"):
        batches(workload, "valid", 8)
